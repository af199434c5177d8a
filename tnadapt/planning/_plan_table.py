"""The answer: the rows, which of them are on the front, and the table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from tnadapt.errors import ConfigError, safe_repr

from ._plan_row import Row

__all__ = ["CRITERIA", "RUNG", "Plan", "front_of", "rung"]

# What a row can be better at, and whether more is better. (The rank of a row is known only once it is computed.)
CRITERIA = {"parameters": False, "freedom": True, "cost": False, "rank": True, "waste": False}

# Parameters are compared by their rung, each a tenth of the one above: freedom grows with them one for one, so that
# otherwise each row would have the least parameters for its freedom, and be on the front.
RUNG = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings within a budget.

    Attributes
    ----------
    budget : int
        Parameters.
    dtype : str
        What a file holds them in.
    shapes : tuple of (rows, cols)
        Of the weights.
    by : tuple of str
        What the front is of.
    rows : tuple of Row
        All settings that were compared, the most parameters first.
    front : tuple of Row
        Those that no other beats, which is as good in everything that ``by`` names, and better in something. Parameters
        count by tenths: rows between a tenth of the budget and all of it have equally many, and are told apart by them
        only where all else is equal.
    freest : tuple of Row
        Of each method, the one with the most freedom.

    Examples
    --------
    >>> import tnadapt as tna
    >>> found = tna.plan([(64, 64)] * 8, 300)
    >>> found.front[0].parameters <= 300
    True
    """

    budget: int
    dtype: str
    shapes: tuple[tuple[int, int], ...]
    by: tuple[str, ...]
    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    freest: tuple[Row, ...]

    @property
    def size(self) -> int:
        """N, the elements of all weights."""
        return sum(rows * cols for rows, cols in self.shapes)

    @property
    def shown(self) -> tuple[Row, ...]:
        """What the table has: the front, and of each method the one with the most freedom."""
        return tuple(row for row in self.rows if row in self.front or row in self.freest)

    def table(self, every: bool = False) -> list[tuple[str, ...]]:
        """The cells of the table, the titles first.

        Parameters
        ----------
        every : bool
            All rows, not only ``shown``; each rank is computed, which may take a while.
        """
        rows = self.rows if every else self.shown
        return [TITLES, *(_cells(row, row in self.front) for row in rows)]

    def __str__(self) -> str:
        """The table as plain text."""
        return "\n".join([*aligned(self.table()), *self.notes()])

    def notes(self) -> list[str]:
        """What the table must be read with."""
        names = {"parameters": "parameters (by tenths)", "cost": "step", "waste": "padding"}
        told = ", ".join(names.get(name, name) for name in self.by)
        return [
            f"● front: no other is as good in {told}, and better in one",
            "  beside it, of each method the one with the most freedom",
            "rank: the largest that a weight's update can have; step: multiply-adds of updates and gradients",
            "freedom: the dimension of the set of all updates, and its share of their elements",
            f"{_counted(len(self.shapes), 'weight')} of {_counted(self.size, 'element')}; at most "
            f"{_counted(self.budget, 'parameter')}; {_counted(len(self.rows), 'setting')} compared",
        ]

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """As JSON knows it; all rows if ``every``."""
        rows = self.rows if every else self.shown
        return {
            "budget": self.budget, "dtype": self.dtype, "weights": len(self.shapes), "elements": self.size,
            "by": list(self.by), "compared": len(self.rows),
            "rows": [{**row.to_dict(), "front": row in self.front} for row in rows],
        }  # fmt: skip


TITLES = ("", "method", "setting", "parameters", "bytes", "rank", "freedom", "share", "padding", "step")


def _cells(row: Row, front: bool) -> tuple[str, ...]:
    return (
        "●" if front else "", row.name.family, row.name.label, f"{row.parameters:,}", f"{row.bytes:,}",
        str(row.rank), f"{row.freedom:,}", _percent(row.fraction), f"{row.waste:.1%}", _short(row.cost),
    )  # fmt: skip


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text; all but the first three columns to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place < 3 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]


def checked_criteria(by: Iterable[str]) -> tuple[str, ...]:
    """Names of ``CRITERIA``, or a ConfigError."""
    names = tuple(by) if not isinstance(by, str) else (by,)
    if not names or any(name not in CRITERIA for name in names):
        raise ConfigError(f"by must name what a setting can be better at: {', '.join(CRITERIA)}; got {safe_repr(by)}")
    return names


def rung(parameters: int, budget: int) -> int:
    """How many times the budget can be divided by ten and still holds so many parameters.

    Examples
    --------
    >>> [rung(parameters, 1000) for parameters in (1000, 101, 100, 10, 1)]
    [0, 0, 1, 2, 3]
    """
    steps = 0
    while parameters * RUNG ** (steps + 1) <= budget:
        steps += 1
    return steps


def front_of(rows: Sequence[Row], by: Sequence[str], budget: int) -> list[Row]:
    """The rows that no other beats, in their order; of several that are equal, the first."""
    keys = [(*(_goodness(row, name, budget) for name in by), -row.parameters) for row in rows]
    firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
    return [
        row
        for place, (row, key) in enumerate(zip(rows, keys, strict=True))
        if firsts[key] == place and not any(_beats(other, key) for other in keys)
    ]


def _goodness(row: Row, name: str, budget: int) -> float:
    if name == "parameters":
        return rung(row.parameters, budget)
    value = row.rank.value if name == "rank" else getattr(row, name)
    return value if CRITERIA[name] else -value


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """As good in all that counts, and better in one; where all is equal, of fewer parameters."""
    *ours, few = one
    *theirs, fewer = other
    return all(a >= b for a, b in zip(ours, theirs, strict=True)) and (ours != theirs or few > fewer)
