"""The shortest way through a patched layer: low-rank updates whose factors are arrays as they are stored.

For a small layer the questions that :class:`~tnadapt.torch._forward_patch.ForwardPatch` asks in each call take longer
than the products. Here what cannot change between calls is asked once, when slots are added or removed, and the rest in
as few steps as possible. The general way is the reference: it computes the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._forward_pass import acts, check_recomputation, in_backward
from ._interception import in_dispatch_mode, in_functorch
from ._low_rank_linear import LowRank, is_small, low_rank_linear, mixed_low_rank_linear
from ._patched_parameter import PatchedParameter
from ._state import AdapterSlot, AdapterState

__all__ = ["LowRankLayer"]

#: Subclasses, such as sharded tensors, take the general way.
_PLAIN = (Tensor, nn.Parameter)


class _Stored(NamedTuple):
    """An adapter, the names of its arrays that are the two factors of its update, and the factor of the update."""

    state: AdapterState
    left: str
    right: str
    scale: float


class LowRankLayer:
    """A call of a linear layer with the updates of its adapters, where all are stored low-rank matrices.

    Parameters
    ----------
    host : Linear
    updates : sequence of _Stored
    """

    def __init__(self, host: nn.Linear, updates: Sequence[_Stored]) -> None:
        self.host, self.updates = host, tuple(updates)

    @classmethod
    def of(cls, host: nn.Module, weights: Sequence[PatchedParameter]) -> LowRankLayer | None:
        """Return the way through a host with torch's own forward, or None if some slot needs the general one."""
        if not isinstance(host, nn.Linear) or len(weights) != 1 or weights[0].rivals:
            return None
        found = [_stored(slot) for slot in weights[0].slots]
        updates = [one for one in found if one is not None]
        return cls(host, updates) if len(updates) == len(found) else None

    def __call__(self, x: Any) -> Tensor | None:
        """Return the output; None, with nothing done, where this call needs the general way."""
        host = self.host
        own = host._parameters
        weight, bias = own.get("weight"), own.get("bias")
        if type(x) not in _PLAIN or type(weight) not in _PLAIN or (bias is None and "bias" not in own):
            return None
        assert weight is not None  # of these types
        dtype, device = x.dtype, x.device
        if weight.dtype is not dtype or weight.device != device or not _is_ordinary(x):
            return None
        changes: list[LowRank] = []
        acting: list[AdapterState] = []
        recomputing = in_backward()
        for state, left_name, right_name, scale in self.updates:
            if state.by_rows or (state.dropout != 0.0 and host.training):
                return None
            if recomputing:
                check_recomputation(state)
            if not acts(state):
                continue
            # Looked up in each call: FSDP and load_state_dict(assign=True) replace the parameter objects.
            names, arrays = state.parameter_names, state.owner._parameters
            left, right = arrays[names[left_name]], arrays[names[right_name]]
            assert left is not None  # ensured by attach
            assert right is not None
            for array in (left, right):
                if type(array) not in _PLAIN or array.device != device:
                    return None
            if left.dtype is not right.dtype or (changes and left.dtype is not changes[0].left.dtype):
                return None
            changes.append(LowRank(left, right, scale, state.weight))
            acting.append(state)
        if not changes:
            return None
        alike = changes[0].left.dtype is dtype
        if alike and torch.is_grad_enabled() and not is_small(x, weight):
            return None
        for state in acting:
            state.threads.add(threading.get_ident())
        return (low_rank_linear if alike else mixed_low_rank_linear)(x, weight, bias, changes)


def _stored(slot: AdapterSlot) -> _Stored | None:
    """Return the names of the arrays of a slot's update if they are its factors, and nothing else is done with them."""
    state, how, target = slot.adapter, slot.factoring, slot.target
    if slot.strategy != "factored" or how is None or how.stored is None or how.shared:
        return None
    if target.rows is not None or target.index is not None or target.transposed or slot.quantized:
        return None
    if state.activation is not None or state.made is not None or not state.plan.applying.additive:
        return None
    return _Stored(state, *how.stored, how.network.scale)


def _is_ordinary(x: Tensor) -> bool:
    """Return what :func:`~tnadapt.torch._factored_linear.can_fuse` asks of an input and of the way it is called."""
    if x.is_nested or x.ndim == 0 or x.is_meta or not x.is_contiguous():
        return False
    # A constant where possible: the name of the device takes longer than the answer.
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        return False
    return not in_functorch() and not in_dispatch_mode()
