"""What a budget of parameters buys: of each family, its largest setting that fits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from ..errors import TnadaptError
from ..superlora import SuperLoRA, parameter_count
from .methods import Method, Shapes, fastfood_of, lokr_of, lonkr_of, lora_of, lorta_of, projected_of, superlora_of

__all__ = ["within"]


def within(budget: int, shapes: Shapes) -> list[Method]:
    """Of each family, the setting with the most parameters that are no more than a budget.

    Parameters
    ----------
    budget : int
    shapes : sequence of (rows, cols)
        Of the model's targets.

    Returns
    -------
    list of Method
        Families whose least setting is above the budget are left out.

    Raises
    ------
    TnadaptError
        If all of them are.

    Examples
    --------
    >>> shapes = [(768, 768)] * 24
    >>> for method in within(10_000, shapes):
    ...     print(method.name, parameter_count(method.config, shapes))
    LoNKr K = 2, f = 24, r = 30 9996
    LoRTA M = 3, r = 11 9317
    LoRTA M = 5, r = 6 8586
    SuperLoRA r = 1 7526
    SuperLoRA + F r = 42, ρ = 0.001 9996
    fastfood ρ = 0.0007064 10000
    """
    if budget < 1:
        raise TnadaptError(f"a budget must be at least 1 parameter; got {budget}")
    size = sum(rows * cols for rows, cols in shapes)
    allowed = min(budget, size)
    families = list(_families(shapes, size))
    found = [method for family in families if (method := _most(family, allowed, shapes))]
    if not found:
        raise TnadaptError(
            f"a budget of {budget} is less than any setting needs on these {len(shapes)} weights; "
            f"the least is {_smallest(families, shapes)}"
        )
    return found


# The members of a family by a size from 1 upward, with which their parameters grow; the largest size, if no rank.
Ladder = tuple[Callable[[int], Method], int | None]


def _families(shapes: Shapes, size: int) -> Iterator[list[Ladder]]:
    side = math.isqrt(size - 1) + 1
    yield [(lora_of, None)]
    yield [(lokr_of, None)]
    sizes = [f for f in (*range(2, 33), *range(33, 257, 4)) if f <= side]
    yield [
        (functools.partial(lonkr_of, splits=k, size=f), None) for k in (2, 3, 4) for f in sizes if f ** (k - 1) <= side
    ]
    for order in (3, 5):
        yield [(functools.partial(lorta_of, order=order), None)]
    yield [(superlora_of, None)]
    yield [(functools.partial(projected_of, ratio=ratio), None) for ratio in (0.1, 0.01, 0.001)]
    # Ten decimals of ρ come within a parameter of the budget on 10^10 elements.
    yield [(lambda count: fastfood_of(math.floor(count / size * 1e10) / 1e10 or 1e-10), size)]


def _smallest(families: list[list[Ladder]], shapes: Shapes) -> int:
    firsts = [_counted(member, 1, shapes) for family in families for member, _ in family]
    return min(counted[1] for counted in firsts if counted is not None)


def _counted(member: Callable[[int], Method], size: int, shapes: Shapes) -> tuple[Method, int] | None:
    method = member(size)
    assert method.config is not None
    try:
        return method, parameter_count(method.config, shapes)
    except TnadaptError:  # a setting that does not suit these weights
        return None


def _most(family: list[Ladder], allowed: int, shapes: Shapes) -> Method | None:
    best: tuple[Method, int] | None = None
    for member, high in family:
        found = _largest(member, high, allowed, shapes)
        if found is not None and (best is None or found[1] > best[1]):
            best = found
    return best and best[0]


def _largest(
    member: Callable[[int], Method], high: int | None, allowed: int, shapes: Shapes
) -> tuple[Method, int] | None:
    """By bisection, between the first size and the largest of use."""
    first = _counted(member, 1, shapes)
    if first is None or first[1] > allowed:
        return None
    best, low = first, 1
    high = _full_rank(first[0], shapes) if high is None else high
    while low < high:
        middle = (low + high + 1) // 2
        counted = _counted(member, middle, shapes)
        if counted is not None and counted[1] <= allowed:
            best, low = counted, middle
        else:
            high = middle - 1
    return best


def _full_rank(method: Method, shapes: Shapes) -> int:
    """Beyond the least size of a factored mode, a rank buys nothing."""
    assert method.config is not None
    arrays = SuperLoRA(method.config, shapes).param_shapes
    return max(1, min(shape[0] for name, shape in arrays.items() if ".factor" in name))
