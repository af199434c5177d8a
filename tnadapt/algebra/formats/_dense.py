"""The dense format: the tensor itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from ._contraction import letters
from ._format import Format, Ranges, Rank, rows_of

__all__ = ["Dense"]


class Dense(Format):
    """The tensor itself. With M = 1, dense fine-tuning (the paper's table 1, first row)."""

    title = "dense"
    zero = "dense"
    diagram = "dense"

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        return {"dense": self.sizes}

    @property
    def formula(self) -> str:
        modes, _ = letters(len(self.sizes), 0)
        return f"{modes}->{modes}"

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        block = arrays["dense"]
        for axis, bounds in enumerate(ranges):
            block = rows_of(block, bounds, axis)
        return block

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        return {"dense": tensor}

    def summed(self, terms: int) -> Self:
        return self

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        rows = math.prod(self.sizes[mode] for mode in modes)
        return min(rows, math.prod(self.sizes) // rows)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        return iter(())

    def matrix_rank(self) -> int:
        return min(self.sizes)

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        return math.prod(sizes)

    def useful_rank(self) -> None:
        return None

    @property
    def products(self) -> int:
        return 0
