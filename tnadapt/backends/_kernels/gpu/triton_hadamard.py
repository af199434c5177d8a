"""The Hadamard transform of a tile of points in a Triton program, and the pass that does only this.

The points of a tile are in the program's registers. A stage removes the lowest binary digit of the position
(``split``), does the butterfly, and adds the digit back at the top (``join``, ``permute``). To the compiler this only
renames registers as long as the lowest digit is within a thread. Otherwise it exchanges points through shared memory,
once in about five stages.
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
    """Return the positions in the whole array at which the rows of this program's tile begin: (ROWS,), int64."""
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
    """Transform a tile without scaling: over 2**BITS neighbors, or (STRIDE not 1) over the ROWS of each column."""
    N: tl.constexpr = ROWS * COLUMNS
    if STRIDE == 1:
        x = butterflies(tl.reshape(x, (N,)), N, BITS)
        x = tl.permute(tl.reshape(x, (1 << BITS, N >> BITS)), (1, 0))
    else:
        x = butterflies(tl.reshape(tl.permute(x, (1, 0)), (N,)), N, BITS)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def scaled(x, scale_bits):
    """Multiply x by the float64 number with these bits, which is first rounded to x's dtype."""
    return x * scale_bits.to(tl.int64).to(tl.float64, bitcast=True).to(x.dtype)


# Triton recompiles a kernel for special values of integers (1, multiples of 16). That is useless for those that do not
# enter addresses.
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
