"""The real part of the inverse Fourier transform of a matrix (FourierFT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array, FixedArrays

from ._two_sided import TwoSided

__all__ = ["Dft2"]

# Shorter sides are transformed by one product: two thin ones, with the twiddle factors between, take as long.
_SHORT = 1 << 10


class _Waves(FixedArrays):
    """Cosines, sines and negated sines of ``2 π j k / period``; keys are (name, j's, k's, period, divisor)."""

    def make(self, key: Any) -> np.ndarray:
        name, rows, cols, period, divisor = key
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = np.outer(np.arange(rows), np.arange(cols)) % period
        angles = turns * (2.0 * math.pi / period)
        if name == "cos":
            return np.asarray(np.cos(angles) / divisor)
        return np.asarray(np.sin(angles) / (-divisor if name == "-sin" else divisor))


class Dft2(TwoSided):
    """``Y = Re(ifft2(X))`` for a real X, with the normalization of ``numpy.fft``: 1 / (rows * cols).

    It is computed by products with matrices of cosines and sines, a slice with the rows of them that it needs. Long
    sides, of length ``n1 n2``, are transformed in two steps, with matrices of ``n1`` and of ``n2`` rows.
    """

    kind = "dft2"
    square = True
    matrices = _Waves()

    @property
    def sides(self) -> Sequence[tuple[tuple[str, int, int, int, int], tuple[str, int, int, int, int]]]:
        # The real part of exp(i a) exp(i b): cos a cos b - sin a sin b.
        rows, cols = ((size, size, size, size) for size in self.shape)
        return [(("cos", *rows), ("cos", *cols)), (("-sin", *rows), ("sin", *cols))]

    def forward(self, backend: Backend, x: Array) -> Array:
        batch = tuple(x.shape[:-1])
        re, im = self._transformed(backend, backend.reshape(x, (*batch, *self.shape)), None)
        re, _ = self._transformed(backend, backend.matrix_transpose(re), backend.matrix_transpose(im), real=True)
        return backend.reshape(backend.matrix_transpose(re), (*batch, self.n_out))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self.forward(backend, y)  # the matrix is symmetric

    def _transformed(self, backend: Backend, re: Array, im: Array | None, real: bool = False) -> tuple[Array, Any]:
        """Compute the inverse transform along the last axis, of numbers without an imaginary part if ``im`` is None.

        The imaginary part of the result is None if only the real one is asked for. Entry k = n2 k1 + k2 contributes to
        entry a = a1 + n1 a2 by the product of ``w(a1 k1 / n1)``, ``w(a1 k2 / n)`` and ``w(a2 k2 / n2)``, with
        ``w(t) = exp(2 π i t)`` (Cooley & Tukey, 1965).
        """
        size = re.shape[-1]
        first = _divisor(size)
        last = size // first
        if first == 1:
            return self._product(backend, re, im, size, size, real)
        batch = tuple(re.shape[:-1])
        re, im = (
            None if part is None else backend.moveaxis(backend.reshape(part, (*batch, first, last)), -2, -1)
            for part in (re, im)
        )
        re, im = self._product(backend, re, im, first, size, False)
        cos, sin = (self._side(backend, (name, last, first, size, 1), re) for name in ("cos", "sin"))
        re, im = re * cos - im * sin, re * sin + im * cos
        re, im = self._product(backend, backend.matrix_transpose(re), backend.matrix_transpose(im), last, 1, real)
        re, im = (
            None if part is None else backend.reshape(backend.matrix_transpose(part), (*batch, size))
            for part in (re, im)
        )
        return re, im

    def _product(
        self, backend: Backend, re: Array, im: Array | None, size: int, divisor: int, real: bool
    ) -> tuple[Array, Any]:
        cos, sin = (self._side(backend, (name, size, size, size, divisor), re) for name in ("cos", "sin"))
        if im is None:
            return backend.matmul(re, cos), None if real else backend.matmul(re, sin)
        found = backend.matmul(re, cos) - backend.matmul(im, sin)
        return found, None if real else backend.matmul(re, sin) + backend.matmul(im, cos)

    def cost(self) -> int:
        # The first side has no imaginary part before it, and only the real part of the second is wanted.
        (rows, cols), total = self.shape, 0
        for size, (before, after) in ((cols, (2, 4)), (rows, (4, 2))):
            first = _divisor(size)
            total += 2 * size if first == 1 else before * first + 4 + after * (size // first)
        return total * rows * cols

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


def _divisor(size: int) -> int:
    """Return the largest divisor up to the square root; 1 for a short side, and where it would save little."""
    if size <= _SHORT:
        return 1
    found = next(number for number in range(math.isqrt(size), 0, -1) if size % number == 0)
    return found if found > 4 else 1
