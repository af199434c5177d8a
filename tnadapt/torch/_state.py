"""AdapterState, the state of an adapter on a model: its slots, arrays and mixing weight, and which rows it acts on.

Most other modules of the package are functions on :class:`AdapterState`. :class:`tnadapt.torch.Adapter` is the public
interface of such a state; no module below imports that class, so there are no import cycles.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tnadapt.algebra.factoring import Factoring
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import constant_result
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, ShapeError, TargetError, pluralize, warn
from tnadapt.targets.target import Target

from ._delta import (
    ArrayCache,
    DeltaCache,
    Function,
    ThetaArrays,
    gather_full,
    in_functorch,
    is_final,
    is_sharded,
    memory,
    recomputed,
    reshard,
    version,
)

# -- The state, and where a model keeps it -----------------------------------------------------------------------------


#: Prefix of the names of an adapter's parameters on its model.
PREFIX = "tnadapt_"
#: Replacement for a dot of the adapter's name in these names.
DOT = "%2E"
#: Prefix of the attributes of a state that are its mixing weight on a device.
_WEIGHT_ON = "weight on "
#: Prefix of the attributes of a population's members that are the active one's number on a device.
_INDEX_ON = "index on "
#: The model's attribute that holds the states of its adapters by name.
ADAPTERS_ATTR = "_tnadapt_adapters"
#: Runs a patched forward, with its arguments and keywords, where rows have different adapters.
RowRunner = Callable[[Any, Any, Any], Any]
#: Draws the random initial arrays of members, as ``UpdatePlan.drawn_for`` does.
Draws = Callable[[Sequence[int]], Iterator[tuple[str, Any]]]


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
    #: Whether the weight has no numbers to read in place; only set if the update is not just added.
    quantized: bool


class Idle(NamedTuple):
    """Since when an adapter has been idle, in turns of all adapters, and the bytes that it keeps."""

    turn: int
    held: int


class AdapterState:
    """The complete state of one adapter on one model.

    Attributes
    ----------
    model : Module
    name : str
    whole : AdapterState
        The population that a :class:`MemberState` belongs to; any other state itself.
    members : Members or None
        Number, names and states of a population's members; None for a single adapter.
    plan : UpdatePlan
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
    patches : list of ForwardPatch
        The patch that uses each slot, in their order; the same one several times where one forward uses several.
    was_trainable : dict of str to bool
        ``requires_grad`` of the base's parameters before ``attach``.
    untied : list of (Module, str, Parameter)
        The weights that were untied: module, name there, and the shared parameter that was there before.
    alone : tuple of str
        Targets and kept parameters that are of one module alone, though the model may tie them to others.
    settings : list of (Module, str, object)
        Attributes of a quantized model that were set for the adapter, with their values before.
    merged : list of Merged or None
        One for each target while ΔW is in the weights.
    merge_report : RequantizationReport or None
        How well the quantized weights among them hold the sum, typed loosely because its class is defined above.
    cache : DeltaCache
    quotients : ArrayCache
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
    references : tuple of weak references
        To other models that share the base's parameters. A copy of the adapter has none.
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
        plan: UpdatePlan,
        targets: Sequence[Target],
        kept: Sequence[str],
        activation: str | None,
        detach_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        self.members: Members | None = None
        self.detach_norm, self.dropout = detach_norm, dropout
        self.model, self.name, self.plan = model, name, plan
        self.model_name = type(model).__name__
        self.targets = tuple(targets)
        self.activation = activation
        self.kept = tuple(kept)
        self.trained: tuple[str, ...] | None = None
        self.slots: list[AdapterSlot] = []
        self.patches: list[Any] = []
        self.was_trainable: dict[str, bool] = {}
        self.untied: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.alone: tuple[str, ...] = ()
        self.settings: list[Any] = []
        self.merged: list[Merged] | None = None
        self.merge_report: Any = None
        self.cache = DeltaCache(plan.arrays_plan)
        self.quotients = ArrayCache()
        self.made = None if plan.theta is None else ThetaArrays(plan)
        self.enabled = True
        self.weight = 1.0
        self.weight_tensor = torch.tensor(1.0)
        self.row_passes, self.by_rows = 0, False
        self.row_runner: RowRunner | None = None
        self.threads: set[int] = set()
        self.warned = self.idle_warned = False
        self.idle: Idle | None = None
        self.references: tuple[weakref.ref[nn.Module], ...] = ()
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

    @property
    def whole(self) -> AdapterState:
        """The population of a member, or the state itself."""
        return self

    @property
    def acting(self) -> AdapterState:
        """The member of a population that acts on all rows, if one does; else the state itself, as in programs."""
        # A compiled program reads which member is active from a tensor, and has one cache for all.
        if self.members is None or self.members.active is None or torch.compiler.is_compiling():
            return self
        return self.members.active

    def array_of(self, name: str) -> Tensor:
        """Return an array by its name in the plan, as the model has it at this moment."""
        parameter = cast(Tensor, self.owner._parameters[self.parameter_names[name]])
        if self.members is None:
            return parameter
        if self.members.active is None or not torch.compiler.is_compiling():
            raise unnamed_member(self)
        index = getattr(self.members, self.members.index_name(str(parameter.device)))
        return parameter.index_select(0, index).squeeze(0)

    def caches(self) -> list[ArrayCache]:
        """Return its caches, of a population those of all members; those of a member are made on first use."""
        several = (self.__dict__.get(name) for name in ("cache", "quotients", "made"))
        caches = [cache for cache in several if cache is not None]
        if self.members is not None and self.whole is self:
            caches += [cache for member in self.members.caching() for cache in member.caches()]
        return caches

    def clear_cache(self) -> None:
        """Discard all cached updates."""
        for cache in self.caches():
            cache.forget()

    def __getstate__(self) -> dict[str, Any]:
        # Passes with rows and references belong to this object: a copy has none. Tensors on devices are recomputed.
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(_WEIGHT_ON)}
        return {**state, "row_passes": 0, "by_rows": False, "row_runner": None, "references": ()}

    def set_weight(self, weight: float) -> None:
        """Set the mixing weight, which is known to be valid."""
        self.weight = weight
        for name, value in list(self.__dict__.items()):
            if name == "weight_tensor" or name.startswith(_WEIGHT_ON):
                value.fill_(weight)

    def weight_name(self, device: str) -> str:
        """Return the name of the attribute that is the mixing weight on a device; create it if necessary.

        As in :meth:`tnadapt.backends.FixedArrays.name_of`, a compiler takes the name for a constant.
        """
        name = f"{_WEIGHT_ON}{device}"
        if name not in self.__dict__:
            with torch.inference_mode(False):
                self.__dict__[name] = torch.tensor(self.weight, device=device)
        return name


