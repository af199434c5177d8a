"""The linear part of F and its adjoint on CUDA tensors by Triton, with nothing stored.

Every draw is made where it is used. Forward: the small transform of x; then the first pass of the long one gathers
its input through the Feistel network, times the normal number of that place, and the last one ends with the signs or
normal numbers of the diagonal. Backward: the same from the other end; each place of the small vector gathers through
the inverse network what the repeats of the period send it, summed in a fixed order (no atomics, so that two runs give
the same bits).

The plain twin is the linear part of :class:`tnadapt.projection.Projection`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .draws import feistel, feistel_keys, normal, normal_row, permuted, sign_row
from .hadamard import as_bits, fwht, scaled, tile_rows, transform
from .passes import passes

__all__ = ["Drawn", "fastfood", "fastfood_adjoint", "shuffle"]

#: What one program of the gathering sum takes: so many places of the period, repeat after repeat.
_SUM_TILE, _SUM_COLUMNS = 1024, 128
#: And one of the shuffle: few, as its last straggler holds up all.
_SHUFFLE_TILE = 256


class Drawn(NamedTuple):
    """The integers that make one F."""

    n_in: int
    n_out: int
    length: int
    """Of the long transform: L, a power of two."""
    period: int
    """Of the small one: the least power of two that n_in fits in."""
    seed: int
    group: int
    signs: bool
    """Whether signs are the diagonal at the end; else normal numbers."""


@triton.jit
def _diagonal(tile, first, COLUMNS: tl.constexpr, SIGNS: tl.constexpr, group, seed):
    if SIGNS:
        tile = tl.where(sign_row(first, COLUMNS, group, seed) == 1, -tile, tile)
    else:
        tile = tile * normal_row(first, COLUMNS, 4, group, seed).to(tile.dtype)
    return tile


@triton.jit
def _drawn_pass(
    x, out, vectors: tl.int64, n_in: tl.int64, n_out: tl.int64, scale_bits: tl.int64, group: tl.int64, seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, SIGNS: tl.constexpr,
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
        tile = tile * normal(place, 2, group, seed).to(tile.dtype)
    elif LOAD == "unpermuted":
        place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
        tile = tl.load(start + place, mask=inside, other=0.0)
        tile = tile * normal_row(first, COLUMNS, 2, group, seed).to(tile.dtype)
    else:
        tile = tl.load(start + j, mask=inside & (j < n_in), other=0.0)
        if LOAD == "diagonal":
            tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tile = scaled(transform(tile, ROWS, COLUMNS, BITS, STRIDE), scale_bits)
    if STORE == "diagonal":
        tile = _diagonal(tile, first, COLUMNS, SIGNS, group, seed)
    tl.store(out + (vector * n_out)[:, None] + j, tile, mask=inside & (j < n_out))


@triton.jit
def _gathered_sum(
    x, out, group: tl.int64, seed: tl.uint64,
    LENGTH: tl.constexpr, LOG_LENGTH: tl.constexpr, PERIOD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = PERIOD // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    # Of all repeats of all vectors: ROWS divides the repeats of one.
    repeat = program // ACROSS * ROWS + tl.arange(0, ROWS).to(tl.int64)
    first = repeat * PERIOD + program % ACROSS * COLUMNS
    vector = first // LENGTH
    first = first % LENGTH
    j = first[:, None] + tl.arange(0, COLUMNS)[None, :]
    place = feistel(j, feistel_keys(group, seed), LOG_LENGTH, True)
    tile = tl.load(x + (vector * LENGTH)[:, None] + place)
    tile = tile * normal_row(first, COLUMNS, 2, group, seed).to(tile.dtype)
    tl.store(out + program * COLUMNS + tl.arange(0, COLUMNS), tl.sum(tile, axis=0))


def _long(x: Any, f: Drawn, load: str, store: str, n_out: int) -> Any:
    """The transform of f.length, orthonormal, of rows of x that come in and go out as these words say."""
    vectors, n_in = x.shape
    steps = passes(f.length.bit_length() - 1, x.element_size())
    between = x.new_empty((vectors, f.length)) if len(steps) > 1 else x
    out = between if n_out == f.length and len(steps) > 1 else x.new_empty((vectors, n_out))
    for step in steps:
        begins, ends = step is steps[0], step is steps[-1]
        _drawn_pass[(-(-vectors * f.length // (step.rows * step.columns)),)](
            x if begins else between, out if ends else between, vectors, n_in if begins else f.length,
            n_out if ends else f.length, as_bits(1.0 / math.sqrt(f.length) if ends else 1.0), f.group, f.seed,
            LENGTH=f.length, LOG_LENGTH=f.length.bit_length() - 1, PERIOD=f.period, STRIDE=step.stride,
            BITS=step.bits, ROWS=step.rows, COLUMNS=step.columns, LOAD=load if begins else "plain",
            STORE=store if ends else "plain", SIGNS=f.signs, num_warps=step.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def fastfood(x: Any, f: Drawn) -> Any:
    """The linear part of F: (vectors, n_in) to (vectors, n_out).

    x is a contiguous float32 or float64 tensor on a CUDA device, or anywhere under Triton's interpreter; the result is
    new. Memory beside it: one long vector for each of x.
    """
    if not x.shape[0]:
        return x.new_empty((0, f.n_out))
    small = fwht(x, f.period, 1.0 / math.sqrt(f.length), f.period)
    return _long(small, f, "permuted", "diagonal", f.n_out)


def fastfood_adjoint(y: Any, f: Drawn) -> Any:
    """The adjoint of :func:`fastfood`: (vectors, n_out) to (vectors, n_in); the same bits at every run."""
    vectors = y.shape[0]
    if not vectors:
        return y.new_empty((0, f.n_in))
    long = _long(y, f, "diagonal", "plain", f.length)
    if f.period == f.length:
        return _long(long, f, "unpermuted", "plain", f.n_in)
    columns = min(f.period, _SUM_COLUMNS)
    rows = min(f.length // f.period, _SUM_TILE // columns)
    chunks = f.length // f.period // rows
    sums = y.new_empty((vectors, chunks, f.period))
    _gathered_sum[(vectors * chunks * (f.period // columns),)](
        long, sums, f.group, f.seed, LENGTH=f.length, LOG_LENGTH=f.length.bit_length() - 1, PERIOD=f.period, ROWS=rows,
        COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    small = sums.reshape(vectors, f.period) if chunks == 1 else sums.sum(1)
    return fwht(small, f.period, 1.0 / math.sqrt(f.length), f.n_in)


@triton.jit
def _shuffle(
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


def shuffle(x: Any, seed: int, group: int, inverse: bool = False) -> Any:
    """``x[:, perm]`` of the fixed permutation of as many as x (contiguous) has columns, or of its inverse."""
    vectors, size = x.shape
    out = x.new_empty((vectors, size))
    if vectors:
        _shuffle[(vectors * -(-size // _SHUFFLE_TILE),)](
            x, out, size, group, seed, BITS=(size - 1).bit_length(), INVERSE=inverse, TILE=_SHUFFLE_TILE, num_warps=4
        )
    return out
