"""The identity map: y = x."""

from __future__ import annotations

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._digest import digest_of
from ._map import Map

__all__ = ["Identity"]


class Identity(Map):
    """``y = x``; ρ = 1 only."""

    kind = "identity"
    square = isometry = identity = True

    def forward(self, backend: Backend, x: Array) -> Array:
        return x

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return y

    def gain(self) -> float:
        return 1.0

    def squared_norm(self) -> float:
        return float(self.n_out)

    def cost(self) -> int:
        return 0

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        raise KeyError(name)  # it draws nothing

    def digest(self) -> str:
        return digest_of(self, {})
