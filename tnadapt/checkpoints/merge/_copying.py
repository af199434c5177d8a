"""Bytes from file to file: by the kernel in large pieces where it can, through memory where it cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO

from tnadapt.errors import FileError

__all__ = ["Stopped", "copy_range", "write_at"]

# What the kernel is asked for at once: a fraction of a second, in which nothing can be said or stopped.
_KERNEL_PIECE = 1 << 26
_PIECE = 1 << 22

# What tells that the kernel cannot do it for these files: not on one file system, or not on this one. On macOS sendfile
# takes sockets only, and ENOTSUP is another number than EOPNOTSUPP.
_CANNOT = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.EISDIR,
    errno.ENOTSOCK,
}  # fmt: skip


class Stopped(Exception):  # noqa: N818  # no error: it was asked for
    """The work was told to stop."""


def copy_range(
    source: BinaryIO, start: int, target: BinaryIO, at: int, count: int, on_bytes: Callable[[int], None]
) -> None:
    """Copy ``count`` bytes from a place in one file to a place in another.

    Parameters
    ----------
    source, target : unbuffered binary files
        Their positions are moved: one thread a file object.
    start, at : int
        Where to read from, and where to write to.
    count : int
    on_bytes : callable
        Called with the number of bytes of each piece that is copied. What it raises stops the copy.

    Raises
    ------
    FileError
        If the source ends before.
    OSError
        If it cannot be read or written.

    Notes
    -----
    ``copy_file_range`` (Linux; file systems that share blocks copy nothing at all), else ``sendfile``, else a buffer of
    4 MiB.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryFile(buffering=0) as a, tempfile.TemporaryFile(buffering=0) as b:
    ...     _ = a.write(b"0123456789")
    ...     copy_range(a, 2, b, 0, 5, lambda count: None)
    ...     _ = b.seek(0)
    ...     b.read()
    b'23456'
    """
    ways = list(_WAYS)
    while count:
        try:
            done = ways[0](source, start, target, at, count)
        except OSError as error:
            if len(ways) == 1 or error.errno not in _CANNOT:
                raise
            done = 0
        if not done:
            # Some file systems say 0 where they mean that they cannot.
            if len(ways) == 1:
                raise FileError("ended before its last tensor, while it was copied")
            ways.pop(0)
            continue
        start, at, count = start + done, at + done, count - done
        on_bytes(done)


def _by_copy_file_range(source: BinaryIO, start: int, target: BinaryIO, at: int, count: int) -> int:
    return os.copy_file_range(source.fileno(), target.fileno(), min(count, _KERNEL_PIECE), start, at)


def _by_sendfile(source: BinaryIO, start: int, target: BinaryIO, at: int, count: int) -> int:
    target.seek(at)
    return os.sendfile(target.fileno(), source.fileno(), start, min(count, _KERNEL_PIECE))


def _by_hand(source: BinaryIO, start: int, target: BinaryIO, at: int, count: int) -> int:
    source.seek(start)
    found = source.read(min(count, _PIECE))
    write_at(target, at, found)
    return len(found)


_WAYS: list[Callable[[BinaryIO, int, BinaryIO, int, int], int]] = [
    *([_by_copy_file_range] if hasattr(os, "copy_file_range") else []),
    *([_by_sendfile] if hasattr(os, "sendfile") else []),
    _by_hand,
]


def write_at(target: BinaryIO, at: int, content: bytes | memoryview) -> None:
    """Write all of something at a place in an unbuffered file, which may take several goes."""
    target.seek(at)
    rest = memoryview(content)
    while rest:
        rest = rest[target.write(rest) :]
