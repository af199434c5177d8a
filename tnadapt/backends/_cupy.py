"""CuPy: the array API through array-api-compat, on a CUDA device."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import array_api_compat.cupy as namespace
import cupy
import numpy as np

from tnadapt.errors import BackendError

from ._dft2 import FFT_DTYPES, dft2_by_fft
from ._kernels.gpu.cuda_launcher import OPTIONS, CudaLauncher, Drawn, source
from .backend import OPTIONAL, Array, Backend, Map


class CupyBackend(Backend):
    """CuPy arrays on the current CUDA device, or on the device of an existing array."""

    name = "cupy"
    types = (cupy.ndarray,)

    def __init__(self) -> None:
        super().__init__(namespace)

    def owns(self, x: Any) -> bool:
        return isinstance(x, cupy.ndarray)

    def usable(self) -> bool:
        try:
            return bool(cupy.cuda.runtime.getDeviceCount() > 0)
        except cupy.cuda.runtime.CUDARuntimeError:
            return False

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        with self._device(device):
            return cupy.array(array, dtype=None if dtype is None else self.dtype(dtype))

    def constant(self, array: np.ndarray, device: Any) -> Array:
        with self._device(device):
            return cupy.asarray(array)

    def to_numpy(self, x: Array) -> np.ndarray:
        return np.asarray(cupy.asnumpy(x))

    def lacks(self, x: Array) -> frozenset[str]:
        return frozenset(set(OPTIONAL) - {"dft2"} if cupy.cuda.runtime.is_hip else {"gradient"})

    def fwht(self, x: Array, scale: float, axis: int, fallback: Map) -> Array | None:
        if not _has_kernels(x):
            return None
        rows, batch = _rows(cupy.moveaxis(x, axis, -1))
        length = x.shape[axis]
        found = _LAUNCHER.fwht(rows, length, scale, length)
        return cupy.moveaxis(found.reshape(*batch, length), -1, axis)

    def fastfood(self, x: Array, draws: Any, n_in: int, adjoint: bool, fallback: tuple[Map, Map]) -> Array | None:
        if not _has_kernels(x):
            return None
        f = Drawn.of(draws, n_in)
        rows, batch = _rows(x)
        found = _LAUNCHER.fastfood_adjoint(rows, f) if adjoint else _LAUNCHER.fastfood(rows, f)
        return found.reshape(*batch, found.shape[-1])

    def shuffle(self, x: Array, recipe: str, inverse: bool, fallback: tuple[Map, Map]) -> Array | None:
        if not _has_kernels(x):
            return None
        seed, group = map(int, recipe.split())
        rows, _ = _rows(x)
        return _LAUNCHER.shuffle(rows, seed, group, inverse).reshape(x.shape)

    def dft2(self, x: Array, fallback: Map) -> Array | None:
        return dft2_by_fft(self.xp, x) if self.dtype_name(x) in FFT_DTYPES and x.size else None

    def _device(self, device: Any) -> Any:
        if device is None:
            return cupy.cuda.Device()
        if isinstance(device, str):
            match = re.fullmatch(r"(?:cuda|gpu)(?::(\d+))?", device)
            if match is None:
                raise BackendError(f"CuPy arrays live on 'cuda' or 'cuda:N'; got device {device!r}")
            device = int(match[1] or 0)
        return device if isinstance(device, cupy.cuda.Device) else cupy.cuda.Device(device)


def _has_kernels(x: Array) -> bool:
    # Not on AMD devices, whose compiler rounds differently.
    return x.dtype in (np.float32, np.float64) and not cupy.cuda.runtime.is_hip


def _rows(x: Array) -> tuple[Array, tuple[int, ...]]:
    """Return x as a contiguous (vectors, n) array, and the shape of its batch."""
    batch = x.shape[:-1]
    return cupy.ascontiguousarray(x.reshape(math.prod(batch), x.shape[-1])), batch


@functools.cache
def _program(itemsize: int, device: int) -> Any:
    return cupy.RawModule(code=source(itemsize), options=OPTIONS, backend="nvrtc")


def _run(x: Array, name: str, blocks: int, threads: int, arguments: tuple[Any, ...]) -> None:
    with x.device:
        _program(x.itemsize, x.device.id).get_function(name)((blocks,), (threads,), arguments)


def _empty(x: Array, shape: tuple[int, ...]) -> Array:
    with x.device:
        return cupy.empty(shape, x.dtype)


_LAUNCHER = CudaLauncher(_run, _empty)
