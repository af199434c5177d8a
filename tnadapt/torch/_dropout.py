"""Dropout of an adapter: on the input of what the adapter adds to a layer, in training mode only.

A layer computes ``y = x Wᵀ + b + drop(x) (W' - W)ᵀ``, where W' - W is ΔW if the update is added. Whatever the strategy,
``drop`` zeroes single elements of x and scales the others by 1 / (1 - p). The expectation is the output without
dropout, and the base's own part sees the whole x. In evaluation mode nothing is different.

So a layer in the weight strategy computes a second product of its size while it drops. The alternative, zeros in
columns of ΔW, would keep the single product but drop the same features for all tokens of a batch, and the noise would
depend on a strategy that is chosen by speed. That form (:class:`ColumnDropout`) is used only where there is no choice:
a module that reads its child's weight, as nn.MultiheadAttention does, does not show the child's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.errors import ConfigError, safe_repr

from ._state import AdapterSlot, AdapterState

__all__ = ["ColumnDropout", "check_dropout", "dropped_inputs", "drops_input", "is_transposed"]

_CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def check_dropout(dropout: Any) -> float:
    """Return the probability as a float, or raise a ConfigError."""
    is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not is_number or not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout must be a probability from 0 to below 1; got {safe_repr(dropout)}")
    return float(dropout)


def drops_input(slot: AdapterSlot, host: nn.Module) -> bool:
    """Return whether elements of the host's input are dropped for this slot."""
    if slot.adapter.dropout == 0.0 or not host.training:
        return False
    if isinstance(host, nn.Embedding) or getattr(host.__dict__.get("forward"), "looks_up", False):
        return False  # its input are indices
    if slot.target.index is not None:
        return False  # it is not what the experts' second matrices multiply
    return slot.strategy != "weight" or _shows_input(slot, host)


def _shows_input(slot: AdapterSlot, host: nn.Module) -> bool:
    """Return whether the host's input is multiplied with the weight and nothing else happens to it."""
    if slot.owner is not host or slot.target.parameter != "weight":
        return False
    return type(host).forward is nn.Linear.forward or is_transposed(host) or type(host).forward in _CONVOLUTIONS


def is_transposed(host: nn.Module) -> bool:
    """Return whether a module is transformers' Conv1D, whose weight is stored as ``(in, out)``."""
    return type(host).__name__ == "Conv1D"


def dropped_inputs(slots: Sequence[AdapterSlot], x: Tensor) -> list[tuple[Tensor, list[AdapterSlot]]]:
    """Return for each adapter its own dropped input, which all its slots in this layer share."""
    several: dict[AdapterState, list[AdapterSlot]] = {}
    for slot in slots:
        several.setdefault(slot.adapter, []).append(slot)
    return [(functional.dropout(x, state.dropout, training=True), own) for state, own in several.items()]


class ColumnDropout:
    """Zeros in columns of the changes of one weight: input features that are dropped for the whole batch.

    Parameters
    ----------
    host : Module
        The module whose forward reads the weight. Where it shows the weight's input, nothing is dropped here.
    """

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        # All slots of an adapter in one weight have the same input.
        self._masks: dict[AdapterState, Tensor] = {}

    def acts(self, slot: AdapterSlot) -> bool:
        """Return whether columns of this slot's change are dropped."""
        if slot.adapter.dropout == 0.0 or not self.host.training or isinstance(slot.owner, nn.Embedding):
            return False
        return not _shows_input(slot, self.host)

    def __call__(self, slot: AdapterSlot, change: Tensor) -> Tensor:
        """Return a change ``(rows, cols)`` with its columns dropped, or as it is."""
        if not self.acts(slot):
            return change
        state = slot.adapter
        if state not in self._masks:
            ones = torch.ones(1, change.shape[1], dtype=change.dtype, device=change.device)
            self._masks[state] = functional.dropout(ones, state.dropout, training=True)
        return change * self._masks[state]
