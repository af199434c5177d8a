"""Lists of values in recipes, and all their combinations as configs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.errors import ConfigError

__all__ = ["configs", "numbers"]

# More values than any sweep has; limits the cost of a typing error.
_MOST = 10_000


def numbers(text: str) -> list[int]:
    """Parse a list of integers; ``a, b..c`` continues from a in steps of b - a.

    Raises
    ------
    ConfigError
        If the text is not such a list.

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
            raise ConfigError(f"{word.strip()!r} in {text!r} does not reach its end in steps of {step}")
        found += range(first, last + 1, step)
    return found


def configs(fixed: Mapping[str, Any], swept: Mapping[str, Any]) -> Iterator[Config]:
    """Yield every combination of swept fields; the last one varies fastest.

    Parameters
    ----------
    fixed : mapping
        Fields of :class:`~tnadapt.Config` common to all.
    swept : mapping
        Field -> a list of its values, or a string for :func:`numbers`.

    Raises
    ------
    ConfigError
        If a field is unknown or a value invalid.

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
        raise ConfigError(f"a swept field must be a list, or numbers in a string; got {name} = {given!r}")
    return given
