"""A permutation of the long vector."""

from __future__ import annotations

from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .. import rng
from ._digest import digest_of
from ._map import Map

__all__ = ["Shuffle"]


class Shuffle(Map):
    """``y[j] = x[perm[j]]``; ρ = 1 only."""

    kind = "shuffle"
    square = isometry = exact_in_batches = True
    fixed = ("perm",)

    def __init__(self, n_in: int, n_out: int, seed: int = 0, group: int = 0, **settings: Any) -> None:
        super().__init__(n_in, n_out, seed, group, **settings)
        #: The integers that define the permutation. A compiler takes text for a constant, not always a number.
        self.recipe = f"{seed} {group}"

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of the permutation or its inverse without the rest."""
        return rng.permutation(self.n_out, self.seed, self.group, start, stop, inverse=name == "inverse")

    def make(self, key: object) -> np.ndarray:
        if isinstance(key, tuple):
            return self.part(*key)
        whole = self.part(str(key), 0, self.n_out)
        # Half the memory if positions fit in 32 bits.
        return whole.astype(np.int32) if self.n_out <= 1 << 31 else whole

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._shuffled(backend, x, inverse=False)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self._shuffled(backend, y, inverse=True)

    def _shuffled(self, backend: Backend, x: Array, inverse: bool) -> Array:
        def there(x: Array) -> Array:
            return backend.take(x, self.on(backend, "perm", x))

        def back(x: Array) -> Array:
            return backend.take(x, self.on(backend, "inverse", x))

        found = backend.shuffle(x, self.recipe, inverse, fallback=(there, back))
        return (back if inverse else there)(x) if found is None else found

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        kept = "perm" in self.kept
        own = (
            self.on(backend, "perm", x)[start:stop] if kept else self.on(backend, ("perm", start, stop), x, keep=False)
        )
        return backend.take(x, own)

    def gain(self) -> float:
        return 1.0

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def digest(self) -> str:
        return digest_of(self, {"perm": self.n_out})
