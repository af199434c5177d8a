"""Lists of settings as a recipe writes them, and all their combinations as configs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.errors import ConfigError

__all__ = ["configs", "numbers"]

# More than any sweep has, and no more than a typing error should cost.
_MOST = 10_000


def numbers(text: str) -> list[int]:
    """Integers, ``a, b..c`` going on from a by steps of b - a.

    Raises
    ------
    ConfigError
        If it is something else.

    Examples
    --------
    >>> numbers("1, 2, 4..12, 64")
    [1, 2, 4, 6, 8, 10, 12, 64]
    >>> numbers("1..4")
    [1, 2, 3, 4]
    """
    found: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\.\.(\d{1,9}))?\s*", word)
        if match is None:
            raise ConfigError(f"expected numbers such as '1, 2, 4..12, 64'; got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        step = first - found[-1] if found and match[2] else 1
        if last < first or step < 1 or (last - first) % step or (last - first) // step > _MOST:
            raise ConfigError(f"{word.strip()!r} in {text!r} does not go up to its end by steps of {step}")
        found += range(first, last + 1, step)
    return found


def configs(fixed: Mapping[str, Any], swept: Mapping[str, Any]) -> Iterator[Config]:
    """Every combination of what is swept, the last name the fastest.

    Parameters
    ----------
    fixed : mapping
        Fields of :class:`~tnadapt.Config` that all have.
    swept : mapping
        Field -> a list of its values, or :func:`numbers` in a string.

    Raises
    ------
    ConfigError
        If a field is not known, or its value is wrong.

    Examples
    --------
    >>> [(one.groups, one.rank) for one in configs({"fold": "stack"}, {"groups": [1, 2], "rank": "1, 2"})]
    [(1, 1), (1, 2), (2, 1), (2, 2)]
    """
    values = [_values(name, given) for name, given in swept.items()]
    for chosen in itertools.product(*values):
        yield Config.from_dict({**fixed, **dict(zip(swept, chosen, strict=True))})


def _values(name: str, given: Any) -> Sequence[Any]:
    if isinstance(given, str):
        return numbers(given)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"what is swept is a list, or numbers in a string; got {name} = {given!r}")
    return given
