"""Circuits: products of gates, each of which acts on two axes of a matrix's columns (QuanTA)."""

from __future__ import annotations

import collections
import itertools
from typing import Any

from tnadapt.errors import ConfigError

from ._contraction import letters
from ._format import Format, Rank

__all__ = ["Circuit"]

# Modes, of 8 axes: 28 gates.
_MOST = 16


class Circuit(Format):
    """A matrix as a product of gates: one for every two axes, in the order (0, 1), (0, 2), …, (1, 2), ….

    The first half of the modes are the digits of the rows, the second half those of the columns: axis k turns from
    column digit k to row digit k in the first gate that acts on it. With an odd number of modes, the last row digit has
    no column digit. A gate on axes k and l has the shape (row k, row l, the current k, the current l). A single axis
    has one gate, the matrix itself. The rank has no meaning.
    """

    title = "circuit"

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        if order > _MOST:
            raise ConfigError(
                f"format={name!r} has a gate for every two of its axes, and takes up to {_MOST} modes; got "
                f"order={order}: use fewer, larger digits"
            )
        return super().checked_rank(name, rank, order)

    @staticmethod
    def _gates(order: int) -> list[list[tuple[str, int]]]:
        """Return the indices of each gate, those after it before those before it: ("mode", m), or (bond, row digit)."""
        axes = -(-order // 2)
        pairs: list[tuple[int, ...]] = list(itertools.combinations(range(axes), 2)) or [(0,)]
        uses = collections.Counter(axis for pair in pairs for axis in pair)
        # What each axis is so far: the column digit, or nothing for a row digit without one.
        current = {axis: ("mode", axes + axis) for axis in range(order - axes)}
        found = []
        for number, pair in enumerate(pairs):
            before = [current[axis] for axis in pair if axis in current]
            for axis in pair:
                uses[axis] -= 1
                current[axis] = (f"bond{number}", axis) if uses[axis] else ("mode", axis)
            found.append([*(current[axis] for axis in pair), *before])
        return found

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        # A bond has the size of its axis's row digit, which is mode ``axis``.
        return {
            f"gate{number}": tuple(self.sizes[mode] for _, mode in own)
            for number, own in enumerate(self._gates(len(self.sizes)))
        }

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        gates = self._gates(order)
        bonds = list(dict.fromkeys(index for own in gates for index in own if index[0] != "mode"))
        modes, others = letters(order, len(bonds))
        letter = dict(zip(bonds, others, strict=True)) | {("mode", m): own for m, own in enumerate(modes)}
        return ",".join("".join(letter[index] for index in own) for own in gates) + "->" + modes

    def useful_rank(self) -> None:
        return None
