"""Tensor rings for tnadapt: traces of products of slices of three-way cores (Zhao et al., arXiv 1606.05535)."""

from __future__ import annotations

from typing import Any

import tnadapt as tna
from tnadapt.algebra.formats import Format, Rank, letters, rank_a_mode


class TensorRing(Format):
    """``T[i_1, …, i_M] = trace(G_1[i_1] … G_M[i_M])``, bonds of equal rank or of one rank each."""

    title = "tensor ring"

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        return rank_a_mode(name, rank, order, order)

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        order = len(self.sizes)
        if order == 1:  # a ring of one core is closed on itself: its trace is a vector
            return {"core0": self.sizes}
        bonds = (rank,) * order if isinstance(rank, int) else tuple(r or 1 for r in rank)
        return {f"core{m}": (bonds[m], size, bonds[(m + 1) % order]) for m, size in enumerate(self.sizes)}

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        if order == 1:
            return "a->a"
        modes, bonds = letters(order, order)
        return ",".join(bonds[m] + modes[m] + bonds[(m + 1) % order] for m in range(order)) + "->" + modes


def register() -> None:
    """Entry point in the group ``tnadapt.plugins``."""
    tna.register_format("tensor-ring", TensorRing)
