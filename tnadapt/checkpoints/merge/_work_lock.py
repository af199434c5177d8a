"""The lock on a folder of unfinished work, which its holders create and delete."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
from collections.abc import Iterator

from tnadapt.errors import FileError

from ..file_locks import HAS_LOCKS, lock, names_handle, unlock

__all__ = ["LOCK", "RUN", "TRASH", "work_lock"]

#: Name of the lock file, and prefixes of the other names in the folder.
LOCK, RUN, TRASH = "lock", "run-", "trash-"

_OWN = re.compile(rf"{LOCK}|(?:{RUN}|{TRASH})[0-9a-f]{{16}}")
_ATTEMPTS = 1000


@contextlib.contextmanager
def work_lock(root: str) -> Iterator[None]:
    """Create the folder if needed, and hold its lock during the block.

    Raises
    ------
    FileError
        If something else has that name, or another process holds the lock.
    OSError
        If the folder cannot be created.

    Examples
    --------
    >>> with work_lock("work"), work_lock("work"):
    ...     pass
    Traceback (most recent call last):
        ...
    tnadapt.errors.FileError: another process is writing work (process ... on ...): wait for it, or choose another name
    """
    if not HAS_LOCKS:
        _check_own(root)
        os.makedirs(root, exist_ok=True)
        yield
        return
    handle = _locked(root)
    try:
        yield
    finally:
        unlock(handle)
        os.close(handle)
        # On NFS, a folder cannot be removed while a deleted file in it is still open, so remove it only now. If another
        # process has started in the meantime, its lock file keeps the folder, or it creates the folder again.
        with contextlib.suppress(OSError):
            os.rmdir(root)


def _locked(root: str) -> int:
    path = os.path.join(root, LOCK)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    for _ in range(_ATTEMPTS):
        _check_own(root)
        with contextlib.suppress(FileExistsError):
            os.mkdir(root)
        try:
            handle = os.open(path, flags, 0o666)
        except FileNotFoundError:  # the last holder of the lock has just deleted the folder
            continue
        try:
            if not lock(handle):
                raise FileError(
                    f"another process is writing {root}{_holder(handle)}: wait for it, or choose another name"
                )
            if names_handle(path, handle):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        # The last holder deleted the file before releasing the lock: a lock on it protects nothing.
        os.close(handle)
    raise FileError(f"other processes are writing {root} again and again: wait for them, or choose another name")


def _check_own(root: str) -> None:
    """Raise FileError if the name is taken by anything that a merge would not have created.

    The check needs no lock: whatever other processes do at the same time, they put no other names in the folder. Names
    that begin with a dot belong to the system (.DS_Store, NFS's .nfs…) and are ignored.
    """
    try:
        own = stat.S_ISDIR(os.lstat(root).st_mode)
        own = own and all(name.startswith(".") or _OWN.fullmatch(name) for name in os.listdir(root))
        own = own and stat.S_ISREG(_mode(os.path.join(root, LOCK)))
    except FileNotFoundError:
        return
    if not own:
        raise FileError(f"{root} is in the way, and is not an unfinished merge: remove it, or choose another name")


def _mode(path: str) -> int:
    try:
        return os.lstat(path).st_mode
    except FileNotFoundError:
        return stat.S_IFREG


def _sign(handle: int) -> None:
    """Write the holder's name to the lock file, for messages only."""
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)


def _holder(handle: int) -> str:
    with contextlib.suppress(OSError):
        found = os.pread(handle, 200, 0).decode(errors="replace")
        if found and found.isprintable():
            return f" ({found})"
    return ""
