"""A model on disk: one safetensors file, or several with an index, read on demand; and the files of a GGUF model."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import FileError, ShapeError, TnadaptError, pluralize, safe_repr, summarize

from . import container
from .container import Entry

# -- The model: headers are read, and tensors on demand ----------------------------------------------------------------


SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
# What PEFT calls the weights in its folders.
_OF_PEFT = "adapter_model.safetensors"


class Checkpoint:
    """The tensors of a model on disk, as opened by :func:`open_checkpoint`.

    Attributes
    ----------
    path : str
        As it was given.
    folder : str
        The folder of its files.
    files : tuple of str
        The safetensors files, absolute.
    index : str or None
        The path of the index, if there is one.
    entries : dict of str to Entry
        The dtype, shape and position of every tensor of every file.
    shard : dict of str to str
        The file of each tensor.
    data : dict of str to int
        The position in each file where the tensors begin.
    metadata : dict of str to mapping
        The metadata strings of each file's header.
    states : dict of str to list of int
        The size, modification time and inode of each file, recorded before its header was read.

    Examples
    --------
    >>> import tempfile
    >>> from safetensors.numpy import save_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_file({"head.weight": np.ones((2, 3), np.float32)}, folder + "/model.safetensors")
    ...     model = open_checkpoint(folder)
    ...     model, model.entries["head.weight"].shape, model.array("head.weight").sum().item()
    (Checkpoint(1 tensor of 24 bytes in 1 file), (2, 3), 6.0)
    """

    def __init__(self, path: str, files: tuple[str, ...], index: str | None = None) -> None:
        self.path, self.files, self.index = path, files, index
        self.folder = os.path.dirname(files[0])
        self.entries: dict[str, Entry] = {}
        self.shard: dict[str, str] = {}
        self._of_file: dict[str, dict[str, Entry]] = {}
        self.data: dict[str, int] = {}
        self.metadata: dict[str, container.Metadata] = {}
        self.states: dict[str, list[int]] = {}
        for file in files:
            with container.file_error_context(file):
                self.states[file] = file_state(file)
            with container.file_error_context(file), container.opened(file, foreign=True) as header:
                self._of_file[file] = header.entries
                self.data[file], self.metadata[file] = header.data, header.metadata
                for name in header.entries:
                    if name in self.shard:
                        raise FileError(f"{safe_repr(name)} is also in {os.path.basename(self.shard[name])}")
                    self.shard[name] = file
            self.entries |= header.entries

    def __repr__(self) -> str:
        tensors, files = pluralize(len(self.entries), "tensor"), pluralize(len(self.files), "file")
        return f"Checkpoint({tensors} of {self.nbytes} bytes in {files})"

    @property
    def nbytes(self) -> int:
        """Total bytes of all tensors."""
        return sum(entry.stop - entry.start for entry in self.entries.values())

    def of_file(self, file: str) -> dict[str, Entry]:
        """Return the tensors of one of the files, in the order of their bytes."""
        return self._of_file[file]

    @property
    def is_adapter(self) -> bool:
        """Whether it is a file of :func:`tnadapt.save`, or the weights in a folder of PEFT, and not a model."""
        return container.ADAPTER in self.metadata[self.files[0]] or os.path.basename(self.files[0]) == _OF_PEFT

    @functools.cached_property
    def config(self) -> dict[str, Any] | None:
        """The content of ``config.json`` next to the files; None if there is none.

        Raises
        ------
        FileError
            If it is not a JSON object, or is longer than 2**24 bytes.
        """
        path = os.path.join(self.folder, "config.json")
        return _json(path, container.MAX_CONFIG) if os.path.lexists(path) else None

    @checks_arguments
    def array(self, name: str, index: int | None = None) -> np.ndarray:
        """Read a tensor, or a part of it.

        Parameters
        ----------
        name : str
            One of ``entries``.
        index : int, optional
            Along the first axis: read ``tensor[index]`` only.

        Returns
        -------
        ndarray
            Little-endian; bfloat16 as uint16 bit patterns.

        Raises
        ------
        FileError
            If NumPy lacks its dtype, such as F8_E4M3, or the file cannot be read.
        """
        if name not in self.entries:
            raise FileError(f"name must be one of the tensors, {summarize(self.entries)}; got {safe_repr(name)}")
        file, entry = self.shard[name], self.entries[name]
        if index is not None:
            index = integer("index", index, 0, (entry.shape or (0,))[0] - 1, ShapeError)
        with container.file_error_context(file), open(file, "rb") as raw:
            held = container.held_bytes(os.fstat(raw.fileno()))
            container.check_held(entry.stop - entry.start, held, safe_repr(name), raw)
            return container.read_array(raw, name, entry, self.data[file], index)


def file_state(path: str) -> list[int]:
    """Return a file's size, modification time and inode, which change when it is written to or replaced."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ino]


