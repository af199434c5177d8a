"""Where the rows and columns of a weight are in a folded tensor: integer arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._boxes import boxes
from .formats import Legs

__all__ = ["WeightPlace", "enclosing", "place_of", "run_in_box"]

Box = tuple[tuple[int, int], ...]


class WeightPlace(NamedTuple):
    """Where the rows of a weight are in a folded tensor.

    Attributes
    ----------
    ranges : tuple of (int, int)
        A box that contains them: start and stop of every mode.
    modes : int
        Number of leading modes that are rows.
    across : int
        How many columns an index of the next mode stands for; the other columns are those of the modes after it. 1 if
        there is no such mode.
    row_sizes : tuple of int
        Sizes of the modes of the whole tensor that are rows, with that of the rows' part of the mode that has both.
    row_ranges : tuple of (int, int)
        The box, of these.
    rows : (int, int)
        The weight's rows are this run of the rows of the whole tensor.
    """

    ranges: Box
    modes: int
    across: int
    row_sizes: tuple[int, ...]
    row_ranges: Box
    rows: tuple[int, int]

    def legs(self) -> Legs:
        """Return for each mode how many rows and columns its range stands for."""
        lengths = [stop - start for start, stop in self.ranges]
        found = [(length, 1) for length in lengths[: self.modes]]
        found += [(1, length) for length in lengths[self.modes :]]
        if self.across > 1:
            found[self.modes] = (lengths[self.modes] // self.across, self.across)
        return tuple(found)


def place_of(sizes: Sequence[int], start: int, length: int, cols: int) -> WeightPlace | None:
    """Return where a run of rows is in a folded tensor; None if rows begin at different places of its modes.

    Examples
    --------
    Rows of 10 elements in a matrix of rows of 20:

    >>> place = place_of((24, 20), 120, 120, 10)
    >>> place.ranges, place.legs()
    (((6, 12), (0, 20)), ((6, 1), (2, 10)))
    """
    inner, modes = 1, len(sizes)
    while modes and inner * sizes[modes - 1] <= cols and cols % (inner * sizes[modes - 1]) == 0:
        modes -= 1
        inner *= sizes[modes]
    across = cols // inner
    run = start // cols, (start + length) // cols
    after = tuple((0, size) for size in sizes[modes:])
    if across == 1:
        if start % cols:
            return None
        leading = enclosing(sizes[:modes], *run)
        return WeightPlace((*leading, *after), modes, 1, tuple(sizes[:modes]), leading, run)
    if not modes or start % inner:
        return None
    # Mode modes - 1 holds parts of rows: several of its indices make up the columns.
    modes -= 1
    box = enclosing(sizes[: modes + 1], start // inner, (start + length) // inner)
    before, last = box[:-1], box[-1]
    if all(stop - first == 1 for first, stop in before):
        # The rows are the box.
        rows = (last[1] - last[0]) // across
        ranges, whole = (*before, last, *after), ((0, 1),) * modes
        return WeightPlace(ranges, modes, across, (*(1,) * modes, rows), (*whole, (0, rows)), (0, rows))
    if sizes[modes] % across or start % cols:
        return None
    ranges, rows = (*before, (0, sizes[modes]), *after), sizes[modes] // across
    return WeightPlace(ranges, modes, across, (*sizes[:modes], rows), (*before, (0, rows)), run)


def enclosing(sizes: Sequence[int], start: int, stop: int) -> Box:
    """Return the smallest box that contains a run of ``vec``."""
    found = boxes(sizes, start, stop) if sizes else []
    sides = [[box.ranges[mode] for box in found] for mode in range(len(sizes))]
    return tuple((min(lo for lo, _ in side), max(hi for _, hi in side)) for side in sides)


def run_in_box(sizes: Sequence[int], box: Box, run: tuple[int, int]) -> slice | np.ndarray:
    """Return where the elements of a run of ``vec`` are in the ``vec`` of a box that contains it.

    Examples
    --------
    >>> run_in_box((4, 10), ((1, 3), (0, 10)), (12, 15)), run_in_box((4, 10), ((0, 2), (4, 6)), (4, 6))
    (slice(2, 5, None), slice(0, 2, None))
    >>> run_in_box((4, 2, 2), ((0, 2), (1, 2), (0, 2)), (2, 4))
    slice(0, 2, None)
    """
    if not sizes:
        return slice(0, 1)
    digits = np.unravel_index(np.arange(*run), tuple(sizes))
    inside = [digit - lo for digit, (lo, _) in zip(digits, box, strict=True)]
    places = np.ravel_multi_index(inside, [hi - lo for lo, hi in box])
    first = int(places[0])
    return (
        slice(first, first + len(places)) if np.array_equal(places, np.arange(first, first + len(places))) else places
    )
