"""The families of settings that a plan compares: the paper's table 1, and what lies between its rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from typing import Any

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.superlora import SuperLoRA

from .ladders import Family, Ladder

__all__ = ["families", "groups_between", "usual"]

Shapes = Sequence[tuple[int, int]]

ORDERS = (3, 4, 5)
RATIOS = (0.1, 0.01, 0.001)


def usual(shapes: Shapes) -> list[Family]:
    """Those that training compares (``tnadapt finetune --budget``): one a method, with one group where it groups.

    Examples
    --------
    >>> len(usual([(768, 768)] * 24))
    8
    """
    size = sum(rows * cols for rows, cols in shapes)
    return [
        [Ladder(presets.lora, _by_factors)],
        [Ladder(presets.lokr, _by_factors)],
        _lonkr(1, size),
        [_lorta(3, 1)],
        [_lorta(5, 1)],
        [Ladder(presets.superlora, _by_factors)],
        [_projected(presets.superlora, ratio) for ratio in RATIOS],
        # Ten decimals of ρ come within a parameter of the budget on 10^10 elements.
        [Ladder(lambda n: presets.fastfood(math.floor(n / size * 1e10) / 1e10 or 1e-10), lambda plan: plan.size)],
    ]


def families(shapes: Shapes, layers: Sequence[Hashable] | None = None) -> list[Family]:
    """All of them: the usual ones, their relatives, other orders and formats, and more groups.

    Examples
    --------
    >>> len(families([(768, 768)] * 24))
    31
    """
    size = sum(rows * cols for rows, cols in shapes)
    found = [*usual(shapes), [Ladder(presets.loha, _by_factors)], [Ladder(lambda _: presets.krona(), lambda _: 1)]]
    if len(set(shapes)) == 1 and len(shapes) > 1:
        (rows, cols), weights = shapes[0], len(shapes)
        lotr = functools.partial(presets.lotr, weights=weights, rows=rows, cols=cols)
        found.append([Ladder(lotr, _by_factors)])
    found += [[_lorta(4, 1)], [_projected(functools.partial(presets.lorta, order=5), 0.01)]]
    found += [[_cp(order, 1)] for order in ORDERS] + [[_train(order, 1)] for order in ORDERS]
    for groups in _groups(shapes, layers):
        # A square weight is its own square: that is LoRA.
        if groups != "weight" or any(rows != cols for rows, cols in shapes):
            found.append([Ladder(functools.partial(presets.superlora, groups=groups), _by_factors)])
        found += [[_cp(3, groups)], [_lorta(3, groups)], _lonkr(groups, size)]
    return [*found, [Ladder(lambda _: presets.dense(), lambda _: 1)]]


def groups_between(weights: int) -> list[int]:
    """Numbers of groups between one and one a weight: divisors near the third and the two thirds, in logarithms.

    Examples
    --------
    >>> groups_between(24), groups_between(2), groups_between(7)
    ([3, 8], [], [])
    """
    divisors = [g for g in range(2, weights) if weights % g == 0]
    ideal = (weights ** (1 / 3), weights ** (2 / 3))
    return sorted({min(divisors, key=lambda g: abs(math.log(g / wish))) for wish in ideal}) if divisors else []


def _groups(shapes: Shapes, layers: Sequence[Hashable] | None) -> list[Any]:
    """What ``Config.groups`` may be beside 1."""
    if len(shapes) == 1:
        return []
    several = layers is not None and 1 < len(set(layers)) < len(shapes)
    return [*groups_between(len(shapes)), *(["layer"] if several else []), "weight"]


def _lonkr(groups: Any, size: int) -> Family:
    """Of any K and f; one that is no finer than the hypercube."""
    side = math.isqrt(size - 1) + 1
    factors = [f for f in (*range(2, 33), *range(33, 257, 4)) if f <= side]
    return [
        Ladder(functools.partial(presets.lonkr, groups=groups, splits=k, split_size=f), _by_factors)
        for k in (2, 3, 4)
        for f in factors
        if f ** (k - 1) <= side
    ]


def _lorta(order: int, groups: Any) -> Ladder:
    return Ladder(functools.partial(presets.lorta, order=order, groups=groups), _by_factors)


def _projected(preset: Any, ratio: float) -> Ladder:
    return Ladder(functools.partial(preset, projection="linear", ratio=ratio), _by_factors)


def _cp(order: int, groups: Any) -> Ladder:
    return Ladder(lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="cp"), _by_count)


def _train(order: int, groups: Any) -> Ladder:
    return Ladder(lambda rank: Config(rank, order, groups=groups, fold="hypercube", format="tt"), _by_bonds)


def _by_factors(plan: SuperLoRA) -> int:
    """Beyond the least size of a factored mode, a rank buys nothing."""
    return min(shape[0] for name, shape in plan.param_shapes.items() if ".factor" in name)


def _by_count(plan: SuperLoRA) -> int:
    """CP of an order above 2: ranks above the sizes still buy freedom, until all elements are free."""
    networks = [group.network for group in plan.groups]
    return max(network.size // (sum(network.sizes) - len(network.sizes) + 1) for network in networks)


def _by_bonds(plan: SuperLoRA) -> int:
    """A train's bond has no use for more than the elements on either side."""
    sizes = max(group.network.sizes for group in plan.groups)
    cuts = range(1, len(sizes))
    return max(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in cuts)
