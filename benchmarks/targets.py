"""What is to be reached, and where in the results it stands; where it is missed, why the limit is where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["TARGETS", "Target"]

Rows = Sequence[Mapping[str, Any]]


class Target(NamedTuple):
    """One line.

    Attributes
    ----------
    point, what : str
        Its number and text.
    limit : float
        The most that it may be.
    part : str
        In whose results it stands.
    find : callable
        The number, of the rows; None where they do not have it.
    why : str
        Said where it is missed or not measured.
    """

    point: str
    what: str
    limit: float
    part: str
    find: Callable[[Rows], float | None]
    why: str = ""


def largest(column: str, **where: Any) -> Callable[[Rows], float | None]:
    """The largest number in a column, of the rows that have these values."""

    def find(rows: Rows) -> float | None:
        found = [
            row[column]
            for row in rows
            if row.get(column) is not None
            and all(row.get(key) in (value if isinstance(value, tuple) else (value,)) for key, value in where.items())
        ]
        return max(found, default=None)

    return find


TARGETS: list[Target] = []