constant_result(AdapterState.weight_name)


# -- Populations: one state for all members, whose arrays have a leading axis, and one for each member in use ----------


class Members:
    """Number, names and states of a population's members.

    Parameters
    ----------
    count : int
    names : tuple of (str or None), or None
        The names of the members, in order; None if none has one.
    seeds : {"one", "each"}
        Whether the members start alike, or each from random arrays of its own.
    sparse : bool
        Whether gradients are row-sparse where torch can have them.

    Attributes
    ----------
    active : MemberState or None
        The member that acts on all rows of a forward pass outside of ``with adapter.members(...)``.
    """

    def __init__(
        self, count: int, names: tuple[str | None, ...] | None = None, seeds: str = "one", sparse: bool = False
    ) -> None:
        self.count, self.seeds, self.sparse = count, seeds, sparse
        self.names = names
        #: The number of the member that is merged, while the population is.
        self.merged: int | None = None
        #: By which factors layers multiply in the batched form, where the strategy has none; by index of the weight,
        #: logarithm of the tokens, and type of the device.
        self.factorings: dict[tuple[int, int, str], Factoring | None] = {}
        self.active: MemberState | None = None
        self._states: weakref.WeakValueDictionary[int, MemberState] = weakref.WeakValueDictionary()
        self._caching: weakref.WeakValueDictionary[int, MemberState] = weakref.WeakValueDictionary()

    @property
    def names(self) -> tuple[str | None, ...] | None:
        """The names of the members, in order; None if none has one."""
        return self._names

    @names.setter
    def names(self, names: tuple[str | None, ...] | None) -> None:
        self._names = names if names is not None and any(name is not None for name in names) else None
        self._numbers = {name: number for number, name in enumerate(self._names or ()) if name is not None}

    def number(self, name: str) -> int | None:
        """Return the number of the member of a name; None if there is none."""
        return self._numbers.get(name)

    def state(self, whole: AdapterState, number: int) -> MemberState:
        """Return the state of a member, which is made when it is first used."""
        state = self._states.get(number)
        if state is None:
            state = self._states[number] = MemberState(whole, number)
        return state

    def caching(self) -> list[MemberState]:
        """Return the states of the members that have caches."""
        return _alive(self._caching)

    def drop_caches(self) -> None:
        """Discard what is cached for members other than the active one: of each it may be as large as the model."""
        for state in self.caching():
            if state is not self.active:
                state.clear_cache()

    def note_caching(self, state: MemberState) -> None:
        """Remember that a member has caches."""
        self._caching[state.number] = state

    def initial(self, arrays: Mapping[str, Any], drawn: Draws) -> dict[str, Tensor]:
        """Return the initial arrays of all members from those of the first."""
        alone = {name: torch.as_tensor(array) for name, array in arrays.items()}
        each = drawn(range(self.count)) if self.seeds == "each" else ()
        # Without a copy, where they are on the CPU in float32.
        own = {name: torch.from_numpy(several).to(alone[name]) for name, several in each}
        expanded = {name: array.expand(self.count, *array.shape) for name, array in alone.items() if name not in own}
        return {name: own[name] if name in own else expanded[name].clone() for name in alone}

    def renew(self) -> None:
        """Discard what depends on the plan: the population has another one."""
        self.factorings.clear()
        for state in _alive(self._states):
            state.renew()

    def activate(self, state: MemberState) -> None:
        """Let a member act on all rows."""
        self.active = state
        for name, index in list(self.__dict__.items()):
            if name.startswith(_INDEX_ON):
                index.fill_(state.number)

    def index_name(self, device: str) -> str:
        """Return the name of the attribute that is the active member's number on a device: see ``weight_name``."""
        name = f"{_INDEX_ON}{device}"
        if name not in self.__dict__:
            assert self.active is not None
            with torch.inference_mode(False):
                self.__dict__[name] = torch.tensor([self.active.number], device=device)
        return name

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if not name.startswith(_INDEX_ON)}
        return {**state, "_states": None, "_caching": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _states=weakref.WeakValueDictionary(), _caching=weakref.WeakValueDictionary())
        if self.active is not None:
            self._states[self.active.number] = self.active


