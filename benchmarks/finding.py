"""Functions that find a number in the rows of results, for the targets and the first lines of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Find", "Rows", "inverse", "largest", "largest_over", "over", "times"]

Rows = Sequence[Mapping[str, Any]]
Find = Callable[[Rows], float | None]


def largest(column: str, **where: Any) -> Find:
    """Return a function that finds the largest number in a column, over the rows that have these values."""

    def find(rows: Rows) -> float | None:
        found = [
            row[column]
            for row in rows
            if row.get(column) is not None
            and all(row.get(key) in (value if isinstance(value, tuple) else (value,)) for key, value in where.items())
        ]
        return max(found, default=None)

    return find


def over(case: str, other: str, **where: Any) -> Find:
    """Return a function that computes the ratio of one case relative to another."""
    one, two = largest("ratio", case=case, **where), largest("ratio", case=other, **where)

    def find(rows: Rows) -> float | None:
        mine, theirs = one(rows), two(rows)
        return None if mine is None or theirs is None else mine / theirs

    return find


def largest_over(cases: Sequence[str], other: str, **where: Any) -> Find:
    """Return a function that computes the largest ratio of several cases relative to another."""
    several = [over(case, other, **where) for case in cases]

    def find(rows: Rows) -> float | None:
        found = [one(rows) for one in several]
        return max((ratio for ratio in found if ratio is not None), default=None)

    return find


def inverse(column: str, **where: Any) -> Find:
    """Return a function that computes one over the smallest number in a column of speed-ups."""
    least = largest(column, **where)

    def find(rows: Rows) -> float | None:
        several = [least([row]) for row in rows]
        found = [number for number in several if number is not None]
        return 1 / min(found) if found else None

    return find


def times(factor: float, finder: Find) -> Find:
    """Return a function that multiplies what another one finds, such as seconds, by a factor."""

    def find(rows: Rows) -> float | None:
        found = finder(rows)
        return None if found is None else factor * found

    return find
