"""The state of an adapter, which the modules of this package share, and where a model keeps it.

All other modules are functions on :class:`AdapterState` and import this one. :class:`tnadapt.torch.Adapter` is the
public interface of such a state; no module below imports that class, so there are no import cycles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from tnadapt.algebra.factoring import Factoring
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends.constant_result import constant_result
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, TargetError
from tnadapt.targets.target import Target

from ._delta_cache import DeltaCache
from ._quotient import QuotientCache
from ._shared_references import SharedReferences
from ._theta_arrays import ThetaArrays

__all__ = [
    "ADAPTERS_ATTR",
    "DOT",
    "PREFIX",
    "AdapterSlot",
    "AdapterState",
    "Idle",
    "Merged",
    "RowRunner",
    "UntiedWeight",
    "encoded",
    "is_array",
    "need_attached",
    "need_linear",
    "need_unmerged",
    "not_a_sum",
    "weight_on",
]

#: Prefix of the names of an adapter's parameters on its model.
PREFIX = "tnadapt_"
#: Replacement for a dot of the adapter's name in these names.
DOT = "%2E"
#: Prefix of the attributes of a state that are its mixing weight on a device.
_WEIGHT_ON = "weight on "
#: The model's attribute that holds the states of its adapters by name.
ADAPTERS_ATTR = "_tnadapt_adapters"
#: Runs a patched forward, with its arguments and keywords, where rows have different adapters.
RowRunner = Callable[[Any, Any, Any], Any]


def is_array(path: str) -> bool:
    """Return whether the parameter at a path of the model belongs to an adapter rather than the base.

    Parameters
    ----------
    path : str

    Examples
    --------
    Its name has the prefix, or the name of a module that holds the arrays, as in a PEFT model:

    >>> is_array("encoder.tnadapt_default_group0_split0_factor0")
    True
    >>> is_array("tnadapt.tnadapt_arrays.default.group0_split0_factor0")
    True
    >>> is_array("encoder.layers.0.weight")
    False
    """
    return any(part.startswith(PREFIX) for part in path.split("."))


def encoded(name: str) -> str:
    """Encode an adapter's name for use in the name of a parameter or module, in which torch allows no dot.

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
    """A weight that was untied: the module, the parameter's name there, and the shared parameter it had before."""

    module: nn.Module
    name: str
    parameter: nn.Parameter


class Merged(Protocol):
    """The interface of what is kept for one target while its update is in the weight."""

    @property
    def before(self) -> Tensor:
        """The original rows as numbers."""

    def check(self, state: AdapterState, target: Target, owner: nn.Module) -> None:
        """Raise a TargetError if the weight has changed since, so that its original bits cannot be put back."""

    def put_back(self, target: Target, owner: nn.Module) -> None:
        """Write the original rows back into the weight; can be repeated."""


@dataclasses.dataclass(frozen=True, eq=False)
class AdapterSlot:
    """One adapter's part in one weight: the index of its update, the rows, and the strategy."""

    adapter: AdapterState
    index: int
    #: The module that holds the weight.
    owner: nn.Module
    target: Target
    strategy: str
    #: The factors of the update, for the strategy "factored".
    factoring: Factoring | None
    #: Whether the weight has no numbers to read in place; known if the update is not just added.
    quantized: bool


class Idle(NamedTuple):
    """Since when an adapter has been idle, in turns of all adapters, and the bytes that it keeps."""

    turn: int
    held: int


class Patch(Protocol):
    """The interface of a patched module's forward that the state needs."""

    host: nn.Module

    def remove(self, adapter: AdapterState) -> None:
        """Remove an adapter's slots."""

    def rivals(self, adapter: AdapterState) -> list[AdapterState]:
        """Return the adapters of the same rows with which this one does not add up."""

    def exchange(self, slots: Mapping[AdapterSlot, AdapterSlot]) -> None:
        """Put other slots in the place of some."""


