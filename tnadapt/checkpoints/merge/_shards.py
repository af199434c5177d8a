"""Copies of safetensors files with some tensors changed, the rest copied by the kernel; and comparison of files."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple

import numpy as np

from tnadapt.checkpoints.atomic_files import sync_file, write_all
from tnadapt.checkpoints.checkpoint import Checkpoint
from tnadapt.checkpoints.container import Entry, appended, file_head, raw_bytes
from tnadapt.errors import FileError

# -- Bytes copied between files: in the kernel, in large pieces, or through memory -------------------------------------


# Size of one kernel call, which takes a fraction of a second: meanwhile progress cannot be reported, nor the copy
# stopped.
_KERNEL_PIECE = 1 << 26
_PIECE = 1 << 22

# Errors that mean that the kernel cannot copy between these files, as on two file systems. On macOS, ENOTSUP and
# EOPNOTSUPP are different numbers.
_CANNOT = {
    errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EBADF, errno.EISDIR,
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
    Uses ``copy_file_range`` (Linux; file systems that share blocks copy no data), else a buffer of 4 MiB.

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


def _by_hand(source: BinaryIO, start: int, target: BinaryIO, at: int, count: int) -> int:
    source.seek(start)
    content = source.read(min(count, _PIECE))
    write_at(target, at, content)
    return len(content)


_WAYS: list[Callable[[BinaryIO, int, BinaryIO, int, int], int]] = [
    *([_by_copy_file_range] if hasattr(os, "copy_file_range") else []),
    _by_hand,
]


def write_at(target: BinaryIO, at: int, content: bytes | memoryview) -> None:
    """Write all bytes at a position of an unbuffered file, in several calls if needed."""
    target.seek(at)
    write_all(target, content)


# -- Copies in which some tensors are changed --------------------------------------------------------------------------


# Only one tensor larger than this is in memory at a time.
_LARGE = 1 << 26
# Bytes copied between requests to flush them to disk.
_FLUSHED = 1 << 28

Change = Callable[[np.ndarray], np.ndarray]


class Shard(NamedTuple):
    """One file to write.

    Attributes
    ----------
    file : str
        The checkpoint's file to copy.
    out : str
        Path of the new file.
    changes : dict of str to callable
        Maps each tensor to change to a function from its old content to its new one, of the same dtype and shape. They
        are called in this order.
    added : dict of str to (str, ndarray)
        Tensors to append, with their dtypes.
    finished : callable
        Called, in another thread, when the file is complete and synchronized.
    """

    file: str
    out: str
    changes: dict[str, Change]
    added: dict[str, tuple[str, np.ndarray]]
    finished: Callable[[], None]


class Writer:
    """Writer of modified copies of a checkpoint's files.

    While the calling thread computes changed tensors, another one copies the unchanged bytes.

    Parameters
    ----------
    checkpoint : Checkpoint
        The checkpoint to copy.
    on_bytes : callable
        Called with the number of bytes of each piece that is written, by one thread at a time.

    Notes
    -----
    Memory is needed for one changed tensor and for its computation. If all are at most 64 MiB, another
    tensor may be waiting to be written, and one more may be used by ``meanwhile``. In addition to the calling thread
    there is one that copies, one that writes computed tensors, one that flushes to disk, and one for ``meanwhile``.
    """

    def __init__(self, checkpoint: Checkpoint, on_bytes: Callable[[int], None]) -> None:
        self.checkpoint, self._on_bytes = checkpoint, on_bytes
        self._lock, self._stop = threading.Lock(), threading.Event()

    def write(self, shards: Sequence[Shard], meanwhile: Callable[[], None] | None = None) -> None:
        """Write files, one after another.

        Parameters
        ----------
        shards : sequence of Shard
        meanwhile : callable, optional
            Called once, in another thread. If it raises an exception, writing stops.

        Raises
        ------
        OSError
            If a file cannot be read or written. Unfinished files are left in place.
        """
        with contextlib.ExitStack() as stack:
            copier, writer, syncer, other = (stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4))
            try:
                # Files are laid out first, so that copies and computed tensors can be written in any order.
                starts = [self._laid_out(shard) for shard in shards]
                copies = [copier.submit(self._copy, *laid_out, syncer) for laid_out in zip(shards, starts, strict=True)]
                beside = other.submit(meanwhile or (lambda: None))
                if self._largest(shards) > _LARGE:
                    beside.result()  # so that only one large tensor is in memory
                synced = []
                for shard, start, copied in zip(shards, starts, copies, strict=True):
                    self._compute(shard, start, (copied, beside), writer)
                    copied.result()
                    synced.append(syncer.submit(_synchronize, shard.out, shard.finished))
                for future in (beside, *synced):
                    future.result()
            except BaseException:
                self._stop.set()
                copier.shutdown(cancel_futures=True)
                raise

    def _largest(self, shards: Sequence[Shard]) -> int:
        entries = [self.checkpoint.entries[name] for shard in shards for name in shard.changes]
        return max((entry.stop - entry.start for entry in entries), default=0)

    def _laid_out(self, shard: Shard) -> int:
        """Create the file at its full length, write its head if that is new, and return the offset of its tensors."""
        entries, start = self.checkpoint.of_file(shard.file), self.checkpoint.data[shard.file]
        with open(shard.out, "xb", buffering=0) as target:
            if not shard.added:
                target.truncate(start + _size(entries))
                return start
            entries = appended(entries, shard.added)
            head = file_head(entries, self.checkpoint.metadata[shard.file])
            self._put(target, 0, head)
            for name, (_, array) in shard.added.items():
                self._put(target, len(head) + entries[name].start, raw_bytes(array))
            return len(head)

    def _compute(self, shard: Shard, start: int, others: Sequence[Future[None]], writer: ThreadPoolExecutor) -> None:
        entries = self.checkpoint.of_file(shard.file)
        written: Future[None] | None = None
        with open(shard.out, "r+b", buffering=0) as target:
            try:
                for name, change in shard.changes.items():
                    for other in others:
                        if other.done():
                            other.result()  # raises their errors, such as a full disk, before more is computed
                    tensor = change(self.checkpoint.array(name))
                    if written is not None:
                        written.result()
                    written = writer.submit(self._put, target, start + entries[name].start, raw_bytes(tensor))
                    if tensor.nbytes > _LARGE:
                        written.result()
                    del tensor
            finally:
                if written is not None:
                    written.result()

    def _copy(self, shard: Shard, start: int, syncer: ThreadPoolExecutor) -> None:
        """Copy everything between the changed tensors, and the head if it does not change."""
        entries, old = self.checkpoint.of_file(shard.file), self.checkpoint.data[shard.file]
        spots = sorted(entries[name][2:] for name in shard.changes)
        edges = [0 if shard.added else -old, *(edge for spot in spots for edge in spot), _size(entries)]
        dirty = 0
        flushed: Future[None] | None = None

        def on_copied(count: int) -> None:
            nonlocal dirty, flushed
            if self._stop.is_set():
                raise Stopped
            with self._lock:
                self._on_bytes(count)
            dirty += count
            if dirty >= _FLUSHED and (flushed is None or flushed.done()):
                # Flush early, so that the disk is busy from the start and little is left at the end.
                dirty, flushed = 0, syncer.submit(_synchronize, shard.out)

        with open(shard.file, "rb", buffering=0) as source, open(shard.out, "r+b", buffering=0) as target:
            for first, last in zip(edges[::2], edges[1::2], strict=True):
                copy_range(source, old + first, target, start + first, last - first, on_copied)

    def _put(self, target: BinaryIO, at: int, content: bytes | memoryview) -> None:
        write_at(target, at, content)
        with self._lock:
            self._on_bytes(len(content))


def _size(entries: Mapping[str, Entry]) -> int:
    return max((entry.stop for entry in entries.values()), default=0)


def _synchronize(path: str, finished: Callable[[], None] | None = None) -> None:
    sync_file(path)
    if finished is not None:
        finished()


# -- The bytes of two files, or of two folders, compared ---------------------------------------------------------------


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
    with open(open_regular(first), "rb") as a, open(open_regular(second), "rb") as b:
        while (piece := a.read(_PIECE)) == b.read(_PIECE):
            if not piece:
                return True
    return False
