"""Copy bytes between files: in the kernel, in large pieces, or through memory if the kernel cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import BinaryIO

from tnadapt.errors import FileError

__all__ = ["Stopped", "copy_range", "write_at"]

# Size of one kernel call. It takes a fraction of a second, during which progress cannot be reported nor the copy
# stopped.
_KERNEL_PIECE = 1 << 26
_PIECE = 1 << 22

# Errors that mean that the kernel cannot copy between these files, as on two file systems. On macOS, sendfile only
# accepts sockets, and ENOTSUP and EOPNOTSUPP are different numbers.
_CANNOT = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.EISDIR,
    errno.ENOTSOCK,
}  # fmt: skip


class Stopped(Exception):  # noqa: N818  # a request, not an error
    """The work was told to stop."""


def copy_range(
    source: BinaryIO, start: int, target: BinaryIO, at: int, count: int, on_bytes: Callable[[int], None]
) -> None:
    """Copy ``count`` bytes from a position in one file to a position in another.

    Parameters
    ----------
    source, target : unbuffered binary files
        Their positions change, so each file object must be used by one thread only.
    start, at : int
        Positions to read from and to write to.
    count : int
    on_bytes : callable
        Called with the number of bytes of each copied piece. Exceptions that it raises stop the copy.

    Raises
    ------
    FileError
        If the source is too short.
    OSError
        If a file cannot be read or written.

    Notes
    -----
    Uses ``copy_file_range`` (Linux; file systems that share blocks copy no data), else ``sendfile``, else a buffer of
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
            # Some file systems return 0 instead of an error if they cannot copy.
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
    """Write all bytes at a position of an unbuffered file, in several calls if needed."""
    target.seek(at)
    rest = memoryview(content)
    while rest:
        rest = rest[target.write(rest) :]
