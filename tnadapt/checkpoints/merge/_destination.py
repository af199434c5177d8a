"""Destination of a merged checkpoint: its path, what it may replace, and which other files of the base are copied."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Any, NamedTuple

from tnadapt.checkpoints.checkpoint import SUFFIX, Checkpoint, open_checkpoint
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError

# -- Which files belong to a checkpoint: those in its folder, and the targets of links inside --------------------------

# In a Hugging Face cache, files are links: ``REPOSITORY/snapshots/REVISION/config.json`` points to
# ``REPOSITORY/blobs/HASH``. The folder of blobs therefore counts as part of every checkpoint below ``snapshots``.


class Belonging:
    """The files that belong to the checkpoint in a folder.

    Parameters
    ----------
    folder : str

    Examples
    --------
    >>> from pathlib import Path
    >>> Path("model").mkdir(exist_ok=True)
    >>> _ = Path("model/config.json").write_text("{}")
    >>> os.symlink(os.path.abspath("/etc/passwd"), "model/notes.txt")
    >>> belonging = Belonging("model")
    >>> belonging.file("config.json") == os.path.realpath("model/config.json"), belonging.file("notes.txt")
    (True, None)
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.realpath(folder)
        self._roots = [self.folder, *_blobs(self.folder)]

    def leaves(self, name: str) -> str | None:
        """Return the target of a name in the folder if it is outside of the checkpoint; None if it is inside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        return None if any(_inside(path, root) for root in self._roots) else path

    def file(self, name: str) -> str | None:
        """Return the real path of a regular file of the checkpoint; None if it is not one, or lies outside."""
        path = os.path.realpath(os.path.join(self.folder, name))
        # Also for a dangling or circular link: there is no file.
        regular = os.path.isfile(path) and not os.path.islink(path)
        return path if regular and self.leaves(name) is None else None


def _blobs(folder: str) -> list[str]:
    """Return the folder of blobs if a folder is part of a Hugging Face cache."""
    while (parent := os.path.dirname(folder)) != folder:
        # In REPOSITORY/snapshots/REVISION, the parent of REVISION is named snapshots.
        if os.path.basename(parent) == "snapshots":
            blobs = os.path.join(os.path.dirname(parent), "blobs")
            if os.path.isdir(blobs) and not os.path.islink(blobs):
                return [blobs]
        folder = parent
    return []


# -- The destination, and the other files ------------------------------------------------------------------------------


# Suffixes of weights in other formats, which lack the update: copying them next to the merged ones would be misleading.
_WEIGHTS = (
    SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".hdf5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml",
    ".tflite", ".npz", ".npy", ".mlmodel", ".pb", ".engine", ".index.json",
)  # fmt: skip


class Destination(NamedTuple):
    """The destination of a merge.

    Attributes
    ----------
    path : str
        Absolute path with links resolved.
    name : str or None
        Name of the output file if it is a single one; None if the output is a folder.
    others : tuple of str
        Files of the base's folder that are copied, relative to it.
    left_out : tuple of str
        Files that are not copied: weights in other formats, hidden folders, links to folders or out of the checkpoint,
        and everything that is not a regular file (pipes, devices, sockets).
    """

    path: str
    name: str | None
    others: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def need_free(self, overwrite: bool) -> None:
        """Raise FileError unless the path is free, or names a checkpoint that may be overwritten."""
        if not os.path.lexists(self.path):
            return
        if not overwrite:
            raise FileError("already exists: choose another name, or overwrite=True (--overwrite)")
        if (why := self.refusal(self.path)) is not None:
            raise FileError(why)

    def refusal(self, path: str) -> str | None:
        """Return why the content of a path must not be replaced by the result; None if it may, or the path is free."""
        for _ in range(_LOOKS):
            before = _state(path)
            if before is None:
                return None
            if self.name is not None:
                return None if stat.S_ISREG(before.st_mode) else "is not a regular file, and is not overwritten"
            if stat.S_ISDIR(before.st_mode):
                with contextlib.suppress(FileError):
                    open_checkpoint(path)
                    return None
            after = _state(path)
            if after is not None and (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino):
                break  # otherwise another process has replaced it meanwhile: look again
        return "is not the folder of a checkpoint, and is not overwritten: remove it, or choose another name"


# How often to retry examining a path that other processes keep replacing.
_LOOKS = 10


def _state(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def destination(out: Any, checkpoint: Checkpoint, adapter: str | None) -> Destination:
    """Determine the destination of a merged checkpoint.

    Raises
    ------
    FileError
        If the destination is the base or the adapter, lies in the base's folder or contains it; is not of the base's
        kind (a file or a folder); is a pipe, a device or a socket; or is in a folder that does not exist. Also if a
        file of the base's weights is a link that leaves the checkpoint (:class:`Belonging`).
    """
    out = path_of(out)
    path = os.path.realpath(out)
    single = checkpoint.index is None and not os.path.isdir(checkpoint.path)

    def refuse(why: str) -> FileError:
        return FileError(f"{out}: {why}")

    _check_links(checkpoint)
    inputs = [os.path.realpath(file) for file in (*checkpoint.files, adapter) if file is not None]
    if path in inputs:
        raise refuse("is an input of the merge: give another name for the output")
    state = _state(path)
    file_type = 0 if state is None else stat.S_IFMT(state.st_mode)
    if file_type not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise refuse("is neither a file nor a folder but a pipe, a device or the like, and is never replaced")
    if single:
        if file_type == stat.S_IFDIR:
            raise refuse("is a folder, and the base is one file: give the path of a file in it")
        if not path.endswith(SUFFIX):
            raise refuse(f"must end with {SUFFIX}, as the base is one file")
    else:
        folder = os.path.realpath(checkpoint.folder)
        if path == folder:
            raise refuse("is the folder of the base: give another folder for the output")
        if _inside(path, folder):
            raise refuse("is in the folder of the base: give a place outside of it")
        if any(_inside(source, path) for source in (*inputs, folder)):
            raise refuse("contains an input of the merge: give another place")
        if path.endswith((SUFFIX, ".json")):
            raise refuse("would be a folder, as the base is one: give the name of a folder")
        if file_type == stat.S_IFREG:
            raise refuse("is a file, and the base is a folder: give the name of a folder")
    if not os.path.isdir(os.path.dirname(path)):
        raise refuse(f"the folder {os.path.dirname(path)} does not exist; make it first")
    if single:
        return Destination(path, os.path.basename(checkpoint.files[0]))
    return Destination(path, None, *_others(checkpoint))


def _inside(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))


def _others(checkpoint: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the other files of the base's folder: those to copy, and those to omit."""
    belonging = Belonging(checkpoint.folder)
    model_files = {os.path.basename(file) for file in (*checkpoint.files, checkpoint.index) if file is not None}
    copied: list[str] = []
    left: list[str] = []
    for root, folders, files in os.walk(checkpoint.folder):
        here = os.path.relpath(root, checkpoint.folder)
        for name in sorted(folders):
            path = os.path.normpath(os.path.join(here, name))
            # A link may lead anywhere, even back to its own folder.
            if name.startswith(".") or os.path.islink(os.path.join(root, name)):
                folders.remove(name)
                left.append(path + os.sep)
        for name in sorted(files):
            path = os.path.normpath(os.path.join(here, name))
            if here == "." and name in model_files:
                continue
            usable = not name.endswith(_WEIGHTS) and belonging.file(path) is not None
            (copied if usable else left).append(path)
    return tuple(copied), tuple(left)


def _check_links(checkpoint: Checkpoint) -> None:
    """Raise FileError if weights would be read from outside the checkpoint, which the user did not ask for."""
    belonging = Belonging(checkpoint.folder)
    model_path = os.path.abspath(checkpoint.path)
    hint = ", or give the path of that one file" if checkpoint.index is None else ""
    for path in filter(None, (*checkpoint.files, checkpoint.index)):
        name = os.path.basename(path)
        if path != model_path and (outside := belonging.leaves(name)) is not None:
            raise FileError(
                f"{checkpoint.path}: {name} is a link to {outside}, which is outside of the checkpoint, and is not "
                f"followed: copy the folder with its links followed (cp -rL){hint}"
            )
