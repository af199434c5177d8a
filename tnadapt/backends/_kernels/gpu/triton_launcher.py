"""Launches of the Triton kernels for CUDA tensors (any tensors under Triton's interpreter): transform, F, shuffle.

The reference implementations are :func:`tnadapt.algebra.maps.fastfood.fwht` and the linear part of
:class:`tnadapt.algebra.maps.projection.Projection`.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from .launch_plans import Drawn, Pass, passes
from .triton_kernels import drawn_pass, gathered_sum, hadamard_pass
from .triton_kernels import shuffle as shuffle_kernel

#: Bytes of an array that one program (thread block) processes: at least two tiles fit in a multiprocessor's shared
#: memory, so that one computes while another waits for memory. A thread has 16 numbers of a tile, which leaves
#: registers for the draws.
TILE_BYTES = 1 << 15
#: Elements of one program of the gathering sum, and how many of them are adjacent positions of the period.
_SUM_TILE, _SUM_COLUMNS = 1024, 128
#: Elements of one program of the shuffle: few, as all of them wait for the last one to finish cycle walking.
_SHUFFLE_TILE = 256


# -- One kernel ------------------------------------------------------------------------------------


def _launch(x: Any, out: Any, length: int, step: Pass, scale: float, f: Drawn | None, load: str, store: str) -> None:
    """Run one pass of a transform of that length, from the rows of x to the rows of out, which may be shorter."""
    # ``load`` selects what the pass reads: "plain" numbers, zero beyond the end of x's row; "diagonal", these times the
    # diagonal of f; "permuted", ``x[perm[j] % period] * g[perm[j]]``; or "unpermuted", ``x[inverse[j]] * g[j]``.
    # ``store`` selects what it writes: "plain" numbers, or "diagonal", these times the diagonal. Both are multiplied by
    # scale.
    vectors = x.shape[0]
    grid = (step.tiles(vectors * length),)
    numbers = (vectors, x.shape[1], out.shape[1], _bits(scale))
    shape = {"STRIDE": step.stride, "BITS": step.bits, "ROWS": step.rows, "COLUMNS": step.columns}
    options = {"num_warps": warps(step), "enable_fp_fusion": False}
    if f is None or (load, store) == ("plain", "plain"):
        hadamard_pass[grid](x, out, *numbers, LENGTH=length, **shape, **options)
        return
    drawn_pass[grid](
        x, out, _gain(f, x), *numbers, f.group, f.seed, LENGTH=length, LOG_LENGTH=length.bit_length() - 1,
        PERIOD=f.period, LOAD=load, STORE=store, SIGNS=f.signs, KEPT=f.gain is not None, **shape, **options,
    )  # fmt: skip


def _gathered_sum(x: Any, f: Drawn) -> Any:
    """Sum ``x[inverse[j]] * g[j]`` over the repeats of the period."""
    vectors = x.shape[0]
    columns = min(f.period, _SUM_COLUMNS)
    rows = min(f.length // f.period, _SUM_TILE // columns)
    pieces = f.length // f.period // rows
    sums = x.new_empty((vectors, pieces, f.period))
    gathered_sum[(vectors * pieces * (f.period // columns),)](
        x, sums, _gain(f, x), f.group, f.seed, LENGTH=f.length, LOG_LENGTH=f.length.bit_length() - 1,
        PERIOD=f.period, ROWS=rows, COLUMNS=columns, KEPT=f.gain is not None, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return sums.reshape(vectors, f.period) if pieces == 1 else sums.sum(1)


def warps(step: Pass) -> int:
    """Return the number of warps for a tile: sixteen points per thread, at most sixteen warps."""
    return max(1, min(16, step.rows * step.columns // 512))


def _gain(f: Drawn, x: Any) -> Any:
    """Return the cached normal numbers, or if there are none any pointer, which is not read."""
    return x if f.gain is None else f.gain


def _bits(scale: float) -> int:
    """Return the bits of a float64 as an int64, because Triton passes floats in single precision."""
    return int(struct.unpack("<q", struct.pack("<d", scale))[0])


# -- Sequences of launches, for contiguous tensors (vectors, n) of float32 or float64 ----------------


def _transform(
    x: Any, length: int, scale: float, n_out: int, f: Drawn | None = None, load: str = "plain", store: str = "plain"
) -> Any:
    vectors = x.shape[0]
    steps = passes(length.bit_length() - 1, x.itemsize, TILE_BYTES)
    between = x.new_empty((vectors, length)) if len(steps) > 1 else x
    out = between if n_out == length and len(steps) > 1 else x.new_empty((vectors, n_out))
    if not vectors:
        return out
    for step in steps:
        begins, ends = step is steps[0], step is steps[-1]
        _launch(
            x if begins else between, out if ends else between, length, step, scale if ends else 1.0, f,
            load if begins else "plain", store if ends else "plain",
        )  # fmt: skip
    return out


def fwht(x: Any, length: int, scale: float, n_out: int) -> Any:
    """Compute ``scale * (H pad(x))[..., :n_out]``, (vectors, n_in) to (vectors, n_out); H's entries are 1 and -1."""
    return _transform(x, length, scale, n_out)


def fastfood(x: Any, f: Drawn) -> Any:
    """Compute the linear part of F, (vectors, n_in) to (vectors, n_out).

    After the small transform of x, the first pass of the long transform gathers its input through the Feistel network
    and multiplies it by normal numbers, and the last pass applies the diagonal of signs or normal numbers. In addition
    to the result it needs memory for one long vector per vector of x.
    """
    scale = 1.0 / math.sqrt(f.length)
    small = fwht(x, f.period, scale, f.period)
    return _transform(small, f.length, scale, f.n_out, f, "permuted", "diagonal")


def fastfood_adjoint(y: Any, f: Drawn) -> Any:
    """Compute the adjoint of :func:`fastfood`, (vectors, n_out) to (vectors, n_in); with the same bits in every run.

    Each element of the small vector gathers its contributions from all repeats of the period through the inverse
    network, and sums them in a fixed order (a scatter would need atomics, whose order varies).
    """
    scale = 1.0 / math.sqrt(f.length)
    if not y.shape[0]:
        return y.new_empty((0, f.n_in))
    long = _transform(y, f.length, scale, f.length, f, "diagonal")
    if f.period == f.length:
        return _transform(long, f.length, scale, f.n_in, f, "unpermuted")
    return fwht(_gathered_sum(long, f), f.period, scale, f.n_in)


def shuffle(x: Any, seed: int, group: int, inverse: bool = False) -> Any:
    """Compute ``x[:, perm]`` of a contiguous x, for the fixed permutation of its columns or the inverse."""
    vectors, size = x.shape
    out = x.new_empty((vectors, size))
    if vectors:
        shuffle_kernel[(vectors * -(-size // _SHUFFLE_TILE),)](
            x, out, size, group, seed, BITS=(size - 1).bit_length(), INVERSE=inverse, TILE=_SHUFFLE_TILE, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
