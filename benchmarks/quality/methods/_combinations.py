"""Combinations of parts that no method of the literature combines; each is a config, as the presets are.

They group weights, fold the groups, and take numbers from θ or from the base weights at the same time. They take part
in a comparison only if it names them, or ``new`` for all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tnadapt import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.planning.ladders import Family, Ladder
from tnadapt.planning.preset_families import LARGEST_DENSE, AdaptedWeights
from tnadapt.sources import FromBase, Mixed

from ._presets import Preset

__all__ = ["COMBINATIONS", "REFERENCES", "Combination"]

#: The known methods with the fewest parameters.
REFERENCES = ("lora_xs", "unilora", "tinylora")

#: The number of arrays' elements per element of θ from which a network is chosen.
_SHARE = 4


class Combination(Preset):
    """A combination with the settings that it offers for given weights."""

    library = "new"

    def label(self, config: Config) -> str:
        """Return the rank of the network, if it has one; the number of parameters is shown beside it."""
        if config.format == "dense":
            return ""
        return f"r = {config.rank if isinstance(config.rank, int) else config.rank[-1]}"


def _size(config: Config, weights: AdaptedWeights) -> int:
    return SuperLoRA(config, weights.shapes, weights.layers, weights.roles).num_parameters


def _of_theta(make: Callable[[int], Config], before: str, most: int) -> Callable[[AdaptedWeights], Family]:
    """Return the sizes of θ for a network whose rank doubles, each up to a quarter of the network's elements.

    Of equal sizes, the search takes the first: the smallest network that has four numbers for each of θ.
    """

    def family(weights: AdaptedWeights) -> Family:
        found = []
        for rank in (1 << step for step in range(8)):
            if rank > weights.side:
                break
            largest = min(most, _size(make(rank), weights) // _SHARE)
            if largest >= 1:
                found.append(Ladder(functools.partial(_with_theta, make(rank), before), lambda _, top=largest: top))
        return found

    return family


def _with_theta(config: Config, before: str, parameters: int) -> Config:
    return config.replace(before=before, parameters=parameters)


def _groups(weights: AdaptedWeights) -> Any:
    return 1 if weights.uniform else "role"


def _of_ranks(make: Callable[..., Config]) -> Callable[[AdaptedWeights], Family]:
    """Return the ranks of a network over the weights of a group, which have one shape."""
    return lambda weights: [Ladder(lambda rank: make(rank, groups=_groups(weights)), lambda _: weights.side)]


def _shared_bases(rank: int, groups: Any = "role") -> Config:
    """LoRA-XS with one pair of bases for all weights of a group: ``ΔW_l = U (Σ_k d_lk R_k) Vᵀ`` with two R."""
    bases = {"factor1": FromBase("mode"), "factor2": FromBase("mode")}
    return Config(
        (2, rank, rank), 3, groups=groups, fold=("weights", "rows", "cols"), format="tucker", sources=bases, rate="adam"
    )  # fmt: skip


def _mixed_bases(rank: int, groups: Any = "role") -> Config:
    """The same with matrices R of rank r: ``ΔW_l = U J_1 diag(d_l) (V J_2)ᵀ`` with shared, trained J."""
    bases = {"factor1": Mixed(FromBase("mode")), "factor2": Mixed(FromBase("mode"))}
    return Config(
        rank, 3, groups=groups, fold=("weights", "rows", "cols"), format="cp", sources=bases, rate="adam"
    )  # fmt: skip


def _hashed(weights: AdaptedWeights) -> Family:
    # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
    def config(size: int) -> Config:
        return presets.fastfood(int(size / weights.size * 1e10) / 1e10 or 1e-10, projection="sign-gather")

    return [Ladder(config, lambda _: weights.size)]


def _lorta(rank: int) -> Config:
    return presets.lorta(rank, order=5)


_ANY = 1 << 40

_TABLE: tuple[tuple[str, str, Callable[[AdaptedWeights], Family]], ...] = (
    ("tiny-lorta", "θ → LoRTA", _of_theta(_lorta, "normal", LARGEST_DENSE)),
    ("uni-lorta", "one-hot θ → LoRTA", _of_theta(_lorta, "one-hot", _ANY)),
    ("tiny-superlora", "θ → SuperLoRA", _of_theta(presets.superlora, "normal", LARGEST_DENSE)),
    ("fastfood-lora", "fastfood θ → LoRA", _of_theta(presets.lora, "linear", _ANY)),
    ("shared-bases", "LoRA-XS, bases shared over depth", _of_ranks(_shared_bases)),
    ("mixed-bases", "LoRTA in bases shared over depth", _of_ranks(_mixed_bases)),
    ("tiny-shared-bases", "θ → LoRA-XS, bases shared over depth", _of_theta(_shared_bases, "normal", LARGEST_DENSE)),
    ("tiny-craft", "θ → CRAFT", _of_theta(presets.craft, "normal", LARGEST_DENSE)),
    ("hashed", "hashing of the long vector", _hashed),
)

COMBINATIONS = tuple(Combination(*row) for row in _TABLE)
