"""Bounds on the matrix rank of each weight's update that hold by structure, whatever the arrays are.

They are computed from the integers of a plan. LoRA of that rank holds the update exactly; how, is in
:mod:`tnadapt.algebra.factoring`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from ._boxes import boxes
from .formats import Format
from .group import Group
from .layout import Layout, Piece
from .network import Network

__all__ = ["lora_rank", "rank_bound"]

Legs = list[tuple[int, int]]


class _Place(NamedTuple):
    """Where the rows of a weight are in a folded tensor.

    Attributes
    ----------
    ranges : list of (int, int)
        A box that contains them: start and stop of every mode.
    modes : int
        Number of leading modes that are rows.
    across : int
        How many columns an index of the next mode stands for; the other columns are those of the modes after it. 1 if
        there is no such mode.
    """

    ranges: list[tuple[int, int]]
    modes: int
    across: int

    def legs(self) -> Legs:
        """Return for each mode how many rows and columns its range stands for."""
        lengths = [stop - start for start, stop in self.ranges]
        found = [(length, 1) for length in lengths[: self.modes]]
        found += [(1, length) for length in lengths[self.modes :]]
        if self.across > 1:
            found[self.modes] = (lengths[self.modes] // self.across, self.across)
        return found


def rank_bound(layout: Layout, groups: Sequence[Group], weight: int) -> int:
    """Return a rank that no update of a weight exceeds; see :meth:`tnadapt.SuperLoRA.largest_rank`.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.loha(2), [(8, 6)])
    >>> rank_bound(plan.layout, plan.groups, 0)
    4
    """
    rows, cols = layout.shapes[weight]
    total = 0
    for piece in layout.of_weight(weight):
        total += _of_piece(groups[piece.group], piece, cols)
    return min(total, rows, cols)


def lora_rank(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int | None:
    """Return the largest of the ranks; None if two factors of a rank are not smaller than their weight.

    Examples
    --------
    >>> lora_rank([(64, 32), (16, 32)], [2, 3]), lora_rank([(64, 32), (16, 32)], [2, 11])
    (3, None)
    """
    smaller = all(rank * (rows + cols) < rows * cols for rank, (rows, cols) in zip(ranks, shapes, strict=True))
    return max(ranks) if smaller else None


def _of_piece(group: Group, piece: Piece, cols: int) -> int:
    """Return a bound on the rank of the rows of a weight that have elements in a piece."""
    first, last = piece.weight_start // cols, -(-(piece.weight_start + piece.length) // cols)
    touched = min(last - first, cols)
    # Other maps mix elements across rows and columns.
    if group.projection.kind != "identity" or piece.weight_start % cols or piece.length % cols:
        return touched
    place = _place(group.network.sizes, piece.group_start, piece.length, cols)
    if place is None:
        return touched
    # The difference of two updates, that of the arrays and that of their start.
    return min(touched, _of_network(group.network, place) * (2 if group.subtracts else 1))


def _place(sizes: Sequence[int], start: int, length: int, cols: int) -> _Place | None:
    """Return where a run of rows is in a folded tensor; None if rows begin at different places of its modes."""
    inner, modes = 1, len(sizes)
    while modes and inner * sizes[modes - 1] <= cols and cols % (inner * sizes[modes - 1]) == 0:
        modes -= 1
        inner *= sizes[modes]
    across = cols // inner
    if across == 1:
        if start % cols:
            return None
        return _Place(
            [*_enclosing(sizes[:modes], start // cols, (start + length) // cols), *_whole(sizes[modes:])], modes, 1
        )
    if not modes or start % inner:
        return None
    # Mode modes - 1 holds parts of rows: several of its indices make up the columns.
    modes -= 1
    ranges = _enclosing(sizes[: modes + 1], start // inner, (start + length) // inner)
    if any(stop - first > 1 for first, stop in ranges[:-1]):
        if sizes[modes] % across or start % cols:
            return None
        ranges[-1] = (0, sizes[modes])
    return _Place([*ranges, *_whole(sizes[modes + 1 :])], modes, across)


def _enclosing(sizes: Sequence[int], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the smallest box that contains a run of ``vec``."""
    found = boxes(sizes, start, stop) if sizes else []
    sides = [[box.ranges[mode] for box in found] for mode in range(len(sizes))]
    return [(min(lo for lo, _ in side), max(hi for _, hi in side)) for side in sides]


def _whole(sizes: Sequence[int]) -> list[tuple[int, int]]:
    return [(0, size) for size in sizes]


def _of_network(network: Network, place: _Place) -> int:
    if len(network.splits) == 1 or not network.kronecker:
        # The rank of an elementwise product is at most the product of the ranks.
        legs = place.legs()
        return network.terms * math.prod(_of_split(split, legs) for split in network.splits)
    if place.across > 1:
        return math.prod(rows for rows, _ in place.legs())  # digits of the splits on both sides
    # An index is a number with one digit a split. The update is a part of the Kronecker product of the matrices that
    # the digits' ranges cut out of the splits.
    digits = [
        _enclosing([split.sizes[mode] for split in network.splits], *bounds) for mode, bounds in enumerate(place.ranges)
    ]
    total = network.terms
    for k, split in enumerate(network.splits):
        own = _Place([digit[k] for digit in digits], place.modes, 1)
        total *= _of_split(split, own.legs())
    return total


def _of_split(split: Format, legs: Legs) -> int:
    rows, cols = (math.prod(leg[side] for leg in legs) for side in (0, 1))
    return min(rows, cols, _least_cut(split, tuple(legs)))


@functools.lru_cache(maxsize=1024)
def _least_cut(split: Format, legs: tuple[tuple[int, int], ...]) -> int:
    # The same for all weights of one shape in a group.
    return split.rank_of_legs(legs)
