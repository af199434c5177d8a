"""Maps in a row: each is applied to the result of the one before."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._map import Map

__all__ = ["Chain"]


class Chain(Map):
    """The composition of maps, the first one applied first. Only the last one may be nonlinear.

    Parameters
    ----------
    parts : sequence of Map
        Two or more; the length of each one's output is that of the next one's input.
    """

    @checks_arguments
    def __init__(self, parts: Sequence[Map]) -> None:
        parts = tuple(parts)
        if not parts or not all(isinstance(part, Map) for part in parts):
            raise ConfigError(f"parts must be one or more maps; got {safe_repr(parts)}")
        super().__init__(parts[0].n_in, parts[-1].n_out, parts[0].seed, parts[0].group)
        for one, after in itertools.pairwise(parts):
            if one.n_out != after.n_in:
                raise ConfigError(
                    f"parts must fit each other; {one.kind!r} makes {one.n_out} elements, and {after.kind!r} takes "
                    f"{after.n_in}"
                )
        self.parts = parts
        self.kind = " → ".join(part.kind for part in parts)
        for part in parts[:-1]:
            if not part.linear:
                raise ConfigError(
                    f"{part.kind!r} is not linear, and only the last map of a chain may be nonlinear: put it last"
                )
        self.linear = parts[-1].linear
        self.identity = all(part.identity for part in parts)
        self.square = all(part.square for part in parts)
        self.isometry = all(part.isometry for part in parts)
        self.exact_in_batches = all(part.exact_in_batches for part in parts)
        # If the last map gives any vector full rank, it does so for what the others compute.
        self.full_rank = parts[-1].full_rank

    def __repr__(self) -> str:
        return f"Chain({list(self.parts)!r})"

    def forward(self, backend: Backend, x: Array) -> Array:
        return self.parts[-1].forward(backend, self._before_last(backend, x))

    def _before_last(self, backend: Backend, x: Array) -> Array:
        for part in self.parts[:-1]:
            x = part.forward(backend, x)
        return x

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return self.parts[-1].slice(backend, self._before_last(backend, x), start, stop)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        for part in reversed(self.parts):
            y = part.adjoint(backend, y)
        return y

    def adjoint_at(self, backend: Backend, y: Array, at: Array) -> Array:
        if self.linear:
            return self.adjoint(backend, y)
        y = self.parts[-1].adjoint_at(backend, y, self._before_last(backend, at))
        for part in reversed(self.parts[:-1]):
            y = part.adjoint(backend, y)
        return y

    def sides(self) -> Sequence[tuple[Map, Map]]:
        terms = itertools.product(*(part.sides() for part in self.parts))
        return [(_composed([a for a, _ in pairs]), _composed([b for _, b in pairs])) for pairs in terms]

    @property
    def linear_part(self) -> Map:
        return self if self.linear else Chain([*self.parts[:-1], self.parts[-1].linear_part])

    def digest(self) -> str:
        return hashlib.sha256(" ".join(["tnadapt chain", *(part.digest() for part in self.parts)]).encode()).hexdigest()

    def squared_norm(self) -> float:
        # A map that preserves distances does not change the sum of squares of another one, before or after it.
        others = [part for part in self.parts if not part.isometry]
        if len(others) < 2:
            return others[0].linear_part.squared_norm() if others else float(self.n_out)
        first, *rest = others
        if first.samples and len(rest) == 1 and rest[0].even_columns:
            # Columns taken at random have their share of the sum, as a mean over the draws.
            return rest[0].squared_norm() * first.n_in / first.n_out
        return super().squared_norm()  # an estimate

    def freedom(self) -> int:
        return min(part.freedom() for part in self.parts)

    def fourth_moment(self) -> float:
        return self.parts[-1].fourth_moment()

    def cost(self) -> int | None:
        costs = [part.cost() for part in self.parts]
        known = [cost for cost in costs if cost is not None]
        return sum(known) if len(known) == len(costs) else None

    def matrix(self) -> np.ndarray:
        found = self.parts[0].matrix()
        for part in self.parts[1:]:
            found = part.matrix() @ found
        return np.asarray(found)


def _composed(parts: Sequence[Map]) -> Map:
    moving = [part for part in parts if not part.identity]
    if len(moving) > 1:
        return Chain(moving)
    return moving[0] if moving else parts[0]
