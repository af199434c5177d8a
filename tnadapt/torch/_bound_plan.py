"""Arrays of an adapter that are computed from the weights of its model: frozen ones, and starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import TargetError
from tnadapt.targets.target import Target

from ._merging import numbers
from ._state import AdapterState

__all__ = ["bound", "fill", "is_bound"]


def is_bound(plan: SuperLoRA) -> bool:
    """Return whether the plan has all arrays that are computed from base weights."""
    return plan.base_shapes.keys() <= plan.given.keys()


def bound(
    plan: SuperLoRA,
    targets: Sequence[Target],
    owners: Sequence[nn.Module],
    progress: Callable[[int, int], None] | None = None,
) -> SuperLoRA:
    """Return the plan with the arrays that are computed from the weights of the model.

    Quantized weights are dequantized. The plan is returned as it is if the weights are on the meta device.

    Raises
    ------
    TargetError
        If a weight has no values that can be read.
    """
    devices = {tensor.device.type for owner in owners for tensor in [*owner.parameters(), *owner.buffers()]}
    if is_bound(plan) or "meta" in devices:
        return plan
    return plan.with_base(lambda index: _weight(targets[index], owners[index]).float().cpu(), progress)


def fill(state: AdapterState) -> None:
    """Compute the arrays of an adapter that was attached on the meta device, now that the weights have values."""
    if not is_bound(state.plan):
        owners = [slot.owner for slot in state.slots]
        state.plan.fill(bound(state.plan, state.targets, owners).given)


def _weight(target: Target, owner: nn.Module) -> Tensor:
    weight = numbers(owner, target.parameter)
    if weight is None:
        raise TargetError(
            f"the adapter has arrays that are computed from the base weights (FromBase, start), and the values of "
            f"{target.name} cannot be read: register its layer type with tnadapt.torch.register_quantized, or give the "
            "arrays as given="
        )
    found: Tensor = target.select(weight)
    return found
