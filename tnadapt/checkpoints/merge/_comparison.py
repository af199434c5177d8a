"""Compare the bytes of two files, or of two folders of files."""

from __future__ import annotations

import os
import stat

__all__ = ["open_regular", "same_content"]

_PIECE = 1 << 22


def open_regular(path: str) -> int:
    """Open a regular file for reading and return its descriptor, without following a link or blocking on a pipe.

    Raises
    ------
    OSError
        If the path does not exist, is a link, or is anything other than a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(f"{path} is not a regular file")
    return handle


def same_content(first: str, second: str) -> bool:
    """Return whether two paths are files with the same bytes, or folders of such files under the same names.

    All bytes are read. Links, pipes, devices and unreadable files are never equal to anything.

    Examples
    --------
    >>> from pathlib import Path
    >>> _ = [Path(name).mkdir(exist_ok=True) for name in ("x", "y")], Path("x/a").write_text("1")
    >>> same_content("x", "y"), Path("y/a").write_text("1") and same_content("x", "y")
    (False, True)
    """
    try:
        modes = os.lstat(first).st_mode, os.lstat(second).st_mode
        if all(map(stat.S_ISDIR, modes)):
            names = sorted(os.listdir(first))
            return names == sorted(os.listdir(second)) and all(
                same_content(os.path.join(first, name), os.path.join(second, name)) for name in names
            )
        return all(map(stat.S_ISREG, modes)) and _same_bytes(first, second)
    except OSError:
        return False


def _same_bytes(first: str, second: str) -> bool:
    with open(open_regular(first), "rb", buffering=0) as a, open(open_regular(second), "rb", buffering=0) as b:
        if os.fstat(a.fileno()).st_size != os.fstat(b.fileno()).st_size:
            return False
        while True:
            piece = a.read(_PIECE)
            rest = memoryview(piece)
            while rest:
                other = b.read(len(rest))
                if not other or rest[: len(other)] != other:
                    return False
                rest = rest[len(other) :]
            if not piece:
                return not b.read(1)
