"""Files of other libraries: the same content gives the same bytes, and what is there is whole at any time."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.atomic_files import replace_file, sync_folder
from tnadapt.checkpoints.container import DTYPES, raw_bytes, raw_dtype
from tnadapt.checkpoints.file_locks import HAS_LOCKS, lock, names_handle, unlock
from tnadapt.checkpoints.renaming import rename_new
from tnadapt.errors import FileError

__all__ = ["content_of", "json_text", "replace_folder"]

# In a stage: the files whose places others take.
_OLD = "old"

_TAGS = {name: tag for tag, name in DTYPES.items()}


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON with sorted keys: one text for one value."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def content_of(tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to ndarray
    dtypes : mapping of str to str
        Which float32 arrays are to be stored as "bfloat16", whose numbers they have.
    metadata : mapping of str to str
        Written in the order of its keys, which safetensors' own writer does not promise.
    """
    tags = {name: _TAGS[dtypes.get(name, array.dtype.name)] for name, array in tensors.items()}
    # Wide elements first, so that every tensor lies at a multiple of its element's size.
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
    """Write files to a folder, which is made if it is not there; in it, the last of them comes last.

    A new folder appears with all of them. In one that is there, they take the places of the old ones when all have been
    written: the last of the old ones goes first, so that who reads the folder meanwhile, or after a kill, misses it and
    does not take new beside old. Several writers take turns, where the file system has locks.

    Raises
    ------
    FileError
        If the path is no folder, or has a folder by the name of a file; if one of the files is there, and must not be
        overwritten; or if the disk fails half-way, and again as the old files are put back: it says where they are.
    OSError
        If they cannot be written; nothing has changed then.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileError("is a file; an adapter of PEFT is a folder")
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise FileError(f"the folder {parent} does not exist; make it first")
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise FileError(f"has a folder {name}, where a file is to be; move it away")
    if not os.path.isdir(path):
        with _beside(parent) as stage:
            for name, content in files.items():
                replace_file(os.path.join(stage, name), content)
            with contextlib.suppress(FileExistsError):
                rename_new(stage, path)
                sync_folder(parent)
                return
        # Another process made it meanwhile.
    with _beside(path) as stage:
        for name, content in files.items():
            replace_file(os.path.join(stage, name), content)
        with _turn(path):
            if not overwrite and any(os.path.lexists(os.path.join(path, name)) for name in files):
                raise FileError("exists; give another path, or overwrite=True (--force)")
            _exchange(stage, path, tuple(files))


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Wait for other writers of a folder: files of two of them, one put in place after another, would mix."""
    if not HAS_LOCKS:
        yield
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            lock(handle, wait=True)
            if names_handle(folder, handle):  # else it was renamed or deleted while this one waited
                yield
                return
        finally:
            unlock(handle)
            os.close(handle)


def _exchange(stage: str, path: str, names: Sequence[str]) -> None:
    """Files of a stage for those of the same names in a folder, or neither."""
    old = os.path.join(stage, _OLD)
    os.mkdir(old)
    moved = list[tuple[str, str]]()

    def move(start: str, end: str) -> None:
        moved.append((start, end))  # first: an interrupt may come right after
        os.rename(start, end)
        sync_folder(path)  # one after another on the disk, too

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
def _beside(folder: str) -> Iterator[str]:
    """A new folder in this one, which is gone in the end unless it was renamed, or has what was there before."""
    stage = os.path.join(folder, f".tnadapt-{secrets.token_hex(8)}.tmp")
    os.mkdir(stage)
    try:
        yield stage
    finally:
        if not os.path.lexists(os.path.join(stage, _OLD)):
            shutil.rmtree(stage, ignore_errors=True)
