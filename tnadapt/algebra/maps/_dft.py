"""The real part of the inverse Fourier transform of a matrix (FourierFT)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from ._two_sided import TwoSided

__all__ = ["Dft2"]

# How many multiply-adds of a matrix product take as long as one of an FFT, about, on the CPU.
_PRODUCTS_PER_STEP = 8


class _Waves(FixedArrays):
    """Cosines, sines and negated sines of ``2 π j k / size``, divided by the size; keys are (name, size)."""

    def make(self, key: Any) -> np.ndarray:
        name, size = key
        # Reduced modulo the period in integers, so that the cosine of a large argument loses nothing.
        turns = np.outer(np.arange(size), np.arange(size)) % size
        angles = turns * (2.0 * math.pi / size)
        if name == "cos":
            return np.asarray(np.cos(angles) / size)
        return np.asarray(np.sin(angles) / (-size if name == "-sin" else size))


class Dft2(TwoSided):
    """``Y = Re(ifft2(X))`` for a real X, with the normalization of ``numpy.fft``: 1 / (rows * cols).

    It is computed by the FFT of X's library, or by products with matrices of cosines and sines: the reference
    implementation, which is also used where a library has no FFT of X, and for sides with which it is faster. These are
    the ones with which an FFT has more than an eighth of the operations, such as primes below 200. The choice depends
    on the sides alone. A slice is cut from the whole by an FFT, which takes less time than the products of one row.
    """

    kind = "dft2"
    square = True
    even_columns = True  # but for at most four frequencies, which are their own negatives
    matrices = _Waves()

    @property
    def side_keys(self) -> Sequence[tuple[tuple[str, int], tuple[str, int]]]:
        # The real part of exp(i a) exp(i b): cos a cos b - sin a sin b.
        rows, cols = self.shape
        return [(("cos", rows), ("cos", cols)), (("-sin", rows), ("sin", cols))]

    def forward(self, backend: Backend, x: Array) -> Array:
        found = self._by_fft(backend, x)
        return self.forward_plain(backend, x) if found is None else found

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self.forward(backend, y)  # the matrix is symmetric

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        found = self._by_fft(backend, x)
        return super().slice(backend, x, start, stop) if found is None else found[..., start:stop]

    def forward_plain(self, backend: Backend, x: Array) -> Array:
        """Compute F by matrix products: the reference implementation for every FFT."""
        return super().forward(backend, x)

    def _by_fft(self, backend: Backend, x: Array) -> Array | None:
        if not self._fft_is_faster:
            return None
        matrices = backend.reshape(x, (*x.shape[:-1], *self.shape))
        found = backend.dft2(matrices, functools.partial(self._plain_matrices, backend))
        return None if found is None else backend.reshape(found, x.shape)

    def _plain_matrices(self, backend: Backend, matrices: Array) -> Array:
        batch = matrices.shape[:-2]
        return backend.reshape(
            self.forward_plain(backend, backend.reshape(matrices, (*batch, self.n_in))), (*batch, *self.shape)
        )

    @property
    def _fft_is_faster(self) -> bool:
        return _PRODUCTS_PER_STEP * self._fft_cost <= super().cost()

    @property
    def _fft_cost(self) -> int:
        # A transform of real numbers has half of the products.
        return math.ceil(self.n_in * sum(map(_products, self.shape)) / 2)

    def cost(self) -> int:
        return self._fft_cost if self._fft_is_faster else super().cost()

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


def _products(size: int) -> float:
    """Return the products per element of an FFT of complex numbers.

    About p for each prime factor p of the length (Cooley & Tukey, 1965), or three transforms of a power of two of at
    least twice the length (Bluestein, 1970), if these have fewer.
    """
    bits = (2 * size - 2).bit_length()
    total, left, factor = 0, size, 2
    while factor * factor <= left:
        if left % factor:
            factor += 1
        else:
            total, left = total + factor, left // factor
    total += left if left > 1 else 0
    return min(total, 6 * bits * (1 << bits) / size)
