"""Hadamard transform along one axis of an array on the CPU: its passes over memory, and their division among threads.

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

from .compiling import compiled
from .simd import (
    LOW_VECTORS,
    RADIX_BITS,
    VECTOR_BYTES,
    butterfly,
    butterfly_of_four,
    butterfly_of_one,
    low_stages,
)
from .work_space import CACHE_LINE, SMALL, aligned_empty, cache_sizes, readable, share_range, thread_count

# -- Loops: all stages of a block in the cache, and stages across distant rows -----------------------------------------

# Stage s pairs elements ``unit * 2**s`` apart, where unit is the distance of neighbors along the axis. Every schedule
# runs from the lowest stage to the highest, so all of them compute the same sums in the same order, with the same bits.
# The first stage applies the scale as it reads its input.


# mypy: disable-error-code="no-untyped-def,no-untyped-call"


def low_run(itemsize: int) -> int:
    """Return the number of contiguous elements that :func:`low_stages` processes at once."""
    return LOW_VECTORS * VECTOR_BYTES // itemsize


@compiled
def across(src, at, apart, dst, to, to_apart, bits, columns, scale, coming, ahead):
    """Transform across ``2**bits`` rows of that many columns: ``dst = H (scale * src)``.

    Also prefetches the same rows of ``coming``, ``ahead`` elements further on, unless ahead is 0.
    """
    lanes = VECTOR_BYTES // src.itemsize
    whole = columns - columns % lanes
    for j in range(0, whole, lanes):
        butterfly(src, at + j, apart, dst, to + j, to_apart, bits, scale, coming, ahead)
    few = columns - columns % 4
    for j in range(whole, few, 4):
        butterfly_of_four(src, at + j, apart, dst, to + j, to_apart, bits, scale, coming, ahead)
    for j in range(few, columns):
        butterfly_of_one(src, at + j, apart, dst, to + j, to_apart, bits, scale, coming, ahead)


@compiled
def evenly(bits):
    """Return how many of the remaining stages the next sweep does: the fewest sweeps, with stages spread evenly.

    Rows at distances of a power of two map to few sets of a cache; sixteen such rows evict each other.
    """
    sweeps = (bits + RADIX_BITS - 1) // RADIX_BITS
    return (bits + sweeps - 1) // sweeps


@compiled
def stages(x, at, unit, bits, coming, ahead):
    """Do stages 0 to bits - 1 of ``unit << bits`` contiguous elements in place, in sweeps over all of them.

    The last sweep prefetches the elements of ``coming`` that are ``ahead`` further on.
    """
    one = x.dtype.type(1)
    size = unit << bits
    while bits > 0:
        radix = evenly(bits)
        for i in range(at, at + size, unit << radix):
            across(x, i, unit, x, i, unit, radix, unit, one, coming, ahead if bits == radix else 0)
        unit <<= radix
        bits -= radix


@compiled
def block(src, dst, at, low, unit, bits, near, scale, coming):
    """Do all stages of ``unit << bits`` contiguous elements, a block that fits in the level 2 cache.

    The stages within each part of ``unit << near`` elements, which fits in the level 1 cache, come first. If low is
    not 0, :func:`low_stages` does the first ``low`` of them within runs of ``low_run`` elements. The last sweep
    prefetches the elements of src that are ``coming`` further on, unless coming is 0.
    """
    run = LOW_VECTORS * (VECTOR_BYTES // src.itemsize)
    first = 0
    while unit >> first > 1:
        first += 1
    size, part = unit << bits, unit << near
    done = low if low > 0 else evenly(near)
    for i in range(at, at + size, part):
        if low > 0:
            for j in range(i, i + part, run):
                low_stages(src, j, dst, j, first, first + low, scale, part)
        else:
            for j in range(i, i + part, unit << done):
                across(src, j, unit, dst, j, unit, done, unit, scale, src, part)
        stages(dst, i, unit << done, near - done, src, 0)
    stages(dst, at, part, bits - near, src, coming)


@compiled
def blocks(src, dst, first, last, low, unit, bits, near, scale):
    """Transform blocks first to last - 1 of ``unit << bits`` elements each, from src to dst, which may be the same."""
    size = unit << bits
    scale = src.dtype.type(scale)
    for i in range(first * size, last * size, size):
        block(src, dst, i, low, unit, bits, near, scale, size if i + size < last * size else 0)


@compiled
def vector(x, scale):
    """Transform one vector of at least ``low_run`` elements in place, which fits in the level 1 cache.

    As :func:`blocks`, whose many arguments take numba as long to unpack as a thousand numbers take to transform.
    """
    run = LOW_VECTORS * (VECTOR_BYTES // x.itemsize)
    low = 0
    while run >> low > 1:
        low += 1
    bits = low
    while x.size >> bits > 1:
        bits += 1
    block(x, x, 0, low, 1, bits, bits, x.dtype.type(scale), 0)


@compiled
def short(src, dst, first, last, low, bits, scale):
    """Do stages low to low + bits - 1 within runs first to last - 1; the array's last run may be incomplete."""
    scale = src.dtype.type(scale)
    run = LOW_VECTORS * (VECTOR_BYTES // src.itemsize)
    stop = min(last * run, src.size)
    whole = stop - stop % run
    for i in range(first * run, whole, run):
        low_stages(src, i, dst, i, low, low + bits, scale, run)
    if whole < stop:
        scratch = np.zeros(run, src.dtype)
        scratch[: stop - whole] = src[whole:stop]
        low_stages(scratch, 0, scratch, 0, low, low + bits, scale, run)
        dst[whole:stop] = scratch[: stop - whole]


@compiled
def strips(src, dst, first, last, rows_apart, bits, width, scale):
    """Do stages across ``2**bits`` rows that are ``rows_apart`` elements from each other, from src to dst.

    Processes strips first to last - 1 of ``width`` columns each; strips are numbered within one group of rows, then
    within the next. If several sweeps are needed, the first one writes to a scratch buffer and the last one reads from
    it. Its rows are a cache line longer than the strip, so that they do not map to the same sets of a cache.
    """
    scale = src.dtype.type(scale)
    one = src.dtype.type(1)
    line = CACHE_LINE // src.itemsize
    wide = width + line
    scratch = np.empty((wide << bits) + line if bits > RADIX_BITS else 0, src.dtype)
    start = (-scratch.ctypes.data % CACHE_LINE) // src.itemsize
    a_group = (rows_apart + width - 1) // width
    for strip in range(first, last):
        group, column = strip // a_group, strip % a_group * width
        columns = min(width, rows_apart - column)
        at = group * (rows_apart << bits) + column
        if bits <= RADIX_BITS:
            across(src, at, rows_apart, dst, at, rows_apart, bits, columns, scale, src, 0)
            continue
        done = evenly(bits)
        for i in range(1 << (bits - done)):
            row = at + (i << done) * rows_apart
            across(src, row, rows_apart, scratch, start + (i << done) * wide, wide, done, columns, scale, src, 0)
        while bits - done > RADIX_BITS:
            radix = evenly(bits - done)
            for i in range(1 << (bits - radix)):
                row = start + ((i >> done << (done + radix)) + (i & ((1 << done) - 1))) * wide
                across(scratch, row, wide << done, scratch, row, wide << done, radix, columns, one, src, 0)
            done += radix
        for i in range(1 << done):
            to = at + i * rows_apart
            across(
                scratch, start + i * wide, wide << done, dst, to, rows_apart << done, bits - done, columns, one, src, 0
            )


# -- The transform: its passes over memory, and their division among threads -------------------------------------------


# Stages across rows in one pass: a strip has up to 512 rows, which must fit in the cache together.
_STRIP_BITS = 9
# A pass over strips does at least this many stages, which take no longer than one: the pass is memory-bound.
_LEAST_STRIP_BITS = 3
# Minimum and maximum bytes of a strip's row; a strip fills up to half of the level 2 cache.
_STRIP_BYTES = 256, 4096
# From these sizes on, further threads gain more than it costs to wake them. Several passes also move data between the
# caches of cores.
_SHARED_BYTES, _SHARED_BYTES_OF_PASSES = 1 << 21, 1 << 24
# Sixteen rows at distances of a power of two evict each other from an 8-way level 1 cache: a sweep over a block of the
# level 2 cache has fewer, if necessary after larger parts.
_ALIASED_BITS = 4


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
    vector(result, scale if normalize else 1.0)
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
        vector(dst, scale)
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
    share_range(lambda first, last: kernel(src, dst, first, last, *how), count, threads)


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
