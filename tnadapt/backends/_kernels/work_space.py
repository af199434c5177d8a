"""Memory that repeated calls of a kernel reuse: for new memory, the system would find and zero pages in every call."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from .memory import CACHE_LINE

__all__ = ["WorkSpace"]


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
    """A vector under NumPy's array interface. Arrays that use its memory refer to it; its end returns the memory."""

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
