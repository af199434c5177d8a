"""Launcher of CUDA C kernels, for arrays of a library that compiles them on first use (CuPy, by NVRTC)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import numpy as np

from . import launch_plans
from .launch_plans import Drawn
from .passes import Pass

__all__ = ["OPTIONS", "CudaLauncher", "Drawn", "source"]

#: Options for NVRTC. Fused multiply-adds would change the last bits of the draws.
OPTIONS = ("--std=c++17", "-fmad=false")

_THREADS = 512
_REAL = {4: "float", 8: "double"}
#: Number of repeats that one thread of the gathering sum adds: enough to leave few partial sums, few enough that even a
#: short period keeps the device busy.
_SUM_ROWS = 16


@functools.cache
def source(itemsize: int) -> str:
    """Return the source of the program for numbers with that many bytes."""
    folder = resources.files(__package__) / "cuda"
    parts = [f"typedef {_REAL[itemsize]} REAL;\n"]
    parts += [(folder / name).read_text(encoding="utf-8") for name in ("draws.cuh", "passes.cu")]
    return "\n".join(parts)


class CudaLauncher:
    """A :class:`~tnadapt.backends._kernels.gpu.launch_plans.Launcher` that runs CUDA C kernels.

    Parameters
    ----------
    run : callable
        ``run(x, name, blocks, threads, arguments)`` runs a kernel of the program for x's dtype on x's device;
        arguments are arrays and NumPy scalars.
    empty : callable
        ``empty(x, shape)``: a new array like x.
    """

    #: With its padding, less than the 48 KiB of shared memory that a block may use by default.
    tile_bytes = 1 << 15

    def __init__(
        self, run: Callable[[Any, str, int, int, tuple[Any, ...]], None], empty: Callable[[Any, tuple[int, ...]], Any]
    ) -> None:
        self._run, self._empty = run, empty

    def empty(self, x: Any, *shape: int) -> Any:
        return self._empty(x, shape)

    def transform(
        self, x: Any, out: Any, length: int, step: Pass, scale: float, f: Drawn, load: str, store: str
    ) -> None:
        vectors = x.shape[0]
        points = step.rows * step.columns
        logs = (length, f.period, step.stride, 1 << step.bits, step.rows, step.columns)
        arguments = (
            x, out, np.int64(vectors), np.int64(x.shape[1]), np.int64(out.shape[1]), np.float64(scale),
            np.uint32(f.group), np.uint64(f.seed), np.int32(f.signs),
            *(np.int32(number.bit_length() - 1) for number in logs),
        )  # fmt: skip
        # Each thread processes sixteen points at a time.
        threads = max(32, min(_THREADS, points // 16))
        self._run(x, f"pass_{load}_{store}", step.tiles(vectors * length), threads, arguments)

    def gathered_sum(self, x: Any, f: Drawn) -> Any:
        repeats = f.length // f.period
        rows = min(repeats, _SUM_ROWS)
        sums = self._empty(x, (x.shape[0], repeats // rows, f.period))
        total = x.shape[0] * repeats // rows * f.period
        arguments = (
            x, sums, np.int64(total), np.uint32(f.group), np.uint64(f.seed), np.int32(f.length.bit_length() - 1),
            np.int32(f.period.bit_length() - 1), np.int32(rows),
        )  # fmt: skip
        self._run(x, "gathered_sum", -(-total // 1024), 256, arguments)
        return sums

    def fwht(self, x: Any, length: int, scale: float, n_out: int) -> Any:
        """:func:`tnadapt.backends._kernels.gpu.launch_plans.fwht` by CUDA C."""
        return launch_plans.fwht(self, x, length, scale, n_out)

    def fastfood(self, x: Any, f: Drawn) -> Any:
        """:func:`tnadapt.backends._kernels.gpu.launch_plans.fastfood` by CUDA C."""
        return launch_plans.fastfood(self, x, f)

    def fastfood_adjoint(self, y: Any, f: Drawn) -> Any:
        """:func:`tnadapt.backends._kernels.gpu.launch_plans.fastfood_adjoint` by CUDA C."""
        return launch_plans.fastfood_adjoint(self, y, f)

    def shuffle(self, x: Any, seed: int, group: int, inverse: bool = False) -> Any:
        """Compute ``x[:, perm]`` of a contiguous x, for the fixed permutation of its columns or the inverse."""
        vectors, size = x.shape
        out = self._empty(x, (vectors, size))
        arguments = (
            x, out, np.int64(vectors * size), np.int64(size), np.uint32(group), np.uint64(seed),
            np.int32((size - 1).bit_length()), np.int32(inverse),
        )  # fmt: skip
        if vectors:
            self._run(x, "shuffle", -(-vectors * size // 256), 256, arguments)
        return out
