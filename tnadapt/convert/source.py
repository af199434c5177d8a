"""What an adapter was before it was converted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..adapter_file import AdapterFile
from ..errors import ConfigError, shown
from .joining import Found
from .updates import Update

__all__ = ["Source", "natural", "path_of", "sourced"]


class Source(NamedTuple):
    """An adapter that was read.

    Attributes
    ----------
    kind : str
        "tnadapt", "peft-lora", "lycoris-lokr" and so on; "lycoris" where a file mixes methods.
    file : AdapterFile
    parameters : int
        Elements of its tensors as they were stored there.
    notes : tuple of str
        What is to be said of the way in.
    updates : tuple of Update
        Of each target, as it was there; none where that is the file itself.
    """

    kind: str
    file: AdapterFile
    parameters: int
    notes: tuple[str, ...] = ()
    updates: tuple[Update, ...] = ()


def sourced(kind: str, file: AdapterFile, found: Sequence[Found], notes: Sequence[str]) -> Source:
    """The adapter of another library's file."""
    updates = tuple(one.update for one in found)
    return Source(kind, file, sum(update.num_parameters for update in updates), tuple(notes), updates)


def path_of(value: Any) -> str:
    """A path that can name a file, or a ConfigError."""
    try:
        found = os.fsdecode(value)
        usable = bool(found) and b"\0" not in os.fsencode(found)
    except (TypeError, UnicodeEncodeError):
        usable = False
    if not usable:
        raise ConfigError(f"a path must be a string or PathLike that can name a file; got {shown(value)}")
    return found


def natural(path: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in path.split(".")]
