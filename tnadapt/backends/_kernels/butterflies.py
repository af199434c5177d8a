"""Loops of the Hadamard transform: all stages of a block in the cache, and stages across distant rows.

Stage s pairs elements ``unit * 2**s`` apart, where unit is the distance of neighbors along the axis. Every schedule
runs from the lowest stage to the highest, so that all of them compute the same sums in the same order, and with them
the same bits. The first stage applies the scale as it reads its input.
"""

from __future__ import annotations

import numpy as np

from .compiling import compiled
from .memory import CACHE_LINE
from .simd import (
    LOW_VECTORS,
    RADIX_BITS,
    VECTOR_BYTES,
    butterfly,
    butterfly_of_four,
    butterfly_of_one,
    butterfly_of_overlapping_eight,
    butterfly_of_overlapping_four,
    butterfly_of_overlapping_sixteen,
    low_stages,
)

__all__ = ["blocks", "low_run", "short", "strips", "vector"]

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
def across_short(src, at, unit, dst, to, bits, scale):
    """Transform across ``2**bits`` rows of ``unit`` elements each, one after another, fewer than a vector has."""
    if unit < 3:
        across(src, at, unit, dst, to, unit, bits, unit, scale, src, 0)
    elif unit <= 4:
        butterfly_of_overlapping_four(src, at, unit, dst, to, bits, scale)
    elif unit <= 8:
        butterfly_of_overlapping_eight(src, at, unit, dst, to, bits, scale)
    else:
        butterfly_of_overlapping_sixteen(src, at, unit, dst, to, bits, scale)


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
        elif unit < VECTOR_BYTES // src.itemsize:
            for j in range(i, i + part, unit << done):
                across_short(src, j, unit, dst, j, done, scale)
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
