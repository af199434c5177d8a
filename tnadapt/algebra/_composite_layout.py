"""The layout of several parts of an adapter, each with a config of its own."""

from __future__ import annotations

from collections.abc import Sequence

from .layout import Layout, Piece

__all__ = ["CompositeLayout"]


class CompositeLayout(Layout):
    """The layouts of several parts, one after another.

    Parameters
    ----------
    parts : sequence of Layout

    Examples
    --------
    >>> from .layout import make_layout
    >>> layout = CompositeLayout([make_layout("weight", [(2, 2)] * 2), make_layout(1, [(2, 3)])])
    >>> layout.num_groups, layout.of_weight(2)
    (3, [Piece(weight=2, weight_start=0, group=2, group_start=0, length=6)])
    """

    def __init__(self, parts: Sequence[Layout]) -> None:
        shapes = [shape for part in parts for shape in part.shapes]
        super().__init__(shapes, ())
        self.parts = tuple(parts)
        self.num_groups = sum(part.num_groups for part in parts)
        #: For each part, the numbers of its first weight and of its first group.
        self.firsts = [
            (sum(len(part.shapes) for part in parts[:place]), sum(part.num_groups for part in parts[:place]))
            for place in range(len(parts))
        ]
        self._of_weight = [place for place, part in enumerate(parts) for _ in part.shapes]

    def part_of(self, group: int) -> int:
        """Return the part that a group belongs to."""
        return max(place for place, (_, first) in enumerate(self.firsts) if first <= group)

    def moved(self, place: int, piece: Piece) -> Piece:
        """Return a piece of a part with the numbers of the whole."""
        weight, group = self.firsts[place]
        return piece._replace(weight=piece.weight + weight, group=piece.group + group)

    def group_size(self, group: int) -> int:
        """Return the number of elements of a group."""
        place = self.part_of(group)
        return self.parts[place].group_size(group - self.firsts[place][1])

    def same_size(self) -> list[tuple[int, int, int]]:
        """Return runs of consecutive groups of equal size."""
        return [
            (first + start, count, size)
            for part, (_, start) in zip(self.parts, self.firsts, strict=True)
            for first, count, size in part.same_size()
        ]

    def columns(self, group: int) -> int:
        """Return the greatest common divisor of the column counts in a group."""
        place = self.part_of(group)
        return self.parts[place].columns(group - self.firsts[place][1])

    def of_weight(self, weight: int) -> list[Piece]:
        """Return the pieces of one weight."""
        place = self._of_weight[weight]
        return [self.moved(place, piece) for piece in self.parts[place].of_weight(weight - self.firsts[place][0])]

    def of_group(self, group: int) -> list[Piece]:
        """Return the pieces of one group."""
        place = self.part_of(group)
        return [self.moved(place, piece) for piece in self.parts[place].of_group(group - self.firsts[place][1])]
