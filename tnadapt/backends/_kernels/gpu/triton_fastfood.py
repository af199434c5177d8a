"""The passes of F in Triton; every random number is drawn where it is used.

None is stored, unless ``KEPT``: then the normal numbers, in the order of the permutation, are read from ``gain``.

The adjoint sums in a fixed order (no atomics), so that two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_draws import feistel, feistel_keys, normal, normal_row, permuted, sign_row
from .triton_hadamard import scaled, tile_rows, transform

__all__ = ["drawn_pass", "gathered_sum", "shuffle"]


@triton.jit
def _diagonal(tile, first, COLUMNS: tl.constexpr, SIGNS: tl.constexpr, group, seed):
    if SIGNS:
        tile = tl.where(sign_row(first, COLUMNS, group, seed) == 1, -tile, tile)
    else:
        tile = tile * normal_row(first, COLUMNS, 4, group, seed).to(tile.dtype)
    return tile


@triton.jit
def _gain(gain, place, first, COLUMNS: tl.constexpr, group, seed, KEPT: tl.constexpr):
    """Return elements of g that belong to rows of positions, of which ``place`` are the images under the inverse."""
    # Kept is g[perm], here at the inverse of a position.
    return tl.load(gain + place) if KEPT else normal_row(first, COLUMNS, 2, group, seed)


@triton.jit(do_not_specialize=["vectors", "scale_bits", "group", "seed"])
def drawn_pass(
    x, out, gain, vectors: tl.int64, n_in: tl.int64, n_out: tl.int64, scale_bits: tl.int64, group: tl.int64,
    seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, SIGNS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    first = tile_rows(ROWS, COLUMNS, STRIDE)
    vector = first // LENGTH
    first = first % LENGTH
    j = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    inside = (vector < vectors)[:, None]
    start = x + (vector * n_in)[:, None]
    if LOAD == "permuted":
        place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, False)
        tile = tl.load(start + place % PERIOD, mask=inside, other=0.0)
        factor = tl.load(gain + j) if KEPT else normal(place, 2, group, seed)
        tile = tile * factor.to(tile.dtype)
    elif LOAD == "unpermuted":
        place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
        tile = tl.load(start + place, mask=inside, other=0.0)
        tile = tile * _gain(gain, place, first, COLUMNS, group, seed, KEPT).to(tile.dtype)
    else:
        tile = tl.load(start + j, mask=inside & (j < n_in), other=0.0)
        if LOAD == "diagonal":
            tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tile = scaled(transform(tile, ROWS, COLUMNS, BITS, STRIDE), scale_bits)
    if STORE == "diagonal":
        tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tl.store(out + (vector * n_out)[:, None] + j, tile, mask=inside & (j < n_out))


@triton.jit(do_not_specialize=["group", "seed"])
def gathered_sum(
    x, out, gain, group: tl.int64, seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = PERIOD // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    # Index over all repeats of all vectors; ROWS divides the number of repeats per vector.
    repeat = program // ACROSS * ROWS + tl.arange(0, ROWS).to(tl.int64)
    first = repeat * PERIOD + program % ACROSS * COLUMNS
    vector = first // LENGTH
    first = first % LENGTH
    j = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
    tile = tl.load(x + (vector * LENGTH)[:, None] + place)
    tile = tile * _gain(gain, place, first, COLUMNS, group, seed, KEPT).to(tile.dtype)
    tl.store(out + program * COLUMNS + tl.arange(0, COLUMNS), tl.sum(tile, axis=0))


@triton.jit(do_not_specialize=["size", "group", "seed"])
def shuffle(
    x, out, size: tl.int64, group: tl.int64, seed: tl.uint64,
    BITS: tl.constexpr, INVERSE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(size, TILE)
    program = tl.program_id(0).to(tl.int64)
    start = program // tiles * size
    j = program % tiles * TILE + tl.arange(0, TILE)
    inside = j < size
    place = permuted(tl.where(inside, j, 0), size, feistel_keys(group, seed), BITS, INVERSE)
    tl.store(out + start + j, tl.load(x + start + place, mask=inside), mask=inside)
