"""Atomic writes: files are written under a temporary name, synchronized and renamed."""

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

# Errors of file systems that cannot synchronize folders. On macOS, ENOTSUP and EOPNOTSUPP are different numbers.
_NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EROFS}

_NO_MODES = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


@contextlib.contextmanager
def atomic_write(path: str, overwrite: bool = True) -> Iterator[io.FileIO]:
    """Open a new file that replaces the one at a path when the block ends, and is deleted if the block fails.

    Symbolic links are followed, and their target is replaced. At any time, the path names either the old file or the
    new one, complete.

    Parameters
    ----------
    path : str
    overwrite : bool
        Whether an existing file may be replaced.

    Yields
    ------
    io.FileIO
        Unbuffered: large pieces are passed to the system as they are, and its handle can be written to directly.

    Raises
    ------
    FileError
        If the path names something other than a file, or its folder does not exist; if the file exists and must not be
        overwritten, even if it was created after the block began.
    OSError
        If the file cannot be written. Nothing has changed then.

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
    path = os.path.realpath(path)  # replace the target of a link, and keep the link
    folder = os.path.dirname(path)
    if os.path.isdir(path):
        raise FileError("is a folder; give the path of a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileError("is neither a file nor a folder")
    if not os.path.isdir(folder):
        raise FileError(f"the folder {folder} does not exist; make it first")
    beside = os.path.join(folder, f".tnadapt-{secrets.token_hex(8)}.tmp")
    # Mode 0o666 lets the umask decide who may read the file; tempfile would not.
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
        if not stat.S_ISREG(mode):  # created in the meantime
            raise FileError("is neither a file nor a folder")
        _set_mode(made, stat.S_IMODE(mode))
    return os.replace(made, path)


def _set_mode(path: str, mode: int) -> None:
    """Set a file's mode, unless the file system lacks modes: FAT, SMB and some FUSE ones use one for all files."""
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
    """Write a file such that the path always names the old or the new one, complete; see :func:`atomic_write`."""
    with atomic_write(path, overwrite) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) :]


def sync_file(path: str) -> None:
    """Flush the content of a file to disk."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: str) -> None:
    """Flush the names in a folder to disk, if the system can synchronize folders.

    Raises
    ------
    OSError
        If the disk fails.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows, or a folder with write permission only
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def sync_tree(folder: str) -> None:
    """Apply :func:`sync_folder` to a folder and all folders in it, innermost first."""
    for root, _, _ in os.walk(folder, topdown=False):
        sync_folder(root)
