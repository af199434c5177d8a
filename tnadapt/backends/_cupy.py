"""The CuPy backend: the array API through array-api-compat, on a CUDA device."""

from __future__ import annotations

import re
from typing import Any

import array_api_compat.cupy as namespace
import cupy
import numpy as np

from tnadapt.errors import BackendError

from . import FFT_DTYPES, LAUNCHED_AT_ONCE, OPTIONAL, Array, Backend, Map, dft2_by_fft


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

    def write(self, out: Array, x: Array) -> None:
        cupy.copyto(out, x)

    def lacks(self, x: Array) -> frozenset[str]:
        return frozenset(OPTIONAL) - {"dft2"}

    def at_once(self, x: Array) -> int:
        return LAUNCHED_AT_ONCE

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
