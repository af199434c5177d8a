"""Scatter: a few values at seeded or given positions of a vector that is zero elsewhere."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer, safe_repr

from .. import rng
from ..folding import MAX_SIZE
from ._map import Map, Space
from ._map_settings import MapSettings

__all__ = ["Scatter", "ScatterMap"]

# An adapter file bounds the length of its config, which holds the positions as decimal numbers.
_MOST_DIGITS = 50_000


@dataclasses.dataclass(frozen=True)
class Scatter(MapSettings):
    """Values at distinct positions; every other element is zero.

    Parameters
    ----------
    size : int, optional
        Number of values; by default, the number of positions given.
    positions : tuple of int, optional
        The position of each value in the output. By default they are seeded: the first ``size`` elements of
        :func:`tnadapt.algebra.rng.permutation` of the output's length (purpose 1).

    Raises
    ------
    ConfigError
        If neither is given, or positions are not ``size`` distinct integers of at least 0.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection(tna.maps.Scatter(positions=(4, 0)), n_out=6)
    >>> f(np.array([1.0, 2.0]))
    array([2., 0., 0., 0., 1., 0.])
    >>> tna.Projection(tna.maps.Scatter(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([0., 0., 0., 2., 0., 1.])
    """

    size: int | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.positions is None and self.size is None:
            raise ConfigError("Scatter needs the number of values, Scatter(size=1000), or their positions")
        if self.size is not None:
            object.__setattr__(self, "size", integer("Scatter's size", self.size, 1, MAX_SIZE, ConfigError))
        if self.positions is not None:
            object.__setattr__(self, "positions", self._checked_positions(self.positions))
            object.__setattr__(self, "size", len(self.positions))
        super().__post_init__()

    def _checked_positions(self, given: Any) -> tuple[int, ...]:
        if not isinstance(given, (tuple, list, np.ndarray)) or getattr(given, "shape", given) == () or not len(given):
            raise ConfigError(f"Scatter's positions must be a tuple of integers, or None; got {safe_repr(given)}")
        found = tuple(integer("one of Scatter's positions", place, 0, MAX_SIZE - 1, ConfigError) for place in given)
        if len(set(found)) < len(found):
            (twice, _), *_ = collections.Counter(found).most_common(1)
            raise ConfigError(f"Scatter's positions must be distinct; {twice} is given twice or more often")
        if self.size not in (None, len(found)):
            raise ConfigError(f"Scatter has size={self.size} and {len(found)} positions: leave size out")
        if sum(len(str(place)) + 1 for place in found) > _MOST_DIGITS:
            raise ConfigError(
                f"Scatter's {len(found)} positions have more digits than an adapter file's config may hold "
                f"({_MOST_DIGITS}): use seeded positions, Scatter(size={len(found)})"
            )
        return found


class ScatterMap(Map):
    """``y[positions[i]] = x[i]``, and 0 elsewhere."""

    kind = "scatter"
    settings_class = Scatter
    settings: Scatter
    fixed = ("positions",)
    exact_in_batches = True

    @classmethod
    def fixes_length(cls, settings: Scatter) -> bool:
        return True

    @classmethod
    def domain(cls, codomain: Space, settings: Scatter) -> Space:
        assert settings.size is not None  # or the positions set it
        if settings.size > codomain.length:
            raise ConfigError(
                f"Scatter has size={settings.size}, more positions than places: its output has {codomain.length} "
                f"elements; give a size of at most {codomain.length}"
            )
        if settings.positions is not None and max(settings.positions) >= codomain.length:
            raise ConfigError(
                f"Scatter's position {max(settings.positions)} is beyond its output of {codomain.length} elements, "
                f"whose positions are 0 to {codomain.length - 1}"
            )
        return Space(settings.size)

    @property
    def samples(self) -> bool:
        return self.settings.positions is None

    @property
    def _invertible(self) -> bool:
        """Whether the value at a position is known without all positions."""
        return self.settings.positions is None

    def make(self, key: object) -> np.ndarray:
        if key == "positions":
            if self.settings.positions is not None:
                return np.array(self.settings.positions, np.int64)
            return rng.permutation(self.n_out, self.seed, self.group, 0, self.n_in)
        if key == "sources":
            return self._sources(0, self.n_out)
        assert isinstance(key, tuple)
        return self._sources(*key)

    def _sources(self, start: int, stop: int) -> np.ndarray:
        """Return which element of x each of these elements of y is; ``n_in``, for a zero that is appended, if none."""
        positions = self.kept.get("positions")
        if positions is None and (not self._invertible or stop - start == self.n_out):
            positions = self.make("positions")
        if positions is None:  # a slice: drawn without the rest
            inverse = rng.permutation(self.n_out, self.seed, self.group, start, stop, inverse=True)
            found = np.minimum(inverse, self.n_in)
        else:
            found = np.full(stop - start, self.n_in)
            inside = np.flatnonzero((start <= positions) & (positions < stop))
            found[positions[inside] - start] = inside
        return found.astype(np.int32) if self.n_in < 1 << 31 else found

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.take(backend.pad_last(x, self.n_in + 1), self.on(backend, "sources", x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return backend.take(y, self.on(backend, "positions", y))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        if "sources" in self.kept:
            sources = self.on(backend, "sources", x)[start:stop]
        else:
            sources = self.on(backend, (start, stop), x, keep=False)
        return backend.take(backend.pad_last(x, self.n_in + 1), sources)

    def squared_norm(self) -> float:
        return float(self.n_in)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        found = np.zeros((self.n_out, self.n_in))
        for column, place in enumerate(self.make("positions")):
            found[place, column] = 1.0
        return found
