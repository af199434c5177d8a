"""What the modules of this package share: the state of an adapter, and where a model keeps it.

All other modules are functions on :class:`AdapterState` and lie above this one. :class:`tnadapt.torch.Adapter` is the
public face of such a state; nothing below it knows that class, so no import leads back up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tnadapt.algebra.factoring import Factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, TargetError
from tnadapt.targets.target import Target

from ._delta_cache import DeltaCache

__all__ = [
    "ADAPTERS_ATTR",
    "DOT",
    "PREFIX",
    "AdapterSlot",
    "AdapterState",
    "MergedRows",
    "UntiedWeight",
    "encoded",
    "is_array",
    "need_attached",
    "need_linear",
    "need_unmerged",
]

#: How the names of an adapter's parameters on its model begin.
PREFIX = "tnadapt_"
#: What stands for a dot of an adapter's name there.
DOT = "%2E"
#: The model's attribute that holds the states of its adapters by name.
ADAPTERS_ATTR = "_tnadapt_adapters"


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


class UntiedWeight(NamedTuple):
    """Where a tied weight got a copy of its own: the module, its name there, and the shared parameter it had."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


class MergedRows(NamedTuple):
    """One weight that holds an update: what its rows were, and a checksum of what they are."""

    before: Tensor
    checksum: int


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterSlot:
    """One adapter's share in one weight: which of its updates, on which rows, and how it is used."""

    adapter: AdapterState
    index: int
    #: The module that holds the weight.
    owner: nn.Module
    target: Target
    strategy: str
    #: How the update factors, where it is used factored.
    factoring: Factoring | None = None


class Patch(Protocol):
    """What stands in for a module's forward, as far as the state has to know of it."""

    host: nn.Module

    def remove(self, adapter: AdapterState) -> None:
        """Take an adapter's slots away."""


class AdapterState:
    """Everything that is known of one adapter on one model.

    Attributes
    ----------
    model : Module
    name : str
    plan : SuperLoRA
    targets : tuple of Target
    activation : str or None
    model_name : str
        The model's class when the adapter was attached: sharding replaces it by one of its own.
    kept : tuple of str
        The model's own parameters that ``keep_trainable`` left free.
    trained : tuple of str or None
        The arrays that are trained, by their names in the plan; None for all.
    slots : list of AdapterSlot
        One for each target, in their order.
    patches : list of Patch
        What uses the slots; the same one several times, where several targets are used by one forward.
    was_trainable : dict of str to bool
        ``requires_grad`` of the base's parameters before.
    untied : list of UntiedWeight
    merged : list of MergedRows or None
        One for each target while ΔW is in the weights.
    cache : DeltaCache
    enabled : bool
        False inside ``disabled()``.
    weight : float
        What the update is multiplied with.
    weight_tensor : Tensor
        The same number. A compiled program reads this one, so that another weight is no reason to compile again.
    threads : set of int
        The threads in whose current forward pass some patch has used this adapter.
    warned : bool
        Whether the warning that no patch was used has been given.
    passes : (int, set)
        How often the arrays had been written to, and with which settings forward passes with gradients have begun
        since: activation checkpointing must find one of these again in backward.
    owner : Module
        What the parameters are registered on: the model, or where PEFT looks for them.
    parameter_names : dict of str to str
        Their names there, by those in the plan.
    managed_by : str or None
        Where the owner must know of it, what to call instead of ``detach()`` and ``bake()``.
    handle : Adapter
        The public face, typed loosely because its class lies above this module.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        plan: SuperLoRA,
        targets: Sequence[Target],
        kept: Sequence[str],
        activation: str | None,
    ) -> None:
        self.model, self.name, self.plan = model, name, plan
        self.model_name = type(model).__name__
        self.targets = tuple(targets)
        self.activation = activation
        self.kept = tuple(kept)
        self.trained: tuple[str, ...] | None = None
        self.slots: list[AdapterSlot] = []
        self.patches: list[Patch] = []
        self.was_trainable: dict[str, bool] = {}
        self.untied: list[UntiedWeight] = []
        self.merged: list[MergedRows] | None = None
        self.cache = DeltaCache(plan)
        self.enabled = True
        self.weight = 1.0
        self.weight_tensor = torch.tensor(1.0)
        self.threads: set[int] = set()
        self.warned = False
        self.passes: tuple[int, set[tuple[bool, float, bool]]] = -1, set()
        self.owner = model
        self.parameter_names = {
            array: f"{PREFIX}{encoded(name)}_{array.replace('.', '_')}" for array in plan.param_shapes
        }
        self.managed_by: str | None = None
        self.handle: Any = None


def need_attached(state: AdapterState) -> None:
    """Raise a TargetError if it was taken off."""
    if state.model.__dict__.get(ADAPTERS_ATTR, {}).get(state.name) is not state:
        raise TargetError(f"adapter {state.name!r} is not attached to its model any more")


def need_unmerged(state: AdapterState, what: str) -> None:
    """Raise a TargetError if it is merged."""
    if state.merged is not None:
        raise TargetError(f"adapter {state.name!r} is merged, and {what} needs it unmerged: call unmerge() first")


def need_linear(state: AdapterState, what: str) -> None:
    """Raise a ConfigError if the update depends on the input."""
    if state.activation is not None:
        raise ConfigError(
            f"adapter {state.name!r} has {state.activation!r} between its factors (LoDA), so that its update "
            f"depends on the input: {what}. Keep it attached, or train with activation=None"
        )
