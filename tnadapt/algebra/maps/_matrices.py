"""A dense map of independent normal numbers."""

from __future__ import annotations

import math

import numpy as np

from tnadapt.algebra import rng
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError

from ._map import Map

__all__ = [
    "BroughtMap",
    "GivenMatrix",
    "Normal",
]


# -- A dense map of independent normal numbers -------------------------------------------------------------------------


# A matrix of up to this many elements is drawn once and kept; a larger one is drawn in blocks at each use.
_KEPT = 1 << 24
_BLOCK = 1 << 22


class Normal(Map):
    """``y = N x``, where N has independent normal entries of variance 1 / n_out, so that ``FᵀF`` is about 1.

    Entry (i, j) is word ``i n_in + j`` of the stream with purpose 5. For inputs of up to some thousands of elements, as
    in TinyLoRA and NOLA: one call costs ``n_in n_out`` multiply-adds, and as many draws if the matrix has more than
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
        """Blocks of rows that cover a range; their edges do not depend on it."""
        if self.n_in * self.n_out <= _KEPT:
            return [(0, self.n_out)]
        step = max(1, _BLOCK // self.n_in)
        return [(row, min(row + step, self.n_out)) for row in range(start // step * step, stop, step)]

    def _block(self, backend: Backend, like: Array, block: tuple[int, int]) -> Array:
        keep = self.n_in * self.n_out <= _KEPT
        return backend.astype(self.on(backend, block, like, keep=keep), backend.dtype_name(like))

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.slice(backend, x, 0, self.n_out)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        row = backend.reshape(x, (*x.shape[:-1], 1, self.n_in))
        parts = []
        for lo, hi in self._blocks(start, stop):
            block = self._block(backend, x, (lo, hi))[max(start - lo, 0) : stop - lo, :]
            made = backend.precise_matmul(row, backend.matrix_transpose(block))
            parts.append(backend.reshape(made, (*x.shape[:-1], block.shape[0])))
        return backend.concat(parts, axis=-1)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        total = None
        for lo, hi in self._blocks(0, self.n_out):
            row = backend.reshape(y[..., lo:hi], (*y.shape[:-1], 1, hi - lo))
            part = backend.reshape(
                backend.precise_matmul(row, self._block(backend, y, (lo, hi))), (*y.shape[:-1], self.n_in)
            )
            total = part if total is None else total + part
        return total

    def squared_norm(self) -> float:
        return float(self.n_in)  # its expectation

    def cost(self) -> int:
        return self.n_in * self.n_out

    def matrix(self) -> np.ndarray:
        rows = [
            rng.normals(self.seed, self.group, rng.PURPOSE["normal_map"], row * self.n_in, (row + 1) * self.n_in)
            for row in range(self.n_out)
        ]
        return np.asarray(np.float32(np.asarray(rows, np.float64) / math.sqrt(self.n_out)), np.float64)


# -- Base class of maps before the network with an array that the caller brings ----------------------------------------


class BroughtMap(Map):
    """A map with one array that the caller brings and files store; ``Config.before`` takes it, alone.

    Attributes
    ----------
    brings : str
        Name of the array: a plan calls it ``theta.`` and this name.
    """

    brings: str = ""
    _brought: np.ndarray | None = None

    @property
    def brought_shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        raise self._lacks("brought_shape")

    def bring(self, array: np.ndarray, label: str = "the array") -> None:
        """Set the array; raise a ConfigError or ShapeError that names it by ``label`` if it does not fit.

        Parameters
        ----------
        array : ndarray, shape ``brought_shape``
            Finite float32 numbers.
        label : str
        """
        if array.shape != self.brought_shape:
            raise ShapeError(f"{label} has shape {array.shape}; expected {self.brought_shape}")
        self.check(array, label)
        self._brought = array
        self.kept.clear()

    def check(self, array: np.ndarray, label: str) -> None:
        """Raise a ConfigError if the values do not fit. Default: all do."""

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random array that fits, for what depends on shapes alone."""
        raise self._lacks("stand_in(rng)")

    @property
    def brought(self) -> np.ndarray:
        """The array."""
        if self._brought is None:
            raise ConfigError(
                f"map {self.kind!r} has no {self.brings} yet, an array of shape {self.brought_shape}: use "
                f"Config(before={self.kind!r}), whose plan takes it as given={{'theta.{self.brings}': array}}"
            )
        return self._brought


# -- A dense map that the caller brings --------------------------------------------------------------------------------


class GivenMatrix(BroughtMap):
    """``y = G x`` with a given matrix, which files store in float32: ``given={"theta.matrix": G}``.

    For few parameters, with a P that was drawn elsewhere, such as that of PEFT's TinyLoRA.
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

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.slice(backend, x, 0, self.n_out)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        row = backend.reshape(x, (*x.shape[:-1], 1, self.n_in))
        found = backend.precise_matmul(row, backend.matrix_transpose(self._rows(backend, x, start, stop)))
        return backend.reshape(found, (*x.shape[:-1], stop - start))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        row = backend.reshape(y, (*y.shape[:-1], 1, self.n_out))
        found = backend.precise_matmul(row, self._rows(backend, y, 0, self.n_out))
        return backend.reshape(found, (*y.shape[:-1], self.n_in))

    def squared_norm(self) -> float:
        return float(np.sum(self.brought.astype(np.float64) ** 2))

    def matrix(self) -> np.ndarray:
        return self.brought.astype(np.float64)
