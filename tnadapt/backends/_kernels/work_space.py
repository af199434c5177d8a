"""Resources of the kernels: aligned memory that calls reuse, the sizes of caches, and a thread pool.

New memory would cost page faults and zeroing in every call.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# -- Alignment of arrays, and the sizes of the processor's caches ------------------------------------------------------


CACHE_LINE = 64
#: Smaller arrays, in bytes, are not aligned.
SMALL = 1 << 14
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an uninitialized array that begins at a cache line; NumPy's own arrays begin 16 bytes after one.

    A SIMD vector as wide as a cache line touches two lines if it is not aligned, which takes up to 1.7 times as long.
    Small arrays are not aligned: that would take longer than it saves.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALL:
        return np.empty(shape, dtype)
    buffer = np.empty(nbytes + CACHE_LINE, np.uint8)
    start = -buffer.__array_interface__["data"][0] % CACHE_LINE
    return np.ndarray(shape, dtype, buffer, start)


def readable(x: np.ndarray) -> np.ndarray:
    """Return x, or a writeable view of it: numba would compile a kernel again for the type of read-only arrays."""
    return x if x.flags.writeable else np.asarray(_Writeable(x))


class _Writeable:
    """The memory of an array under NumPy's array interface, without the read-only flag."""

    def __init__(self, x: np.ndarray) -> None:
        interface = x.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self.kept = x


@functools.cache
def cache_sizes() -> tuple[int, int]:
    """Return the bytes of a core's level 1 data and level 2 caches; those of a small core if they are unknown."""
    sizes = {1: 32 << 10, 2: 512 << 10}
    for index in _CACHES.glob("index*"):
        try:
            level, content, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if content != "Instruction" and int(level) in sizes and size.endswith("K"):
                sizes[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return sizes[1], sizes[2]


# -- Memory that repeated calls reuse ----------------------------------------------------------------------------------


class WorkSpace:
    """Float32 vectors that are lent as arrays. One comes back when no array uses its memory any more.

    At most one returned vector is kept for the next call; further ones are given back to the system. The kept one is
    freed with the work space, or by :meth:`clear`. Threads may share a work space: a vector is lent to one call at a
    time.

    Examples
    --------
    >>> space = WorkSpace()
    >>> x = space.vector(1 << 10)
    >>> address = x.ctypes.data
    >>> del x
    >>> space.nbytes, space.vector(1 << 10).ctypes.data == address
    (4160, True)
    """

    def __init__(self) -> None:
        # Operations of a deque are atomic. A lock could deadlock, as vectors may come back in a garbage collection that
        # starts while this thread holds it. A deque that is full discards an element for each one that is added.
        self._idle: deque[np.ndarray] = deque(maxlen=1)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for the next call."""
        return sum(memory.nbytes for memory in tuple(self._idle))

    def vector(self, size: int) -> np.ndarray:
        """Return an uninitialized vector of that size, which begins at a cache line."""
        needed = 4 * size + CACHE_LINE
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if memory.nbytes != needed:
            memory = np.empty(needed, np.uint8)
        return np.asarray(_Lent(memory, size, self._idle))

    def clear(self) -> None:
        """Free the vector that is kept; those that are lent come back as before."""
        self._idle.clear()


class _Lent:
    """A vector under NumPy's array interface that returns its memory once no array uses it any more."""

    def __init__(self, memory: np.ndarray, size: int, idle: deque[np.ndarray]) -> None:
        start = memory.__array_interface__["data"][0]
        self.memory, self.idle = memory, idle
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "shape": (size,),
            "typestr": np.dtype(np.float32).str,
            "data": (start + -start % CACHE_LINE, False),
        }

    def __del__(self) -> None:
        self.idle.append(self.memory)


# -- A pool of threads, which is effective because kernels release the interpreter lock --------------------------------


def thread_count() -> int:
    """Return how many threads a call may use: at most the number of processors available to this process.

    ``OMP_NUM_THREADS`` lowers it, as for other numerical libraries, and so does ``torch.set_num_threads`` if
    torch is loaded (a DataLoader worker has one thread).
    """
    count = _allowed()
    # Looked up, not imported: torch's setting applies only if the process uses torch.
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        count = min(count, torch.get_num_threads())
    return count


@functools.cache
def _allowed() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # This may be a list with one number per nesting level.
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(count, int(asked)) if asked.isdecimal() and int(asked) > 0 else count


def share(work: Callable[[int], object], count: int, threads: int) -> None:
    """Call ``work(0)`` to ``work(count - 1)``, in any order, on this thread and up to ``threads - 1`` others.

    The calling thread takes part, and every free thread takes the next piece. This makes progress even if no other
    thread is free, so that calls may be nested (a piece of work may call this function) and concurrent.
    """
    numbers = itertools.count()

    def pieces() -> None:
        # next() of itertools.count is atomic under the interpreter lock: no two threads get the same number.
        while (number := next(numbers)) < count:
            work(number)

    helpers = _helpers(pieces, min(threads, count) - 1)
    try:
        pieces()
    finally:
        # Cancel helpers that have not started: all pieces are taken. Waiting for them could deadlock nested calls, in
        # which every thread of the pool waits for a helper in the queue.
        waited = [helper for helper in helpers if not helper.cancel()]
        for helper in waited:
            helper.exception()
    for helper in waited:
        helper.result()  # raises a helper's exception


# Pieces of work per thread: with several, other threads take over from a slow one.
_PIECES = 4


def share_range(run: Callable[[int, int], object], count: int, threads: int) -> None:
    """Call ``run(first, last)`` for ranges that together are 0 to ``count - 1``, as :func:`share`."""
    pieces = min(count, threads * _PIECES) if threads > 1 else 1
    share(lambda i: run(count * i // pieces, count * (i + 1) // pieces), pieces, threads)


def _helpers(pieces: Callable[[], None], count: int) -> list[Future[None]]:
    futures: list[Future[None]] = []
    for _ in range(count):
        try:
            futures.append(_pool().submit(pieces))
        except RuntimeError:
            break  # the interpreter is shutting down, or no thread can be started: the caller does all the work
    return futures


@functools.cache
def _pool() -> ThreadPoolExecutor:
    # The executor starts threads on demand and ends them with the interpreter.
    return ThreadPoolExecutor(max(1, _allowed() - 1), thread_name_prefix="tnadapt")


if hasattr(os, "register_at_fork"):
    # A forked process inherits none of the threads, and may have another set of processors.
    os.register_at_fork(after_in_child=_pool.cache_clear)
    os.register_at_fork(after_in_child=_allowed.cache_clear)
