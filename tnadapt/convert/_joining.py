"""Many weights' updates, each in a form of another library, as one adapter file: exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import kronecker_sizes
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.targets.target import Target

from ._numbers import narrowed
from ._updates import Float, Pair, Update, alpha_of, padded, product, scaled

__all__ = ["Found", "joined"]

# Factoring longer sides evenly takes too long to be worth a shorter config.
_MAX_BALANCED = 1 << 20


class Found(NamedTuple):
    """One weight of another library's file.

    Attributes
    ----------
    target : Target
    update : Update
    """

    target: Target
    update: Update


def joined(
    found: Sequence[Found], dtype: str, kept: Mapping[str, np.ndarray], dtypes: Mapping[str, str], model: str = ""
) -> tuple[AdapterFile, list[str]]:
    """The adapter file of these weights, and what is to be said of it.

    Parameters
    ----------
    found : sequence of Found
        At least one.
    dtype : str
        Of the stored arrays: kept where no number needs more than it has, else float32.
    kept, dtypes, model
        As of :class:`~tnadapt.AdapterFile`; ``dtypes`` of what is kept.

    Notes
    -----
    One config says what all weights are made of. Ranks are made equal by zero columns, scales that differ move into a
    factor, and W1 and W2 of LoKr that are full here and low-rank there become what both are. Where forms or Kronecker
    sizes differ beyond that, every update is stored dense.
    """
    updates = [one.update for one in found]
    config, notes = _common(updates), list[str]()
    if config is None:
        kinds = sorted({_described(update) for update in updates})
        notes.append(f"stored dense, as one config cannot say {' and '.join(kinds[:4])}{' …' * (len(kinds) > 4)}")
        updates = [Update("dense", update.shape, (update.delta(),)) for update in updates]
        config = updates[0].config()
    scales = [update.scale for update in updates]
    assert isinstance(config.rank, int)
    alpha = None if set(scales) == {1.0} else alpha_of(scales, config.rank)
    if alpha is None:
        updates = [scaled(update) for update in updates]
    config = config.replace(alpha=alpha)
    arrays: dict[str, Float] = {}
    for number, update in enumerate(updates):
        made = _alike(update, config).arrays()
        arrays |= {f"group{number}.{name}": array for name, array in made.items()}
    stored, kinds_of = narrowed(arrays, dtype)
    file = AdapterFile(
        config, [one.target for one in found], stored, kept=kept, dtypes={**dtypes, **kinds_of}, model=model
    )
    return file, notes


def _described(update: Update) -> str:
    if update.kind == "lokr":
        return f"LoKr of W1 {update.parts[0].shape}"
    return {"lora": "LoRA", "loha": "LoHa", "dense": "dense updates"}[update.kind]


def _common(updates: Sequence[Update]) -> Config | None:
    """The config that all of them have once they are padded, or None."""
    if len({update.kind for update in updates}) > 1:
        return None
    rank = max(update.rank for update in updates)
    config = updates[0].config()
    if updates[0].kind != "lokr":
        return config.replace(rank=rank)
    size = _split_size(updates)
    if size is None:
        return None
    firsts, lasts = ([update.parts[place] for update in updates] for place in (0, 1))
    if not any(isinstance(last, Pair) for last in lasts):
        return config.replace(rank=1, split_size=size, leading="dense", format="dense")
    same = all(isinstance(first, Pair) for first in firsts)
    rank = max(_factored(last).rank for last in lasts)
    if same:
        rank = max(rank, *(first.rank for first in firsts if isinstance(first, Pair)))
    return config.replace(rank=rank, split_size=size, leading="same" if same else "dense", format="cp")


def _split_size(updates: Sequence[Update]) -> str | int | tuple[int, ...] | None:
    """The ``split_size`` that gives every update the sizes it has; the one that says the least."""
    first = updates[0].parts[0].shape
    small = max(side for update in updates for side in update.shape) <= _MAX_BALANCED
    candidates: list[str | int | tuple[int, ...]] = ["balanced"] if small else []
    candidates += [first[0]] if len(set(first)) == 1 else []
    candidates.append(first)
    for size in candidates:
        if all(kronecker_sizes(update.shape, 2, size) == [part.shape for part in update.parts] for update in updates):
            return size
    return None


def _factored(part: Pair | Float) -> Pair:
    """A full matrix as a Pair, exactly: beside an identity."""
    if isinstance(part, Pair):
        return part
    rows, cols = part.shape
    return Pair(part, np.eye(cols)) if cols <= rows else Pair(np.eye(rows), part.T)


def _alike(update: Update, config: Config) -> Update:
    """An update with the parts that a common config asks for."""
    if update.kind == "dense":
        return update
    parts = list(update.parts)
    if update.kind == "lokr":
        parts[0] = product(parts[0]) if config.leading == "dense" else parts[0]
        parts[1] = _factored(parts[1]) if config.format == "cp" else product(parts[1])
    assert isinstance(config.rank, int)
    rank = config.rank
    return update._replace(parts=tuple(padded(part, rank) if isinstance(part, Pair) else part for part in parts))
