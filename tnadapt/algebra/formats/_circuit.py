"""Circuits: products of gates, each of which acts on two axes of a matrix's columns (QuanTA)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from tnadapt.errors import ConfigError

from ._contraction import letters
from ._format import Format, Rank

__all__ = ["Circuit"]

# Gates for every two of 8 axes.
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
    def _gates(order: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of each gate and the axes that it acts on."""
        axes = -(-order // 2)
        if axes == 1:
            yield "gate0", (0,)
        for number, pair in enumerate(itertools.combinations(range(axes), 2)):
            yield f"gate{number}", pair

    @staticmethod
    def _traced(rows: Sequence[Any], cols: Sequence[Any], fresh: Iterator[Any], order: int) -> Iterator[list[Any]]:
        """Yield what the axes of each gate are: those after it, then those before it, where there are any.

        ``rows`` and ``cols`` are those at the ends; ``fresh`` yields those of an axis between two gates.
        """
        gates = [pair for _, pair in Circuit._gates(order)]
        current: list[Any] = [*cols, *[None] * (len(rows) - len(cols))]
        for number, pair in enumerate(gates):
            last = [not any(axis in later for later in gates[number + 1 :]) for axis in pair]
            after = [rows[axis] if ends else next(fresh) for axis, ends in zip(pair, last, strict=True)]
            before = [current[axis] for axis in pair if current[axis] is not None]
            for axis, now in zip(pair, after, strict=True):
                current[axis] = now
            yield after + before

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        order = len(self.sizes)
        axes = -(-order // 2)
        rows, cols = self.sizes[:axes], self.sizes[axes:]
        touched = (rows[axis] for axis in self._unfinished(order))
        traced = self._traced(rows, cols, touched, order)
        return {name: tuple(shape) for (name, _), shape in zip(self._gates(order), traced, strict=True)}

    @staticmethod
    def _unfinished(order: int) -> Iterator[int]:
        """Yield the axis of each index between two gates."""
        gates = [pair for _, pair in Circuit._gates(order)]
        for number, pair in enumerate(gates):
            yield from (axis for axis in pair if any(axis in later for later in gates[number + 1 :]))

    @property
    def formula(self) -> str:
        order = len(self.sizes)
        axes = -(-order // 2)
        modes, bonds = letters(order, len(list(self._unfinished(order))))
        traced = self._traced(modes[:axes], modes[axes:], iter(bonds), order)
        return ",".join("".join(own) for own in traced) + "->" + modes

    def useful_rank(self) -> None:
        return None