@checks_arguments
def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a model on disk.

    Parameters
    ----------
    path : str or PathLike
        A ``.safetensors`` file; an index, ``….safetensors.index.json``; or a folder with ``model.safetensors``, an
        index, or one ``.safetensors`` file.

    Returns
    -------
    Checkpoint

    Raises
    ------
    FileError
        If there is no such model, its files are damaged, or index and files disagree; the message says which. Pickles
        are never opened.

    Notes
    -----
    Time and memory depend on the headers only, not on the size of the tensors.

    Examples
    --------
    >>> open_checkpoint("missing")
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: missing: No such file or directory
    """
    path = container.path_of(path)
    with container.file_error_context(path):
        where = os.path.abspath(path)
        if os.path.isdir(where):
            where = os.path.join(where, _main(where))
        elif not os.path.lexists(where):
            raise container.missing_file(path)
    return _indexed(path, where) if where.endswith(".json") else Checkpoint(path, (where,))


def _main(folder: str) -> str:
    """Return the name of the model's file or index in a folder."""
    names = sorted(os.listdir(folder))
    files = [name for name in names if name.endswith(SUFFIX)]
    indices = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if f"model{SUFFIX}" in files:
        if indices:
            raise FileError(f"has both model{SUFFIX} and {', '.join(indices)}, two models: give the path of one")
        return f"model{SUFFIX}"
    for candidates in (indices, files):
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise FileError(
                f"has {_some(candidates)}, and nothing says which is the model: give the path of one"
                + ("" if indices else ", or the index that belongs to them")
            )
    if not names:
        raise FileError("is an empty folder; expected a model in safetensors files")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]
    why = (
        f": {_some(pickles)} can run arbitrary code when opened, and was not opened. Load it where you trust it, "
        "and save it by save_pretrained, which writes safetensors"
        if pickles
        else f"; it has {_some(names)}"
    )
    raise FileError(f"has no safetensors file{why}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _json(path: str, limit: int) -> dict[str, Any]:
    with container.file_error_context(path):
        return container.json_file(path, limit)


def _indexed(path: str, where: str) -> Checkpoint:
    content = _json(where, container.MAX_HEADER)
    with container.file_error_context(where):
        places = _places(content)
        folder = os.path.dirname(where)
        files = tuple(os.path.join(folder, name) for name in sorted(set(places.values())))
        missing = [os.path.basename(file) for file in files if not os.path.lexists(file)]
        if missing:
            raise FileError(f"lists files that are not there: {_some(missing)}. Was the download complete?")
    checkpoint = Checkpoint(path, files, where)
    with container.file_error_context(where):
        for name, place in places.items():
            shard = checkpoint.shard.get(name)
            if shard is None or os.path.basename(shard) != place:
                where_it_is = "none of its files" if shard is None else os.path.basename(shard)
                raise FileError(f"says that {safe_repr(name)} is in {place}; it is in {where_it_is}")
        for name in checkpoint.entries:
            if name not in places:
                raise FileError(
                    f"does not list {safe_repr(name)}, which is in {os.path.basename(checkpoint.shard[name])}"
                )
    return checkpoint


def _places(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the file name of each tensor, checked to be a plain name in the index's own folder."""
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FileError(
            f"is not an index: its weight_map must be an object of tensors and files; got {safe_repr(places)}"
        )
    for name, place in places.items():
        if not isinstance(place, str):
            raise FileError(f"says that {safe_repr(name)} is in {safe_repr(place)}; expected the name of a file")
        plain = place.endswith(SUFFIX) and not any(letter in place for letter in "/\\\0:")
        if not plain or not place.isprintable():
            raise FileError(
                f"says that {safe_repr(name)} is in {safe_repr(place)}; expected the name of a {SUFFIX} file in "
                "its own folder"
            )
    return places


# -- A model in GGUF: the file, and the folder or repository to pass to transformers -----------------------------------


def gguf_place(name: str) -> tuple[str, str]:
    """Return the folder or repository that a name of a model stands for, and its GGUF file; "" for other models.

    Parameters
    ----------
    name : str
        A GGUF file; a folder, which is a model in GGUF if it has no ``config.json`` and one such file; or a file in a
        repository on the hub, ``owner/name/file.gguf``.

    Returns
    -------
    folder, file : str

    Raises
    ------
    FileError
        If a folder without ``config.json`` has several GGUF files.

    Examples
    --------
    >>> gguf_place("owner/name/model.gguf"), gguf_place("owner/name")
    (('owner/name', 'model.gguf'), ('owner/name', ''))
    """
    path = Path(name)
    # These functions of os.path return False for a path that cannot be one, such as one that is too long.
    if os.path.isdir(name):
        files = gguf_files(path)
        if len(files) > 1:
            raise FileError(
                f"{safe_repr(name)} has {len(files)} GGUF files and no config.json: name one of them, such as "
                f"{str(path / files[0])!r}"
            )
        return name, files[0] if files else ""
    if not name.lower().endswith(".gguf"):
        return name, ""
    if os.path.isfile(name):
        return str(path.parent), path.name
    parts = name.split("/")
    remote = len(parts) > 2 and all(parts) and not name.startswith((".", "~"))
    return ("/".join(parts[:2]), "/".join(parts[2:])) if remote else (name, "")


def gguf_files(folder: Path) -> list[str]:
    """Return the names of the GGUF files in a folder without ``config.json``; none if it has one."""
    if (folder / "config.json").exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def need_gguf(file: str) -> None:
    """Raise a TnadaptError if the package that reads a GGUF file is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise TnadaptError(
            f"{safe_repr(file)} is a GGUF file, which needs the package gguf: pip install 'tnadapt[gguf]'"
        )
