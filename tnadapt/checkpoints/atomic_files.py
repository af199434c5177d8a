"""Atomic files: written beside, synchronised, and renamed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator

from tnadapt.errors import FileError

from .renaming import rename_new

__all__ = ["atomic_write", "replace_file", "sync_file", "sync_folder", "sync_tree"]

# How a file system says that it does not synchronise folders. On macOS ENOTSUP is another number than EOPNOTSUPP.
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EROFS}

_NO_MODES = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def atomic_write(path: str, overwrite: bool = True) -> Iterator[io.FileIO]:
    """An empty file to write to, which takes a path's place when the block ends, and is gone if it fails.

    A link is followed: where it leads is replaced. At any time either the old file or the new one is there, whole.

    Parameters
    ----------
    path : str
    overwrite : bool
        Whether it may take the place of a file that is there.

    Yields
    ------
    io.FileIO
        Unbuffered: a large piece goes to the system as it is, and its handle can be written to directly.

    Raises
    ------
    FileError
        If the path is a folder or the like, or its folder does not exist; if a file is there that is not to be
        overwritten, even if it was created only after the block began.
    OSError
        If it cannot be written; nothing has changed then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(folder + "/file") as file:
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
        _place(beside, path, overwrite)
    except BaseException:
        _unlink(beside)
        raise
    sync_folder(folder)


def _place(made: str, path: str, overwrite: bool) -> None:
    if not overwrite:
        try:
            return rename_new(made, path)
        except FileExistsError:
            raise FileError("exists; give another path, or overwrite=True (--overwrite)") from None
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):  # it came to be meanwhile
            raise FileError("is neither a file nor a folder")
        _set_mode(made, stat.S_IMODE(mode))
    return os.replace(made, path)


def _set_mode(path: str, mode: int) -> None:
    """Give a file a mode, where the file system has modes: FAT, SMB and some of FUSE have one for all files."""
    if stat.S_IMODE(os.lstat(path).st_mode) == mode:
        return
    try:
        os.chmod(path, mode)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in _NO_MODES:
            raise


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def replace_file(path: str, content: bytes, overwrite: bool = True) -> None:
    """Write a file so that at any time either the old one or the new one is there, whole; see :func:`replaced`."""
    with atomic_write(path, overwrite) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]


def sync_file(path: str) -> None:
    """Make the content of a file last."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: str) -> None:
    """Make the names in a folder last, where the system lets a folder be synchronised.

    Raises
    ------
    OSError
        If the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows; a folder that may be written and not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: str) -> None:
    """:func:`sync_folder` for a folder and all folders in it, the innermost first."""
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(root)
