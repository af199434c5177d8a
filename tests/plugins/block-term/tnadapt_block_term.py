"""Block-term decompositions for tnadapt: sums of Tucker blocks, and the preset of one tensor of all updates.

De Lathauwer, Decompositions of a Higher-Order Tensor in Block Terms II, SIAM J. Matrix Anal. Appl. 30 (2008).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import tnadapt as tna
from tnadapt.algebra.formats import Format, Rank, letters, rank_a_mode
from tnadapt.presets import AdaptedWeights, Ladder, Preset


class BlockTerm(Format):
    """The sum of blocks of Tucker form; the rank is their number, or their number and the side of their cores."""

    title = "block term"

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        return rank_a_mode(name, rank, order, 2)

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        blocks, side = (rank, 2) if isinstance(rank, int) else (rank[0] or 1, rank[1] or 1)
        sides = [min(side, size) for size in self.sizes]
        factors = {f"factor{m}": (blocks, size, sides[m]) for m, size in enumerate(self.sizes)}
        return {"core": (blocks, *sides), **factors}

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        modes, bonds = letters(order, order + 1)
        block, sides = bonds[0], bonds[1:]
        factors = [block + mode + side for mode, side in zip(modes, sides, strict=True)]
        return ",".join([block + sides, *factors]) + "->" + modes


def btd(blocks: int = 2, side: int = 2, **changes: Any) -> tna.Config:
    """BTD: all updates as one tensor (weights, rows, cols), the sum of Tucker blocks (De Lathauwer, 2008).

    Settings: G = 1, that fold, block term.
    """
    settings = {"groups": 1, "fold": ("weights", "rows", "cols"), "order": 3, "format": "block-term", "rate": "adam"}
    return tna.Config.from_dict({**settings, "rank": (blocks, side), **changes})


def sizes(weights: AdaptedWeights) -> list[Ladder]:
    """Numbers of blocks, for several sides of their cores."""
    groups: Any = 1 if weights.uniform else "role"
    return [
        Ladder(functools.partial(btd, side=side, groups=groups), lambda plan: weights.side)
        for side in (1, 2, 4)
        if side <= weights.side
    ]


def label(config: tna.Config) -> str | None:
    """The label of a config that the preset makes."""
    if not isinstance(config.rank, tuple) or len(config.rank) != 2 or None in config.rank:
        return None
    blocks, side = (rank or 1 for rank in config.rank)
    return f"B = {blocks}, r = {side}" if config == btd(blocks, side, groups=config.groups) else None


def update(params: Mapping[str, Any], config: tna.Config, shapes: Sequence[tuple[int, int]]) -> list[Any]:
    """``ΔW_s = sum_b U_b (sum_t P_b[s, t] C_b[t]) V_bᵀ``."""
    core, p, u, v = (params[f"group0.split0.{name}"] for name in ("core", "factor0", "factor1", "factor2"))
    deltas = []
    for s in range(len(shapes)):
        blocks = [u[b] @ np.tensordot(p[b, s], core[b], 1) @ v[b].T for b in range(len(core))]
        deltas.append(config.scale * np.sum(blocks, axis=0))
    return deltas


def register() -> None:
    """Entry point in the group ``tnadapt.plugins``."""
    tna.register_format("block-term", BlockTerm)
    reference = "De Lathauwer, SIAM J. Matrix Anal. Appl. 30 (2008)"
    example = {"blocks": 2, "side": 2}
    tna.register_preset(Preset("btd", btd, "BTD", reference, example, sizes, recognize=label, formula=update))
