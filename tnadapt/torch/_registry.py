"""The adapters that are attached to a model, and the weights of their mix."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tnadapt.argument_checks import is_sequence
from tnadapt.errors import ConfigError, TargetError, safe_repr

from ._forward_patch import ForwardPatch
from ._idle_caches import trim_idle
from ._state import ADAPTERS_ATTR, AdapterState, need_unmerged
from ._transaction import all_or_none

__all__ = ["attached", "mix", "overlapping", "refuse_merged", "set_weight"]


def attached(model: nn.Module) -> dict[str, AdapterState]:
    """Return the adapters on a model and its submodules by name; raise a TargetError if two have one name."""
    found: dict[str, AdapterState] = {}
    if not callable(getattr(model, "modules", None)):
        raise TargetError(f"adapters are on a torch module; got {safe_repr(model)}")
    for module in model.modules():
        for name, adapter in module.__dict__.get(ADAPTERS_ATTR, {}).items():
            if name in found:
                one, other = (type(a.model).__name__ for a in (found[name], adapter))
                raise TargetError(
                    f"two adapters of this model have the name {name!r}, one attached to a {one} in it and one to a "
                    f"{other}: query those submodules separately, or attach the adapters under different names"
                )
            found[name] = adapter
    return found


def overlapping(model: nn.Module) -> list[AdapterState]:
    """Return the adapters on a model, on its submodules, and those on an enclosing model that act inside it."""
    found: dict[int, AdapterState] = {}
    for module in model.modules():
        for adapter in module.__dict__.get(ADAPTERS_ATTR, {}).values():
            found[id(adapter)] = adapter
        patch = ForwardPatch.of(module)
        for patched in patch.weights if patch is not None else ():
            for slot in patched.slots:
                found[id(slot.adapter)] = slot.adapter
    return list(found.values())


def refuse_merged(model: nn.Module, what: str, but: AdapterState | None = None) -> None:
    """Raise a TargetError if an adapter, except one, is merged into the weights; ``what`` needs the base without it."""
    for other in overlapping(model):
        if other is not but and other.merged is not None:
            raise TargetError(f"adapter {other.name!r} is merged into the base: unmerge it before {what}")


def mix(model: nn.Module, weights: Mapping[str, float] | Iterable[tuple[str, float]]) -> None:
    """Set the mixing weights of a model's adapters; adapters that are not named get weight 0.

    Parameters
    ----------
    model : Module
        The model they are attached to.
    weights : mapping of str to float
        The update becomes ``sum_a weight_a ΔW_a`` (inside the activations for LoDA).

    Raises
    ------
    TargetError
        If the model has no adapter of that name, or an adapter whose weight would change is merged; nothing is changed.
    ConfigError
        If a weight is not a finite number; nothing is changed.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> a, b = (tnadapt.torch.attach(model, name=name) for name in "ab")
    >>> mix(model, {"a": 0.25, "b": 0.75})
    >>> a.weight, b.weight
    (0.25, 0.75)
    """
    there = attached(model)
    wanted = {name: _finite(weight) for name, weight in _pairs(weights)}
    for name in wanted:
        if name not in there:
            raise TargetError(f"no adapter {name!r} on this model; there are: {', '.join(map(repr, there)) or 'none'}")
    for name, adapter in there.items():
        if adapter.merged is not None and wanted.get(name, 0.0) != adapter.weight:
            raise TargetError(f"adapter {name!r} is merged, so its weight cannot change: call unmerge() first")
    new = [(adapter, wanted.get(name, 0.0)) for name, adapter in there.items()]
    old = [(adapter, adapter.weight) for adapter in there.values()]
    all_or_none(_set_weight, new, old)
    trim_idle(there.values())


def _pairs(weights: Any) -> list[tuple[str, float]]:
    """Return names with their weights, or raise a ConfigError."""
    given = weights.items() if isinstance(weights, Mapping) else weights
    pairs = list(given) if is_sequence(given) else []
    if not is_sequence(given) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs):
        raise ConfigError(f"mix() needs weights by name, such as {{'first': 0.5}}; got {safe_repr(weights)}")
    return [(name, weight) for name, weight in pairs]


def set_weight(adapter: AdapterState, weight: float) -> None:
    """Set one mixing weight; see :meth:`Adapter.set_weight`."""
    _set_weight(adapter, weight)
    trim_idle(adapter.model.__dict__.get(ADAPTERS_ATTR, {}).values())


def _set_weight(adapter: AdapterState, weight: float) -> None:
    number = _finite(weight)
    if number != adapter.weight:
        need_unmerged(adapter, "another weight")
    all_or_none(AdapterState.set_weight, [(adapter, number)], [(adapter, adapter.weight)])


def _finite(weight: float) -> float:
    """Return a mixing weight as a number within the range of float32, or raise a ConfigError."""
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # Written with "not <=" so that NaN fails, too.
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ConfigError(f"a mixing weight must be a finite number; got {safe_repr(weight)}")
    return number
