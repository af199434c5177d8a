"""A start that is brought to an adapter: the arrays at which training begins, and to which ΔW is the difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, warn

from ._arrays import named_parameters, pairs
from ._delta_cache import DeltaCache
from ._sharding import copy_all, gather_full
from ._state import AdapterState, need_attached, need_unmerged
from ._theta_arrays import ThetaArrays
from ._trainable import can_learn

__all__ = ["start_from"]


def start_from(adapter: AdapterState, arrays: Mapping[str, Any]) -> None:
    """Start from given arrays; see :meth:`Adapter.start_from`."""
    need_attached(adapter)
    need_unmerged(adapter, "start_from()")
    plan = adapter.plan.with_start(_on_host(arrays)).training_plan
    current = dict(named_parameters(adapter))
    if next(iter(current.values())).device.type == "meta":
        raise ConfigError(
            f"adapter {adapter.name!r} is on the meta device: give the model its weights and call reset() before "
            "start_from()"
        )
    for name, start in adapter.plan.init(trained=adapter.trained).items():
        there = gather_full(current[name]).detach().cpu()
        if not torch.equal(there, torch.from_numpy(start).to(there.dtype)):
            raise ConfigError(
                f"adapter {adapter.name!r} has been trained or loaded, and another start would change its ΔW: call "
                "reset(), which discards what was trained, before start_from(), or attach another adapter"
            )
    _check_gradient(adapter, plan)
    new = pairs(adapter, plan.init())
    numbers = [(parameter, parameter.detach().clone()) for parameter, _ in new]
    before = adapter.plan
    try:
        _exchange(adapter, plan)
        copy_all(new)
    except BaseException:  # KeyboardInterrupt, too
        _exchange(adapter, before)
        with torch.no_grad():
            for parameter, number in numbers:
                parameter.copy_(number)
        raise


def _on_host(arrays: Any) -> Any:
    """Return tensors that require gradients, or that NumPy has no dtype for, in float32; the rest as it is."""
    if not isinstance(arrays, Mapping):
        return arrays
    tensors = {name: array for name, array in arrays.items() if isinstance(array, torch.Tensor)}
    return {**arrays, **{name: tensor.detach().float().cpu() for name, tensor in tensors.items()}}


def _check_gradient(adapter: AdapterState, plan: SuperLoRA) -> None:
    """Raise a ConfigError if no trained array has a gradient at the start; warn if it is so in some groups."""
    if plan.theta is not None:
        return
    trained, unable, able = set(adapter.trained or plan.param_shapes), list[int](), 0
    for number, group in enumerate(plan.groups):
        names = {name for name, full in group.names.items() if full in trained}
        own = {name: torch.from_numpy(group.start.host(name)) for name in group.names}
        if names and not can_learn(group, own, names):
            unable.append(number)
        able += bool(names)
    if not unable:
        return
    problem = (
        f"adapter {adapter.name!r} would start where the gradient of every trained array is zero, because more than "
        f"one array of a product is zero or frozen at zero, in group {unable[0]}"
    ) + (f" and {len(unable) - 1} more" if len(unable) > 1 else "")
    if len(unable) == able:
        raise ConfigError(f"{problem}: nothing would learn. Start one of them at other numbers")
    warn(f"{problem}. Start one of them at other numbers")


def _exchange(adapter: AdapterState, plan: SuperLoRA) -> None:
    """Let an adapter compute with another plan of the same config, shapes and names."""
    slots = {
        slot: dataclasses.replace(slot, factoring=None if slot.factoring is None else factoring(plan, slot.index))
        for slot in adapter.slots
    }
    adapter.plan = plan
    adapter.cache = DeltaCache(plan.arrays_plan)
    adapter.made = None if plan.theta is None else ThetaArrays(plan)
    for patch in dict.fromkeys(adapter.patches):
        patch.exchange(slots)
    adapter.slots = list(slots.values())
    adapter.handle.plan = plan.file_plan
