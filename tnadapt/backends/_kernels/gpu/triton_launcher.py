"""Launcher of Triton kernels, for CUDA tensors (any tensors under Triton's interpreter)."""

from __future__ import annotations

import struct
from typing import Any

from . import launch_plans
from .launch_plans import Drawn, Pass
from .triton_kernels import drawn_pass, gathered_sum, hadamard_pass
from .triton_kernels import shuffle as shuffle_kernel

#: Elements of one program of the gathering sum, and how many of them are adjacent positions of the period.
_SUM_TILE, _SUM_COLUMNS = 1024, 128
#: Elements of one program of the shuffle: few, as all of them wait for the last one to finish cycle walking.
_SHUFFLE_TILE = 256


class TritonLauncher:
    """A :class:`~tnadapt.backends._kernels.gpu.launch_plans.Launcher` for torch tensors; it uses only their methods."""

    #: At least two tiles fit in a multiprocessor's shared memory, so that one computes while another waits for memory.
    #: A thread has 16 numbers of a tile, which leaves registers for the draws.
    tile_bytes = 1 << 15

    def empty(self, x: Any, *shape: int) -> Any:
        return x.new_empty(shape)

    def transform(
        self, x: Any, out: Any, length: int, step: Pass, scale: float, f: Drawn, load: str, store: str
    ) -> None:
        vectors = x.shape[0]
        grid = (step.tiles(vectors * length),)
        numbers = (vectors, x.shape[1], out.shape[1], _bits(scale))
        shape = {"STRIDE": step.stride, "BITS": step.bits, "ROWS": step.rows, "COLUMNS": step.columns}
        options = {"num_warps": warps(step), "enable_fp_fusion": False}
        if (load, store) == ("plain", "plain"):
            hadamard_pass[grid](x, out, *numbers, LENGTH=length, **shape, **options)
            return
        drawn_pass[grid](
            x, out, _gain(f, x), *numbers, f.group, f.seed, LENGTH=length, LOG_LENGTH=length.bit_length() - 1,
            PERIOD=f.period, LOAD=load, STORE=store, SIGNS=f.signs, KEPT=f.gain is not None, **shape, **options,
        )  # fmt: skip

    def gathered_sum(self, x: Any, f: Drawn) -> Any:
        vectors = x.shape[0]
        columns = min(f.period, _SUM_COLUMNS)
        rows = min(f.length // f.period, _SUM_TILE // columns)
        pieces = f.length // f.period // rows
        sums = x.new_empty((vectors, pieces, f.period))
        gathered_sum[(vectors * pieces * (f.period // columns),)](
            x, sums, _gain(f, x), f.group, f.seed, LENGTH=f.length, LOG_LENGTH=f.length.bit_length() - 1,
            PERIOD=f.period, ROWS=rows, COLUMNS=columns, KEPT=f.gain is not None, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        return sums


def warps(step: Pass) -> int:
    """Return the number of warps for a tile: sixteen points per thread, at most sixteen warps."""
    return max(1, min(16, step.rows * step.columns // 512))


def _gain(f: Drawn, x: Any) -> Any:
    """Return the kept normal numbers; another pointer, which is not read, if there are none."""
    return x if f.gain is None else f.gain


def _bits(scale: float) -> int:
    """Return the bits of a float64 as an int64, because Triton passes floats in single precision."""
    return int(struct.unpack("<q", struct.pack("<d", scale))[0])


_LAUNCHER = TritonLauncher()


def fwht(x: Any, length: int, scale: float, n_out: int) -> Any:
    """:func:`tnadapt.backends._kernels.gpu.launch_plans.fwht` by Triton."""
    return launch_plans.fwht(_LAUNCHER, x, length, scale, n_out)


def fastfood(x: Any, f: Drawn) -> Any:
    """:func:`tnadapt.backends._kernels.gpu.launch_plans.fastfood` by Triton."""
    return launch_plans.fastfood(_LAUNCHER, x, f)


def fastfood_adjoint(y: Any, f: Drawn) -> Any:
    """:func:`tnadapt.backends._kernels.gpu.launch_plans.fastfood_adjoint` by Triton."""
    return launch_plans.fastfood_adjoint(_LAUNCHER, y, f)


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
