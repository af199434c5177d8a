"""Gather: every element of the output is an element of a shorter vector, or its negative (hashing)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer

from .. import rng
from ..folding import MAX_SIZE
from ._map import Map, Space
from ._map_settings import MapSettings

__all__ = ["Gather", "GatherMap", "SignGather", "SignGatherMap"]

# Streams longer than twice this are digested by their two ends.
_ENDS = 1 << 19


@dataclasses.dataclass(frozen=True)
class Gather(MapSettings):
    """Every element of the output is a seeded element of the input: ``y[j] = x[h(j)]``.

    Parameters
    ----------
    size : int, optional
        Length of the input; by default it follows from ``Config.ratio``.

    Raises
    ------
    ConfigError
        If the size is not an integer of at least 1.

    Notes
    -----
    ``h(j) = perm(j) mod n_in`` with perm the permutation of ``n_out`` of purpose 10, so that the numbers of elements
    that copy two elements of x differ by at most one.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> tna.Projection(tna.maps.Gather(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([2., 2., 2., 1., 1., 1.])
    """

    size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            name = f"{type(self).__name__}'s size"
            object.__setattr__(self, "size", integer(name, self.size, 1, MAX_SIZE, ConfigError))
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class SignGather(Gather):
    """:class:`Gather` with seeded signs: ``y[j] = s(j) x[h(j)]``; the signs have purpose 11.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> tna.Projection(tna.maps.SignGather(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([ 2., -2.,  2., -1., -1., -1.])
    """


class GatherMap(Map):
    """``y[j] = x[perm[j] mod n_in]``."""

    kind = "gather"
    settings_class = Gather
    settings: Gather
    fixed: tuple[str, ...] = ("index",)
    exact_in_batches = True

    @classmethod
    def fixes_length(cls, settings: Gather) -> bool:
        return settings.size is not None

    @classmethod
    def domain(cls, codomain: Space, settings: Gather) -> Space:
        assert settings.size is not None  # else ratio determines the length
        return Space(settings.size)

    def _drawn(self, name: str, start: int, stop: int) -> np.ndarray:
        draw = (self.seed, self.group, start, stop)
        if name == "signs":
            return rng.signs(*draw, purpose=rng.PURPOSE["gather_signs"])
        found = rng.permutation(self.n_out, *draw, inverse=name == "back", purpose=rng.PURPOSE["gather"])
        if name == "index":
            found %= self.n_in
        return found.astype(np.int32) if self.n_out < 1 << 31 else found

    def streams(self) -> Iterator[np.ndarray]:
        # Long streams by their two ends: each element is a pure function of its index.
        if self.n_out <= 2 * _ENDS:
            yield from super().streams()
            return
        for name in self.fixed:
            ends = self._drawn(name, 0, _ENDS), self._drawn(name, self.n_out - _ENDS, self.n_out)
            yield np.concatenate(ends).astype("<i8")

    def make(self, key: object) -> np.ndarray:
        if isinstance(key, tuple):
            return self._drawn(*key)
        return self._drawn(str(key), 0, self.n_out)

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.take(x, self.on(backend, "index", x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        # Sorted by perm, the elements that copy x[i] are at i, i + n_in, i + 2 n_in, …
        y = backend.take(y, self.on(backend, "back", y))
        rows = -(-self.n_out // self.n_in)
        y = backend.reshape(backend.pad_last(y, rows * self.n_in), (*y.shape[:-1], rows, self.n_in))
        return backend.sum(y, axis=-2)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return backend.take(x, self._piece(backend, "index", x, start, stop))

    def _piece(self, backend: Backend, name: str, x: Array, start: int, stop: int) -> Array:
        if name in self.kept:
            return self.on(backend, name, x)[start:stop]
        return self.on(backend, (name, start, stop), x, keep=False)

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        found = np.zeros((self.n_out, self.n_in))
        for row, place in enumerate(rng.permutation(self.n_out, self.seed, self.group, purpose=rng.PURPOSE["gather"])):
            found[row, place % self.n_in] = 1.0
        return found


class SignGatherMap(GatherMap):
    """``y[j] = signs[j] * x[perm[j] mod n_in]``."""

    kind = "sign-gather"
    settings_class = SignGather
    fixed = ("index", "signs")

    def forward(self, backend: Backend, x: Array) -> Array:
        return super().forward(backend, x) * self.on(backend, "signs", x, backend.dtype_name(x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return super().adjoint(backend, y * self.on(backend, "signs", y, backend.dtype_name(y)))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        signs = backend.astype(self._piece(backend, "signs", x, start, stop), backend.dtype_name(x))
        return super().slice(backend, x, start, stop) * signs

    def cost(self) -> int:
        return self.n_out

    def matrix(self) -> np.ndarray:
        signs = rng.signs(self.seed, self.group, 0, self.n_out, purpose=rng.PURPOSE["gather_signs"])
        return super().matrix() * signs.astype(np.float64)[:, None]
