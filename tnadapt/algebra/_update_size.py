"""How far ΔW of one group moves if the entries of its arrays do: what the units of the parameters are made of."""

from __future__ import annotations

import math
from collections.abc import Collection

from .init import Initializer

__all__ = ["update_step"]


def _mean_square(start: Initializer, name: str) -> float:
    """Return the mean square of an array or multiplier, by its name in the network, apart from being the zero.

    That of an array that is computed from the base does not depend on the base.
    """
    array, _, multiplier = name.rpartition(".")
    if name not in start.network.shapes:
        source = start.origins[array].multiplied
        assert source is not None
        return (source.starts[multiplier] or 1.0) ** 2
    if name in start.frozen.entries:
        return start.frozen.expected_square(name)
    return start.std_of(name) ** 2


def update_step(start: Initializer, variance: float, moved: Collection[str], distance: float) -> float:
    """Return the root mean square of the step of ΔW if entries of arrays move by ± ``distance`` from the start.

    Parameters
    ----------
    start : Initializer
        Of the group.
    variance : float
        That of its map F; it is given because it may take long to compute, and does not depend on the distance.
    moved : collection of str
        Names of the arrays and multipliers that move, in the network.
    distance : float

    Notes
    -----
    The signs of the moves, and the entries of different arrays, are taken for independent. The mean square of a product
    of arrays is then that of each, plus ``distance²`` where it moves, multiplied.
    """
    network, projection = start.network, start.projection
    change = total = 0.0
    for prefixes in network.prefixes:
        before = after = 1.0
        for prefix, split in zip(prefixes, network.splits, strict=True):
            before, after = before * split.num_terms, after * split.num_terms
            for name in split.shapes:
                before *= _square(start, prefix + name, (), 0.0)
                after *= _square(start, prefix + name, moved, distance)
        change, total = change + after - before, total + after
    gain = network.scale**2 * variance
    if projection.linear:
        return math.sqrt(gain * change)
    # The derivative of tanhshrink(t) is tanh(t)² ~ t², as for the standard deviation, and at most 1.
    return math.sqrt(gain * change * min(1.0, projection.map.fourth_moment() * (gain * total) ** 2))


def _square(start: Initializer, name: str, moved: Collection[str], distance: float) -> float:
    """Return the mean square of an array times its multipliers, if some of them have moved from the start."""

    def of(part: str, products: int = 1) -> float:
        begun = 0.0 if part in start.zeros else _mean_square(start, part)
        return begun + products * distance**2 if part in moved else begun

    square, origin = of(name), start.origins.get(name)
    if origin is not None and origin.multiplied is not None:
        source, shape = origin.multiplied, start.network.shapes[name]
        square *= math.prod(of(f"{name}.{part}", source.touched(part, 1, shape)[1]) for part in source.multipliers)
    return square
