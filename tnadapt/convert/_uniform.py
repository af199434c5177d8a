"""Updates of LoRA with one rank and a scale of 1, which every loader reads in the same way."""

from __future__ import annotations

from collections.abc import Sequence

from ._updates import ModuleUpdate

__all__ = ["uniform"]


def uniform(updates: Sequence[ModuleUpdate], rank: int | None = None) -> list[ModuleUpdate]:
    """Return the same updates with their scales in a factor, and all factors padded with zeros to one rank.

    Parameters
    ----------
    updates : sequence of ModuleUpdate
        All of kind "lora".
    rank : int, optional
        By default, the largest of the updates.
    """
    most = max(update.rank for update in updates) if rank is None else rank
    whole = [update.absorb_scale() for update in updates]
    return [update._replace(parts=(update.pair.padded(most),)) for update in whole]
