"""Files that are there whole or not at all: written beside, synchronised, and renamed."""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import stat
from collections.abc import Iterator

from .errors import FileError

__all__ = ["replace_file", "replaced", "sync_folder"]


@contextlib.contextmanager
def replaced(path: str) -> Iterator[io.FileIO]:
    """An empty file to write to, which takes a path's place when the block ends, and is gone if it fails.

    A link is followed: where it leads is replaced. At any time either the old file or the new one is there, whole.

    Parameters
    ----------
    path : str

    Yields
    ------
    io.FileIO
        Unbuffered: a large piece goes to the system as it is, and its handle can be written to directly.

    Raises
    ------
    FileError
        If the path is a folder or the like, or its folder does not exist.
    OSError
        If it cannot be written; nothing has changed then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with replaced(folder + "/file") as file:
    ...         _ = file.write(b"new")
    ...         during = os.path.exists(folder + "/file")
    ...     during, os.listdir(folder)
    (False, ['file'])
    """
    path = os.path.realpath(path)  # where a link leads, the link stays
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise FileError("is a folder; give the path of a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileError("is neither a file nor a folder")
    if not os.path.isdir(folder):
        raise FileError(f"the folder {folder} does not exist; make it first")
    beside = os.path.join(folder, f".tnadapt-{secrets.token_hex(8)}.tmp")
    # Mode 0o666 leaves it to the umask who may read the file, which tempfile does not.
    handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(handle, "r+b", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
        if os.path.exists(path):
            os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_folder(folder)


def replace_file(path: str, content: bytes) -> None:
    """Write a file so that at any time either the old one or the new one is there, whole; see :func:`replaced`."""
    with replaced(path) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]


def sync_folder(folder: str) -> None:
    """Make the names in a folder last, where the system lets a folder be synchronised."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
