"""A batch of CP tensors: one for each index of the leading mode, with factors of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ._contraction import letters
from ._dimensions import of_cp
from ._format import Format, Rank

__all__ = ["BatchedCP"]


class BatchedCP(Format):
    """``T[b] = sum_r outer(A_2[b, :, r], …, A_M[b, :, r])``: of order 3, a low-rank matrix for each b."""

    title = "batched CP"

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        assert isinstance(rank, int)  # checked_rank allows nothing else
        self.rank = rank
        batch, *others = self.sizes
        if len(others) < 2:
            # A batch of numbers or of vectors, which are sums of no more than one of their kind.
            return {f"factor{len(others)}": self.sizes}
        return {f"factor{mode}": (batch, size, rank) for mode, size in enumerate(others, 1)}

    @property
    def formula(self) -> str:
        modes, bond = letters(len(self.sizes), 1)
        if len(modes) < 3:
            return f"{modes}->{modes}"
        return ",".join(modes[0] + mode + bond for mode in modes[1:]) + "->" + modes

    def matrix_rank(self) -> int:
        return min(self.sizes)  # of order 2, each row is a free vector

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        batch, *others = sizes
        return batch * of_cp(others, times * self.rank**power) if others else batch

    def useful_rank(self) -> int:
        return math.prod(self.sizes[1:]) // max(self.sizes[1:], default=1)
