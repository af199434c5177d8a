"""Compiled kernels of a linear F (fastfood) and its adjoint: gathered in the cache, or sorted into buckets.

With ``h`` one period of H times the padded input, F is ``y = diagonal * H z``, ``z[j] = (g h)[perm[j]]``. There are two
algorithms:

* *gathered*, if h fits in the level 2 cache: each block of z is gathered from h, multiplied by ``gain = g[perm]``, and
  transformed while it is in the cache. The permutation is regenerated in every call, which takes little longer than
  reading it from memory, where it would be as large as the result;
* *sorted*, otherwise, since random access to main memory would cost as much as ten transforms. While a chunk of ``g h``
  is in the cache, its elements are sorted by the part of z that they go to (their *bucket*, one byte per element). Each
  bucket is then put in its final order, also in the cache, by ``order`` (two bytes per element).

The adjoint runs the same steps backwards.

In double precision, which merging needs once per F, the result has the bits of the reference implementation, which
applies the factors ``1 / sqrt`` at the same steps. Sorting is then faster for any h, as its arrays are drawn in less
time than ``gain``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import int64, uint32

from .compiling import compiled
from .gathering import first_images, gather_part, round_keys, scatter_part
from .philox import fill_images
from .simd import RADIX_BITS, VECTOR_BYTES, fetch, signed, signed_butterfly
from .walsh import across, block, evenly, low_run, stages, strips, transform, transform_into
from .work_space import CACHE_LINE, WorkSpace, aligned_empty, cache_sizes, readable, share, share_range, thread_count

# -- Loops: diagonals, gathering and scattering, sorting into buckets --------------------------------------------------

# All loops work on blocks that fit in the level 2 cache, in parts that fit in the level 1 cache. The module docstring
# says how they combine to F.


# mypy: disable-error-code="no-untyped-def,no-untyped-call"

# Images of the permutation computed at a time.
_SHORT = 1024
#: A chunk of one vector and a bucket of the other have 2**16 elements each, so that 16 bits are enough to number them.
CHUNK_BITS = 16


@compiled
def _times_diagonal(src, dst, at, count, words, numbers, scale):
    """Set ``dst = scale * diagonal * src`` for ``count`` elements from ``at`` on."""
    # The diagonal is the signs in the bits of ``words``, or ``numbers``, or 1 if both are empty.
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
    """Do the stages of a block that remain after those within its parts of ``1 << near`` elements, in place."""
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
    """Do stages across rows in two sweeps like ``strips``, multiplying by scale and signs in the second."""
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


# -- F and its adjoint -------------------------------------------------------------------------------------------------


# mypy: disable-error-code="no-untyped-call"

# Lengths of transforms that the loops support, as powers of two.
_LEAST_BITS, _MOST_BITS = 14, 31
# Maximum length of h for the gathered algorithm: a megabyte.
_GATHERED_BITS = 18
# Minimum length of the table that it gathers from.
_TABLE_BITS = 12
# Beyond this length, the run that a bucket gets from a chunk would be only a few elements.
_SORTED_BITS = 26
# Blocks fill the level 2 cache, and their parts half of the level 1 cache; parts of a bucket are larger, so that its
# remaining stages are not a sweep over sixteen rows, which evict each other.
_BLOCK_BITS, _NEAR_BITS, _BUCKET_NEAR_BITS = 18, 12, 13
# Rows in one pass, as a power of two. The columns of a strip take half of the level 2 cache, within these limits.
_STRIP_BITS, _STRIP_BYTES = 8, (256, 4096)
# From this length on, a second thread gains more than it costs to wake it.
_SHARED_BITS = 17
# Parts of the vector that the adjoint sums separately. The number is fixed, so that the order of summation does not
# depend on the number of threads.
_SUMS = 4

_FLOAT, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
_NO_WORDS, _NO_NUMBERS = np.empty(0, np.uint32), np.empty(0, np.float32)
# Signs as bits of words, and numbers; at most one of the two arrays is not empty.
_Diagonal = tuple[np.ndarray, np.ndarray]
_ONES: _Diagonal = (_NO_WORDS, _NO_NUMBERS)


#: A :class:`tnadapt.algebra.maps.fastfood.Linear`, whose ``held`` computes an array on first use and caches it.
F = Any


def sorts(padded: int, period: int) -> bool:
    """Return whether an F of these lengths uses the sorted algorithm in single precision."""
    return period > 1 << _GATHERED_BITS and padded <= 1 << _SORTED_BITS


def _sorts_double(f: F) -> bool:
    """Return whether a short h is sorted in double precision, too, which it is unless ``gain`` is cached."""
    return "gain" not in f.kept and 1 << (CHUNK_BITS + 2) <= f.padded <= 1 << _SORTED_BITS


def takes(dtype: np.dtype[Any], padded: int, adjoint: bool) -> bool:
    """Return whether the loops support an F of that padded length: in single precision, and its forward in double."""
    known = dtype == _FLOAT or (dtype == _DOUBLE and not adjoint)
    return known and 1 << _LEAST_BITS <= padded <= 1 << _MOST_BITS


def permutes(length: int) -> bool:
    """Return whether :func:`permuted` supports vectors of that length."""
    return 1 << (CHUNK_BITS + 1) <= length <= 1 << _SORTED_BITS


def linear(x: np.ndarray, f: F, adjoint: bool) -> np.ndarray:
    """Compute F x along the last axis, or the adjoint.

    Parameters
    ----------
    x : numpy.ndarray, float32, or float64 without ``adjoint``
        Any strides and flags; leading axes are a batch.
    f : Linear
        Of a padded length that :func:`takes` accepts.
    adjoint : bool
        Whether to apply the adjoint.

    Returns
    -------
    numpy.ndarray, dtype of x, shape (…, n_out) or (…, n_in)
        The same bits for any number of threads; in float64, those of the reference implementation.

    Notes
    -----
    ``f`` caches 4 bytes per element of the padded length if the period of h is at most 2**18, otherwise 7, and one
    bit per sign. A call needs one vector of the padded length, or two if it sorts, in addition to a result that is not
    a view of the first one. In float32 that vector comes from the work space of ``f``, and returns to it with the
    result.
    """
    steps = _Steps(f, x.dtype)
    length = f.n_in if adjoint else f.n_out
    rows = x.reshape(-1, x.shape[-1])
    way = steps.backward if adjoint else steps.forward
    if len(rows) == 1:
        output = way(_row(rows[0]))[:length]
        # The result is a view that keeps the whole padded vector alive; copy it if more than a fifth would be wasted.
        output = output if 5 * length >= 4 * f.padded else output.copy()
    else:
        output = aligned_empty((len(rows), length), x.dtype)
        for row, result in zip(rows, output, strict=True):
            result[:] = way(_row(row))[:length]
    return output.reshape(*x.shape[:-1], length)


def _row(x: np.ndarray) -> np.ndarray:
    return readable(np.require(x, requirements=("C", "A")))


class _Steps:
    """The algorithm of one F, and its steps."""

    def __init__(self, f: F, dtype: np.dtype[Any]) -> None:
        bits = (f.padded - 1).bit_length()
        # A multiple of a period is a period, too. In a short table, the adjoint would add many elements to one place:
        # these additions depend on each other, and their rounding errors accumulate.
        self.bits, self.pruned_bits, self.n_in = bits, max(_TABLE_BITS, (f.period - 1).bit_length()), f.n_in
        self.n_out = f.n_out
        self.keys = f.held("keys")
        self.period, self.double = f.period, dtype == _DOUBLE
        self.sorts = sorts(f.padded, f.period) or (self.double and _sorts_double(f))
        if self.sorts:
            self.g, self.buckets = f.held("g"), f.held("buckets")
            self.starts, self.order = f.held("starts"), f.held("order")
        else:
            self.gain = f.held("gain")
        self.diagonal = (_NO_WORDS, f.held("diagonal")) if f.normal else (f.held("words"), _NO_NUMBERS)
        # Two threads may both create one; one of the two is then dropped with its vectors.
        self.space = f.space = f.space or WorkSpace()
        self.threads = thread_count() if bits >= _SHARED_BITS else 1
        # The factors 1 / sqrt(2**bits) of both transforms, as powers of two at either end, so that nothing overflows in
        # between.
        self.first_scale = 2.0 ** -(bits // 2)
        self.last_scale = 2.0 ** -(bits - bits // 2)

        # Each block is a piece of work: short vectors get smaller blocks, so that there are at least four.
        less = int(self.double)  # half as many elements have the same size
        self.within = min(_BLOCK_BITS - less, bits - 2)
        self.table_within = min(_BLOCK_BITS - less, self.pruned_bits - 2)
        self.low, self.near = low_run(dtype.itemsize).bit_length() - 1, _NEAR_BITS - less
        self.bucket_near = _BUCKET_NEAR_BITS - less

    def forward(self, x: np.ndarray) -> np.ndarray:
        if self.double:
            return self.forward_double(x)
        out = self.space.vector(1 << self.bits)
        if self.sorts:
            table = out[: 1 << self.pruned_bits]
            self.begin(x, table, self.table_within, self.first_scale)
            self.end(table, self.table_within)
        else:
            table = np.zeros(1 << self.pruned_bits, np.float32)
            table[: x.size] = x
            table = transform(table, self.first_scale)
        self.permute(table, out)
        self.end(out, self.within, self.last_scale, self.n_out, self.diagonal)
        return out

    def forward_double(self, x: np.ndarray) -> np.ndarray:
        """Compute F x with the operations of ``Linear.forward_plain``, in their order."""
        out = aligned_empty((1 << self.bits,), _DOUBLE)
        table = out[: self.period]
        table[: x.size] = x
        table[x.size :] = 0
        transform_into(table, table, 1.0 / math.sqrt(self.period))
        table *= math.sqrt(self.period / out.size)
        if self.period < 1 << self.pruned_bits:
            table = np.tile(table, (1 << self.pruned_bits) // self.period)
        elif not self.sorts:
            table = table.copy()  # sorting has read it before it writes to out
        self.permute(table, out, 1.0 / math.sqrt(out.size))
        self.end(out, self.within, 1.0, self.n_out, self.diagonal)
        return out

    def permute(self, table: np.ndarray, out: np.ndarray, scale: float = 1.0) -> None:
        """Do the stages within blocks of ``out = H (scale * z)``, z from its table."""
        if self.sorts:
            runs = np.empty(out.size, out.dtype)
            self.share(chunks_to_buckets, len(self.starts), table, self.g, self.buckets, self.starts, runs)
            how = self.low, self.bucket_near, self.within, scale
            self.share(place, out.size >> self.within, runs, self.starts, self.order, out, *how)
        else:
            how = self.low, self.near, self.within, scale
            self.share(gather, out.size >> self.within, table, self.gain, self.keys, self.bits, out, *how)

    def backward(self, y: np.ndarray) -> np.ndarray:
        u = self.space.vector(1 << self.bits)
        self.begin(y, u, self.within, self.first_scale, self.diagonal)
        self.end(u, self.within)
        if self.sorts:
            runs = np.empty(1 << self.bits, np.float32)
            self.share(unplace, len(self.starts), u, self.starts, self.order, runs)
            table = u[: 1 << self.pruned_bits]
            how = self.starts, self.low, self.bucket_near, self.table_within, table
            blocks = table.size >> self.table_within
            self.share(chunks_from_buckets, blocks, runs, self.g, self.buckets, *how)
            self.end(table, self.table_within, self.last_scale, self.n_in)
            return table
        tables = np.zeros((_SUMS, 1 << self.pruned_bits), np.float32)
        part = u.size // _SUMS

        def add(i: int) -> None:
            scatter(i * part, (i + 1) * part, u, self.gain, self.keys, self.bits, tables[i])

        share(add, _SUMS, self.threads)
        return transform(tables.sum(axis=0), self.last_scale)

    def begin(self, x: np.ndarray, out: np.ndarray, within: int, scale: float, diagonal: _Diagonal = _ONES) -> None:
        """Do the stages within blocks of ``H (scale * diagonal * x)``, x padded with zeros."""
        self.share(begin, out.size >> within, x, out, self.low, self.near, within, *diagonal, scale)

    def end(
        self, out: np.ndarray, within: int, scale: float = 1.0, count: int = 0, diagonal: _Diagonal = _ONES
    ) -> None:
        """Do the stages across blocks in place, then multiply the first ``count`` elements by scale and diagonal."""
        bits = (out.size - 1).bit_length() - within
        passes = max(1, -(-bits // _STRIP_BITS))
        least, most = _STRIP_BYTES
        for number in range(passes):
            step = (bits + number) // passes
            apart = 1 << within
            width = min(apart, max(least, min(most, cache_sizes()[1] // 2 >> step)) // out.itemsize)
            within += step
            ended = count if number == passes - 1 else 0
            self.share(end, out.size // (width << step), out, apart, step, width, *diagonal, ended, scale)

    def share(self, kernel: Callable[..., None], count: int, *arguments: Any) -> None:
        """Run a kernel over 0 to count - 1, in parallel pieces."""
        share_range(lambda first, last: kernel(first, last, *arguments), count, self.threads)


# -- The cached form of the permutation for the sorted algorithm -------------------------------------


def buckets_of(padded: int, keys: np.ndarray) -> np.ndarray:
    """Compute the bucket of each element: (padded,), uint8, or uint16 if there are more than 256 buckets."""
    buckets = np.empty(padded, np.uint8 if padded >> CHUNK_BITS <= 256 else np.uint16)
    _over(padded >> CHUNK_BITS, draw_buckets, keys, (padded - 1).bit_length(), buckets)
    return buckets


def starts_of(buckets: np.ndarray) -> np.ndarray:
    """Compute the start of each bucket in each sorted chunk, and the chunk's end: uint32, (chunks, buckets + 1)."""
    chunks = buckets.size >> CHUNK_BITS
    starts = np.empty((chunks, chunks + 1), np.uint32)
    _over(chunks, find_starts, buckets, starts)
    return starts


def order_of(padded: int, keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Compute, for each position of a bucket, the number of its element among those that arrive: uint16, (padded,)."""
    bits = (padded - 1).bit_length()
    # Two separate arrays, so that caching `order` does not keep `locations` alive.
    locations, order = np.empty(padded, np.uint16), np.empty(padded, np.uint16)
    _over(padded >> CHUNK_BITS, sort_locations, keys, bits, starts, locations)
    _over(padded >> CHUNK_BITS, number_buckets, locations, starts, order)
    return order


def permuted(g: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Compute ``g[perm]``; g has the length of the permutation, which :func:`permutes` must accept."""
    buckets = buckets_of(g.size, keys)
    starts = starts_of(buckets)
    order = order_of(g.size, keys, starts)
    runs, out = np.empty_like(g), aligned_empty(g.shape, g.dtype)
    _over(len(starts), chunks_to_buckets, np.ones(1 << CHUNK_BITS, g.dtype), g, buckets, starts, runs)
    _over(len(starts), place, runs, starts, order, out, 0, _NEAR_BITS, CHUNK_BITS, 1.0)
    return out


def _over(count: int, kernel: Callable[..., None], *arguments: Any) -> None:
    share(lambda i: kernel(i, i + 1, *arguments), count, thread_count())
