"""Which modes a product of factors joins last: the cheapest way by a model of its time.

The last matrix product writes the whole result, and the ways to it differ in what it reads: its operands are expanded
from the factors. The model counts the elements that are written on the way. A multiply-add of a matrix product costs
a small part of an element, a row of a product with broadcasting as much as sixteen, each matrix of a batch as much as
three hundred. All are plain integers, and nothing is cached: compilers trace these functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["cp_groups", "train_cut", "tucker_last"]

_ROW = 16
_MATRIX = 300
#: Multiply-adds that cost as much as an element.
_ARITHMETIC = 16
# Libraries multiply long by small faster than small by long: these elements of a wide result cost one more.
_WIDE = 8
# Libraries multiply matrices with fewer columns far below their speed, so a batch of these does not pay.
_NARROW = 32


def _expanded(elements: int, row: int) -> int:
    """Return the cost of a product with broadcasting whose innermost loops have ``row`` elements."""
    return elements + _ROW * elements // max(row, 1)


def cp_groups(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Return how the modes of a CP tensor are grouped: a batch of matrices, their rows, their columns.

    Parameters
    ----------
    sizes : sequence of int
        At least two.
    rank : int

    Returns
    -------
    first, second : int
        ``sizes[:first]`` is the batch, with ``first = 0`` for a single matrix; ``sizes[second:]`` are the columns.

    Notes
    -----
    A batch expands only the smaller operand of the last product: it pays where a mode in the middle is long, and where
    there are many modes.

    Examples
    --------
    >>> cp_groups([2000, 40, 10], 8), cp_groups([10, 40, 2000], 8), cp_groups([10, 2000, 40], 8)
    ((0, 1), (0, 2), (1, 2))
    """
    chosen, least = (0, 1), -1
    for second in range(len(sizes) - 1, 0, -1):
        width = math.prod(sizes[second:])
        right = _expanded(rank * width, sizes[-1]) if second < len(sizes) - 1 else 0
        for first in range(second if width >= _NARROW else 1):
            height, batch = math.prod(sizes[first:second]), math.prod(sizes[:first])
            cost = right + (_expanded(rank * height, rank) if second - first > 1 else 0)
            if width > height:
                cost += batch * height * width // _WIDE
            if first:
                cost += _expanded(rank * batch * width, width) + _MATRIX * batch
            if least < 0 or cost < least:
                chosen, least = (first, second), cost
    return chosen


def tucker_last(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """Return the mode of a Tucker tensor that is expanded last; the last one of ties.

    Parameters
    ----------
    sizes, ranks : sequence of int
        Of the tensor and of its core.

    Returns
    -------
    int

    Notes
    -----
    A mode in the middle needs a batch of matrix products, one per index of the modes before it.

    Examples
    --------
    >>> tucker_last([64, 64, 64], [4, 4, 4]), tucker_last([10, 2000, 40], [4, 4, 4])
    (2, 1)
    """
    chosen, least = len(sizes) - 1, -1
    for mode in range(len(sizes) - 1, -1, -1):
        before, after = math.prod(sizes[:mode]), math.prod(sizes[mode + 1 :])
        middle = 0 < mode < len(sizes) - 1
        if middle and after < _NARROW:
            continue
        cost = ranks[mode] * before * after * (_ARITHMETIC + sizes[mode]) + (_ARITHMETIC * _MATRIX * before) * middle
        if least < 0 or cost < least:
            chosen, least = mode, cost
    return chosen


def train_cut(sizes: Sequence[int], bonds: Sequence[int]) -> int:
    """Return where a tensor train is cut into the two operands of its last product; the last cut of ties.

    Parameters
    ----------
    sizes : sequence of int
        At least two.
    bonds : sequence of int
        The ranks between neighbors, one fewer than sizes.

    Returns
    -------
    int
        Between 1 and the number of modes less one.

    Notes
    -----
    The last one of ties makes the left matrix the long one.

    Examples
    --------
    >>> train_cut([8, 8, 8, 8], [4, 4, 4]), train_cut([8, 8, 8, 8], [4, 50, 2])
    (2, 3)
    """
    chosen, least = len(sizes) - 1, -1
    for cut in range(len(sizes) - 1, 0, -1):
        left, right = math.prod(sizes[:cut]), math.prod(sizes[cut:])
        cost = bonds[cut - 1] * (_ARITHMETIC * (left + right) + left * right)
        if least < 0 or cost < least:
            chosen, least = cut, cost
    return chosen
