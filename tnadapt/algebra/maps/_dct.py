"""The inverse cosine transform of a matrix (LoCA)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends.fixed_arrays import FixedArrays

from ._two_sided import TwoSided

__all__ = ["Dct2"]


class _Cosines(FixedArrays):
    """The transposed orthonormal DCT-II matrices; keys are their sizes."""

    def make(self, key: Any) -> np.ndarray:
        size = int(key)
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = ((2 * np.arange(size)[:, None] + 1) * np.arange(size)[None, :]) % (4 * size)
        found = np.cos(turns * (math.pi / (2 * size))) * math.sqrt(2.0 / size)
        found[:, 0] = 1.0 / math.sqrt(size)
        return np.asarray(found)


class Dct2(TwoSided):
    """``Y = Cᵀ X D``, with C and D the orthonormal DCT-II matrices of rows and columns: the inverse transform."""

    kind = "dct2"
    square = isometry = True
    matrices = _Cosines()

    @property
    def side_keys(self) -> Sequence[tuple[int, int]]:
        return [self.shape]

    def squared_norm(self) -> float:
        return float(self.n_out)

    def matrix(self) -> np.ndarray:
        from scipy.fft import idctn

        units = np.eye(self.n_in).reshape(self.n_in, *self.shape)
        return np.asarray(idctn(units, type=2, axes=(1, 2), norm="ortho")).reshape(self.n_in, self.n_out).T
