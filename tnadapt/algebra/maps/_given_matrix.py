"""A dense map that the caller brings."""

from __future__ import annotations

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._brought import BroughtMap

__all__ = ["GivenMatrix"]


class GivenMatrix(BroughtMap):
    """``y = G x`` with a given matrix, which files store in float32: ``given={"theta.matrix": G}``.

    For few parameters, with a P that was drawn elsewhere, such as that of PEFT's TinyLoRA.
    """

    kind = "given"
    brings = "matrix"
    fixed = ("matrix",)

    @property
    def brought_shape(self) -> tuple[int, ...]:
        return self.n_out, self.n_in

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((self.n_out, self.n_in)).astype(np.float32)

    def make(self, key: object) -> np.ndarray:
        return self.brought

    def _rows(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """Return rows of G in the dtype of ``x``."""
        return self.on(backend, "matrix", x, backend.dtype_name(x))[start:stop, :]

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.slice(backend, x, 0, self.n_out)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        row = backend.reshape(x, (*x.shape[:-1], 1, self.n_in))
        found = backend.precise_matmul(row, backend.matrix_transpose(self._rows(backend, x, start, stop)))
        return backend.reshape(found, (*x.shape[:-1], stop - start))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        row = backend.reshape(y, (*y.shape[:-1], 1, self.n_out))
        found = backend.precise_matmul(row, self._rows(backend, y, 0, self.n_out))
        return backend.reshape(found, (*y.shape[:-1], self.n_in))

    def squared_norm(self) -> float:
        return float(np.sum(self.brought.astype(np.float64) ** 2))

    def matrix(self) -> np.ndarray:
        return self.brought.astype(np.float64)
