"""Files of other libraries' adapters: reading them from disk or memory, and writing them atomically.

The same content gives the same bytes. A kill or a full disk leaves the old files, the new ones, or a folder that cannot
be loaded, but never a mixture.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from tnadapt.checkpoints.adapter_format import ENTRY
from tnadapt.checkpoints.atomic_files import (
    HAS_LOCKS,
    lock,
    names_handle,
    rename_new,
    replace_file,
    sync_folder,
    unlock,
)
from tnadapt.checkpoints.container import (
    DTYPES,
    MAX_CONFIG,
    Container,
    json_file,
    opened,
    raw_bytes,
    raw_dtype,
    strict_json,
)
from tnadapt.errors import FileError

__all__ = [
    "RECORD",
    "StoredFiles",
    "foreign_tensor_names",
    "json_text",
    "pickle_error",
    "replace_folder",
    "safetensors_content",
]

# Metadata entry for the record of a conversion.
RECORD = "tnadapt.convert"

# Subfolder of a staging folder for the files that are being replaced.
_OLD = "old"

_TAGS = {name: tag for tag, name in DTYPES.items()}


# -- Reading -------------------------------------------------------------------------------------


class StoredFiles:
    """The files of one adapter: on disk, or in memory as they will be written.

    Parameters
    ----------
    path : str
        Path of a file, or of the folder with the files.
    contents : mapping of str to bytes, optional
        Contents by file name, instead of files on disk; ``""`` is the name of an adapter's only file.
    """

    def __init__(self, path: str = "", contents: Mapping[str, bytes] | None = None) -> None:
        self._path, self._contents = path, contents

    @contextlib.contextmanager
    def open(self, name: str = "") -> Iterator[BinaryIO]:
        """Open a file for reading, by its name in the folder; without a name, the adapter's only file."""
        if self._contents is not None:
            yield io.BytesIO(self._contents[name])
            return
        path = self._place(name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError("is not a regular file")  # opening a pipe would block until somebody writes to it
        with open(path, "rb") as file:
            yield file

    @contextlib.contextmanager
    def container(self, name: str = "") -> Iterator[Container]:
        """Open a safetensors file."""
        if self._contents is not None:
            content = self._contents[name]
            yield Container(io.BufferedReader(io.BytesIO(content)), len(content))
            return
        with opened(self._place(name)) as container:
            yield container

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object strictly."""
        if self._contents is not None:
            return strict_json(self._contents[name].decode(), name)
        return json_file(self._place(name), MAX_CONFIG, name)

    def _place(self, name: str) -> str:
        return os.path.join(self._path, name) if name else self._path


def foreign_tensor_names(path: str) -> list[str] | None:
    """Return the names of the tensors in a safetensors file; None if it is an adapter file of this library.

    Raises
    ------
    FileError
        If it is not a safetensors file.
    """
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")) and os.path.exists(path):
        raise pickle_error()
    with opened(path) as container:
        return None if ENTRY in container.metadata else list(container.entries)


def pickle_error() -> FileError:
    """Return the error for a pickle."""
    return FileError(
        "the weights are a pickle, which can run arbitrary code when opened, so it was not opened. Save the adapter "
        "again with a release of PEFT or LyCORIS that writes safetensors"
    )


# -- Writing -------------------------------------------------------------------------------------


def json_text(value: Any, indent: int | None = None) -> str:
    """Format JSON with sorted keys, so that equal values give equal texts."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def safetensors_content(
    tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], metadata: Mapping[str, str]
) -> bytes:
    """Serialize tensors as a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to ndarray
    dtypes : mapping of str to str
        Float32 arrays with bfloat16 values, to be stored as "bfloat16".
    metadata : mapping of str to str
        Written in the order of its keys, which safetensors' own writer does not guarantee.
    """
    tags = {name: _TAGS[dtypes.get(name, array.dtype.name)] for name, array in tensors.items()}
    # Wide elements first, so that every tensor is aligned to the size of its elements.
    order = sorted(tensors, key=lambda name: (-raw_dtype(tags[name]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position, pieces = 0, list[bytes | memoryview]()
    for name in order:
        raw = _raw(tensors[name], tags[name])
        header[name] = {
            "dtype": tags[name],
            "shape": list(raw.shape),
            "data_offsets": [position, position + raw.nbytes],
        }
        position += raw.nbytes
        pieces.append(raw_bytes(raw) if raw.size else b"")
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def _raw(array: np.ndarray, tag: str) -> np.ndarray:
    if tag == "BF16":
        array = (array.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.asarray(array, raw_dtype(tag), order="C")


def replace_folder(path: str, files: Mapping[str, bytes], overwrite: bool = True) -> None:
    """Write files to a folder, which is created if it does not exist; the last file is moved into place last.

    A new folder appears together with all of its files. In an existing folder, the old files are replaced once all new
    ones have been written. The last of the old files is removed first: a reader during the exchange, or after a kill,
    finds it missing and so never combines new files with old ones. If the file system has locks, concurrent writers
    take turns.

    Raises
    ------
    FileError
        If the path is not a folder, or a subfolder has the name of a file; if one of the files exists and must not be
        overwritten; or if the disk fails half-way, and again while the old files are restored. In that case, the
        message says where they are.
    OSError
        If the files cannot be written. Nothing has changed then.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileError("is a file; an adapter of PEFT is a folder")
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise FileError(f"the folder {parent} does not exist; make it first")
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise FileError(f"has a folder {name}, where a file has to be; move it away")
    if not os.path.isdir(path):
        with _stage(parent) as stage:
            for name, content in files.items():
                replace_file(os.path.join(stage, name), content)
            with contextlib.suppress(FileExistsError):
                rename_new(stage, path)
                sync_folder(parent)
                return
        # Another process has created the folder in the meantime.
    with _stage(path) as stage:
        for name, content in files.items():
            replace_file(os.path.join(stage, name), content)
        with _turn(path):
            if not overwrite and any(os.path.lexists(os.path.join(path, name)) for name in files):
                raise FileError("exists; give another path, or overwrite=True (--overwrite)")
            _exchange(stage, path, tuple(files))


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Wait for other writers of a folder. Files are moved one by one, so those of two writers could mix."""
    if not HAS_LOCKS:
        yield
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            lock(handle, wait=True)
            if names_handle(folder, handle):  # otherwise the folder was renamed or deleted during the wait
                yield
                return
        finally:
            unlock(handle)
            os.close(handle)


def _exchange(stage: str, path: str, names: Sequence[str]) -> None:
    """Replace all files of a folder by those of the same names in a staging folder, or none of them."""
    old = os.path.join(stage, _OLD)
    os.mkdir(old)
    moved = list[tuple[str, str]]()

    def move(start: str, end: str) -> None:
        moved.append((start, end))  # before the rename, as an interrupt may come right after it
        os.rename(start, end)
        sync_folder(path)  # so that the renames reach the disk in order

    try:
        for name in reversed(names):
            if os.path.lexists(os.path.join(path, name)):
                move(os.path.join(path, name), os.path.join(old, name))
        for name in names:
            move(os.path.join(stage, name), os.path.join(path, name))
    except BaseException as error:
        try:
            for start, end in reversed(moved):
                if os.path.lexists(end):
                    os.rename(end, start)
            os.rmdir(old)
        except OSError as again:
            raise FileError(
                f"could not be written ({error}), nor put back as it was ({again.strerror}); "
                f"what is missing of the old files is in {old}: move it back"
            ) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _stage(folder: str) -> Iterator[str]:
    """Create a staging folder, which is removed at the end unless it was renamed or still holds old files."""
    stage = os.path.join(folder, f".tnadapt-{secrets.token_hex(8)}.tmp")
    os.mkdir(stage)
    try:
        yield stage
    finally:
        if not os.path.lexists(os.path.join(stage, _OLD)):
            shutil.rmtree(stage, ignore_errors=True)
