"""The real part of the inverse Fourier transform of a matrix (FourierFT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends.backend import FixedArrays

from ._two_sided import TwoSided

__all__ = ["Dft2"]


class _Waves(FixedArrays):
    """Cosines, sines and negated sines of ``2 π j k / size``, divided by ``size``; keys are (name, size)."""

    def make(self, key: Any) -> np.ndarray:
        name, size = key
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = np.outer(np.arange(size), np.arange(size)) % size
        angles = turns * (2.0 * math.pi / size)
        if name == "cos":
            return np.asarray(np.cos(angles) / size)
        return np.asarray(np.sin(angles) / (-size if name == "-sin" else size))


class Dft2(TwoSided):
    """``Y = Re(ifft2(X))`` for a real X, with the normalization of ``numpy.fft``: 1 / (rows * cols)."""

    kind = "dft2"
    square = True
    matrices = _Waves()

    @property
    def sides(self) -> Sequence[tuple[tuple[str, int], tuple[str, int]]]:
        # The real part of exp(i a) exp(i b): cos a cos b - sin a sin b.
        rows, cols = self.shape
        return [(("cos", rows), ("cos", cols)), (("-sin", rows), ("sin", cols))]

    @property
    def _self_conjugate(self) -> int:
        """Number of frequencies that are their own negatives; the others have the same cosine in pairs."""
        return math.gcd(2, self.shape[0]) * math.gcd(2, self.shape[1])

    def squared_norm(self) -> float:
        # The sum of cos² of all angles: half of them, and half the sum of the cosines of the doubled angles, which is
        # rows * cols for every frequency whose double is zero.
        return 0.5 * (1.0 + self._self_conjugate / self.n_out)

    def freedom(self) -> int:
        return (self.n_out + self._self_conjugate) // 2

    def matrix(self) -> np.ndarray:
        units = np.eye(self.n_in).reshape(self.n_in, *self.shape)
        return np.asarray(np.fft.ifft2(units, axes=(1, 2)).real).reshape(self.n_in, self.n_out).T
