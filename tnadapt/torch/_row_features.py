"""A target's rows of a weight as output features of a layer: selected from its output, or added to it."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from tnadapt.backends import load_backend
from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.targets.target import RowIndices, Target

__all__ = ["add_features", "features_of", "fixed_indices", "index_tensor", "overlap", "updated_places"]


def index_tensor(target: Target, device: torch.device) -> Tensor:
    """Return the indices of a target's rows as a tensor. Do not write to it."""
    assert target.rows is not None
    return fixed_indices(tuple(target.rows.indices()), device)


def fixed_indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers as a tensor. Do not write to it."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    # A copy from the CPU would wait for the device in each pass, and is forbidden while a CUDA graph is captured.
    return cast(Tensor, load_backend("torch").fixed(_indices, numbers, device))


class _Indices(FixedArrays):
    """Integers on devices; keys are tuples of them."""

    def make(self, key: Any) -> np.ndarray:
        return np.asarray(key, dtype=np.int64)


_indices = _Indices()


def features_of(target: Target, features: Tensor) -> Tensor:
    """Select from ``(n, out)`` features those of the target's rows, in order."""
    if target.rows is None:
        return features
    if isinstance(target.rows, RowIndices):
        return features.index_select(1, index_tensor(target, features.device))
    rows, count = target.rows, features.shape[0]
    blocks = features.view(count, rows.count, rows.stride)[:, :, rows.start : rows.start + rows.length]
    return blocks.reshape(count, rows.count * rows.length)


def add_features(y: Tensor, target: Target, change: Tensor) -> Tensor:
    """Return an output with a change added to the features of the target's rows."""
    change = change.to(y.dtype)
    if target.rows is None:
        return y + change
    if isinstance(target.rows, RowIndices):
        return y.index_add(-1, index_tensor(target, y.device), change)
    rows = target.rows
    blocks = y.reshape(*y.shape[:-1], rows.count, rows.stride)
    stop = rows.start + rows.length
    middle = blocks[..., rows.start : stop] + change.reshape(*y.shape[:-1], rows.count, rows.length)
    return torch.cat([blocks[..., : rows.start], middle, blocks[..., stop:]], -1).reshape(y.shape)


def updated_places(target: Target, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the place of each row among the target's, and whether it is one of them (None if all are).

    Places of rows that are not among the target's are valid ones, of no meaning.

    Examples
    --------
    >>> places, there = updated_places(Target("embed", (9, 2), rows=RowIndices([4, 7])), torch.tensor([7, 5, 4]))
    >>> places[there].tolist(), there.tolist()
    ([1, 0], [True, False, True])
    """
    if target.rows is None:
        return numbers, None
    if isinstance(target.rows, RowIndices):
        known = index_tensor(target, numbers.device)
        places = torch.searchsorted(known, numbers).clamp_(max=len(known) - 1)
        return places, known[places] == numbers
    rows = target.rows
    offset = numbers % rows.stride - rows.start
    there = (offset >= 0) & (offset < rows.length)
    places = torch.div(numbers, rows.stride, rounding_mode="floor") * rows.length + offset
    return torch.where(there, places, 0), there


def overlap(one: Target, other: Target) -> bool:
    """Return whether two targets of one parameter have rows in common."""
    if one.index != other.index:
        return False
    if one.rows is None or other.rows is None:
        return True
    return not set(one.rows.indices()).isdisjoint(other.rows.indices())
