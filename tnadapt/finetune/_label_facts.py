"""What a column of labels holds, as evidence of the task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tnadapt.errors import safe_repr

__all__ = ["LabelFacts", "facts_of", "number"]

#: Separators of several labels in one cell that are tried.
SEPARATORS = ("|", ";")


@dataclasses.dataclass(frozen=True)
class LabelFacts:
    """What the labels are.

    Attributes
    ----------
    kind : {"words", "integers", "fractions", "lists", "other"}
        ``integers`` may be written as ``3.0``.
    count, rows : int
        Number of distinct labels, and of all.
    range : str
        For numbers, such as ``1 to 5``.
    separator : str, optional
        One that is in some of the words.
    joint, alone : str
        A label with the separator, and a piece of it that is in no other label; both empty if there is none.
    odd : str
        Of words that are mostly numbers, the first that is not; empty otherwise.
    """

    kind: str
    count: int
    rows: int
    range: str = ""
    separator: str | None = None
    joint: str = ""
    alone: str = ""
    odd: str = ""


def number(value: Any) -> float:
    """Return a cell as a finite number.

    Raises
    ------
    ValueError
        If it is none.

    Examples
    --------
    >>> number(" 3.5 "), number(2)
    (3.5, 2.0)
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{safe_repr(value)} is not a number")
    try:
        found = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{safe_repr(value)} is not a number") from None
    if not math.isfinite(found):
        raise ValueError(f"{safe_repr(value)} is not a finite number")
    return found


def facts_of(labels: Sequence[Any], separator: str | None = None) -> LabelFacts:
    """Return what the labels are.

    Parameters
    ----------
    labels : sequence
        Cells of a column.
    separator : str, optional
        Instead of :data:`SEPARATORS`.

    Examples
    --------
    >>> facts_of(["1.0", "3.5", "2.0"]).kind, facts_of(["1", "2", "5"]).range
    ('fractions', '1 to 5')
    >>> facts_of(["a|b", "a", "b"]).separator, facts_of(["R|B", "soul"]).alone
    ('|', 'R')
    >>> facts_of(["3.5", "2", "n/a", "1.5"]).odd
    'n/a'
    """
    if all(isinstance(label, list) for label in labels):
        return LabelFacts("lists", len({str(label) for label in labels}), len(labels))
    try:
        numbers = sorted({number(label) for label in labels})
    except ValueError:
        pass
    else:
        kind = "integers" if all(value.is_integer() for value in numbers) else "fractions"
        return LabelFacts(kind, len(numbers), len(labels), f"{numbers[0]:g} to {numbers[-1]:g}")
    if not all(isinstance(label, str) for label in labels):
        return LabelFacts("other", len({str(label) for label in labels}), len(labels))
    words = {label.strip() for label in labels}
    for mark in (separator,) if separator else SEPARATORS:
        if joint := sorted(word for word in words if mark in word):
            return LabelFacts("words", len(words), len(labels), "", mark, *_lonely(joint, words, mark))
    return LabelFacts("words", len(words), len(labels), odd=_odd(labels))


def _odd(labels: Sequence[str]) -> str:
    """Return the first label that is not a number, if most are."""
    odd = [label.strip() for label in labels if not _is_number(label)]
    return odd[0] if 0 < 2 * len(odd) < len(labels) else ""


def _is_number(label: str) -> bool:
    try:
        number(label)
    except ValueError:
        return False
    return True


def _lonely(joint: Sequence[str], words: set[str], mark: str) -> tuple[str, str]:
    """Return a joint label and a piece of it that is in no other label, if there is one."""
    seen: dict[str, int] = {}
    for word in words:
        for piece in {one.strip() for one in word.split(mark)}:
            seen[piece] = seen.get(piece, 0) + 1
    for word in joint:
        for piece in (one.strip() for one in word.split(mark)):
            if seen[piece] == 1:
                return word, piece
    return joint[0], ""
