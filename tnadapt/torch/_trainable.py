"""Which arrays of an adapter are trained, their learning rates (LoRA+ and others), and starts that are given."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.group import Group
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import is_sequence
from tnadapt.errors import ConfigError, safe_repr, warn

from ._delta import (
    DeltaCache,
    ThetaArrays,
    copy_all,
    gather_full,
    reshard,
)
from ._state import AdapterSlot, AdapterState, named_parameters, need_attached, need_unmerged, pairs
from ._weights import bound

__all__ = ["choose", "fill", "keep", "num_parameters", "parameter_groups", "start_from"]


# -- The arrays to train, and learning rates: Local LoRA, asymmetric LoRA, LoRA+ ---------------------------------------


def num_parameters(adapter: AdapterState) -> int:
    """Count the elements of the arrays that are trained."""
    if adapter.trained is None:
        return adapter.plan.num_parameters
    return sum(math.prod(adapter.plan.param_shapes[name]) for name in adapter.trained)


def choose(adapter: AdapterState, groups: Any, arrays: Any) -> None:
    """Choose the arrays to train; see :meth:`Adapter.set_trainable`."""
    known = range(adapter.plan.num_groups)
    places = _places(adapter.plan)
    last = sorted({word for _, words in places.values() for word in words})
    numbers, words = _listed(groups, known), _listed(arrays, last)
    chosen = [
        name
        for name, (number, array_words) in places.items()
        # A θ of the whole plan belongs to all groups, as does the magnitude of a weight in several of them.
        if (number in numbers or (number is None and numbers)) and not array_words.isdisjoint(words)
    ]
    if not chosen:
        raise ConfigError(
            f"adapter {adapter.name!r} has no arrays {safe_repr(arrays)} in groups {safe_repr(groups)}; it has "
            "groups 0 to "
            f"{len(known) - 1} and arrays {', '.join(last)}"
        )
    keep(adapter, chosen, _moved_zero(adapter, chosen))


def _places(plan: SuperLoRA) -> dict[str, tuple[int | None, set[str]]]:
    """Return the group of each parameter, and the words by which its array can be chosen."""
    places = {name: _place(name) for name in plan.param_shapes if name not in plan.weight_param_shapes}
    for index, names in enumerate(plan.weight_param_names):
        # A weight that is cut into several groups is part of each.
        groups = {piece.group for piece in plan.layout.of_weight(index)} if names else set()
        for name in names:
            places[name] = groups.pop() if len(groups) == 1 else None, {name.rpartition(".")[2]}
    return places


def _place(name: str) -> tuple[int | None, set[str]]:
    """Return the group of a parameter, and the words by which its array can be chosen.

    ``group0.split0.factor0`` is ``factor0``; a diagonal ``group0.split0.factor0.size`` is ``factor0`` and ``size``.
    """
    group, _, rest = name.rpartition("group")[2].partition(".")
    if not rest:
        return None, {name}
    parts = [part for part in rest.split(".") if not part.startswith(("term", "split"))]
    return int(group), set(parts)


def keep(
    adapter: AdapterState, trained: Collection[str] | None, arrays: Mapping[str, np.ndarray] | None = None
) -> None:
    """Train only these arrays (None: all), and load new values into some.

    On failure or interruption everything is restored.
    """
    # FSDP2 discards changes to gathered parameters, requires_grad included.
    reshard(adapter.model, adapter.owner)
    everything = adapter.plan.param_shapes
    chosen = everything if trained is None else set(trained)
    names = None if len(chosen) == len(everything) else tuple(name for name in everything if name in chosen)
    new = pairs(adapter, arrays) if arrays else []
    required = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in named_parameters(adapter)]
    numbers = [(parameter, parameter.detach().clone()) for parameter, _ in new]
    before = adapter.trained
    try:
        copy_all(new)
        for name, parameter in named_parameters(adapter):
            parameter.requires_grad_(name in chosen)
            if name not in chosen:
                parameter.grad = None  # an optimiser that holds the parameter would go on updating it
        adapter.trained = names
    except BaseException:  # KeyboardInterrupt, too
        adapter.trained = before
        for parameter, was, gradient in required:
            parameter.requires_grad_(was)
            parameter.grad = gradient
        with torch.no_grad():
            for parameter, number in numbers:
                parameter.copy_(number)
        raise


def _moved_zero(adapter: AdapterState, trained: Collection[str]) -> dict[str, np.ndarray]:
    """Return new values for groups still at their start, so that the zero array is one that is trained."""
    plan, everything = adapter.plan, dict(named_parameters(adapter))
    if plan.theta is not None or next(iter(everything.values())).device.type == "meta":
        return {}  # each θ moves all of its arrays; on the meta device, reset() fills them in
    new_values: dict[str, np.ndarray] = {}
    able, unable = list[int](), list[int]()
    for number, (group, old, new) in enumerate(
        zip(plan.groups, plan.starts(adapter.trained), plan.starts(trained), strict=True)
    ):
        names = {name for name, full in group.names.items() if full in trained}
        if not names or (len(names) == len(group.names) and new.zeros == old.zeros):
            continue
        values = {name: gather_full(everything[full]).detach() for name, full in group.names.items()}
        if new.zeros != old.zeros and _is_start(old, values):
            if adapter.activation == "relu" and new is not group.start:
                raise ConfigError(
                    f"adapter {adapter.name!r} has 'relu' between its factors, whose derivative at zero is zero: "
                    f"{_last_words(names)} alone could never be trained from ΔW = 0. Train "
                    f"{_last_words(group.start.zeros)} too, or use another activation"
                )
            new_values.update({full: new.host(name) for name, full in group.names.items()})
        elif not can_learn(group, values, names):
            unable.append(number)
            continue
        able.append(number)
    _refuse_or_warn(adapter, trained, able, unable)
    return new_values


def _is_start(start: Initializer, values: Mapping[str, Tensor]) -> bool:
    """Return whether arrays are bit for bit those of a start."""
    return all(
        torch.equal(array.cpu(), torch.from_numpy(start.host(name)).to(array.dtype)) for name, array in values.items()
    )


def can_learn(group: Group, values: Mapping[str, Tensor], trained: Collection[str]) -> bool:
    """Return whether some trained array has a nonzero gradient.

    With a linear F the gradient of an array is the product of the others of its term, so it is zero where one of those
    is zero.
    """
    if not group.projection.linear:
        return True
    alive = {name for name, array in values.items() if bool(array.any())} | group.frozen_names.keys()
    parts = {
        array: [
            array,
            *(f"{array}.{part}" for part in (group.multiplied[array].multipliers if array in group.multiplied else ())),
        ]
        for array in group.network.shapes
    }
    for prefixes in group.network.prefixes:
        term = {
            part
            for prefix, split in zip(prefixes, group.network.splits, strict=True)
            for name in split.shapes
            for part in parts[prefix + name]
        }
        if any(term - {name} <= alive for name in term & set(trained)):
            return True
    return False


def _refuse_or_warn(
    adapter: AdapterState, trained: Collection[str], able: Sequence[int], unable: Sequence[int]
) -> None:
    if not unable:
        return
    problem = (
        f"adapter {adapter.name!r} has arrays of zeros next to {_last_words(trained)} that would be frozen, so that "
        "the gradient of the trained arrays is zero"
    )
    way = "Train the others too, or call reset(), which starts over with the zero in a trained array"
    if not able:
        raise ConfigError(f"{problem}: nothing would learn. {way}")
    some = ", ".join(map(str, unable[:4])) + (f" and {len(unable) - 4} more" if len(unable) > 4 else "")
    warn(f"{problem} in groups {some}. {way}")


def _last_words(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _listed(value: Any, known: Sequence[Any]) -> list[Any]:
    """Return what was asked for as a list: everything known for None, and an empty list if any entry is unknown."""
    if value is None:
        return list(known)
    listed = list(value) if is_sequence(value) else [value]
    return listed if all(type(item) in (int, str) and item in known for item in listed) else []


def parameter_groups(adapter: AdapterState, lr: float, ratio: float) -> list[dict[str, Any]]:
    """Return optimizer parameter groups; see :meth:`Adapter.parameter_groups`."""
    zero = set(_start_zero(adapter))
    fast = [p for name, p in named_parameters(adapter) if p.requires_grad and name in zero]
    slow = [p for name, p in named_parameters(adapter) if p.requires_grad and name not in zero]
    if not slow:
        return [{"params": fast, "lr": lr}]
    return [{"params": slow, "lr": lr}, *([{"params": fast, "lr": lr * ratio}] if fast else [])]


def adam_groups(adapter: AdapterState, lr: float) -> list[dict[str, Any]]:
    """Return parameter groups of equal rates; see :meth:`Adapter.adam_groups`."""
    plan = adapter.plan.file_plan
    wanted, units = plan.units_for("adam"), plan.units
    groups: dict[float, list[Tensor]] = {}
    for name, parameter in named_parameters(adapter):
        if parameter.requires_grad:
            groups.setdefault(lr * wanted[name] / units[name], []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _start_zero(adapter: AdapterState) -> Iterator[str]:
    for group, start in zip(adapter.plan.groups, adapter.plan.starts(adapter.trained), strict=True):
        for name, full in group.names.items():
            if not start.host(name).any():
                yield full


# -- Starts: given arrays, and what is computed once the weights have values -------------------------------------------


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
        value = gather_full(current[name]).detach().cpu()
        if not torch.equal(value, torch.from_numpy(start).to(value.dtype)):
            raise ConfigError(
                f"adapter {adapter.name!r} has been trained or loaded, and another start would change its ΔW: call "
                "reset(), which discards what was trained, before start_from(), or attach another adapter"
            )
    _check_gradient(adapter, plan)
    new = pairs(adapter, plan.init())
    numbers = [(parameter, parameter.detach().clone()) for parameter, _ in new]
    before = adapter.plan
    slots = {
        slot: dataclasses.replace(slot, factoring=None if slot.factoring is None else factoring(plan, slot.index))
        for slot in adapter.slots
    }
    try:
        _exchange(adapter, plan, slots)
        copy_all(new)
    except BaseException:  # KeyboardInterrupt, too: at any point of the exchange, which is undone slot by slot
        _exchange(adapter, before, {new_slot: slot for slot, new_slot in slots.items()})
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
        values = {name: torch.from_numpy(group.start.host(name)) for name in group.names}
        if names and not can_learn(group, values, names):
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


def _exchange(adapter: AdapterState, plan: SuperLoRA, slots: Mapping[AdapterSlot, AdapterSlot]) -> None:
    """Let an adapter compute with another plan of the same config, shapes and names, and each slot with its other."""
    adapter.plan = plan
    adapter.cache = DeltaCache(plan.arrays_plan)
    adapter.made = None if plan.theta is None else ThetaArrays(plan)
    for patch in dict.fromkeys(adapter.patches):
        patch.exchange(slots)
    adapter.slots = [slots.get(slot, slot) for slot in adapter.slots]
    adapter.handle.plan = plan.file_plan


def fill(state: AdapterState) -> None:
    """Compute the arrays of an adapter that was attached on the meta device, now that the weights have values."""
    if state.plan.needs_base:
        owners = [slot.owner for slot in state.slots[: len(state.targets)]]
        state.plan.fill(bound(state.plan, state.targets, owners))
