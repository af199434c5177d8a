"""A map on each weight of a group: blocks along the diagonal."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._map import Map

__all__ = ["PerWeight"]


class PerWeight(Map):
    """Maps of the weights of a group: the input is the concatenation of their inputs, and so is the output.

    Parameters
    ----------
    parts : sequence of Map
        One per weight, of one kind. Weights of equal shape share one object, and are computed together if all do.
    """

    @checks_arguments
    def __init__(self, parts: Sequence[Map]) -> None:
        parts = tuple(parts)
        if not parts or not all(isinstance(part, Map) for part in parts):
            raise ConfigError(f"parts must be one or more maps; got {safe_repr(parts)}")
        first = parts[0]
        super().__init__(sum(p.n_in for p in parts), sum(p.n_out for p in parts), first.seed, first.group)
        self.parts = parts
        self.kind = first.kind
        self.linear = first.linear
        self.identity = first.identity
        self.square = all(part.square for part in parts)
        self.isometry = all(part.isometry for part in parts)
        self.exact_in_batches = all(part.exact_in_batches for part in parts)
        self.full_rank = all(part.full_rank for part in parts)
        self._alike = all(part is first for part in parts)

    def part_at(self, start: int) -> tuple[int, Map]:
        """Return where the input of the weight whose output begins at ``start`` begins, and the weight's map."""
        if self._alike:
            first = self.parts[0]
            return start // first.n_out * first.n_in, first
        return self._places[start]

    @functools.cached_property
    def _places(self) -> dict[int, tuple[int, Map]]:
        found, first_in, first_out = dict[int, tuple[int, Map]](), 0, 0
        for part in self.parts:
            found[first_out] = first_in, part
            first_in, first_out = first_in + part.n_in, first_out + part.n_out
        return found

    def __repr__(self) -> str:
        return f"PerWeight({list(self.parts)!r})"

    def _blockwise(
        self, backend: Backend, apply: Callable[..., Array], length: str, *arrays: tuple[Array, str]
    ) -> Array:
        """Apply a method of each part to its pieces of arrays, and concatenate; ``length`` is that of the results."""
        batch = tuple(arrays[0][0].shape[:-1])
        if self._alike:
            first, count = self.parts[0], len(self.parts)
            split = [backend.reshape(array, (*array.shape[:-1], count, getattr(first, name))) for array, name in arrays]
            return backend.reshape(apply(first, backend, *split), (*batch, getattr(self, length)))
        starts = [
            list(itertools.accumulate((getattr(part, name) for part in self.parts), initial=0)) for _, name in arrays
        ]
        pieces = []
        for number, part in enumerate(self.parts):
            own = [
                array[..., edges[number] : edges[number + 1]] for (array, _), edges in zip(arrays, starts, strict=True)
            ]
            pieces.append(apply(part, backend, *own))
        return backend.concat(pieces, axis=-1)

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._blockwise(backend, lambda part, *given: part.forward(*given), "n_out", (x, "n_in"))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self._blockwise(backend, lambda part, *given: part.adjoint(*given), "n_in", (y, "n_out"))

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        if self.linear:
            return self.adjoint(backend, y)
        return self._blockwise(
            backend, lambda part, *given: part.adjoint_at(*given), "n_in", (y, "n_out"), (at, "n_in")
        )

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        pieces, first_in, first_out = [], 0, 0
        for part in self.parts:
            lo, hi = max(start - first_out, 0), min(stop - first_out, part.n_out)
            if lo < hi:
                own = x[..., first_in : first_in + part.n_in]
                whole = (lo, hi) == (0, part.n_out)
                pieces.append(part.forward(backend, own) if whole else part.slice(backend, own, lo, hi))
            first_in, first_out = first_in + part.n_in, first_out + part.n_out
        return backend.concat(pieces, axis=-1)

    @property
    def linear_part(self) -> Map:
        if self.linear:
            return self
        distinct = {id(part): part.linear_part for part in self.parts}
        return PerWeight([distinct[id(part)] for part in self.parts])

    def digest(self) -> str:
        distinct = {id(part): part.digest() for part in self.parts}
        told = ["tnadapt per weight", *(distinct[id(part)] for part in self.parts)]
        return hashlib.sha256(" ".join(told).encode()).hexdigest()

    def squared_norm(self) -> float:
        distinct = {id(part): part.squared_norm() for part in self.parts}
        return sum(distinct[id(part)] for part in self.parts)

    def freedom(self) -> int:
        return sum(part.freedom() for part in self.parts)

    def fourth_moment(self) -> float:
        return self.parts[0].fourth_moment()

    def cost(self) -> int | None:
        costs = [part.cost() for part in self.parts]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def matrix(self) -> np.ndarray:
        from scipy.linalg import block_diag

        return np.asarray(block_diag(*(part.matrix() for part in self.parts)))