class AdapterState:
    """The complete state of one adapter on one model.

    Attributes
    ----------
    model : Module
    name : str
    plan : SuperLoRA
        Of the parameters, which are in units; ``plan.file_plan`` is that of the arrays in files.
    targets : tuple of Target
    activation : str or None
    model_name : str
        The model's class when the adapter was attached: sharding replaces the class.
    kept : tuple of str
        The model's own parameters that ``keep_trainable`` left free.
    trained : tuple of str or None
        The arrays that are trained, by their names in the plan; None for all.
    slots : list of AdapterSlot
        One for each target, in their order; then one for each other module that holds a tied weight.
    patches : list of Patch
        The patch that uses each slot, in their order; the same one several times where one forward uses several.
    was_trainable : dict of str to bool
        ``requires_grad`` of the base's parameters before ``attach``.
    untied : list of UntiedWeight
    alone : tuple of str
        Targets and kept parameters that are of one module alone, though the model may tie them to others.
    settings : list of (Module, str, object)
        Attributes of a quantized model that were set for the adapter, with their values before.
    merged : list of Merged or None
        One for each target while ΔW is in the weights.
    merge_report : RequantizationReport or None
        How well the quantized weights among them hold the sum, typed loosely because its class is defined above.
    cache : DeltaCache
    quotients : QuotientCache
        The quotients of a magnitude and a norm, where the plan has magnitudes.
    detach_norm : bool
        Whether gradients take these norms for constants.
    dropout : float
        The probability with which elements of the input of what the adapter adds are dropped in training.
    made : ThetaArrays or None
        The arrays that θ makes, if the plan has a map before the network.
    enabled : bool
        False inside ``disabled()``.
    weight : float
        Mixing weight: the factor of the update.
    weight_tensor : Tensor
        The same number as a tensor. Compiled programs read it, or its copy on their device (:func:`weight_on`), so that
        changing the weight does not recompile.
    row_passes : int
        Number of open ``with rows(...)`` of the model, in all threads; ``by_rows`` tells whether there are any.
    row_runner : callable or None
        Runs a patched forward of the adapter while ``by_rows``. It stays afterwards: a thread may just have read
        ``by_rows``.
    threads : set of int
        Ids of the threads in whose current forward pass a patch has used this adapter.
    warned : bool
        Whether the warning that no patch was used has been issued.
    idle_warned : bool
        Whether the warning that a training does not change the adapter has been issued.
    idle : Idle or None
        What it keeps while it does not act; None while it does.
    references : SharedReferences
        Other models that share the base's parameters.
    passes : (int, set)
        The sum of the arrays' version counters, and the settings with which forward passes with gradients have begun
        at that version: the recomputation of activation checkpointing must match one of them in backward.
    owner : Module
        The module the parameters are registered on: the model, or the one in which PEFT looks for them.
    parameter_names : dict of str to str
        Names of the parameters there, by their names in the plan.
    managed_by : str or None
        If another library manages the adapter, what to call instead of ``detach()`` and ``bake()``.
    pretrained : Pretrained or None
        What files record of the base model, if a file or the user determined it.
    base : Fingerprint or None
        The fingerprint of the base when it was last computed.
    shares_weights : bool
        Whether another model has the same parameters, so that nothing may be merged into them (a reference).
    handle : Adapter
        The public interface, typed loosely because its class is defined above this module.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        plan: SuperLoRA,
        targets: Sequence[Target],
        kept: Sequence[str],
        activation: str | None,
        detach_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.detach_norm, self.dropout = detach_norm, dropout
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
        self.alone: tuple[str, ...] = ()
        self.settings: list[Any] = []
        self.merged: list[Merged] | None = None
        self.merge_report: Any = None
        self.cache = DeltaCache(plan.arrays_plan)
        self.quotients = QuotientCache()
        self.made = None if plan.theta is None else ThetaArrays(plan)
        self.enabled = True
        self.weight = 1.0
        self.weight_tensor = torch.tensor(1.0)
        self.row_passes, self.by_rows = 0, False
        self.row_runner: RowRunner | None = None
        self.threads: set[int] = set()
        self.warned = self.idle_warned = False
        self.idle: Idle | None = None
        self.references = SharedReferences()
        self.passes: tuple[int, set[tuple[Hashable, ...]]] = -1, set()
        self.owner = model
        self.parameter_names = {
            array: f"{PREFIX}{encoded(name)}_{array.replace('.', '_')}" for array in plan.param_shapes
        }
        self.managed_by: str | None = None
        self.base: Fingerprint | None = None
        self.shares_weights = False
        self.pretrained: Pretrained | None = None
        self.handle: Any = None

    def clear_cache(self) -> None:
        """Discard all cached updates."""
        self.cache.forget()
        self.quotients.forget()
        if self.made is not None:
            self.made.forget()

    def __getstate__(self) -> dict[str, Any]:
        # Passes with rows are those of this object: none is open for a copy. Tensors on devices are recomputed.
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(_WEIGHT_ON)}
        return {**state, "row_passes": 0, "by_rows": False, "row_runner": None}

    def set_weight(self, weight: float) -> None:
        """Set the mixing weight, which is known to be valid."""
        self.weight = weight
        for name, value in list(self.__dict__.items()):
            if name == "weight_tensor" or name.startswith(_WEIGHT_ON):
                value.fill_(weight)

    def weight_name(self, device: str) -> str:
        """Return the name of the attribute that is the mixing weight on a device; create it if necessary.

        As in :meth:`tnadapt.backends.fixed_arrays.FixedArrays.name_of`, a compiler takes the name for a constant.
        """
        name = f"{_WEIGHT_ON}{device}"
        if name not in self.__dict__:
            with torch.inference_mode(False):
                self.__dict__[name] = torch.tensor(self.weight, device=device)
        return name


constant_result(AdapterState.weight_name)


def weight_on(state: AdapterState, device: torch.device) -> Tensor:
    """Return an adapter's mixing weight as a tensor that a compiled program reads.

    It is on the device of the program, where one scalar on the CPU would keep the compiler from CUDA graphs.
    """
    # Export without Dynamo runs this on placeholders, and must leave none behind.
    if device.type == "cpu" or not torch.compiler.is_dynamo_compiling():
        return state.weight_tensor
    return cast(Tensor, getattr(state, state.weight_name(str(device))))


def need_attached(state: AdapterState) -> None:
    """Raise a TargetError if the adapter was detached."""
    if state.model.__dict__.get(ADAPTERS_ATTR, {}).get(state.name) is not state:
        raise TargetError(f"adapter {state.name!r} is no longer attached to its model")


def need_unmerged(state: AdapterState, what: str) -> None:
    """Raise a TargetError if the adapter is merged."""
    if state.merged is not None:
        raise TargetError(f"adapter {state.name!r} is merged, and {what} needs it unmerged: call unmerge() first")


def not_a_sum(*states: AdapterState) -> str:
    """Return why the updates of adapters do not add up."""
    one = next(state for state in states if not state.plan.applying.additive)
    return f"apply={one.plan.config.apply!r} of adapter {one.name!r} is not a sum that others could be added to"


def need_linear(state: AdapterState, what: str) -> None:
    """Raise a ConfigError if the update depends on the input."""
    if state.activation is not None:
        raise ConfigError(
            f"adapter {state.name!r} has {state.activation!r} between its factors (LoDA), so that its update "
            f"depends on the input: {what}. Keep it attached, or train with activation=None"
        )
