"""A linear F, forward and backward, in few passes over memory.

With ``h`` one period of H times the padded input, F is ``y = diagonal * H z``, ``z[j] = (g h)[perm[j]]``. Two ways:

* *gathered*, where h fits in the second cache: blocks of z are gathered from it there and transformed at once, by
  ``gain = g[perm]``. The permutation is regenerated in every call, which takes little longer than to read it from
  memory, where it would be as large as the result;
* *sorted*, where it does not: a gather out of the whole memory would cost ten transforms. Chunks of ``g h`` are put in
  order of the parts of z that their elements go to (*buckets*, a byte an element) while they are in the cache, and a
  bucket is then put in order in the cache, too, by ``order``, two bytes an element.

The adjoint goes the same way backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from .butterflies import low_run
from .fastfood_loops import (
    CHUNK_BITS,
    begin,
    chunks_from_buckets,
    chunks_to_buckets,
    draw_buckets,
    end,
    find_starts,
    gather,
    number_buckets,
    place,
    scatter,
    sort_locations,
    unplace,
)
from .memory import aligned_empty, readable
from .thread_pool import share, thread_count
from .walsh import transform

__all__ = ["Draws", "buckets_of", "linear", "order_of", "permuted", "permutes", "sorts", "starts_of", "takes"]

# mypy: disable-error-code="no-untyped-call"

# Lengths of transforms, in bits, that there are loops for.
_LEAST_BITS, _MOST_BITS = 14, 31
# One period of h that is gathered from: a megabyte.
_GATHERED_BITS = 18
# And at least so much.
_TABLE_BITS = 12
# Beyond this length the runs that a bucket gets are a few elements each.
_SORTED_BITS = 26
# Blocks are half the second cache, and parts of them half the first.
_BLOCK_BITS, _NEAR_BITS = 18, 12
# Rows in one pass, in bits, and bytes of a strip of columns across them.
_STRIP_BITS, _STRIP_BYTES = 8, 512
# From this length on another thread gains more than it costs to wake it.
_SHARED_BITS = 17
# Parts of the vector that are summed apart, in any case: the same sums, however many threads there are.
_SUMS = 4

_FLOAT = np.dtype(np.float32)
_LOW_BITS = low_run(4).bit_length() - 1
_NO_WORDS, _NO_NUMBERS = np.empty(0, np.uint32), np.empty(0, np.float32)
# Signs, as bits of words, and numbers: one of the two, or neither.
_Diagonal = tuple[np.ndarray, np.ndarray]
_ONES: _Diagonal = (_NO_WORDS, _NO_NUMBERS)
# Pieces of work for each thread: one that is late leaves some to the others.
_PIECES = 4


class Draws(Protocol):
    """What is drawn for an F: its arrays, kept from the first time that they are asked for."""

    padded: int
    pruned: int
    signs: bool
    lengths: dict[str, int]

    def held(self, key: str) -> np.ndarray: ...


def sorts(padded: int, pruned: int) -> bool:
    """Whether an F of these lengths is made by sorting."""
    return pruned > 1 << _GATHERED_BITS and padded <= 1 << _SORTED_BITS


def takes(padded: int) -> bool:
    """Whether there are loops for an F of that padded length."""
    return 1 << _LEAST_BITS <= padded <= 1 << _MOST_BITS


def permutes(length: int) -> bool:
    """Whether :func:`permuted` takes vectors of that length."""
    return 1 << (CHUNK_BITS + 1) <= length <= 1 << _SORTED_BITS


def linear(x: np.ndarray, draws: Draws, n_in: int, adjoint: bool) -> np.ndarray:
    """F x along the last axis, or its adjoint.

    Parameters
    ----------
    x : numpy.ndarray, float32
        Any strides and flags; leading axes are a batch.
    draws : Draws
        Of the F; :func:`takes` says of which lengths.
    n_in : int
        Length of its input.
    adjoint : bool
        Whether the adjoint is asked for.

    Returns
    -------
    numpy.ndarray, float32, shape (…, n_out) or (…, n_in)
        The same bits, however many threads there are.

    Notes
    -----
    What is kept in ``draws`` is 4 bytes an element of the padded length where one period of the compressed
    transform is at most 2**18 long, else 7; and a bit for each sign. While it runs, beside x and the result, a call
    needs one vector of the padded length, two where it sorts.
    """
    f = _Linear(draws, n_in)
    length = n_in if adjoint else f.n_out
    rows = x.reshape(-1, x.shape[-1])
    way = f.backward if adjoint else f.forward
    if len(rows) == 1:
        made = way(_row(rows[0]))[:length]
        # What lies beyond is kept with it, unless that would be much.
        made = made if made.base is None or 5 * length >= 4 * draws.padded else made.copy()
    else:
        made = aligned_empty((len(rows), length), _FLOAT)
        for row, result in zip(rows, made, strict=True):
            result[:] = way(_row(row))[:length]
    return made.reshape(*x.shape[:-1], length)


def _row(x: np.ndarray) -> np.ndarray:
    return readable(np.require(x, requirements=("C", "A")))


class _Linear:
    """One F: which way it goes, and its steps."""

    def __init__(self, draws: Draws, n_in: int) -> None:
        bits = (draws.padded - 1).bit_length()
        # A longer period is one, too; elements that are summed in one place would wait for each other, and round more.
        self.bits, self.pruned_bits, self.n_in = bits, max(_TABLE_BITS, (draws.pruned - 1).bit_length()), n_in
        self.n_out = draws.lengths["diagonal"]
        self.keys = draws.held("keys")
        self.sorts = sorts(draws.padded, draws.pruned)
        if self.sorts:
            self.g, self.buckets = draws.held("g"), draws.held("buckets")
            self.starts, self.order = draws.held("starts"), draws.held("order")
        else:
            self.gain = draws.held("gain")
        self.diagonal = (draws.held("words"), _NO_NUMBERS) if draws.signs else (_NO_WORDS, draws.held("diagonal"))
        self.threads = thread_count() if bits >= _SHARED_BITS else 1
        # Both transforms' 1 / sqrt(2**bits) at once; some of it at either end, so that nothing in between overflows.
        self.first_scale = 2.0 ** -(bits // 2)
        self.last_scale = 2.0 ** -(bits - bits // 2)

        # Each block is a piece of work: where there are few, smaller ones.
        self.within = min(_BLOCK_BITS, bits - 2)
        self.table_within = min(_BLOCK_BITS, self.pruned_bits - 2)

    def forward(self, x: np.ndarray) -> np.ndarray:
        out = aligned_empty((1 << self.bits,), _FLOAT)
        if self.sorts:
            table = out[: 1 << self.pruned_bits]
            self.begin(x, table, self.table_within, self.first_scale)
            self.end(table, self.table_within)
            runs = np.empty(1 << self.bits, np.float32)
            self.share(chunks_to_buckets, len(self.starts), table, self.g, self.buckets, self.starts, runs)
            how = _LOW_BITS, _NEAR_BITS, self.within
            self.share(place, out.size >> self.within, runs, self.starts, self.order, out, *how)
        else:
            table = np.zeros(1 << self.pruned_bits, np.float32)
            table[: x.size] = x
            table = transform(table, self.first_scale)
            how = _LOW_BITS, _NEAR_BITS, self.within
            self.share(gather, out.size >> self.within, table, self.gain, self.keys, self.bits, out, *how)
        self.end(out, self.within, self.last_scale, self.n_out, self.diagonal)
        return out

    def backward(self, y: np.ndarray) -> np.ndarray:
        u = aligned_empty((1 << self.bits,), _FLOAT)
        self.begin(y, u, self.within, self.first_scale, self.diagonal)
        self.end(u, self.within)
        if self.sorts:
            runs = np.empty(1 << self.bits, np.float32)
            self.share(unplace, len(self.starts), u, self.starts, self.order, runs)
            table = u[: 1 << self.pruned_bits]
            how = self.starts, _LOW_BITS, _NEAR_BITS, self.table_within, table
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
        """The stages within blocks of ``H (scale * diagonal * x)``, x padded with zeros."""
        self.share(begin, out.size >> within, x, out, _LOW_BITS, _NEAR_BITS, within, *diagonal, scale)

    def end(
        self, out: np.ndarray, within: int, scale: float = 1.0, count: int = 0, diagonal: _Diagonal = _ONES
    ) -> None:
        """The stages across blocks, in place; then the first ``count`` elements times scale and diagonal."""
        bits = (out.size - 1).bit_length() - within
        passes = max(1, -(-bits // _STRIP_BITS))
        for number in range(passes):
            step = (bits + number) // passes
            apart = 1 << within
            width = min(apart, _STRIP_BYTES // 4)
            within += step
            ended = count if number == passes - 1 else 0
            self.share(end, out.size // (width << step), out, apart, step, width, *diagonal, ended, scale)

    def share(self, kernel: Callable[..., None], count: int, *arguments: Any) -> None:
        """A kernel over 0 to count - 1, in pieces."""
        pieces = min(count, self.threads * _PIECES) if self.threads > 1 else 1
        share(lambda i: kernel(count * i // pieces, count * (i + 1) // pieces, *arguments), pieces, self.threads)


# -- What is kept of the permutation where F is sorted ----------------------------------------------


def buckets_of(padded: int, keys: np.ndarray) -> np.ndarray:
    """Which bucket each element goes to: (padded,), uint8, or uint16 where there are more than 256."""
    buckets = np.empty(padded, np.uint8 if padded >> CHUNK_BITS <= 256 else np.uint16)
    _over(padded >> CHUNK_BITS, draw_buckets, keys, (padded - 1).bit_length(), buckets)
    return buckets


def starts_of(buckets: np.ndarray) -> np.ndarray:
    """Where in each chunk, put in order of buckets, each bucket begins, and its end: uint32, (chunks, buckets + 1)."""
    chunks = buckets.size >> CHUNK_BITS
    starts = np.empty((chunks, chunks + 1), np.uint32)
    _over(chunks, find_starts, buckets, starts)
    return starts


def order_of(padded: int, keys: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Which of the elements that come to a bucket belongs at each of its places: uint16, (padded,)."""
    bits = (padded - 1).bit_length()
    # Two arrays, not two parts of one: the first is not kept with the second.
    locations, order = np.empty(padded, np.uint16), np.empty(padded, np.uint16)
    _over(padded >> CHUNK_BITS, sort_locations, keys, bits, starts, locations)
    _over(padded >> CHUNK_BITS, number_buckets, locations, starts, order)
    return order


def permuted(g: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """``g[perm]``; g has the permutation's length, a power of two from 2**18 to 2**26."""
    buckets = buckets_of(g.size, keys)
    starts = starts_of(buckets)
    order = order_of(g.size, keys, starts)
    runs, out = np.empty_like(g), aligned_empty(g.shape, g.dtype)
    _over(len(starts), chunks_to_buckets, np.ones(1 << CHUNK_BITS, g.dtype), g, buckets, starts, runs)
    _over(len(starts), place, runs, starts, order, out, 0, _NEAR_BITS, CHUNK_BITS)
    return out


def _over(count: int, kernel: Callable[..., None], *arguments: Any) -> None:
    share(lambda i: kernel(i, i + 1, *arguments), count, thread_count())
