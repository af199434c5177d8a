"""Advisory locks on open files, released when the process that holds them ends."""

from __future__ import annotations

import contextlib
import os

try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

__all__ = ["HAS_LOCKS", "lock", "names_handle", "unlock"]


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
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
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
