"""What an adapter's plan computes from the weights of its model: frozen arrays, and where it starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import TargetError
from tnadapt.targets.target import Target

from ._merging import numbers
from ._state import AdapterState

__all__ = ["bound", "fill", "is_bound"]


def is_bound(plan: SuperLoRA) -> bool:
    """Return whether the plan has everything that is computed from base weights."""
    return not plan.needs_base


def bound(
    plan: SuperLoRA,
    targets: Sequence[Target],
    owners: Sequence[nn.Module],
    progress: Callable[[int, int], None] | None = None,
) -> SuperLoRA:
    """Return the plan with what is computed from the weights of the model.

    Quantized weights are dequantized. The plan is returned as it is if the weights are on the meta device.

    Raises
    ------
    TargetError
        If a weight has no values that can be read.
    """
    devices = {tensor.device.type for owner in owners for tensor in [*owner.parameters(), *owner.buffers()]}
    if is_bound(plan) or "meta" in devices:
        return plan

    def weight(index: int) -> Tensor:
        weight = _weight(plan, targets[index], owners[index]).cpu()
        return weight if weight.dtype is torch.float64 else weight.float()

    return plan.with_base(weight, progress)


def fill(state: AdapterState) -> None:
    """Compute the arrays of an adapter that was attached on the meta device, now that the weights have values."""
    if not is_bound(state.plan):
        owners = [slot.owner for slot in state.slots[: len(state.targets)]]
        state.plan.fill(bound(state.plan, state.targets, owners))


def _what(plan: SuperLoRA) -> str:
    if plan.weight_param_shapes:
        return f"apply={plan.config.apply!r}"
    return f"start={plan.config.start!r}" if plan.point.needs_base else "FromBase"


def _weight(plan: SuperLoRA, target: Target, owner: nn.Module) -> Tensor:
    weight = numbers(owner, target.parameter)
    if weight is None:
        raise TargetError(
            f"the adapter has arrays that are computed from the base weights ({_what(plan)}), and the values of "
            f"{target.name} cannot be read: register its layer type with tnadapt.torch.register_quantized"
            + ("" if plan.weight_param_shapes else ", or give the arrays as given=")
        )
    found: Tensor = target.select(weight)
    return found
