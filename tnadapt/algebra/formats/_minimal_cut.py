"""The cheapest cut of a small tensor network between row indices and column indices.

The network is then a product of two matrices, one for each side of the cut, and the cut is their inner dimension: an
upper bound on the rank that holds for any arrays, trained or not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from ._contraction import Formula

__all__ = ["least_cut", "least_cut_of_legs", "minimal_cut"]

# Up to this many arrays, all partitions are searched.
_ALL = 12


def least_cut(formula: Formula, size: Mapping[str, int], rows: Sequence[int]) -> int:
    """Return the least product of bonds found over the cuts of the network that separate some modes from the others.

    It is an upper bound on the rank of that unfolding; see :func:`minimal_cut`.
    """
    legs = [(size[index], 1) if mode in rows else (1, size[index]) for mode, index in enumerate(formula.output)]
    return least_cut_of_legs(formula, size, legs)


def least_cut_of_legs(formula: Formula, size: Mapping[str, int], legs: Sequence[tuple[int, int]]) -> int:
    """Return the least product of bonds and legs found over the cuts of the network that separate rows from columns."""
    return minimal_cut(formula, size, legs)[0]


def minimal_cut(
    formula: Formula, size: Mapping[str, int], legs: Sequence[tuple[int, int]]
) -> tuple[int, tuple[bool, ...]]:
    """Return the least product of bonds and legs over the cuts, and for each array whether it is on the rows' side.

    Each mode, or a range of it, is a pair of a row index and a column index, of the lengths in ``legs``. A mode that
    is all rows has one column; a mode at a fixed index is ``(1, 1)``.

    Up to 12 arrays, all partitions are searched. With more, arrays are moved to the other side one at a time as long as
    this makes the product smaller.

    Examples
    --------
    A CP tensor whose second mode is one row index and two column indices of length 2:

    >>> minimal_cut(Formula(("ar", "br", "cr"), "abc"), {"a": 5, "b": 6, "c": 7, "r": 2}, [(5, 1), (3, 2), (1, 7)])
    (4, (True, True, False))
    """
    lengths = dict(zip(formula.output, legs, strict=True))
    holders = {index: [k for k, own in enumerate(formula.inputs) if index in own] for index in size}
    count = len(formula.inputs)

    def cost(side: Sequence[bool]) -> int:
        total = 1
        for index, length in size.items():
            sides = {side[k] for k in holders[index]}
            rows, cols = lengths.get(index, (1, 1))
            if len(sides) == 2:
                total *= rows * cols if index in lengths else length
            else:
                # A leg on the other side than its array is cut.
                total *= cols if True in sides else rows
        return total

    if count <= _ALL:
        return min((cost(side), side) for side in itertools.product((False, True), repeat=count))
    # True is the side of the rows. Arrays without a leg begin on one side, and on the other.
    held = [[lengths[index] for index in own if index in lengths] for own in formula.inputs]
    starts = [any(rows > 1 for rows, _ in own) for own in held], [all(cols == 1 for _, cols in own) for own in held]
    return min(_descended(cost, list(side)) for side in starts)


def _descended(cost: Callable[[Sequence[bool]], int], side: list[bool]) -> tuple[int, tuple[bool, ...]]:
    """Move one array at a time to the other side as long as the cost falls; return the cost and the sides."""
    best, improved = cost(side), True
    while improved:
        improved = False
        for k in range(len(side)):
            side[k] = not side[k]
            now = cost(side)
            if now < best:
                best, improved = now, True
            else:
                side[k] = not side[k]
    return best, tuple(side)
