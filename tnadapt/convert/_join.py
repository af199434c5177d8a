"""Join the updates of many weights, as other libraries store them, into one adapter file.

Each weight keeps its own form, rank and scale: where they differ, the file has several configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import numpy as np

from tnadapt.algebra.composite import CompositeConfig
from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import kronecker_sizes
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.errors import FileError, safe_repr

from ._unpack import TargetUpdate
from ._updates import Float, ModuleUpdate, Pair, alpha_of, as_matrix, narrow

__all__ = ["join"]

# Divisions up to which factoring the sides evenly is worth a shorter config; readers of the file refuse twice as many.
_MAX_BALANCED = 1 << 17


def join(
    found: Sequence[TargetUpdate],
    dtype: str,
    kept: Mapping[str, np.ndarray],
    dtypes: Mapping[str, str],
    model: str = "",
    ties: Mapping[str, Sequence[str]] | None = None,
) -> tuple[AdapterFile, tuple[ModuleUpdate, ...]]:
    """Join the updates of many weights into one adapter file, exactly.

    Parameters
    ----------
    found : sequence of TargetUpdate
        At least one.
    dtype : str
        The dtype of the stored arrays if it represents all of their values; otherwise they are float32.
    kept, dtypes, model, ties
        As in :class:`~tnadapt.AdapterFile`; ``dtypes`` are those of ``kept``.

    Returns
    -------
    AdapterFile
        With a :class:`tnadapt.CompositeConfig` if the weights differ in form, rank or scale.
    tuple of ModuleUpdate
        The updates in the order of its targets.

    Raises
    ------
    FileError
        If an array overflows when its scale is multiplied in.

    Notes
    -----
    In LoKr, a W1 or W2 that is full in one weight and low-rank in another gets a form that fits both. A scale that is
    not ``alpha / rank`` for any alpha is multiplied into a factor.
    """
    parts = [
        own
        for part in _alike(found, _key)
        for own in ([part] if _common([one.update for one in part]) is not None else _alike(part, _sizes))
    ]
    configs, arrays, number = list[tuple[Config, int]](), dict[str, Float](), 0
    for part in parts:
        config, updates = _conformed([one.update for one in part])
        configs.append((config, len(part)))
        for update in updates:
            arrays |= {f"group{number}.{name}": array for name, array in update.arrays().items()}
            number += 1
    config = configs[0][0] if len(configs) == 1 else CompositeConfig(configs)
    ordered = [one for part in parts for one in part]
    stored, kinds_of = narrow(arrays, dtype)
    for name, array in stored.items():
        if not np.isfinite(array).all():
            target = ordered[int(name.partition(".")[0].removeprefix("group"))].target
            raise FileError(f"the scale of {safe_repr(target.label)} makes numbers that are too large for float32")
    file = AdapterFile(
        config, [one.target for one in ordered], stored, kept=kept, dtypes={**dtypes, **kinds_of}, model=model,
        ties=ties or {},
    )  # fmt: skip
    return file, tuple(one.update for one in ordered)


def _alike(found: Iterable[TargetUpdate], key: Callable[[ModuleUpdate], Hashable]) -> Iterable[list[TargetUpdate]]:
    """Return the updates of each key, in the order of its first one."""
    parts: dict[Hashable, list[TargetUpdate]] = {}
    for one in found:
        parts.setdefault(key(one.update), []).append(one)
    return parts.values()


def _key(update: ModuleUpdate) -> Hashable:
    """Return what updates of one config have in common, apart from the sizes of LoKr."""
    # The rank of LoKr is that of the factors that it has; those without any are padded.
    return update.kind, update.scale, None if update.kind == "lokr" else update.rank


def _sizes(update: ModuleUpdate) -> Hashable:
    return update.parts[0].shape if update.kind == "lokr" else None


def _conformed(updates: Sequence[ModuleUpdate]) -> tuple[Config, list[ModuleUpdate]]:
    """Return the config of updates that have one, and the updates in its form."""
    config = _common(updates)
    assert config is not None  # of updates of one key and size
    assert isinstance(config.rank, int)
    scale = updates[0].scale
    alpha = None if scale == 1.0 else alpha_of([scale], config.rank)
    if alpha is None:
        updates = [update.absorb_scale() for update in updates]
    return config.replace(alpha=alpha), [_conform(update, config) for update in updates]


def _common(updates: Sequence[ModuleUpdate]) -> Config | None:
    """Return the common config of updates of one key, or None for LoKr of sizes that no one config gives."""
    config = updates[0].config()
    if updates[0].kind != "lokr":
        return config
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


def _split_size(updates: Sequence[ModuleUpdate]) -> str | int | tuple[int, ...] | None:
    """Return the shortest ``split_size`` that gives every update its sizes, or None."""
    first = updates[0].parts[0].shape
    small = sum(math.isqrt(size) for size in {math.prod(update.shape) for update in updates}) <= _MAX_BALANCED
    candidates: list[str | int | tuple[int, ...]] = ["balanced"] if small else []
    candidates += [first[0]] if len(set(first)) == 1 else []
    candidates.append(first)
    for size in candidates:
        if all(kronecker_sizes(update.shape, 2, size) == [part.shape for part in update.parts] for update in updates):
            return size
    return None


def _factored(part: Pair | Float) -> Pair:
    """Return a full matrix as an exact Pair: the matrix and an identity."""
    if isinstance(part, Pair):
        return part
    rows, cols = part.shape
    return Pair(part, np.eye(cols)) if cols <= rows else Pair(np.eye(rows), part.T)


def _conform(update: ModuleUpdate, config: Config) -> ModuleUpdate:
    """Return an update with its parts in the form that a common config requires."""
    if update.kind == "dense":
        return update
    parts = list(update.parts)
    if update.kind == "lokr":
        parts[0] = as_matrix(parts[0]) if config.leading == "dense" else parts[0]
        parts[1] = _factored(parts[1]) if config.format == "cp" else as_matrix(parts[1])
    assert isinstance(config.rank, int)
    rank = config.rank
    return update._replace(parts=tuple(part.padded(rank) if isinstance(part, Pair) else part for part in parts))
