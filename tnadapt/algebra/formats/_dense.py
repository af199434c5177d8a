"""The tensor itself."""

from __future__ import annotations

from collections.abc import Mapping

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._format import Format, Ranges, Rank, rows_of

__all__ = ["Dense"]


class Dense(Format):
    """The tensor itself. With M = 1, dense fine-tuning (the paper's table 1, first row)."""

    zero = "dense"
    unfolds = False

    def _shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"dense": self.sizes}

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        block = arrays["dense"]
        for axis, bounds in enumerate(ranges):
            block = rows_of(block, bounds, axis)
        return block

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return {"dense": tensor}

    def paths(self, name: str) -> int:
        return 1

    @property
    def total_paths(self) -> int:
        return 1
