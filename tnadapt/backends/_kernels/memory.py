"""Alignment of arrays, and the sizes of the processor's caches."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CACHE_LINE", "SMALL", "aligned_empty", "cache_sizes", "readable"]

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
    found = {1: 32 << 10, 2: 512 << 10}
    for index in _CACHES.glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and int(level) in found and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return found[1], found[2]
