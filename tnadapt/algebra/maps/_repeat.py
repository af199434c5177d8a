"""Repeat: a vector, repeated and cut; one side of :class:`tnadapt.algebra.maps.Tile`."""

from __future__ import annotations

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._map import Map

__all__ = ["Repeat"]


class Repeat(Map):
    """``y[j] = x[j mod n_in]``. The adjoint sums the repeats of each element, and needs no gather.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import load_backend
    >>> Repeat(2, 5).adjoint(load_backend("numpy"), np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    array([9., 6.])
    """

    kind = "repeat"

    def make(self, key: object) -> np.ndarray:
        """Return which element of x each element of y is."""
        return (np.arange(self.n_out) % self.n_in).astype(np.int64)

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.take(x, self.on(backend, "places", x), axis=-1)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        times = -(-self.n_out // self.n_in)
        padded = y if times * self.n_in == self.n_out else backend.pad_last(y, times * self.n_in)
        return backend.sum(backend.reshape(padded, (*y.shape[:-1], times, self.n_in)), axis=-2)

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        return np.asarray(np.eye(self.n_in)[self.make("places")])
