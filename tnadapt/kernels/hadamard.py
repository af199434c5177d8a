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
from .threads import share, thread_count
from .vectors import RADIX_BITS

__all__ = ["transform", "transform_into"]

# Stages across rows in one pass: strips of 256 rows are in the cache at once.
_STRIP_BITS = 2 * RADIX_BITS
_STRIP_BYTES = 4096
# From here on another thread gains more than it costs to wake it.
_SHARED_BYTES = 1 << 20
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
    shape, total = src.shape, src.size
    if total == 0:
        return
    bits = shape[axis].bit_length() - 1
    unit = 1 if axis == -1 else math.prod(shape[axis % len(shape) + 1 :])
    if bits == 0:
        np.multiply(src, src.dtype.type(scale), out=dst)
        return
    src, dst = readable(src).reshape(-1), dst.reshape(-1)
    itemsize = dst.itemsize
    threads = thread_count() if total * itemsize >= _SHARED_BYTES else 1
    outer = total // (unit << bits)
    plan = _planned(unit, bits, itemsize, -(-threads // outer))
    if plan.short:
        _share(threads, -(-total // low_run(itemsize)), short, src, dst, unit.bit_length() - 1, bits, scale)
        return
    done = plan.within
    if done:
        _share(threads, outer << (bits - done), blocks, src, dst, plan.low, unit, done, plan.near, scale)
        src, scale = dst, 1.0
    for step in plan.passes:
        apart = unit << done
        done += step
        width = min(apart, _STRIP_BYTES // itemsize)
        _share(threads, (outer << (bits - done)) * -(-apart // width), strips, src, dst, apart, step, width, scale)
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


class _Plan(NamedTuple):
    """How many of a transform's stages are made where."""

    short: bool  # all, within runs
    low: int  # the first, within runs; none where neighbours on the axis are far apart or no power of two
    near: int  # in the first cache, the low ones included
    within: int  # in a block, those included
    passes: tuple[int, ...]  # of each further pass over memory, across rows


@functools.lru_cache(maxsize=1024)
def _planned(unit: int, bits: int, itemsize: int, least_blocks: int) -> _Plan:
    """For neighbours ``unit`` elements apart; in at least so many blocks, for the threads there are."""
    run = low_run(itemsize)
    low = min(bits, (run // unit).bit_length() - 1) if unit < run and unit & (unit - 1) == 0 else 0
    if low and unit << bits < run:
        return _Plan(True, low, low, low, ())
    near, within = (
        min(bits, (elements // unit).bit_length() - 1 if elements >= unit else 0)
        for elements in (size // 2 // itemsize for size in cache_sizes())
    )
    within = max(low, min(within, bits - (least_blocks - 1).bit_length()))
    if -(-bits // _STRIP_BITS) <= -(-(bits - within) // _STRIP_BITS) and not low:
        # Strips alone take no more passes.
        within = 0
    near = min(within, max(near, low, RADIX_BITS))
    passes = -(-(bits - within) // _STRIP_BITS)
    return _Plan(False, low, near, within, tuple((bits - within + i) // passes for i in range(passes)))
