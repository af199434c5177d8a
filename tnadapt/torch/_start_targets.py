"""What the data-driven starts have in common: the layers that an adapter updates, and calls of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from tnadapt.errors import ConfigError, TargetError
from tnadapt.targets.target import Target

from ._adapter import Adapter, adapters

__all__ = ["Progress", "StartTarget", "adapter_of", "as_base", "called", "start_targets"]

#: Called with the number of batches so far, and their number if it is known.
Progress = Callable[[int, int | None], None]


class StartTarget(NamedTuple):
    """One weight of LoRA's form.

    Attributes
    ----------
    layer : Module
        The linear layer that has the weight.
    target : Target
    left, right : str
        The plan's names of B, (rows, rank), and of A transposed, (cols, rank).
    rank : int
    scale : float
        ``alpha / rank``.
    """

    layer: nn.Module
    target: Target
    left: str
    right: str
    rank: int
    scale: float


def adapter_of(given: Adapter | nn.Module) -> Adapter:
    """Return an adapter, or the only one on a model."""
    if isinstance(given, Adapter):
        return given
    if not isinstance(given, nn.Module):
        raise TargetError(f"expected an adapter, or a model with one; got {type(given).__name__}")
    found = list(adapters(given).values())
    if len(found) != 1:
        raise TargetError(
            f"this {type(given).__name__} has {len(found)} adapters"
            + ("; give one of them instead of the model" if found else ": attach one first")
        )
    return found[0]


def start_targets(adapter: Adapter, what: str) -> list[StartTarget]:
    """Return the targets of an adapter; raise an error unless each is LoRA of a linear layer."""
    state, plan = adapter._state, adapter.plan
    if not plan.point.brought or plan.theta is not None:
        raise ConfigError(
            f"{what} computes arrays for adapter.start_from(), which needs a config with start='given' and no map "
            f"before the network, such as tnadapt.presets.lora(8, start='given'); adapter {adapter.name!r} has "
            f"start={plan.config.start!r} and before={plan.config.before!r}"
        )
    shared = next((target for target in state.targets if target.tied), None)
    if shared is not None:
        raise ConfigError(
            f"{what} observes one layer for each weight, and {shared.name} is tied to {', '.join(shared.tied)}: leave "
            "it out of the targets"
        )
    found = []
    for slot, patch in zip(state.slots, state.patches, strict=True):
        layer, target = slot.owner, slot.target
        linear = type(layer).forward is nn.Linear.forward or type(layer).__name__ == "Conv1D"
        if not linear or patch.host is not layer or target.parameter != "weight":
            raise ConfigError(
                f"{what} needs linear layers, whose inputs it observes; {target.name} is read by "
                f"{type(patch.host).__name__}: leave it out of the targets"
            )
        (first, *others) = plan.layout.of_weight(slot.index)
        place, group = plan.start_place(first.group), plan.groups[first.group]
        if others or not place.is_lora:
            raise ConfigError(
                f"{what} computes LoRA's two factors of each weight, and {target.name} has the arrays "
                f"{', '.join(group.names.values())}: attach with tnadapt.presets.lora(rank, start='given')"
            )
        left, right = group.names.values()
        found.append(StartTarget(layer, target, left, right, place.shapes["split0.factor0"][1], place.scale))
    return found


def called(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextlib.contextmanager
def as_base(adapter: Adapter) -> Iterator[None]:
    """Let the model compute without this adapter and in evaluation mode; restore both afterwards."""
    modes = {module: module.training for module in adapter.model.modules()}
    try:
        adapter.model.eval()
        with adapter.disabled():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
