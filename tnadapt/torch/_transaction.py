"""Several assignments that take effect together or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["all_or_none"]

Thing = TypeVar("Thing")
Value = TypeVar("Value")


def all_or_none(
    assign: Callable[[Thing, Value], object], new: Sequence[tuple[Thing, Value]], old: Sequence[tuple[Thing, Value]]
) -> None:
    """Assign each new value; if that fails or is interrupted, restore the old ones.

    Parameters
    ----------
    assign : function
        Called with each object and its value.
    new, old : sequence of (thing, value)

    Examples
    --------
    >>> numbers = {"a": 1, "b": 2}
    >>> def assign(key, value):
    ...     numbers[key] = int(value)
    >>> all_or_none(assign, [("a", "3"), ("b", "four")], list(numbers.items()))
    Traceback (most recent call last):
    ValueError: invalid literal for int() with base 10: 'four'
    >>> numbers
    {'a': 1, 'b': 2}
    """
    try:
        for thing, value in new:
            assign(thing, value)
    except BaseException:  # KeyboardInterrupt, too
        for thing, value in old:
            assign(thing, value)
        raise
