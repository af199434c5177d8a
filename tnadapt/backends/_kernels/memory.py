"""Where arrays begin, and how much of them is near the processor."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CACHE_LINE", "aligned_empty", "cache_sizes", "readable"]

CACHE_LINE = 64
_SMALL = 1 << 14
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def aligned_empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray:
    """An array whose first element is the first of a cache line; NumPy's own begin 16 bytes on.

    A vector of a line's width that begins elsewhere takes two lines, and up to 1.7 times as long. Small
    arrays begin where they do: to find out takes longer than it saves.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _SMALL:
        return np.empty(shape, dtype)
    buffer = np.empty(nbytes + CACHE_LINE, np.uint8)
    start = -buffer.__array_interface__["data"][0] % CACHE_LINE
    return np.ndarray(shape, dtype, buffer, start)


def readable(x: np.ndarray) -> np.ndarray:
    """x for a kernel that reads it: one that is read-only is no type of its own, and not compiled for."""
    return x if x.flags.writeable else np.asarray(_Writeable(x))


class _Writeable:
    """The same memory under NumPy's protocol, without its flag."""

    def __init__(self, x: np.ndarray) -> None:
        interface = x.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}
        self.kept = x


@functools.cache
def cache_sizes() -> tuple[int, int]:
    """Bytes of a core's first and second cache; a small core's where the system does not say."""
    found = {1: 32 << 10, 2: 512 << 10}
    for index in _CACHES.glob("index*"):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction" and int(level) in found and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return found[1], found[2]
