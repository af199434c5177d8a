"""The methods that ``plan`` compares, as families of settings: table 1 of the paper, between them, and others."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA

from .ladders import Family, Ladder, by_factors
from .preset_families import PRESET_FAMILIES, AdaptedWeights

__all__ = ["FEWEST", "families", "groups_between", "usual"]

Shapes = Sequence[tuple[int, int]]

ORDERS = (3, 4, 5)
RATIOS = (0.1, 0.01, 0.001)
#: Presets of the literature with very few parameters whose largest rank is known without arrays of the weights' size.
FEWEST = ("lora_xs", "tinylora", "unilora", "vera")


def usual(shapes: Shapes) -> list[Family]:
    """Return the families of the most common methods: one per method, with a single group.

    Examples
    --------
    >>> len(usual([(768, 768)] * 24))
    8
    """
    size = sum(rows * cols for rows, cols in shapes)
    return [
        [Ladder(presets.lora, by_factors)],
        [Ladder(presets.lokr, by_factors)],
        _lonkr(1, size),
        [_lorta(3, 1)],
        [_lorta(5, 1)],
        [Ladder(presets.superlora, by_factors)],
        [_projected(presets.superlora, ratio) for ratio in RATIOS],
        # With ten decimals of ρ, the number of parameters is within one of the budget for 10^10 elements.
        [Ladder(lambda n: presets.fastfood(math.floor(n / size * 1e10) / 1e10 or 1e-10), lambda plan: plan.size)],
    ]


def families(
    shapes: Shapes, layers: Sequence[Hashable] | None = None, roles: Sequence[Hashable] | None = None
) -> list[Family]:
    """Return all families: the usual ones, related methods, other orders and formats, more groups, and others.

    Examples
    --------
    >>> len(families([(768, 768)] * 24))
    35
    """
    size = sum(rows * cols for rows, cols in shapes)
    found = [*usual(shapes), [Ladder(presets.loha, by_factors)], [Ladder(lambda _: presets.krona(), lambda _: 1)]]
    if len(set(shapes)) == 1 and len(shapes) > 1:
        (rows, cols), weights = shapes[0], len(shapes)
        lotr = functools.partial(presets.lotr, weights=weights, rows=rows, cols=cols)
        found.append([Ladder(lotr, by_factors)])
    if roles is not None and 1 < len(set(roles)) < len(shapes):
        # Left out by the search where the weights of a role differ in shape.
        found.append([Ladder(functools.partial(presets.lotr, groups="role"), by_factors)])
    found += [[_lorta(4, 1)], [_projected(functools.partial(presets.lorta, order=5), 0.01)]]
    found += [[_cp(order, 1)] for order in ORDERS] + [[_train(order, 1)] for order in ORDERS]
    for groups in _groups(shapes, layers, roles):
        # For square weights, one group per weight is LoRA.
        if groups != "weight" or any(rows != cols for rows, cols in shapes):
            found.append([Ladder(functools.partial(presets.superlora, groups=groups), by_factors)])
        found += [[_cp(3, groups)], [_lorta(3, groups)], _lonkr(groups, size)]
    own = AdaptedWeights(shapes, layers, roles)
    found += [PRESET_FAMILIES[name].family(own) for name in FEWEST]
    return [*found, [Ladder(lambda _: presets.dense(), lambda _: 1)]]


def groups_between(weights: int) -> list[int]:
    """Return numbers of groups between one and one per weight: the divisors nearest to weights^(1/3) and weights^(2/3).

    Examples
    --------
    >>> groups_between(24), groups_between(2), groups_between(7)
    ([3, 8], [], [])
    """
    divisors = [g for g in range(2, weights) if weights % g == 0]
    ideal = (weights ** (1 / 3), weights ** (2 / 3))
    return sorted({min(divisors, key=lambda g: abs(math.log(g / wish))) for wish in ideal}) if divisors else []


def _groups(shapes: Shapes, layers: Sequence[Hashable] | None, roles: Sequence[Hashable] | None) -> list[Any]:
    """Return the values of ``Config.groups`` to compare other than 1."""
    if len(shapes) == 1:
        return []
    keys = {"layer": layers, "role": roles}
    several = [name for name, given in keys.items() if given is not None and 1 < len(set(given)) < len(shapes)]
    return [*groups_between(len(shapes)), *several, "weight"]


def _lonkr(groups: Any, size: int) -> Family:
    """Return ladders for several K and f whose dense splits together are no larger than the hypercube."""
    side = math.isqrt(size - 1) + 1
    factors = [f for f in (*range(2, 33), *range(33, 257, 4)) if f <= side]
    return [
        Ladder(functools.partial(presets.lonkr, groups=groups, splits=k, split_size=f), by_factors)
        for k in (2, 3, 4)
        for f in factors
        if f ** (k - 1) <= side
    ]


def _lorta(order: int, groups: Any) -> Ladder:
    return Ladder(functools.partial(presets.lorta, order=order, groups=groups), by_factors)


def _projected(preset: Any, ratio: float) -> Ladder:
    return Ladder(functools.partial(preset, projection="linear", ratio=ratio), by_factors)


def _cp(order: int, groups: Any) -> Ladder:
    return Ladder(
        lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="cp", rate="adam"), _by_count
    )


def _train(order: int, groups: Any) -> Ladder:
    return Ladder(
        lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="tt", rate="adam"), _by_bonds
    )


def _by_count(plan: SuperLoRA) -> int:
    """Return the rank of CP of an order above 2 at which all elements are free; ranks above the sizes still help."""
    networks = [group.network for group, _ in plan.alike]
    return max(network.size // (sum(network.sizes) - len(network.sizes) + 1) for network in networks)


def _by_bonds(plan: SuperLoRA) -> int:
    """Return the largest useful rank of a tensor train: the number of elements on the smaller side of a bond."""
    sizes = max(group.network.sizes for group, _ in plan.alike)
    cuts = range(1, len(sizes))
    return max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in cuts)
