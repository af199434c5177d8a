"""Atomic writes, renames and exchanges of files, and advisory locks on them.

A file is written under a temporary name, synchronized and renamed (:func:`atomic_write`).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import io
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from typing import BinaryIO

from tnadapt.errors import FileError

# -- Renames that never replace a file, and exchanges of two names -----------------------------------------------------

# Linux provides both in one system call, ``renameat2``, which Python does not expose. On other systems, and on file
# systems that lack it, :func:`rename_new` approximates it and :func:`exchange` returns False.


_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
# Errors of kernels, file systems and sandboxes that lack the call or the flag. On macOS, ENOTSUP and EOPNOTSUPP are
# different numbers.
_LACKING = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@functools.cache
def _system_call() -> Callable[..., int] | None:
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    renameat2.restype = ctypes.c_int
    return renameat2


def _renameat2(source: str, target: str, flags: int) -> bool:
    """Call ``renameat2``, and return False if it is not available."""
    call = _system_call()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), source, None, target)


def exchange(first: str, second: str) -> bool:
    """Exchange what two paths name, atomically: at no time is either of them missing.

    Returns
    -------
    bool
        False if the system or the file system does not support it. Nothing has changed then.

    Raises
    ------
    OSError
        If the exchange fails; FileNotFoundError if one of the paths does not exist. Nothing has changed then.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("a").write_text("1"), Path("b").write_text("2")
    >>> Path("a").read_text() if exchange("a", "b") else "2"
    '2'
    """
    return _renameat2(first, second, _EXCHANGE)


def rename_new(source: str, target: str) -> None:
    """Rename a file or a folder to a free name.

    Raises
    ------
    FileExistsError
        If the name exists, even as a dangling link. Nothing has changed then.
    OSError
        If the rename fails otherwise.

    Notes
    -----
    Without ``renameat2``, a file is linked under its new name and unlinked under its old one, and a folder is renamed,
    which fails on every system if the target is a folder with files in it. Only on a file system without hard links
    (FAT) is there a gap between the check that a file's name is free and the rename.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = Path("a").write_text("1"), Path("b").write_text("2")
    >>> rename_new("a", "b")
    Traceback (most recent call last):
        ...
    FileExistsError: [Errno 17] File exists: 'a' -> 'b'
    """
    if _renameat2(source, target, _NOREPLACE):
        return
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), source, None, target)
    if os.path.lexists(target):
        raise taken
    if os.path.isdir(source) and not os.path.islink(source):
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise taken from error
            raise
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LINKS:
            raise
        os.rename(source, target)
    else:
        os.unlink(source)


# -- Writes: under a temporary name, synchronized and renamed ----------------------------------------------------------


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
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise
    sync_folder(folder)


def _place(source: str, path: str, overwrite: bool) -> None:
    if not overwrite:
        try:
            return rename_new(source, path)
        except FileExistsError:
            raise FileError("exists; give another path, or overwrite=True (--overwrite)") from None
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):  # it has been created meanwhile
            raise FileError("is neither a file nor a folder")
        _set_mode(source, stat.S_IMODE(mode))
    return os.replace(source, path)


def _set_mode(path: str, mode: int) -> None:
    """Set a file's mode, except on file systems without modes of their own, such as FAT, SMB and some FUSE ones."""
    if stat.S_IMODE(os.lstat(path).st_mode) == mode:
        return
    try:
        os.chmod(path, mode)
    except OSError as error:
        if not isinstance(error, PermissionError) and error.errno not in _NO_MODES:
            raise


def replace_file(path: str, content: bytes, overwrite: bool = True) -> None:
    """Write a file such that the path always names the old or the new one, complete; see :func:`atomic_write`."""
    with atomic_write(path, overwrite) as file:
        write_all(file, content)


def write_all(file: BinaryIO, content: bytes | memoryview) -> None:
    """Write all bytes to an unbuffered file, in several calls if needed."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def sync_file(path: str) -> None:
    """Flush the content of a file to disk."""
    with open(path, "r+b", buffering=0) as file:
        os.fsync(file.fileno())


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


# -- Advisory locks on open files, released when the process that holds them ends --------------------------------------


try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True


def lock(handle: int, wait: bool = False) -> bool:
    """Lock an open file or folder exclusively.

    Separately opened handles exclude each other, even within one process.

    Parameters
    ----------
    handle : int
        A file descriptor.
    wait : bool
        Whether to wait until the lock is free.

    Returns
    -------
    bool
        False if another handle holds the lock. True if it was acquired, and also if the system or the file system has
        no locks: callers must not rely on the lock alone.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     again = os.open(file.name, os.O_RDWR)
    ...     lock(file.fileno()), lock(again)
    ...     os.close(again)
    (True, False)
    """
    if not HAS_LOCKS:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)  # other errors mean that the file system has no locks
    return True


def unlock(handle: int) -> None:
    """Release the lock now. Closing the handle would not do so while a forked child still has a copy of it."""
    if HAS_LOCKS:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)


def names_handle(path: str, handle: int) -> bool:
    """Return whether a path still names the file of a handle: it may have been deleted and recreated."""
    try:
        named = os.lstat(path)
    except OSError:
        return False
    opened = os.fstat(handle)
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
