"""The Hadamard transform of a CUDA tensor by Triton: two passes over memory to 2**24 points of float32.

A tile of points lies in a program's registers. A stage takes the lowest digit of the position off (``split``), does the
butterfly, and puts the digit on top (``join``, ``permute``): to the compiler that is a change of names until no digit
is left in a thread's own registers, and an exchange through shared memory then, one for every five stages or so.

The plain twin is :func:`tnadapt.hadamard.fwht`.
"""

from __future__ import annotations

import struct
from typing import Any

import triton
import triton.language as tl

from .passes import passes

__all__ = ["as_bits", "butterflies", "fwht", "scaled", "tile_rows", "transform"]


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


@triton.jit
def _pass(
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


def as_bits(scale: float) -> int:
    """The bits of a float64 as an int64: Triton would hand a float over in single precision."""
    return int(struct.unpack("<q", struct.pack("<d", scale))[0])


def fwht(x: Any, length: int, scale: float, n_out: int) -> Any:
    """``scale * (H pad(x))[..., :n_out]`` with H of that length.

    Parameters
    ----------
    x : tensor, shape (vectors, n_in)
        float32 or float64, contiguous, ``n_in <= length``; on a CUDA device, or anywhere under Triton's interpreter.
    length : int
        A power of two.
    scale : float
        What the transform (entries 1 and -1) is multiplied by.
    n_out : int
        How much of each vector is wanted.

    Returns
    -------
    tensor, shape (vectors, n_out)
        New; dtype and device of x.
    """
    vectors, n_in = x.shape
    steps = passes(length.bit_length() - 1, x.element_size())
    between = x.new_empty((vectors, length)) if len(steps) > 1 else x
    out = between if n_out == length and len(steps) > 1 else x.new_empty((vectors, n_out))
    if not vectors:
        return out
    for number, step in enumerate(steps):
        source, held = (x, n_in) if number == 0 else (between, length)
        target, kept = (out, n_out) if step is steps[-1] else (between, length)
        _pass[(-(-vectors * length // (step.rows * step.columns)),)](
            source, target, vectors, held, kept, as_bits(scale if step is steps[-1] else 1.0),
            LENGTH=length, STRIDE=step.stride, BITS=step.bits, ROWS=step.rows, COLUMNS=step.columns,
            num_warps=step.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out
