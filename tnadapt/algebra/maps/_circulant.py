"""Circulant blocks: each block of the update is determined by its first row (C3A)."""

from __future__ import annotations

import dataclasses

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer, safe_repr

from ..folding import MAX_SIZE
from ._map import Map, Space
from ._map_settings import MapSettings

__all__ = ["Circulant", "CirculantMap"]


@dataclasses.dataclass(frozen=True)
class Circulant(MapSettings):
    """Circulant blocks: ``Y[m b + s, n b + t] = X[m, n, (t - s) mod b]``.

    Parameters
    ----------
    block : int
        b, the size of a block; divides the rows and columns of every weight.
    average : bool
        Whether to divide by the number of columns, as C3A's code and PEFT do.

    Raises
    ------
    ConfigError
        If the block is not an integer of at least 1, or average is not a boolean.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection.on_weights(tna.maps.Circulant(block=3), [(3, 3)])
    >>> f(np.array([1.0, 2.0, 3.0])).reshape(3, 3)
    array([[1., 2., 3.],
           [3., 1., 2.],
           [2., 3., 1.]])
    """

    block: int
    average: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", integer("Circulant's block", self.block, 1, MAX_SIZE, ConfigError))
        if not isinstance(self.average, bool):
            raise ConfigError(f"Circulant's average must be True or False; got {safe_repr(self.average)}")
        super().__post_init__()


class CirculantMap(Map):
    """``Y[m b + s, n b + t] = X[m, n, (t - s) mod b]``, divided by the number of columns if ``average``."""

    kind = "circulant"
    settings_class = Circulant
    settings: Circulant
    shape: tuple[int, int]
    two_sided = True

    @classmethod
    def fixes_length(cls, settings: Circulant) -> bool:
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: Circulant) -> Space:
        assert codomain.shape is not None
        rows, cols = codomain.shape
        if rows % settings.block or cols % settings.block:
            raise ConfigError(
                f"Circulant has block={settings.block}, which does not divide the {rows} rows and {cols} columns of a "
                "weight: give a common divisor of both"
            )
        return Space(rows * cols // settings.block)

    @property
    def _factor(self) -> float:
        return 1.0 / self.shape[1] if self.settings.average else 1.0

    def make(self, key: object) -> np.ndarray:
        """Return (t - s) mod b for each s and t; for "shifts" the element of a block with each difference and row."""
        b = self.settings.block
        places = np.arange(b)
        if key == "differences":
            found = (places[None, :] - places[:, None]) % b
        else:
            found = places[None, :] * b + (places[:, None] + places[None, :]) % b
        return found.reshape(-1).astype(np.int64)

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._block_rows(backend, x, 0, self.shape[0] // self.settings.block)

    def _block_rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        b, across = self.settings.block, self.shape[1] // self.settings.block
        batch = tuple(x.shape[:-1])
        kernels = backend.reshape(x[..., first * across * b : last * across * b], (*batch, last - first, across, b))
        blocks = backend.take(kernels, self.on(backend, "differences", x))
        blocks = backend.reshape(blocks, (*batch, last - first, across, b, b))
        found = backend.reshape(backend.moveaxis(blocks, -3, -2), (*batch, (last - first) * b * self.shape[1]))
        return found * self._factor if self.settings.average else found

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        length = self.settings.block * self.shape[1]
        first, last = start // length, -(-stop // length)
        return self._block_rows(backend, x, first, last)[..., start - first * length : stop - first * length]

    def adjoint(self, backend: Backend, y: Array) -> Array:
        b = self.settings.block
        down, across = self.shape[0] // b, self.shape[1] // b
        batch = tuple(y.shape[:-1])
        blocks = backend.moveaxis(backend.reshape(y, (*batch, down, b, across, b)), -2, -3)
        blocks = backend.reshape(blocks, (*batch, down, across, b * b))
        # Sum each difference (t - s) mod b over the rows s.
        sorted_blocks = backend.take(blocks, self.on(backend, "shifts", y))
        found = backend.sum(backend.reshape(sorted_blocks, (*batch, down, across, b, b)), axis=-1)
        found = backend.reshape(found, (*batch, self.n_in))
        return found * self._factor if self.settings.average else found

    def squared_norm(self) -> float:
        return self.n_out * self._factor**2

    def cost(self) -> int:
        return self.n_out if self.settings.average else 0

    def matrix(self) -> np.ndarray:
        b, cols = self.settings.block, self.shape[1]
        found = np.zeros((self.n_out, self.n_in))
        for row in range(self.shape[0]):
            for col in range(cols):
                kernel = (row // b) * (cols // b) + col // b
                found[row * cols + col, kernel * b + (col - row) % b] = 1.0
        return found / cols if self.settings.average else found
