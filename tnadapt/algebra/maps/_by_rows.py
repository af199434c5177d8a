"""Base class of maps to a matrix that compute any of its rows alone."""

from __future__ import annotations

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._map import Map

__all__ = ["ByRows"]


class ByRows(Map):
    """A map to a matrix Y of which a subclass computes rows: a slice costs the rows that it cuts."""

    two_sided = True
    shape: tuple[int, int]

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._rows(backend, x, 0, self.shape[0])

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        cols = self.shape[1]
        first, last = start // cols, -(-stop // cols)
        return self._rows(backend, x, first, last)[..., start - first * cols : stop - first * cols]

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        """Compute rows ``first`` to ``last`` of Y, flattened."""
        raise self._lacks("_rows")
