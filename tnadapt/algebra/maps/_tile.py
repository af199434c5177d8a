"""Tile: a smaller matrix, repeated along rows and columns (MiSS, MoRA)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer

from ..folding import MAX_SIZE
from ._identity import Identity
from ._map import Map, Space
from ._map_settings import MapSettings
from ._repeat import Repeat

__all__ = ["Tile", "TileMap"]


@dataclasses.dataclass(frozen=True)
class Tile(MapSettings):
    """A smaller matrix, repeated along rows and columns: ``Y[i, j] = X[i mod rows, j mod cols]``.

    Parameters
    ----------
    rows, cols : int, optional
        Size of X; by default that of the weight, which is then not repeated along this side. The last repeat is cut
        if they do not divide the weight's size.

    Raises
    ------
    ConfigError
        If a size is not an integer of at least 1.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection.on_weights(tna.maps.Tile(cols=2), [(2, 5)])
    >>> f(np.array([1.0, 2.0, 3.0, 4.0])).reshape(2, 5)
    array([[1., 2., 1., 2., 1.],
           [3., 4., 3., 4., 3.]])
    """

    rows: int | None = None
    cols: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "cols"):
            given = getattr(self, name)
            if given is not None:
                object.__setattr__(self, name, integer(f"Tile's {name}", given, 1, MAX_SIZE, ConfigError))
        super().__post_init__()


class TileMap(Map):
    """``Y[i, j] = X[i mod rows, j mod cols]``."""

    kind = "tile"
    settings_class = Tile
    settings: Tile
    shape: tuple[int, int]
    two_sided = True

    @classmethod
    def fixes_length(cls, settings: Tile) -> bool:
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: Tile) -> Space:
        assert codomain.shape is not None
        given = (settings.rows, settings.cols)
        for side, size, whole in zip(("rows", "cols"), given, codomain.shape, strict=True):
            if size is not None and size > whole:
                raise ConfigError(
                    f"Tile has {side}={size}, and a weight of {codomain.shape[0]}×{codomain.shape[1]} has {whole}: "
                    f"give at most {whole}"
                )
        rows, cols = (whole if size is None else size for size, whole in zip(given, codomain.shape, strict=True))
        return Space(rows * cols, (rows, cols))

    @property
    def _tile(self) -> tuple[int, int]:
        shape = self.domain(Space(self.n_out, self.shape), self.settings).shape
        assert shape is not None
        return shape

    def make(self, key: object) -> np.ndarray:
        """Return which element of a row of X each column of Y is, or which row of X each row of Y is."""
        side = 0 if key == "rows" else 1
        return (np.arange(self.shape[side]) % self._tile[side]).astype(np.int64)

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._rows(backend, x, 0, self.shape[0])

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        batch = tuple(x.shape[:-1])
        found = backend.reshape(x, (*batch, *self._tile))
        found = backend.take(found, self.on(backend, "rows", x)[first:last], axis=-2)
        found = backend.take(found, self.on(backend, "cols", x), axis=-1)
        return backend.reshape(found, (*batch, (last - first) * self.shape[1]))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        cols = self.shape[1]
        first, last = start // cols, -(-stop // cols)
        return self._rows(backend, x, first, last)[..., start - first * cols : stop - first * cols]

    def adjoint(self, backend: Backend, y: Array) -> Array:
        batch = tuple(y.shape[:-1])
        rows, cols = self._tile
        down, across = -(-self.shape[0] // rows), -(-self.shape[1] // cols)
        found = backend.pad_last(backend.reshape(y, (*batch, *self.shape)), across * cols)
        found = backend.sum(backend.reshape(found, (*batch, self.shape[0], across, cols)), axis=-2)
        found = backend.reshape(found, (*batch, self.shape[0] * cols))
        found = backend.pad_last(found, down * rows * cols)
        return backend.sum(backend.reshape(found, (*batch, down, rows * cols)), axis=-2)

    def sides(self) -> Sequence[tuple[Map, Map]]:
        rows, cols = (
            Identity(size, whole) if size == whole else Repeat(size, whole)
            for size, whole in zip(self._tile, self.shape, strict=True)
        )
        return [(rows, cols)]

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        rows, cols = self._tile
        whole = np.tile(
            np.arange(rows * cols).reshape(rows, cols),
            [-(-a // b) for a, b in zip(self.shape, (rows, cols), strict=True)],
        )
        cut = whole[: self.shape[0], : self.shape[1]].reshape(-1)
        return np.asarray(np.eye(self.n_in)[cut])
