"""Which adapters a model has, and with what weights they act."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from tnadapt.errors import ConfigError, TargetError, shown

from ._forward_patch import Site
from ._transaction import all_or_none

if TYPE_CHECKING:
    from ._adapter import Adapter

__all__ = ["BOOK", "DOT", "PREFIX", "adapters", "encoded", "finite", "is_array", "mix", "overlapping"]

#: How the names of an adapter's parameters on its model begin.
PREFIX = "tnadapt_"
#: What stands for a dot of an adapter's name there.
DOT = "%2E"
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
        for name, adapter in module.__dict__.get(BOOK, {}).items():
            if name in found:
                one, other = (type(a.model).__name__ for a in (found[name], adapter))
                raise TargetError(
                    f"two adapters of this model have the name {name!r}, one attached to a {one} in it and one to a "
                    f"{other}: ask either for its own, or attach them under two names"
                )
            found[name] = adapter
    return found


def overlapping(model: nn.Module) -> list[Adapter]:
    """The adapters on a model, on parts of it, and on what it is a part of, as far as they act in it."""
    found: dict[int, Adapter] = {}
    for module in model.modules():
        for adapter in module.__dict__.get(BOOK, {}).values():
            found[id(adapter)] = adapter
        site = Site.of(module)
        for stored in site.weights if site is not None else ():
            for part in stored.parts:
                found[id(part.adapter)] = part.adapter
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
    there = adapters(model)
    wanted = {name: finite(weight) for name, weight in dict(weights).items()}
    for name in wanted:
        if name not in there:
            raise TargetError(f"no adapter {name!r} on this model; there are: {', '.join(map(repr, there)) or 'none'}")
    for name, adapter in there.items():
        if adapter.merged is not None and wanted.get(name, 0.0) != adapter.weight:
            raise TargetError(f"adapter {name!r} is merged, and another weight needs it unmerged: call unmerge() first")
    new = [(adapter, wanted.get(name, 0.0)) for name, adapter in there.items()]
    old = [(adapter, adapter.weight) for adapter in there.values()]
    all_or_none(lambda adapter, weight: adapter.set_weight(weight), new, old)


def is_array(path: str) -> bool:
    """Whether a parameter belongs to an adapter and not to the base, by its path in the model.

    Parameters
    ----------
    path : str

    Examples
    --------
    Its own name says it, or that of a module that holds the arrays, as in a PEFT model:

    >>> is_array("encoder.tnadapt_default_group0_split0_factor0")
    True
    >>> is_array("tnadapt.tnadapt_arrays.default.group0_split0_factor0")
    True
    >>> is_array("encoder.layers.0.weight")
    False
    """
    return any(part.startswith(PREFIX) for part in path.split("."))


def encoded(name: str) -> str:
    """An adapter's name as a part of a parameter's or module's name, in which torch allows no dot.

    Parameters
    ----------
    name : str

    Examples
    --------
    >>> encoded("my-adapter"), encoded("v1.0")
    ('my-adapter', 'v1%2E0')
    """
    return name.replace(".", DOT)


def finite(weight: float) -> float:
    """A mixing weight as a number that float32 has, or a ConfigError."""
    try:
        number = float(weight)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    # NaN is not below anything.
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise ConfigError(f"a mixing weight must be a finite number; got {shown(weight)}")
    return number
