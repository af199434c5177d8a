"""The Hadamard transform of a tile of points in a Triton program, and the pass that does nothing else.

The points of a tile lie in the program's registers. A stage takes the lowest digit of the position off (``split``),
does the butterfly, and puts the digit on top (``join``, ``permute``): to the compiler that is a change of names until
no digit is left in a thread's own registers, and an exchange through shared memory then, once for some five stages.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["butterflies", "hadamard_pass", "scaled", "tile_rows", "transform"]


@triton.jit
def butterflies(x, N: tl.constexpr, BITS: tl.constexpr):
    """Transform the lowest BITS digits of the position in (N,), and move them to the top in order."""
    for _ in tl.static_range(BITS):
        a, b = tl.split(tl.reshape(x, (N // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (1, 0)), (N,))
    return x


@triton.jit
def tile_rows(ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Where in all of the array the rows of this program's tile begin: (ROWS,), int64."""
    tile = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS).to(tl.int64)
    if STRIDE == 1:
        start = (tile * ROWS + row) * COLUMNS
    else:
        ACROSS: tl.constexpr = STRIDE // COLUMNS
        start = tile // ACROSS * (ROWS * STRIDE) + tile % ACROSS * COLUMNS + row * STRIDE
    return start


@triton.jit
def transform(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr, STRIDE: tl.constexpr):
    """The unscaled transform of a tile: of 2**BITS neighbours, or (STRIDE not 1) of the ROWS of each column."""
    N: tl.constexpr = ROWS * COLUMNS
    if STRIDE == 1:
        x = butterflies(tl.reshape(x, (N,)), N, BITS)
        x = tl.permute(tl.reshape(x, (1 << BITS, N >> BITS)), (1, 0))
    else:
        x = butterflies(tl.reshape(tl.permute(x, (1, 0)), (N,)), N, BITS)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def scaled(x, scale_bits):
    """x times the float64 number of these bits, rounded to x's dtype first."""
    return x * scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(x.dtype)


# What does not say where numbers lie in memory is no reason to compile anew.
@triton.jit(do_not_specialize=["vectors", "scale_bits"])
def hadamard_pass(
    x, out, vectors: tl.int64, n_in: tl.int64, n_out: tl.int64, scale_bits: tl.int64,
    LENGTH: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    first = tile_rows(ROWS, COLUMNS, STRIDE)
    column = tl.arange(0, COLUMNS)[None, :]
    vector = first // LENGTH
    j = (first % LENGTH)[:, None] + column
    inside = (vector < vectors)[:, None]
    tile = tl.load(x + (vector * n_in)[:, None] + j, mask=inside & (j < n_in), other=0.0)
    tile = scaled(transform(tile, ROWS, COLUMNS, BITS, STRIDE), scale_bits)
    tl.store(out + (vector * n_out)[:, None] + j, tile, mask=inside & (j < n_out))
