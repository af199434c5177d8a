"""Cover a slice of a tensor's vector by boxes of the tensor: integer arithmetic only.

A tensor network restricted to a box is the same network with its factors restricted to the box's rows. This is how a
slice is computed without the rest of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tnadapt.errors import ShapeError

__all__ = ["Box", "boxes"]


class Box(NamedTuple):
    """A box of a tensor whose elements are contiguous in ``vec``.

    Attributes
    ----------
    ranges : tuple of (int, int)
        Start and stop in every mode.
    start : int
        Position in ``vec`` of its first element.
    """

    ranges: tuple[tuple[int, int], ...]
    start: int


# One box may compute up to this fraction of extra elements if that avoids splitting the slice into three boxes.
SLACK = 0.25


def boxes(sizes: Sequence[int], start: int, stop: int) -> list[Box]:
    """Return boxes that together hold elements ``start`` to ``stop - 1`` of ``vec`` of a tensor, in order.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M`` of the tensor.
    start, stop : int
        The slice, ``0 <= start < stop <= prod(sizes)``.

    Returns
    -------
    list of Box
        At most 2 M - 1 boxes. The first may begin before ``start`` and the last may end after ``stop``: at most a
        quarter of the slice's length extra, so that a slice of a few rows is one box instead of three.

    Raises
    ------
    ShapeError
        If the slice is empty or extends beyond the tensor.

    Notes
    -----
    The leading modes in which the slice stays at one index are fixed, the next mode is cut to the rows that the slice
    touches, and the remaining modes are whole.

    Examples
    --------
    >>> boxes((4, 10), 10, 30)
    [Box(ranges=((1, 3), (0, 10)), start=10)]
    >>> boxes((4, 10), 19, 21)
    [Box(ranges=((1, 2), (9, 10)), start=19), Box(ranges=((2, 3), (0, 1)), start=20)]
    """
    if not 0 <= start < stop <= math.prod(sizes):
        raise ShapeError(f"no slice {start}:{stop} of a tensor of sizes {tuple(sizes)} ({math.prod(sizes)} elements)")
    return _boxes(tuple(sizes), start, stop)


def _boxes(sizes: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if len(sizes) == 1:
        return [Box(((start, stop),), start)]
    row = math.prod(sizes[1:])
    whole = tuple((0, size) for size in sizes[1:])
    first, end = start // row, -(-stop // row)

    def inside(index: int, lo: int, hi: int) -> list[Box]:
        """Return the boxes of elements lo to hi - 1 of one row."""
        return [Box(((index, index + 1), *box.ranges), index * row + box.start) for box in _boxes(sizes[1:], lo, hi)]

    if end - first == 1:
        return inside(first, start - first * row, stop - first * row)
    if (end - first) * row <= (1 + SLACK) * (stop - start):
        return [Box(((first, end), *whole), first * row)]
    head: list[Box] = []
    tail: list[Box] = []
    if start % row:
        head, first = inside(first, start % row, row), first + 1
    if stop % row:
        tail, end = inside(end - 1, 0, stop % row), end - 1
    middle = [Box(((first, end), *whole), first * row)] if first < end else []
    return head + middle + tail
