"""Which adapters a model has, and with what weights they act."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from tnadapt.errors import ConfigError, TargetError, safe_repr

from ._forward_patch import ForwardPatch
from ._state import ADAPTERS_ATTR, AdapterState, need_unmerged
from ._transaction import all_or_none

__all__ = ["attached", "mix", "overlapping", "set_weight"]


def attached(model: nn.Module) -> dict[str, AdapterState]:
    """The adapters of a model by name, those on parts of it included; a TargetError if two have one name."""
    found: dict[str, AdapterState] = {}
    for module in model.modules():
        for name, adapter in module.__dict__.get(ADAPTERS_ATTR, {}).items():
            if name in found:
                one, other = (type(a.model).__name__ for a in (found[name], adapter))
                raise TargetError(
                    f"two adapters of this model have the name {name!r}, one attached to a {one} in it and one to a "
                    f"{other}: ask either for its own, or attach them under two names"
                )
            found[name] = adapter
    return found


def overlapping(model: nn.Module) -> list[AdapterState]:
    """The adapters on a model, on parts of it, and on what it is a part of, as far as they act in it."""
    found: dict[int, AdapterState] = {}
    for module in model.modules():
        for adapter in module.__dict__.get(ADAPTERS_ATTR, {}).values():
            found[id(adapter)] = adapter
        patch = ForwardPatch.of(module)
        for patched in patch.weights if patch is not None else ():
            for slot in patched.slots:
                found[id(slot.adapter)] = slot.adapter
    return list(found.values())


def mix(model: nn.Module, weights: Mapping[str, float] | Iterable[tuple[str, float]]) -> None:
    """Let the model's adapters act with these weights; those not named have weight 0.

    Parameters
    ----------
    model : Module
        What they are attached to.
    weights : mapping of str to float
        The update becomes ``sum_a weight_a ΔW_a`` (inside the activations for LoDA).

    Raises
    ------
    TargetError
        If a name is none of the model's, or an adapter whose weight would change is merged; nothing is changed.

    ConfigError
        If a weight is no finite number; nothing is changed.

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
    wanted = {name: _finite(weight) for name, weight in dict(weights).items()}
    for name in wanted:
        if name not in there:
            raise TargetError(f"no adapter {name!r} on this model; there are: {', '.join(map(repr, there)) or 'none'}")
    for name, adapter in there.items():
        if adapter.merged is not None and wanted.get(name, 0.0) != adapter.weight:
            raise TargetError(f"adapter {name!r} is merged, and another weight needs it unmerged: call unmerge() first")
    new = [(adapter, wanted.get(name, 0.0)) for name, adapter in there.items()]
    old = [(adapter, adapter.weight) for adapter in there.values()]
    all_or_none(set_weight, new, old)


def set_weight(adapter: AdapterState, weight: float) -> None:
    """See :meth:`Adapter.set_weight`."""
    number = _finite(weight)
    if number != adapter.weight:
        need_unmerged(adapter, "another weight")
    all_or_none(_assign, [(adapter, number)], [(adapter, adapter.weight)])


def _assign(adapter: AdapterState, number: float) -> None:
    adapter.weight = number
    adapter.weight_tensor.fill_(number)


def _finite(weight: float) -> float:
    """A mixing weight as a number that float32 has, or a ConfigError."""
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # NaN is not below anything.
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ConfigError(f"a mixing weight must be a finite number; got {safe_repr(weight)}")
    return number
