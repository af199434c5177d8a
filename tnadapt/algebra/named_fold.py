"""Folds whose sizes are named: ``("weights", "rows", "cols")`` stands for the numbers of each group.

A fold in names makes one setting fit groups of different weights, such as the queries and the values of grouped-query
attention. A size is an integer, one of the names, or a name divided by an integer: ``("weights", 12, "rows/12",
"cols")`` splits the rows into 12 heads, ``("weights", "rows/64", 64, "cols")`` into heads of 64 rows.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from tnadapt.errors import ConfigError, safe_repr

from .layout import Layout

__all__ = ["NAMES", "check_fold", "group_fold", "is_named"]

#: What a size may stand for: the number of weights in a group, and the rows and columns of each.
NAMES = ("weights", "rows", "cols")

_SIZE = re.compile(r"(weights|rows|cols)(?:/([1-9][0-9]{0,17}))?")


def is_named(fold: Any) -> bool:
    """Return whether a fold has a size that is a name.

    Examples
    --------
    >>> is_named(("weights", "rows", "cols")), is_named((4, 8, 8)), is_named("stack")
    (True, False, False)
    """
    return isinstance(fold, (tuple, list)) and any(isinstance(size, str) for size in fold)


def check_fold(fold: Sequence[int | str]) -> None:
    """Raise a ConfigError unless the sizes are those of the weights, of their rows and of their columns, in this order.

    Then the tensor has as many elements as the group, and its ``vec`` is the group's vector, whatever the shapes are.

    Examples
    --------
    >>> check_fold(("weights/2", 2, "rows", "cols"))
    >>> check_fold(("weights", "cols", "rows"))
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: fold=('weights', 'cols', 'rows') must give the number of weights, then their rows, ...
    """
    # From the last size to the first: a block is complete once its name has occurred and all divisors are made up for.
    parsed = [_parsed(mode, size) if isinstance(size, str) else size for mode, size in enumerate(fold)]
    blocks = list(NAMES)
    name, product = "", Fraction(1)
    for size in reversed(parsed):
        if isinstance(size, tuple):
            found, divisor = size
            if name or not blocks or found != blocks[-1]:
                raise _misplaced(fold)
            name, product = found, product / divisor
        else:
            product *= size
        if name and product == 1:
            blocks.pop()
            name = ""
    if blocks or product != 1:
        raise _misplaced(fold)


def group_fold(fold: Sequence[int | str], layout: Layout, group: int) -> tuple[int, ...]:
    """Return the sizes that a fold in names stands for in one group.

    Parameters
    ----------
    fold : sequence of int and str
        For which :func:`check_fold` raises no error.
    layout : Layout
    group : int

    Returns
    -------
    tuple of int

    Raises
    ------
    ConfigError
        If the group cuts a weight, has weights of different shapes, or a number is not divisible as the fold says.

    Examples
    --------
    >>> from tnadapt.algebra.layout import make_layout
    >>> layout = make_layout("role", [(64, 32), (16, 32)] * 2, roles="qvqv")
    >>> [group_fold(("weights", "rows/16", 16, "cols"), layout, group) for group in range(2)]
    [(2, 4, 16, 32), (2, 1, 16, 32)]
    """
    counts = collections.Counter[tuple[int, int]]()
    for piece in layout.of_group(group):
        rows, cols = shape = layout.shapes[piece.weight]
        if piece.length != rows * cols:
            raise ConfigError(
                f"fold={tuple(fold)} needs groups of whole weights, and group {group} has {piece.length} of the "
                f'{rows * cols} elements of a weight of {rows}×{cols}: use groups=1, groups="role", or lists of weights'
            )
        counts[shape] += 1
    if len(counts) > 1:
        listed = ", ".join(f"{count} of {rows}×{cols}" for (rows, cols), count in list(counts.items())[:6])
        raise ConfigError(
            f"fold={tuple(fold)} needs groups of weights of one shape, and group {group} has {listed}"
            f'{", …" if len(counts) > 6 else ""}: use groups="role", which makes one group of all queries, one of all '
            "values and so on (grouped-query attention); or lists of weights of one shape; or a preset that takes any "
            "shapes, such as superlora or lora"
        )
    (((rows, cols), number),) = counts.items()
    known = {"weights": number, "rows": rows, "cols": cols}
    return tuple(size if isinstance(size, int) else _quotient(fold, size, known, group) for size in fold)


def _quotient(fold: Sequence[int | str], size: str, known: dict[str, int], group: int) -> int:
    name, divisor = _parsed(0, size)  # valid, as check_fold has found
    found, rest = divmod(known[name], divisor)
    if rest:
        raise ConfigError(
            f"fold={tuple(fold)} divides the {name} of each group by {divisor}, and group {group} has {known[name]} "
            f"{name}: give a divisor of it, or groups whose {name} it divides"
        )
    return found


def _parsed(mode: int, size: str) -> tuple[str, int]:
    found = _SIZE.fullmatch(size)
    if found is None:
        raise ConfigError(
            f"fold[{mode}] must be an integer, one of {', '.join(map(repr, NAMES))}, or one of these divided by an "
            f"integer, such as 'rows/12'; got {safe_repr(size)}"
        )
    return found[1], int(found[2] or 1)


def _misplaced(fold: Sequence[int | str]) -> ConfigError:
    return ConfigError(
        f"fold={tuple(fold)} must give the number of weights, then their rows, and then their columns, each once and "
        'whole, such as ("weights", "rows", "cols") or, with 12 heads, ("weights", 12, "rows/12", "cols")'
    )
