"""A module's parameter together with the updates that act on it in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ._changed_forward import changed_weight
from ._dropout import ColumnDropout
from ._experts import shows_products
from ._forward_pass import delta
from ._lazy_stack import LazyStack, can_be_lazy
from ._merged_linear import summed
from ._patched_parameter import PatchedParameter
from ._routed_changes import RoutedChanges
from ._state import AdapterSlot
from ._summed_matrices import summed_matrices

__all__ = ["changed_parameter", "is_read", "parameter_sum"]


def is_read(slot: AdapterSlot) -> bool:
    """Return whether a slot acts where the module reads the parameter, and not on the module's output."""
    return slot.strategy == "weight" or slot.target.index is not None


def parameter_sum(patched: PatchedParameter, slots: Sequence[AdapterSlot], host: nn.Module) -> Tensor:
    """Return the changed parameter as a tensor."""
    drop = ColumnDropout(host)
    if not patched.sums:
        return changed_weight(patched.tensor, slots, drop)
    if slots[0].target.index is not None:
        return summed_matrices(patched.tensor, slots, drop)
    return summed(patched.tensor, [(slot.target, drop(slot, delta(slot))) for slot in slots])


def changed_parameter(
    patched: PatchedParameter,
    slots: Sequence[AdapterSlot],
    host: nn.Module,
    output: Callable[[AdapterSlot, Tensor], Tensor],
) -> Tensor:
    """Return what stands in the place of a parameter: the sum, or for experts a stack that products add updates to.

    Parameters
    ----------
    patched : PatchedParameter
    slots : sequence of AdapterSlot
        Those that act.
    host : Module
    output : function of (AdapterSlot, Tensor)
        What a slot adds to the output for an input, where its strategy is not "weight".
    """
    added = [slot for slot in slots if slot.strategy != "weight"]
    stored = patched.tensor
    if not added or not can_be_lazy(stored) or not shows_products(patched.owner):
        return parameter_sum(patched, slots, host)
    others = [slot for slot in slots if slot.strategy == "weight"]
    base = parameter_sum(patched, others, host) if others else stored
    return LazyStack(RoutedChanges(stored, base, added, host, output, lambda: parameter_sum(patched, slots, host)))
