"""Loops of a linear F: its diagonals, gathering and scattering, and sorting into buckets.

All loops work on blocks that fit in the level 2 cache, in parts that fit in the level 1 cache. ``fastfood.py``
describes how they combine to F.
"""

from __future__ import annotations

import numpy as np
from numba import int64, uint32

from .butterflies import across, block, evenly, stages, strips
from .compiling import compiled
from .feistel import fill_images
from .gathering import first_images, gather_part, round_keys, scatter_part
from .intrinsics import fetch, signed, signed_butterfly
from .memory import CACHE_LINE
from .simd import RADIX_BITS, VECTOR_BYTES

__all__ = [
    "CHUNK_BITS",
    "begin",
    "chunks_from_buckets",
    "chunks_to_buckets",
    "draw_buckets",
    "end",
    "find_starts",
    "gather",
    "number_buckets",
    "place",
    "scatter",
    "sort_locations",
    "unplace",
]

# mypy: disable-error-code="no-untyped-def,no-untyped-call"

# Images of the permutation computed at a time.
_SHORT = 1024
#: A chunk of one vector and a bucket of the other have 2**16 elements each, so that 16 bits are enough to number them.
CHUNK_BITS = 16


@compiled
def _times_diagonal(src, dst, at, count, words, numbers, scale):
    """Set ``dst = scale * diagonal * src`` for ``count`` elements from ``at`` on.

    The diagonal is signs, the bits of ``words``; or ``numbers``; or 1 if both are empty.
    """
    whole = count // 32 if at % 32 == 0 else 0
    for i in range(whole):
        signed(src, dst, at + 32 * i, words[at // 32 + i] if words.size > 0 else uint32(0), scale)
    for j in range(at + 32 * whole, at + count):
        bit = (words[j >> 5] >> uint32(j & 31)) & uint32(1) if words.size > 0 else uint32(0)
        dst[j] = src[j] * (-scale if bit else scale)
    if numbers.size > 0:
        _multiply(dst[at : at + count], numbers[at : at + count])


@compiled
def _multiply(out, factors):
    for j in range(out.size):
        out[j] *= factors[j]


@compiled
def _rest_of_block(out, at, near, within):
    """Do the remaining stages of a block in place, after those within its parts of ``1 << near`` elements."""
    stages(out, at, 1 << near, within - near, out, 0)


@compiled
def begin(first, last, x, out, low, near, within, words, numbers, scale):
    """Do the stages within blocks first to last - 1 of ``out = H (scale * diagonal * x)``, x padded with zeros."""
    one = out.dtype.type(1)
    for i in range(first << within, last << within, 1 << within):
        for part in range(i, i + (1 << within), 1 << near):
            count = max(0, min(1 << near, x.size - part))
            if count > 0:
                _times_diagonal(x, out, part, count, words, numbers, out.dtype.type(scale))
            out[part + count : part + (1 << near)] = 0
            block(out, out, part, low, 1, near, near, one, 1 << near)
        _rest_of_block(out, i, near, within)


@compiled
def _signed_strips(out, first, last, apart, bits, width, words, scale):
    """Do stages across rows in two sweeps like ``strips``; the second multiplies by the scale and the signs."""
    line, lanes = CACHE_LINE // out.itemsize, VECTOR_BYTES // out.itemsize
    wide, done, one, scale = width + line, evenly(bits), out.dtype.type(1), out.dtype.type(scale)
    scratch = np.empty((wide << bits) + line, out.dtype)
    start = (-scratch.ctypes.data % CACHE_LINE) // out.itemsize
    groups = apart // width
    for strip in range(first, last):
        at = strip // groups * (apart << bits) + strip % groups * width
        for i in range(1 << (bits - done)):
            row, to = at + (i << done) * apart, start + (i << done) * wide
            across(out, row, apart, scratch, to, wide, done, width, one, out, 0)
        for i in range(1 << done):
            row, to = start + i * wide, at + i * apart
            for j in range(0, width, lanes):
                signed_butterfly(scratch, row + j, wide << done, out, to + j, apart << done, bits - done, words, scale)


@compiled
def end(first, last, out, apart, bits, width, words, numbers, count, scale):
    """Do stages across rows like ``strips``; then multiply the first ``count`` elements by scale and diagonal.

    Elements after these may be multiplied, too.
    """
    if count > 0 and 32 * words.size >= out.size and RADIX_BITS < bits <= 2 * RADIX_BITS:
        _signed_strips(out, first, last, apart, bits, width, words, scale)
        return
    groups = apart // width
    for strip in range(first, last):
        if bits > 0:
            strips(out, out, strip, strip + 1, apart, bits, width, 1.0)
        at = strip // groups * (apart << bits) + strip % groups * width
        for row in range(at, at + (apart << bits), apart):
            some = min(width, count - row)
            if some > 0:
                _times_diagonal(out, out, row, some, words, numbers, out.dtype.type(scale))


# -- The gathered algorithm: one period of the small transform fits in the level 2 cache ---------


@compiled
def gather(first, last, table, gain, keys, bits, out, low, near, within, scale):
    """Compute blocks of ``out = H (scale * z)``, ``z[j] = gain[j] * table[image of j modulo its size]``."""
    changes = round_keys(keys)
    images = first_images(first << within, bits, changes, table)
    for i in range(first << within, last << within, 1 << within):
        for part in range(i, i + (1 << within), 1 << near):
            end = part + (1 << near)
            gather_part(part, bits, changes, images, table, gain[part:end], out[part:end])
            block(out, out, part, low, 1, near, near, out.dtype.type(scale), 1 << near)
        _rest_of_block(out, i, near, within)


@compiled
def scatter(first, last, u, gain, keys, bits, table):
    """Apply the adjoint of gathering: add elements first to last - 1 of u to the table."""
    changes = round_keys(keys)
    images = first_images(first, bits, changes, table)
    for j in range(first, last, _SHORT):
        scatter_part(j, bits, changes, images, u[j : j + _SHORT], gain[j : j + _SHORT], table)


# -- The sorted algorithm: first into the bucket of its destination, then to its position in the bucket --
#
# A chunk is sorted by bucket while it is in the cache; ``starts[chunk]`` has the start of each bucket in the sorted
# chunk, and its end. A bucket receives one run from every chunk. Numbering the received elements in order of chunks,
# ``order`` has, for each position of the bucket, the number of the element that belongs there.


@compiled
def draw_buckets(first, last, keys, bits, buckets):
    """Compute the buckets of the elements of chunks first to last - 1."""
    image, shift = np.empty(_SHORT, np.uint32), uint32(CHUNK_BITS)
    for j in range(first << CHUNK_BITS, last << CHUNK_BITS, _SHORT):
        fill_images(j, bits, keys, True, image)
        some = buckets[j : j + _SHORT]
        for k in range(_SHORT):
            some[k] = image[k] >> shift


@compiled
def find_starts(first, last, buckets, starts):
    """Compute the start of each bucket in the sorted chunks first to last - 1, and the chunks' ends."""
    for chunk in range(first, last):
        counts = np.zeros(starts.shape[1], np.int64)
        for j in range(chunk << CHUNK_BITS, (chunk + 1) << CHUNK_BITS):
            counts[int64(buckets[j])] += 1
        total = 0
        for bucket in range(counts.size):
            starts[chunk, bucket] = total
            total += counts[bucket]


@compiled
def sort_locations(first, last, keys, bits, starts, locations):
    """Compute the elements' positions within their buckets for chunks first to last - 1, sorted by bucket."""
    image, shift, mask = np.empty(_SHORT, np.uint32), uint32(CHUNK_BITS), uint32((1 << CHUNK_BITS) - 1)
    for chunk in range(first, last):
        cursor = starts[chunk].copy()
        some = locations[chunk << CHUNK_BITS : (chunk + 1) << CHUNK_BITS]
        for j in range(chunk << CHUNK_BITS, (chunk + 1) << CHUNK_BITS, _SHORT):
            fill_images(j, bits, keys, True, image)
            for k in range(_SHORT):
                bucket = int64(image[k] >> shift)
                at = int64(cursor[bucket])
                cursor[bucket] = at + 1
                some[at] = image[k] & mask


@compiled
def number_buckets(first, last, locations, starts, order):
    """Invert the positions within buckets first to last - 1: for each position, the number of its element."""
    for bucket in range(first, last):
        number, places = 0, order[bucket << CHUNK_BITS : (bucket + 1) << CHUNK_BITS]
        for chunk in range(starts.shape[0]):
            begin, end = int64(starts[chunk, bucket]), int64(starts[chunk, bucket + 1])
            for j in range((chunk << CHUNK_BITS) + begin, (chunk << CHUNK_BITS) + end):
                places[int64(locations[j])] = number
                number += 1


@compiled
def _fetch(array, at, count):
    for j in range(at, at + count, CACHE_LINE // array.itemsize):
        fetch(array, j)


@compiled
def _sorted(x, factors, buckets, cursor, run):
    for k in range(buckets.size):
        bucket = int64(buckets[k])
        at = int64(cursor[bucket])
        cursor[bucket] = at + 1
        run[at] = x[k] * factors[k]


@compiled
def chunks_to_buckets(first, last, table, g, buckets, starts, runs):
    """Sort chunks first to last - 1 of ``g * table`` by bucket, the table repeated periodically."""
    size = 1 << CHUNK_BITS
    for chunk in range(first, last):
        cursor, run = starts[chunk].copy(), runs[chunk * size : (chunk + 1) * size]
        for j in range(chunk * size, (chunk + 1) * size, _SHORT):
            # Sorted writes are scattered over a whole chunk of runs, so all of the next chunk is prefetched by the time
            # its first element is written.
            _fetch(runs, j + size, _SHORT)
            x = table[j & (table.size - 1) :]
            _sorted(x, g[j : j + _SHORT], buckets[j : j + _SHORT], cursor, run)


@compiled
def _placed(scratch, order, out):
    for j in range(out.size):
        out[j] = scratch[int64(order[j])]


@compiled
def place(first, last, runs, starts, order, out, low, near, within, scale):
    """Assemble blocks first to last - 1, each of one or more buckets, from their runs.

    If low is not 0, also do all stages within them, which first multiply by scale.
    """
    size, parts = 1 << CHUNK_BITS, 1 << (CHUNK_BITS - near)
    scratch = np.empty(size, out.dtype)
    for i in range(first << within, last << within, size):
        bucket, number = i >> CHUNK_BITS, 0
        for chunk in range(starts.shape[0]):
            run = runs[chunk * size + int64(starts[chunk, bucket]) : chunk * size + int64(starts[chunk, bucket + 1])]
            for j in range(run.size):
                scratch[number + j] = run[j]
            number += run.size
        for part in range(parts):
            at = i + (part << near)
            # The next bucket's runs arrive in the cache while this one is computed.
            for chunk in range(starts.shape[0] * part // parts, starts.shape[0] * (part + 1) // parts):
                if bucket + 1 < starts.shape[0]:
                    coming = chunk * size + int64(starts[chunk, bucket + 1])
                    _fetch(runs, coming, int64(starts[chunk, bucket + 2]) - int64(starts[chunk, bucket + 1]))
            _placed(scratch, order[at : at + (1 << near)], out[at : at + (1 << near)])
            if low > 0:
                block(out, out, at, low, 1, near, near, out.dtype.type(scale), 1 << near)
        if low > 0:
            _rest_of_block(out, i, near, CHUNK_BITS)
            if (i + size) >> within << within == i + size:
                _rest_of_block(out, i + size - (1 << within), CHUNK_BITS, within)


@compiled
def _scattered_to(u, places, scratch):
    for j in range(u.size):
        scratch[int64(places[j])] = u[j]


@compiled
def unplace(first, last, u, starts, order, runs):
    """Apply the adjoint of :func:`place`: split buckets first to last - 1 of u into their runs."""
    size = 1 << CHUNK_BITS
    scratch = np.empty(size, u.dtype)
    for bucket in range(first, last):
        _scattered_to(u[bucket * size : (bucket + 1) * size], order[bucket * size : (bucket + 1) * size], scratch)
        number = 0
        for chunk in range(starts.shape[0]):
            run = runs[chunk * size + int64(starts[chunk, bucket]) : chunk * size + int64(starts[chunk, bucket + 1])]
            for j in range(run.size):
                run[j] = scratch[number + j]
            number += run.size


@compiled
def _unsorted(run, buckets, cursor, factors, table):
    for k in range(buckets.size):
        bucket = int64(buckets[k])
        at = int64(cursor[bucket])
        cursor[bucket] = at + 1
        table[k] = run[at] * factors[k]


@compiled
def _add_unsorted(run, buckets, cursor, factors, table):
    for k in range(buckets.size):
        bucket = int64(buckets[k])
        at = int64(cursor[bucket])
        cursor[bucket] = at + 1
        table[k] += run[at] * factors[k]


@compiled
def chunks_from_buckets(first, last, runs, g, buckets, starts, low, near, within, table):
    """Apply the adjoint of :func:`chunks_to_buckets`, and do all stages of the table's blocks first to last - 1."""
    size = 1 << CHUNK_BITS
    for i in range(first << within, last << within, size):
        # The adjoint of repeating the table is summing over the repeats.
        for at in range(i, runs.size, table.size):
            cursor, run = starts[at >> CHUNK_BITS].copy(), runs[at : at + size]
            coming = at + table.size if at + table.size < runs.size else i + size
            for j in range(0, size, _SHORT):
                _fetch(runs, coming + j, _SHORT)
                some = at + j
                if at == i:
                    _unsorted(run, buckets[some : some + _SHORT], cursor, g[some:], table[i + j :])
                else:
                    _add_unsorted(run, buckets[some : some + _SHORT], cursor, g[some:], table[i + j :])
        for part in range(i, i + size, 1 << near):
            block(table, table, part, low, 1, near, near, table.dtype.type(1), 1 << near)
        _rest_of_block(table, i, near, CHUNK_BITS)
        if (i + size) >> within << within == i + size:
            _rest_of_block(table, i + size - (1 << within), CHUNK_BITS, within)
