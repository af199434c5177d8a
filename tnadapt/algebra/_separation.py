"""Where rows and columns of a weight stay separate: in its group's network, and through the map behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .group import Group
from .layout import Piece
from .maps import Map, PerWeight

__all__ = ["Separation", "separation_of"]


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
