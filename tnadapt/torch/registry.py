"""Which adapters a model has, and with what weights they act."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from ..errors import TargetError

if TYPE_CHECKING:
    from .adapter import Adapter

__all__ = ["BOOK", "PREFIX", "adapters", "mix"]

#: How the names of an adapter's parameters on its model begin.
PREFIX = "tnadapt_"
#: The model's attribute that holds its adapters by name.
BOOK = "_tnadapt_adapters"


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, those on parts of it included.

    Parameters
    ----------
    model : Module
        As it was given to ``attach``, or a deep copy of it, or what it is wrapped in.

    Examples
    --------
    >>> import copy, torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> _ = tnadapt.torch.attach(model, name="a")
    >>> list(adapters(copy.deepcopy(model)))
    ['a']
    """
    found: dict[str, Adapter] = {}
    for module in model.modules():
        found.update(module.__dict__.get(BOOK, {}))
    return found


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

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> a, b = (tnadapt.torch.attach(model, name=name) for name in "ab")
    >>> mix(model, {"a": 0.25, "b": 0.75})
    >>> a.weight, b.weight
    (0.25, 0.75)
    """
    there = adapters(model)
    wanted = dict(weights)
    for name in wanted:
        if name not in there:
            raise TargetError(f"no adapter {name!r} on this model; there are: {', '.join(map(repr, there)) or 'none'}")
    for name, adapter in there.items():
        if adapter.merged is not None and wanted.get(name, 0.0) != adapter.weight:
            raise TargetError(f"adapter {name!r} is merged, and another weight needs it unmerged: call unmerge() first")
    for name, adapter in there.items():
        adapter.set_weight(wanted.get(name, 0.0))
