"""The Hadamard transform along one axis of an array: its passes over memory, and their division among threads.

The lowest stages pair neighbors, the highest stages distant elements. The first pass over memory therefore processes
blocks that fit in the level 2 cache and does all stages within each block, the lowest of them in parts that fit in the
level 1 cache. Each further pass does up to nine stages across distant rows, one strip of columns at a time. 2**26
numbers take two passes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .butterflies import blocks, low_run, short, strips, vector
from .memory import SMALL, aligned_empty, cache_sizes, readable
from .simd import RADIX_BITS
from .thread_pool import share, thread_count

__all__ = ["planned", "transform", "transform_at_once", "transform_into"]

# Stages across rows in one pass: a strip has up to 512 rows, which must fit in the cache together.
_STRIP_BITS = 9
# A pass over strips does at least this many stages, which take no longer than one: memory is what it waits for.
_LEAST_STRIP_BITS = 3
# Minimum and maximum bytes of a strip's row; a strip fills up to half of the level 2 cache.
_STRIP_BYTES = 256, 4096
# From these sizes on, further threads gain more than it costs to wake them. Several passes also move data between the
# caches of cores.
_SHARED_BYTES, _SHARED_BYTES_OF_PASSES = 1 << 21, 1 << 24
# Sixteen rows at distances of a power of two evict each other from a level 1 cache of eight ways: a sweep over a block
# of the level 2 cache has fewer, if need be after larger parts.
_ALIASED_BITS = 4
# Pieces of work per thread: with several, other threads take over from a slow one.
_PIECES = 4


def transform(x: np.ndarray, scale: float, axis: int = -1) -> np.ndarray:
    """Compute ``scale * H x`` along one axis, in a new array; the entries of H are 1 and -1.

    Parameters
    ----------
    x : numpy.ndarray, float32 or float64
        Any strides, alignment and flags; the length of the axis is a power of two.
    scale : float
        Factor of the result.
    axis : int
        The axis to transform.

    Returns
    -------
    numpy.ndarray, the shape of x
        Rounded like butterflies of ``scale * x``, nearest pairs first, for any number of threads. A large array
        begins at a cache line. Strides are in the order of x's if x is contiguous in some order of its axes.
    """
    flags = x.flags
    if flags.c_contiguous and flags.aligned:
        # Alignment takes longer than it saves on a small array.
        result = np.empty_like(x, subok=False) if x.nbytes < SMALL else aligned_empty(x.shape, x.dtype)
        _run(x, result, scale, axis)
        return result
    axis %= x.ndim
    order = sorted(range(x.ndim), key=lambda i: -x.strides[i])
    turned = x.transpose(order)
    if turned.flags.c_contiguous and flags.aligned:
        result = transform(turned, scale, order.index(axis))
        return result.transpose([order.index(i) for i in range(x.ndim)])
    result = aligned_empty(x.shape, x.dtype)
    np.copyto(result, x)
    _run(result, result, scale, axis)
    return result


def transform_at_once(x: np.ndarray, normalize: bool) -> np.ndarray | None:
    """Compute :func:`transform` of one small vector, whose checks and schedule take longer than the kernel.

    Parameters
    ----------
    x : numpy.ndarray
        Any.
    normalize : bool
        Whether to divide by the square root of the length.

    Returns
    -------
    numpy.ndarray or None
        The bits of ``transform``; None if x is not a vector of float32 or float64 whose length is a power of two, from
        :func:`~.butterflies.low_run` elements up to half of 16 KiB.
    """
    scale = _AT_ONCE.get(x.dtype, _NO_SHAPE).get(x.shape)
    if scale is None:
        return None
    result = x.copy()  # in C order, aligned and writeable
    vector(result, scale if normalize else 1.0)  # type: ignore[no-untyped-call]
    return result


_NO_SHAPE: dict[tuple[int, ...], float] = {}
# The shapes of each dtype, with the scale of the normalized transform.
_AT_ONCE = {
    dtype: {
        (1 << bits,): 1.0 / math.sqrt(1 << bits)
        for bits in range(SMALL.bit_length())
        if low_run(dtype.itemsize) <= 1 << bits < SMALL // dtype.itemsize
    }
    for dtype in (np.dtype(np.float32), np.dtype(np.float64))
}


def transform_into(src: np.ndarray, dst: np.ndarray, scale: float, axis: int = -1) -> None:
    """Compute ``dst[...] = H (scale * src)`` along one axis; both are in C order and aligned, and may be the same.

    Parameters
    ----------
    src, dst : numpy.ndarray, float32 or float64
        Of the same shape and dtype; their memory is identical or disjoint.
    scale : float
        Factor of the result.
    axis : int
        The axis to transform; its length is a power of two.
    """
    if src is dst and src.shape in _AT_ONCE.get(src.dtype, _NO_SHAPE):
        vector(dst, scale)  # type: ignore[no-untyped-call]
        return
    _run(src, dst, scale, axis)


def _run(src: np.ndarray, dst: np.ndarray, scale: float, axis: int) -> None:
    nbytes = src.nbytes
    threads = thread_count() if nbytes >= _SHARED_BYTES else 1
    passes = planned(src.shape, axis, src.itemsize, threads)
    if threads > 1 and len(passes) > 1 and nbytes < _SHARED_BYTES_OF_PASSES:
        threads, passes = 1, planned(src.shape, axis, src.itemsize, 1)
    if not src.flags.writeable:
        src = readable(src)
    if src.ndim > 1:
        src, dst = src.reshape(-1), dst.reshape(-1)
    for kernel, count, how in passes:
        if threads == 1 or count < 2:
            kernel(src, dst, 0, count, *how, scale)
        else:
            _share(threads, count, kernel, src, dst, *how, scale)
        src, scale = dst, 1.0


def _share(
    threads: int, count: int, kernel: Callable[..., object], src: np.ndarray, dst: np.ndarray, *how: float
) -> None:
    """Run a kernel over 0 to count - 1 in parallel pieces."""
    pieces = min(count, threads * _PIECES)

    def piece(i: int) -> None:
        kernel(src, dst, count * i // pieces, count * (i + 1) // pieces, *how)

    share(piece, pieces, threads)


class _Pass(NamedTuple):
    """One pass over memory: a kernel, its number of blocks or strips, and its other arguments."""

    kernel: Callable[..., object]
    pieces: int
    how: tuple[int, ...]


def _multiply(src: np.ndarray, dst: np.ndarray, first: int, last: int, scale: float) -> None:
    """Do the transform of length 1."""
    np.multiply(src, src.dtype.type(scale), out=dst)


@functools.lru_cache(maxsize=1024)
def planned(shape: tuple[int, ...], axis: int, itemsize: int, threads: int) -> tuple[_Pass, ...]:
    """Plan the passes of a transform along an axis."""
    if 0 in shape:
        return ()
    if shape[axis] == 1:
        return (_Pass(_multiply, 1, ()),)
    bits = shape[axis].bit_length() - 1
    unit = math.prod(shape[axis % len(shape) + 1 :])  # distance of neighbors along the axis
    outer = math.prod(shape) // (unit << bits)
    run = low_run(itemsize)
    low = min(bits, (run // unit).bit_length() - 1) if unit < run and unit & (unit - 1) == 0 else 0
    if low and unit << bits < run:
        return (_Pass(short, -(-math.prod(shape) // run), (unit.bit_length() - 1, bits)),)
    # `near` stages fit in half of the level 1 cache, whose other half holds what is prefetched; with 48 KiB, more would
    # also need one more sweep. `within` stages fit in the level 2 cache: smaller blocks leave more to the strips.
    first, second = cache_sizes()
    near, within = (min(bits, max((size // itemsize // unit).bit_length() - 1, 0)) for size in (first // 2, second))
    # At least one block per thread.
    within = max(low, min(within, bits - (-(-threads // outer) - 1).bit_length()))
    if -(-bits // _STRIP_BITS) <= -(-(bits - within) // _STRIP_BITS) and not low:
        within = 0  # strips alone need no more passes than strips after blocks
    if within < bits:
        within = min(within, max(low, bits - _LEAST_STRIP_BITS))
    near = min(within, max(near, low, RADIX_BITS))
    if within - near == _ALIASED_BITS == RADIX_BITS:
        near += 1
    passes = [_Pass(blocks, outer << (bits - within), (low, unit, within, near))] if within else []
    least, most = _STRIP_BYTES
    strip_passes, done = -(-(bits - within) // _STRIP_BITS), within
    for i in range(strip_passes):
        apart, step = unit << done, (bits - within + i) // strip_passes
        done += step
        width = min(apart, max(least, min(most, second // 2 >> step)) // itemsize)
        passes.append(_Pass(strips, (outer << (bits - done)) * -(-apart // width), (apart, step, width)))
    return tuple(passes)
