"""Atomic renames that never replace anything, and atomic exchanges of two names.

Linux provides both in one system call, ``renameat2``, which Python does not expose. On other systems, and on file
systems that lack it, :func:`rename_new` approximates it and :func:`exchange` returns False.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable

__all__ = ["exchange", "rename_new"]

_AT_FDCWD, _NOREPLACE, _EXCHANGE = -100, 1, 2
# Errors of kernels, file systems and sandboxes that lack the call or the flag. On macOS, ENOTSUP and EOPNOTSUPP are
# different numbers.
_LACKING = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EXDEV}
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@functools.cache
def _system_call() -> Callable[..., int] | None:
    try:
        found = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None
    found.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    found.restype = ctypes.c_int
    return found


def _renameat2(source: str, target: str, flags: int) -> bool:
    """Call ``renameat2``; return False if it is not available."""
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
