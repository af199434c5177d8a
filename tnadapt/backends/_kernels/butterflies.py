"""The loops of the Hadamard transform: all stages of what lies in a cache, and stages across far rows.

Stage s pairs elements ``unit * 2**s`` apart, unit being how far two neighbours along the axis are. All ways
through memory go from the lowest stage to the highest, so that each makes the same sums in the same order,
and the same bits; what is read first is multiplied by the scale as it is read.
"""

from __future__ import annotations

import numpy as np

from .compiling import compiled
from .memory import CACHE_LINE
from .simd import LOW_VECTORS, RADIX_BITS, VECTOR_BYTES, butterfly, butterfly_of_four, butterfly_of_one, low_stages

__all__ = ["blocks", "low_run", "short", "strips"]

# mypy: disable-error-code="no-untyped-def,no-untyped-call"


def low_run(itemsize: int) -> int:
    """How many elements in a row the low stages take at once."""
    return LOW_VECTORS * VECTOR_BYTES // itemsize


@compiled
def across(src, at, apart, dst, to, to_apart, bits, columns, scale, coming, ahead):
    """``2**bits`` rows of so many columns, transformed across: ``dst = H (scale * src)``.

    Meanwhile the same rows of ``coming``, ``ahead`` elements on, are asked for, unless ahead is 0.
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
    """How many of so many stages the next sweep makes: as few sweeps as can be, and none with many more rows.

    Rows a power of two apart fall on few places of a cache; sixteen of them push each other out.
    """
    sweeps = (bits + RADIX_BITS - 1) // RADIX_BITS
    return (bits + sweeps - 1) // sweeps


@compiled
def stages(x, at, unit, bits, coming, ahead):
    """Stages 0 to bits - 1 of ``unit << bits`` elements in a row, in place, over all of them again and again."""
    one = x.dtype.type(1)
    size = unit << bits
    while bits > 0:
        radix = evenly(bits)
        for i in range(at, at + size, unit << radix):
            across(x, i, unit, x, i, unit, radix, unit, one, coming, ahead if bits == radix else 0)
        unit <<= radix
        bits -= radix


@compiled
def block(src, dst, at, low, unit, bits, near, scale):
    """All stages of ``unit << bits`` elements in a row, those within each ``unit << near`` of them first.

    The first ``low`` of them within runs of ``low_run`` elements, where low is not 0.
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
    # What the next block begins with is on its way while this one is finished.
    stages(dst, at, part, bits - near, src, size)


@compiled
def blocks(src, dst, first, last, low, unit, bits, near, scale):
    """Blocks first to last - 1 of ``unit << bits`` elements each, from src to dst: which may be one array."""
    size = unit << bits
    scale = src.dtype.type(scale)
    for i in range(first * size, last * size, size):
        block(src, dst, i, low, unit, bits, near, scale)


@compiled
def short(src, dst, first, last, low, bits, scale):
    """Stages low to low + bits - 1 within runs first to last - 1; the array's last run may be a part of one."""
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
    """Stages across ``2**bits`` rows ``rows_apart`` elements from each other, from src to dst.

    Strips first to last - 1, ``width`` columns each; those of one group of rows after those of the one before. All
    sweeps but the first and the last are in a scratch buffer, whose rows do not fall on one place of a cache.
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