constant_result(Members.index_name)


def _alive(states: weakref.WeakValueDictionary[int, MemberState]) -> list[MemberState]:
    # In one step: other threads may add states.
    return [state for reference in states.valuerefs() if (state := reference()) is not None]


class MemberState(AdapterState):
    """The state of one member, which it shares with its population except for what is computed from its arrays.

    Parameters
    ----------
    whole : AdapterState
    number : int
    """

    _ALONE = frozenset({"_whole", "number", "cache", "quotients", "made", "handle", "_slots", "_views"})

    def __init__(self, whole: AdapterState, number: int) -> None:
        self._whole, self.number = whole, number
        self.handle: Any = None
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[AdapterSlot, AdapterSlot] = {}
        self._views: dict[str, tuple[Tensor, tuple[Any, ...], Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        if name not in MemberState._ALONE:
            return getattr(self._whole, name)
        # Made on first use: most members only have rows in a batch, and in a copy the population is complete last.
        if name == "cache":
            self.cache = self._whole.cache.twin()
        elif name == "quotients":
            self.quotients = ArrayCache()
        elif name == "made":
            self.made = None if self._whole.plan.theta is None else ThetaArrays(self._whole.plan)
        else:
            raise AttributeError(name)
        cast(Members, self._whole.members).note_caching(self)
        return self.__dict__[name]

    def renew(self) -> None:
        """Drop what is of the population's plan, which was exchanged for another one."""
        for name in ("cache", "quotients", "made"):
            self.__dict__.pop(name, None)
        self._forget()
        if self.handle is not None:
            self.handle.plan = self._whole.plan.file_plan

    def __setattr__(self, name: str, value: Any) -> None:
        if name in MemberState._ALONE:
            object.__setattr__(self, name, value)
        else:
            setattr(self._whole, name, value)

    @property
    def whole(self) -> AdapterState:
        return self._whole

    @property
    def acting(self) -> AdapterState:
        return self

    @property
    def slots(self) -> list[AdapterSlot]:  # type: ignore[override]
        """Those of the population, for this member."""
        return [self.slot(slot) for slot in self._whole.slots]

    def slot(self, slot: AdapterSlot) -> AdapterSlot:
        """Return a slot of the population for this member."""
        if slot not in self._slots:
            self._slots[slot] = dataclasses.replace(slot, adapter=self)
        return self._slots[slot]

    def array_of(self, name: str) -> Tensor:
        assignment = assignment_of(self)
        if assignment is not None:
            return assignment.array(name, self.number)
        parameter = self._parameter(name)
        # A view that is kept would be a constant of a trace, or valid only inside a transform.
        transformed = torch.compiler.is_compiling() or in_functorch()
        if transformed or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return parameter[self.number]
        if not (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter[self.number]
        # Caches of what has a graph know an array by its identity. Moving a model exchanges the memory of a parameter,
        # and after a write in place torch gives a view another node.
        sparse = sparse_gradients(self._whole, parameter)
        place = *memory(parameter), version(parameter), sparse
        cached = self._views.get(name)
        if cached is None or cached[0] is not parameter or cached[1] != place:
            view = recomputed(Selection(self.number, parameter, True), parameter) if sparse else parameter[self.number]
            cached = self._views[name] = parameter, place, view
        return cached[2]

    def view(self, name: str) -> Tensor:
        """Return the member's part of an array as a view, to which numbers can be written."""
        return self._parameter(name)[self.number]

    def pair(self, name: str, array: Any) -> tuple[nn.Parameter, Any]:
        """Pair the member's part of an array with its new value; of a sharded one, all members with theirs."""
        parameter = self._parameter(name)
        if not is_sharded(parameter):
            return cast(nn.Parameter, parameter[self.number]), array
        several = gather_full(parameter).detach().clone()
        several[self.number] = torch.as_tensor(array, dtype=several.dtype, device=several.device)
        return cast(nn.Parameter, parameter), several

    def _parameter(self, name: str) -> Tensor:
        return cast(Tensor, self._whole.owner._parameters[self._whole.parameter_names[name]])

    def __getstate__(self) -> dict[str, Any]:
        return {"_whole": self._whole, "number": self.number, "handle": self.handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class Selection(Function):
    """The array of one member, as a view, or those of several as a function of those of all.

    Its gradient is row-sparse with ``sparse``: it has the rows of these members alone.

    Parameters
    ----------
    numbers : int or Tensor, shape (members,)
    parameter : Tensor, shape (K, …)
    sparse : bool
    """

    keeps = "nothing"

    def __init__(self, numbers: int | Tensor, parameter: Tensor, sparse: bool) -> None:
        self.numbers, self.shape, self.sparse = numbers, parameter.shape, sparse

    def __call__(self, parameter: Tensor) -> Tensor:
        numbers = self.numbers
        return parameter[numbers] if isinstance(numbers, int) else parameter.index_select(0, numbers)

    def vjp(self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradient of the arrays of all members."""
        numbers, rows = self.numbers, gradient
        if isinstance(numbers, int):
            numbers, rows = torch.tensor([numbers], device=rows.device), rows.unsqueeze(0)
        # A sparse gradient cannot be differentiated again, batched or compiled.
        if not self.sparse or not is_final(rows) or torch.compiler.is_compiling():
            return [rows.new_zeros(self.shape).index_copy_(0, numbers, rows)]
        # In ascending order, sums of gradients have each member once. A copy, since others may get the same gradient.
        numbers, order = numbers.sort()
        index, rows = numbers.unsqueeze(0), rows.index_select(0, order)
        return [torch.sparse_coo_tensor(index, rows, self.shape, is_coalesced=True, check_invariants=False)]


def sparse_gradients(whole: AdapterState, parameter: Tensor) -> bool:
    """Return whether a parameter gets row-sparse gradients; raise a ConfigError where nothing could reduce them."""
    if not cast(Members, whole.members).sparse or not parameter.is_leaf:
        return False
    # DDP takes sparse gradients from nn.Embedding alone.
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None) is not None
    if ddp or hasattr(whole.owner, "unshard"):
        raise ConfigError(
            f"population {whole.name!r} has sparse gradients, which {'DistributedDataParallel' if ddp else 'FSDP2'} "
            "cannot reduce over its processes: set population.sparse = False, or leave out sparse=True"
        )
    return True


def unnamed_member(state: AdapterState) -> TargetError:
    """Return the error for a population of which one member is needed, and none is named."""
    assert state.members is not None
    return TargetError(
        f"adapter {state.name!r} is a population of {state.members.count} members, and nothing says which of them acts "
        "here: run the model inside `with adapter.members([…])`, with a member for each row, or call "
        "adapter[0].activate() of one; disabled() gives the base"
    )


def weight_on(state: AdapterState, device: torch.device) -> Tensor:
    """Return an adapter's mixing weight as a tensor that a compiled program reads.

    It is on the device of the program, where one scalar on the CPU would keep the compiler from CUDA graphs.
    """
    state = state.whole
    # Export without Dynamo runs this on placeholders, and must leave none behind.
    if device.type == "cpu" or not torch.compiler.is_dynamo_compiling():
        return state.weight_tensor
    return cast(Tensor, getattr(state, state.weight_name(str(device))))


def need_attached(state: AdapterState) -> None:
    """Raise a TargetError if the adapter was detached."""
    if state.model.__dict__.get(ADAPTERS_ATTR, {}).get(state.name) is not state.whole:
        raise TargetError(
            f"adapter {state.name!r} is no longer attached to its model: it was detached or baked; attach or load "
            "another"
        )


def need_unmerged(state: AdapterState, what: str) -> None:
    """Raise a TargetError if the adapter is merged."""
    if state.merged is not None:
        raise TargetError(f"adapter {state.name!r} is merged, and {what} needs it unmerged: call unmerge() first")


def not_a_sum(*states: AdapterState) -> str:
    """Return why the updates of adapters do not add up."""
    adapter = next(state for state in states if not state.plan.applying.additive)
    return f"apply={adapter.plan.config.apply!r} of adapter {adapter.name!r} is not a sum that others could be added to"


def need_linear(state: AdapterState, what: str) -> None:
    """Raise a ConfigError if the update depends on the input."""
    if state.activation is not None:
        raise ConfigError(
            f"adapter {state.name!r} has {state.activation!r} between its factors (LoDA), so that its update "
            f"depends on the input: {what}. Keep it attached, or train with activation=None"
        )


def warn_of_references(state: AdapterState) -> None:
    """Warn that a merge changes the references of preference training that something still uses."""

    def is_used() -> bool:
        return any(reference() is not None for reference in state.references)

    if is_used():
        gc.collect()  # modules are in reference cycles, so a deleted one may still exist
    if is_used():
        warn(
            f"adapter {state.name!r} is merged into weights that a reference_model() of this model shares, so the "
            "reference changes, too. If it is still used, unmerge() first, or merge into a copy that was loaded "
            "for it; if not, delete it before the merge"
        )


# -- Its arrays: the parameters that hold them, new values, and the updates --------------------------------------------


def named_parameters(state: AdapterState) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the arrays' names in the plan."""
    if isinstance(state, MemberState):
        yield from ((array, cast(nn.Parameter, state.view(array))) for array in state.parameter_names)
        return
    for array, name in state.parameter_names.items():
        yield array, state.owner._parameters[name]  # type: ignore[misc]


def current(state: AdapterState, names: Sequence[str]) -> list[Tensor]:
    """Return the named arrays as the model has them at this moment, or as θ makes them."""
    if state.made is not None:
        arrays = state.made.get(_parameters(state, list(state.made.theta.shapes)))
        return [arrays[name] for name in names]
    return _parameters(state, names)


def weight_params(state: AdapterState, index: int) -> list[Tensor]:
    """Return the parameters that a weight has next to those of its update, as the model has them at this moment."""
    return _parameters(state, state.plan.weight_param_names[index])


def _parameters(state: AdapterState, names: Sequence[str]) -> list[Tensor]:
    if type(state) is AdapterState and state.members is None:
        # Looked up at each use: FSDP and load_state_dict(assign=True) replace the parameter objects.
        return [state.owner._parameters[state.parameter_names[name]] for name in names]  # type: ignore[misc]
    return [state.array_of(name) for name in names]


def full_arrays(state: AdapterState) -> dict[str, Tensor]:
    """Return all parameters by the names of their arrays; sharded ones are gathered (every process must call)."""
    reshard(state.model, state.owner)  # the memory of what FSDP2 has gathered is freed while the caller has the arrays
    return {name: gather_full(parameter) for name, parameter in named_parameters(state)}


def initial_arrays(state: AdapterState, arrays: Mapping[str, Any], drawn: Draws) -> Mapping[str, Any]:
    """Return initial arrays as an adapter has them: a population those of all members, a member with its own draws."""
    members = state.members
    if members is None:
        return arrays
    if not isinstance(state, MemberState):
        return members.initial(arrays, drawn)
    if members.seeds == "one" or state.number == 0:
        return arrays
    return {**arrays, **{name: rows[0] for name, rows in drawn([state.number])}}


def checked_pairs(state: AdapterState, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
    """Pair each parameter with what to copy into it from an array of a file; raise a ShapeError if they do not fit."""
    need_unmerged(state, "new arrays")
    leading = () if state.members is None or isinstance(state, MemberState) else (state.members.count,)
    expected = {name: (*leading, *shape) for name, shape in state.plan.param_shapes.items()}
    shapes = {name: tuple(getattr(array, "shape", ())) for name, array in arrays.items()}
    if shapes != expected:
        wrong = sorted(set(shapes.items()) ^ set(expected.items()))[:4]
        axis = f", with an axis of its {pluralize(leading[0], 'member')} in front" if leading else ""
        raise ShapeError(
            f"adapter {state.name!r} needs arrays named and shaped as its plan says{axis}; differing: {wrong}"
        )
    return pairs(state, state.plan.from_arrays(arrays))


def pairs(state: AdapterState, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
    """Pair each parameter with its new value, in its unit; names and shapes are known to fit."""
    need_unmerged(state, "new arrays")
    reshard(state.model, state.owner)
    if isinstance(state, MemberState):
        return [state.pair(name, arrays[name]) for name in state.parameter_names if name in arrays]
    return [(parameter, arrays[name]) for name, parameter in named_parameters(state) if name in arrays]


def register_in(state: AdapterState, owner: nn.ParameterDict, instead: str) -> None:
    """Register the parameters in ``owner`` instead of on the model, under their array names with ``_`` for dots.

    The parameters stay the same objects. The caller keeps ``owner`` in the same module tree as the model, so that
    moving, sharding and copying treat them alike, and removes the adapter with ``let_go`` or ``let_go_merged`` of
    :mod:`tnadapt.torch._registry`; ``detach()`` and ``bake()`` then raise an error that names ``instead``.
    """
    names = {array: array.replace(".", "_") for array in state.parameter_names}
    left, old = state.owner, list(state.parameter_names.values())
    # Added to the new owner before they leave the old one: at every moment, lookups find the parameters.
    for array, parameter in named_parameters(state):
        owner[names[array]] = parameter

    def move() -> None:
        state.owner, state.parameter_names, state.managed_by = owner, names, instead
        for name in old:
            left._parameters.pop(name, None)

    try:
        move()
    except BaseException:  # finish the move when interrupted: half of it would leave them in two places
        move()
        raise


# -- Which adapter acts on which rows of a batch, in this thread -------------------------------------------------------

# The assignment is a context variable and not an attribute of the model: threads with different rows do not see each
# other's. ``AdapterState.by_rows`` only tells that some thread has one, so that passes without rows do not look it up,
# and that a compiled program, which guards on it, is traced again.


class RowAssignment:
    """An adapter, or none, for each row of a batch.

    Parameters
    ----------
    states : sequence of AdapterState or None
        One entry for each row.
    governed : iterable of AdapterState
        The adapters on the model. Those that no row has do not act.
    weights : mapping of AdapterState to float
        Mixing weights to use instead of the adapters' own.

    Attributes
    ----------
    call, entry : str
        What entered it, and what it has for each row, for messages.
    names : tuple of str or None
    groups : dict of (AdapterState or None) to list of int
        The rows of each distinct adapter, in ascending order.
    """

    call, entry = "rows()", "name"

    def __init__(
        self,
        states: Sequence[AdapterState | None],
        governed: Iterable[AdapterState],
        weights: Mapping[AdapterState, float] | None = None,
    ) -> None:
        self.names = tuple(None if state is None else state.name for state in states)
        self.governed = frozenset(governed)
        self.groups: dict[AdapterState | None, list[int]] = {}
        for row, state in enumerate(states):
            self.groups.setdefault(state, []).append(row)
        self._weights = dict(weights or {})
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def names_adapter(self, state: AdapterState) -> bool:
        """Return whether some row has an adapter."""
        return state in self.groups

    def weight(self, state: AdapterState) -> float:
        """Return an adapter's mixing weight: its own, or 1 if it is inactive and named; 0 if no row has it."""
        if not self.names_adapter(state):
            return 0.0
        return self._weights.get(state, state.weight) or 1.0

    def array(self, name: str, number: int) -> Tensor:
        """Return an array of a member of a population that has rows here."""
        raise NotImplementedError

    def index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return row numbers as a tensor, which all layers share."""
        key = tuple(rows), device
        if key not in self._indices:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for backward
                self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]


#: The assignments of the thread's open ``with rows(...)``, the innermost last.
_OPEN: ContextVar[tuple[RowAssignment, ...]] = ContextVar("tnadapt_rows", default=())
_LOCK = threading.Lock()


def open_assignments() -> tuple[RowAssignment, ...]:
    """Return the thread's open assignments, the innermost last."""
    return _OPEN.get()


def assignment_of(state: AdapterState) -> RowAssignment | None:
    """Return this thread's assignment that an adapter is subject to."""
    if not state.by_rows:
        return None
    return next((assignment for assignment in reversed(_OPEN.get()) if state.whole in assignment.governed), None)


def mixing_weight(state: AdapterState) -> float:
    """Return the factor of an adapter's update in this thread."""
    assignment = assignment_of(state) if state.by_rows else None
    return state.weight if assignment is None else assignment.weight(state)


@contextlib.contextmanager
def entered(assignment: RowAssignment, runner: RowRunner) -> Iterator[None]:
    """Make the assignment that of this thread inside ``with``; ``runner`` runs the forwards of its adapters' layers."""
    _count(assignment, 1, runner)
    token = _OPEN.set((*_OPEN.get(), assignment))
    try:
        yield
    except BaseException:
        for state in assignment.governed:
            state.cache.end()  # a KeyboardInterrupt ends a pass without a hook
        raise
    finally:
        _OPEN.reset(token)
        _count(assignment, -1, runner)


def _count(assignment: RowAssignment, change: int, runner: RowRunner) -> None:
    with _LOCK:
        for state in assignment.governed:
            state.row_passes += change
            state.row_runner = runner
            state.by_rows = state.row_passes > 0
