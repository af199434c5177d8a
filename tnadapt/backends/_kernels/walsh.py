"""The Hadamard transform along one axis of an array: how it goes through memory, and who does which part.

The lowest stages pair neighbours, the highest what is far apart. So the first pass over memory takes blocks that
fit in the second cache, and makes all stages that stay within each: the lowest of them part by part, a part being
what fits in the first cache. Each further pass makes up to eight stages across rows that lie far apart, a strip of
columns at a time. 2**26 numbers take two passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .butterflies import blocks, low_run, short, strips
from .memory import aligned_empty, cache_sizes, readable
from .simd import RADIX_BITS
from .thread_pool import share, thread_count

__all__ = ["transform", "transform_into"]

# Stages across rows in one pass: strips of 256 rows are in the cache at once.
_STRIP_BITS = 8
# Of a strip's row, at least and at most; as much as half the second cache has room for.
_STRIP_BYTES = 256, 4096
# From here on another thread gains more than it costs to wake it, and to move to its cache what is in this one's.
_SHARED_BYTES = 1 << 21
# Pieces of work for each thread: one that is late leaves some to the others.
_PIECES = 4


def transform(x: np.ndarray, scale: float, axis: int = -1) -> np.ndarray:
    """``scale * H x`` along one axis, in a new array; the entries of H are 1 and -1.

    Parameters
    ----------
    x : numpy.ndarray, float32 or float64
        Any strides, alignment and flags; the axis is a power of two long.
    scale : float
        What the transform is multiplied by.
    axis : int
        Which axis.

    Returns
    -------
    numpy.ndarray, the shape of x
        Rounded as butterflies of ``scale * x``, the nearest pairs first, are rounded, however many threads took
        part. A large one begins with a cache line. Strides are in the order of x's where x is one piece of memory.
    """
    flags = x.flags
    if flags.c_contiguous and flags.aligned:
        result = aligned_empty(x.shape, x.dtype)
        transform_into(x, result, scale, axis)
        return result
    axis %= x.ndim
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    turned = x.transpose(order)
    if turned.flags.c_contiguous and flags.aligned:
        result = transform(turned, scale, order.index(axis))
        return result.transpose([order.index(i) for i in range(x.ndim)])
    result = aligned_empty(x.shape, x.dtype)
    np.copyto(result, x)
    transform_into(result, result, scale, axis)
    return result


def transform_into(src: np.ndarray, dst: np.ndarray, scale: float, axis: int = -1) -> None:
    """``dst[...] = H (scale * src)`` along one axis; both are in C order and aligned, and may be the same array.

    Parameters
    ----------
    src, dst : numpy.ndarray, float32 or float64
        Of one shape and dtype; either the same memory or none in common.
    scale : float
        What the transform is multiplied by.
    axis : int
        Which axis; a power of two long.
    """
    if src.size == 0:
        return
    if src.shape[axis] == 1:
        np.multiply(src, src.dtype.type(scale), out=dst)
        return
    threads = thread_count() if src.nbytes >= _SHARED_BYTES else 1
    passes = _planned(src.shape, axis, src.itemsize, threads)
    src = readable(src)
    if src.ndim > 1:
        src, dst = src.reshape(-1), dst.reshape(-1)
    for kernel, count, how in passes:
        _share(threads, count, kernel, src, dst, *how, scale)
        src, scale = dst, 1.0


def _share(
    threads: int, count: int, kernel: Callable[..., object], src: np.ndarray, dst: np.ndarray, *how: float
) -> None:
    """The kernel over 0 to count - 1, in one piece or in several at once."""
    if threads == 1 or count < 2:
        kernel(src, dst, 0, count, *how)
        return
    pieces = min(count, threads * _PIECES)

    def piece(i: int) -> None:
        kernel(src, dst, count * i // pieces, count * (i + 1) // pieces, *how)

    share(piece, pieces, threads)


class _Pass(NamedTuple):
    """One pass over memory: a kernel over so many blocks or strips, and what it is told besides."""

    kernel: Callable[..., object]
    pieces: int
    how: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _planned(shape: tuple[int, ...], axis: int, itemsize: int, threads: int) -> tuple[_Pass, ...]:
    """The passes of a transform along an axis, for an array that is not empty."""
    bits = shape[axis].bit_length() - 1
    unit = math.prod(shape[axis % len(shape) + 1 :])  # how far neighbours on the axis are apart
    outer = math.prod(shape) // (unit << bits)
    run = low_run(itemsize)
    low = min(bits, (run // unit).bit_length() - 1) if unit < run and unit & (unit - 1) == 0 else 0
    if low and unit << bits < run:
        return (_Pass(short, -(-math.prod(shape) // run), (unit.bit_length() - 1, bits)),)
    # What is read besides, and what comes next, is in the caches, too.
    first, second = cache_sizes()
    near, within = (
        min(bits, max((size // itemsize // unit).bit_length() - 1, 0)) for size in (first * 3 // 4, second // 2)
    )
    # A block for every thread.
    within = max(low, min(within, bits - (-(-threads // outer) - 1).bit_length()))
    if -(-bits // _STRIP_BITS) <= -(-(bits - within) // _STRIP_BITS) and not low:
        within = 0  # strips alone take no more passes
    near = min(within, max(near, low, RADIX_BITS))
    passes = [_Pass(blocks, outer << (bits - within), (low, unit, within, near))] if within else []
    least, most = _STRIP_BYTES
    strip_passes, done = -(-(bits - within) // _STRIP_BITS), within
    for i in range(strip_passes):
        apart, step = unit << done, (bits - within + i) // strip_passes
        done += step
        width = min(apart, max(least, min(most, second // 2 >> step)) // itemsize)
        passes.append(_Pass(strips, (outer << (bits - done)) * -(-apart // width), (apart, step, width)))
    return tuple(passes)
