"""Repeat: a vector, repeated and cut; one side of :class:`tnadapt.algebra.maps.Tile`."""

from __future__ import annotations

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._map import Map

__all__ = ["Repeat"]

#: Up to so many repeats are concatenated; a longer list of arrays would take longer than a gather.
_CONCATENATED = 64


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

    @property
    def _times(self) -> int:
        return -(-self.n_out // self.n_in)

    def make(self, key: object) -> np.ndarray:
        """Return which element of x each element of y is."""
        return (np.arange(self.n_out) % self.n_in).astype(np.int64)

    def forward(self, backend: Backend, x: Array) -> Array:
        if self._times > _CONCATENATED:
            return backend.take(x, self.on(backend, "places", x), axis=-1)
        # Copies of whole runs take a third of the time of single elements.
        whole = backend.concat([x] * self._times, axis=-1)
        return whole if whole.shape[-1] == self.n_out else whole[..., : self.n_out]

    def adjoint(self, backend: Backend, y: Array) -> Array:
        whole = self._times * self.n_in
        padded = y if whole == self.n_out else backend.pad_last(y, whole)
        return backend.sum(backend.reshape(padded, (*y.shape[:-1], self._times, self.n_in)), axis=-2)

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        return np.asarray(np.eye(self.n_in)[self.make("places")])
