"""Bounds on the matrix rank of each weight's update that hold by structure, whatever the arrays are.

They are computed from the integers of a plan. LoRA of that rank holds the update exactly; how, is in
:mod:`tnadapt.algebra.factoring`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .group import Group
from .layout import Layout, Piece, place_of
from .maps import Map, PerWeight
from .network import width_at

__all__ = [
    "Separation",
    "lora_rank",
    "rank_bound",
    "rank_bounds",
    "separation_of",
    "useful_rank",
]


# -- Where rows and columns of a weight stay separate: in its group's network, and through the map behind it -----------


class Separation(NamedTuple):
    """The matrix X of a weight in the vector of a group's network, and the maps that make the update of it.

    Attributes
    ----------
    start : int
        Where X begins in the vector; it is contiguous, in C order.
    shape : (int, int)
        Rows and columns of X.
    sides : sequence of (Map, Map)
        Pairs (A_t, B_t), with ``ΔW = sum_t A_t X B_tᵀ``; none if X is the update itself.
    """

    start: int
    shape: tuple[int, int]
    sides: Sequence[tuple[Map, Map]] = ()


def separation_of(group: Group, piece: Piece, cols: int) -> Separation | None:
    """Return where the rows of a weight in a piece come from; None if the map mixes rows with columns.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.miss(4), [(8, 16)])
    >>> found = separation_of(plan.groups[0], plan.groups[0].pieces[0], 16)
    >>> found.shape, found.sides
    ((8, 4), [(Identity(n_in=8, n_out=8, seed=0, group=0), Repeat(n_in=4, n_out=16, seed=0, group=0))])
    """
    found = group.projection.map
    if found.identity:
        return Separation(piece.group_start, (piece.length // cols, cols))
    start, part = found.part_at(piece.group_start) if isinstance(found, PerWeight) else (0, found)
    sides = part.sides()
    if not sides or part.n_out != piece.length:
        return None
    rows_of, cols_of = sides[0]
    return Separation(start, (rows_of.n_in, cols_of.n_in), sides)


# -- Bounds on the matrix rank of each weight's update that hold by structure, whatever the arrays are -----------------


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


def rank_bounds(layout: Layout, groups: Sequence[Group]) -> Iterator[int]:
    """Yield :func:`rank_bound` of every weight; weights at the same place of groups that are alike share theirs.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.presets.loha(2), [(8, 6), (8, 6), (3, 6)])
    >>> list(rank_bounds(plan.layout, plan.groups))
    [4, 4, 3]
    """
    known: dict[tuple[object, ...], int] = {}
    for weight, (rows, cols) in enumerate(layout.shapes):
        pieces = [(groups[piece.group], piece) for piece in layout.of_weight(weight)]
        key = rows, cols, *(_key(group, piece) for group, piece in pieces)
        if key not in known:
            known[key] = min(sum(_of_piece(group, piece, cols) for group, piece in pieces), rows, cols)
        yield known[key]


def _key(group: Group, piece: Piece) -> tuple[object, ...]:
    """Return all that :func:`_of_piece` depends on, besides the shape of the weight."""
    return (
        id(group.network),
        group.projection.kind,
        group.subtracts,
        piece.weight_start,
        piece.group_start,
        piece.length,
    )


def lora_rank(shapes: Sequence[tuple[int, int]], ranks: Sequence[int]) -> int | None:
    """Return the largest of the ranks; None if two factors of a rank are not smaller than their weight.

    Examples
    --------
    >>> lora_rank([(64, 32), (16, 32)], [2, 3]), lora_rank([(64, 32), (16, 32)], [2, 11])
    (3, None)
    """
    smaller = all(rank * (rows + cols) < rows * cols for rank, (rows, cols) in zip(ranks, shapes, strict=True))
    return max(ranks) if smaller else None


def useful_rank(groups: Iterable[Group]) -> int | None:
    """Return the rank beyond which no group gains expressiveness; None if there is no rank.

    Examples
    --------
    >>> import tnadapt as tna
    >>> useful_rank(tna.SuperLoRA(tna.presets.lora(2), [(8, 6), (3, 6)]).groups)
    6
    """
    ranks = (split.useful_rank() for group in groups for split in group.network.splits)
    return max((rank for rank in ranks if rank is not None), default=None)


def _of_piece(group: Group, piece: Piece, cols: int) -> int:
    """Return a bound on the rank of the rows of a weight that have elements in a piece."""
    first, last = piece.weight_start // cols, -(-(piece.weight_start + piece.length) // cols)
    touched = min(last - first, cols)
    if piece.weight_start % cols or piece.length % cols:
        return touched
    found = separation_of(group, piece, cols)
    if found is None:
        return touched
    place = place_of(group.network.sizes, found.start, math.prod(found.shape), found.shape[1])
    width = None if place is None else width_at(group.network, place)
    # The difference of two updates, that of the arrays and that of their start.
    before = min(found.shape) if width is None else min(width * (2 if group.subtracts else 1), *found.shape)
    return min(touched, before * max(1, len(found.sides)))
