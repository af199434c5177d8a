"""Settings as they are typed."""

from __future__ import annotations

import json
from typing import Any

from ..errors import TnadaptError

__all__ = ["setting", "word_or_number"]


def setting(text: str) -> tuple[str, Any]:
    """``FIELD=VALUE``, the value as JSON or a word.

    Examples
    --------
    >>> setting("rank=4"), setting("fold=hypercube"), setting("fold=[8,8]")
    (('rank', 4), ('fold', 'hypercube'), ('fold', [8, 8]))
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise TnadaptError(f"--set takes FIELD=VALUE; got {text!r}")
    return name, word_or_number(value)


def word_or_number(text: str) -> Any:
    """A value as JSON, else as the word that it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
