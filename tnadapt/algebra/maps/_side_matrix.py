"""A product with a fixed matrix: one side of a transform of the rows and columns of a matrix."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from ._map import Map

__all__ = ["SideMatrix"]


class SideMatrix(Map):
    """``y = M x`` with a matrix M, ``(n_out, n_in)``, that several maps share.

    Parameters
    ----------
    matrices : FixedArrays
    key : hashable
        Of M in ``matrices``.
    n_in, n_out : int
    """

    kind = "side matrix"

    def __init__(self, matrices: FixedArrays, key: Hashable, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out)
        self._matrices, self._key = matrices, key

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.precise_matmul(x, backend.matrix_transpose(self._placed(backend, x)))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return backend.precise_matmul(y, self._placed(backend, y))

    def _placed(self, backend: Backend, like: Array) -> Array:
        return self._matrices.on(backend, self._key, like, backend.dtype_name(like))

    def matrix(self) -> np.ndarray:
        return np.asarray(self._matrices.host(self._key))
