"""What an adapter was before it was converted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tnadapt.checkpoints.adapter_file import AdapterFile

from ._joining import Found
from ._updates import Update

__all__ = ["Source", "sourced"]


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
