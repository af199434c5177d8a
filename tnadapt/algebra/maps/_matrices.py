"""Maps that multiply by a matrix: random normal, given, circulant blocks (C3A), and repeated tiles (MiSS, MoRA)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from tnadapt.algebra import rng
from tnadapt.backends import Array, Backend
from tnadapt.errors import ConfigError

from ._map import BroughtMap, ByRows, Copying, Identity, Map, MapSettings, Space, sum_of_runs

# -- A dense map of independent normal numbers -------------------------------------------------------------------------


# A matrix of up to this many elements is drawn once and cached; a larger one is drawn in blocks at each use.
_KEPT = 1 << 24
_BLOCK = 1 << 22


class Normal(Map):
    """``y = N x``, where N has independent normal entries of variance 1 / n_out, so that ``FᵀF`` is about 1.

    Entry (i, j) is word ``i n_in + j`` of the stream with purpose 5. For inputs of up to some thousands of elements, as
    in NOLA: one call costs ``n_in n_out`` multiply-adds, and as many draws if the matrix has more than
    2**24 elements, which are then not kept.
    """

    kind = "normal"
    full_rank = True
    fixed = ("first",)

    def make(self, key: object) -> np.ndarray:
        """Draw a block of rows ``(start, stop)``; ``"first"`` is what is digested, up to 2**20 elements."""
        if key == "first":
            key = (0, max(1, min(self.n_out, (1 << 20) // self.n_in)))
        assert isinstance(key, tuple)
        start, stop = key
        drawn = rng.normals(self.seed, self.group, rng.PURPOSE["normal_map"], start * self.n_in, stop * self.n_in)
        wide = drawn.astype(np.float64) / math.sqrt(self.n_out)
        return wide.astype(np.float32).reshape(stop - start, self.n_in)

    def _blocks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the blocks of rows that cover a range, with edges that do not depend on the range."""
        if self.n_in * self.n_out <= _KEPT:
            return [(0, self.n_out)]
        step = max(1, _BLOCK // self.n_in)
        return [(row, min(row + step, self.n_out)) for row in range(start // step * step, stop, step)]

    def _block(self, backend: Backend, like: Array, block: tuple[int, int]) -> Array:
        keep = self.n_in * self.n_out <= _KEPT
        return backend.astype(self.on(backend, block, like, keep=keep), backend.dtype_name(like))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        parts = []
        for lo, hi in self._blocks(start, stop):
            block = self._block(backend, x, (lo, hi))[max(start - lo, 0) : stop - lo, :]
            parts.append(_row_times(backend, x, backend.matrix_transpose(block)))
        return backend.concat(parts, axis=-1)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        total = None
        for lo, hi in self._blocks(0, self.n_out):
            part = _row_times(backend, y[..., lo:hi], self._block(backend, y, (lo, hi)))
            total = part if total is None else total + part
        return total

    def squared_norm(self) -> float:
        return float(self.n_in)  # its expectation

    def cost(self) -> int:
        return self.n_in * self.n_out

    def matrix(self) -> np.ndarray:
        drawn = rng.normals(self.seed, self.group, rng.PURPOSE["normal_map"], 0, self.n_out * self.n_in)
        return np.float32(drawn.astype(np.float64) / math.sqrt(self.n_out)).astype(np.float64).reshape(self.n_out, -1)


def _row_times(backend: Backend, x: Array, matrix: Array) -> Array:
    """Multiply each vector of a batch by a matrix on its own, so that its bits do not depend on the batch."""
    product = backend.precise_matmul(backend.reshape(x, (*x.shape[:-1], 1, x.shape[-1])), matrix)
    return backend.reshape(product, (*x.shape[:-1], matrix.shape[-1]))


# -- A dense map that the caller gives ---------------------------------------------------------------------------------


class GivenMatrix(BroughtMap):
    """``y = G x`` with a given matrix, which files store in float32: ``given={"theta.matrix": G}``.

    For few parameters, with a P that was drawn elsewhere, such as that of a PEFT adapter.
    """

    kind = "given"
    brings = "matrix"
    fixed = ("matrix",)

    @property
    def brought_shape(self) -> tuple[int, ...]:
        return self.n_out, self.n_in

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal((self.n_out, self.n_in)).astype(np.float32)

    def make(self, key: object) -> np.ndarray:
        return self.brought

    def _rows(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        """Return rows of G in the dtype of ``x``."""
        return self.on(backend, "matrix", x, backend.dtype_name(x))[start:stop, :]

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return _row_times(backend, x, backend.matrix_transpose(self._rows(backend, x, start, stop)))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return _row_times(backend, y, self._rows(backend, y, 0, self.n_out))

    def squared_norm(self) -> float:
        return float(np.sum(self.brought.astype(np.float64) ** 2))

    def matrix(self) -> np.ndarray:
        return self.brought.astype(np.float64)


# -- Circulant blocks: each block is determined by its first row (C3A) -------------------------------------------------


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

    _sizes = ("block",)
    _flags = ("average",)


class CirculantMap(ByRows):
    """``Y[m b + s, n b + t] = X[m, n, (t - s) mod b]``, divided by the number of columns if ``average``."""

    kind = "circulant"
    settings_class = Circulant
    settings: Circulant
    _sized_by_settings = True

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
            index = (places[None, :] - places[:, None]) % b
        else:
            index = places[None, :] * b + (places[:, None] + places[None, :]) % b
        return index.reshape(-1).astype(np.int64)

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        b, cols = self.settings.block, self.shape[1]
        top, bottom = first // b, -(-last // b)  # of the blocks that the rows overlap
        batch, across = tuple(x.shape[:-1]), cols // b
        kernels = backend.reshape(x[..., top * cols : bottom * cols], (*batch, bottom - top, across, b))
        blocks = backend.take(kernels, self.on(backend, "differences", x))
        blocks = backend.reshape(blocks, (*batch, bottom - top, across, b, b))
        rows = backend.reshape(backend.moveaxis(blocks, -3, -2), (*batch, (bottom - top) * b * cols))
        rows = rows[..., (first - top * b) * cols : (last - top * b) * cols]
        return rows * self._factor if self.settings.average else rows

    def adjoint(self, backend: Backend, y: Array) -> Array:
        b = self.settings.block
        down, across = self.shape[0] // b, self.shape[1] // b
        batch = tuple(y.shape[:-1])
        blocks = backend.moveaxis(backend.reshape(y, (*batch, down, b, across, b)), -2, -3)
        blocks = backend.reshape(blocks, (*batch, down, across, b * b))
        # Sum each difference (t - s) mod b over the rows s.
        sorted_blocks = backend.take(blocks, self.on(backend, "shifts", y))
        sums = backend.sum(backend.reshape(sorted_blocks, (*batch, down, across, b, b)), axis=-1)
        sums = backend.reshape(sums, (*batch, self.n_in))
        return sums * self._factor if self.settings.average else sums

    def squared_norm(self) -> float:
        return self.n_out * self._factor**2

    def cost(self) -> int:
        return self.n_out if self.settings.average else 0

    def matrix(self) -> np.ndarray:
        b, cols = self.settings.block, self.shape[1]
        matrix = np.zeros((self.n_out, self.n_in))
        for row in range(self.shape[0]):
            for col in range(cols):
                kernel = (row // b) * (cols // b) + col // b
                matrix[row * cols + col, kernel * b + (col - row) % b] = 1.0
        return matrix / cols if self.settings.average else matrix


# -- Repeat: a vector, repeated and cut; one side of a tile ------------------------------------------------------------


#: Up to this many repeats are concatenated; for longer lists of arrays a gather is faster.
_CONCATENATED = 64


class Repeat(Copying):
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
        times = -(-self.n_out // self.n_in)
        if times > _CONCATENATED:
            return backend.take(x, self.on(backend, "places", x), axis=-1)
        # Copies of whole runs take a third of the time of single elements.
        whole = backend.concat([x] * times, axis=-1)
        return whole if whole.shape[-1] == self.n_out else whole[..., : self.n_out]

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return sum_of_runs(backend, y, self.n_in)

    def matrix(self) -> np.ndarray:
        return np.asarray(np.eye(self.n_in)[self.make("places")])


# -- Tile: a smaller matrix, repeated along rows and columns (MiSS, MoRA) ----------------------------------------------


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

    _sizes = ("rows", "cols")


class TileMap(Copying, ByRows):
    """``Y[i, j] = X[i mod rows, j mod cols]``."""

    kind = "tile"
    settings_class = Tile
    settings: Tile
    _sized_by_settings = True

    @classmethod
    def domain(cls, codomain: Space, settings: Tile) -> Space:
        assert codomain.shape is not None
        sizes = (settings.rows, settings.cols)
        for side, size, whole in zip(("rows", "cols"), sizes, codomain.shape, strict=True):
            if size is not None and size > whole:
                raise ConfigError(
                    f"Tile has {side}={size}, and a weight of {codomain.shape[0]}×{codomain.shape[1]} has {whole}: "
                    f"give at most {whole}"
                )
        rows, cols = (whole if size is None else size for size, whole in zip(sizes, codomain.shape, strict=True))
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

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        batch = tuple(x.shape[:-1])
        tiled = backend.reshape(x, (*batch, *self._tile))
        tiled = backend.take(tiled, self.on(backend, "rows", x)[first:last], axis=-2)
        tiled = backend.take(tiled, self.on(backend, "cols", x), axis=-1)
        return backend.reshape(tiled, (*batch, (last - first) * self.shape[1]))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        batch = tuple(y.shape[:-1])
        rows, cols = self._tile
        along_rows = sum_of_runs(backend, backend.reshape(y, (*batch, *self.shape)), cols)
        return sum_of_runs(backend, backend.reshape(along_rows, (*batch, self.shape[0] * cols)), rows * cols)

    def sides(self) -> Sequence[tuple[Map, Map]]:
        rows, cols = (
            Identity(size, whole) if size == whole else Repeat(size, whole)
            for size, whole in zip(self._tile, self.shape, strict=True)
        )
        return [(rows, cols)]

    def matrix(self) -> np.ndarray:
        rows, cols = self._tile
        row, col = np.indices(self.shape)
        return np.asarray(np.eye(self.n_in)[(row % rows * cols + col % cols).reshape(-1)])
