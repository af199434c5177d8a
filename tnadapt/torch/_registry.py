"""The adapters on a model: list, mix and remove them; the model's methods that they intercept, such as TRL's for vLLM.

:func:`attached` lists them, and :func:`mix` sets their weights. :func:`freeze`, :func:`prepare` and
:func:`install_methods` change the model for an adapter; :func:`let_go` and :func:`let_go_merged` undo it.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.backends import FixedArrays
from tnadapt.errors import ConfigError, TargetError, safe_repr, warn

from ._delta import all_or_none
from ._forward_pass import PassHooks
from ._forward_patch import ForwardPatch
from ._merging import merge
from ._quantized import quantized_type
from ._state import ADAPTERS_ATTR, AdapterState, Idle, is_array, need_attached, need_unmerged

# -- The adapters of a model, and the weights of their mix -------------------------------------------------------------


def attached(model: nn.Module) -> dict[str, AdapterState]:
    """Return the adapters on a model and its submodules by name; raise a TargetError if two have one name."""
    adapters: dict[str, AdapterState] = {}
    if not callable(getattr(model, "modules", None)):
        raise TargetError(f"adapters are on a torch module; got {safe_repr(model)}")
    for module in model.modules():
        for name, adapter in module.__dict__.get(ADAPTERS_ATTR, {}).items():
            if name in adapters:
                first, second = (type(a.model).__name__ for a in (adapters[name], adapter))
                raise TargetError(
                    f"two adapters of this model have the name {name!r}, one attached to a {first} in it and one to a "
                    f"{second}: query those submodules separately, or attach the adapters under different names"
                )
            adapters[name] = adapter
    return adapters


def overlapping(model: nn.Module) -> list[AdapterState]:
    """Return the adapters on a model, on its submodules, and those on an enclosing model that act inside it."""
    states: dict[AdapterState, None] = {}
    for module in model.modules():
        states.update(dict.fromkeys(module.__dict__.get(ADAPTERS_ATTR, {}).values()))
        patch = ForwardPatch.of(module)
        if patch is not None:
            states.update((slot.adapter, None) for patched in patch.weights for slot in patched.slots)
    return list(states)


def refuse_merged(model: nn.Module, what: str, but: AdapterState | None = None) -> None:
    """Raise a TargetError if an adapter, except one, is merged into the weights; ``what`` needs the base without it."""
    for other in overlapping(model):
        if other.merged is not None and (but is None or other is not but.whole):
            raise TargetError(f"adapter {other.name!r} is merged into the base: unmerge it before {what}")


def mix(model: nn.Module, weights: Mapping[str, float]) -> None:
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
    adapters = attached(model)
    if not isinstance(weights, Mapping):
        raise ConfigError(f"mix() needs weights by name, such as {{'first': 0.5}}; got {safe_repr(weights)}")
    wanted = {name: _finite(weight) for name, weight in weights.items()}
    for name in wanted:
        if name not in adapters:
            having = [
                state.name for state in adapters.values() if state.members and state.members.number(name) is not None
            ]
            raise TargetError(
                f"no adapter {name!r} on this model; there are: {', '.join(map(repr, adapters)) or 'none'}"
                + "".join(
                    f"; population {one!r} has a member {name!r}, which its activate() lets act" for one in having
                )
            )
    for name, adapter in adapters.items():
        if adapter.merged is not None and wanted.get(name, 0.0) != adapter.weight:
            raise TargetError(f"adapter {name!r} is merged, so its weight cannot change: call unmerge() first")
    new = [(adapter, wanted.get(name, 0.0)) for name, adapter in adapters.items()]
    old = [(adapter, adapter.weight) for adapter in adapters.values()]
    all_or_none(AdapterState.set_weight, new, old)
    trim_idle(adapters.values())


def set_weight(adapter: AdapterState, weight: float) -> None:
    """Set one mixing weight; see :meth:`Adapter.set_weight`."""
    number, adapter = _finite(weight), adapter.whole
    if number != adapter.weight:
        need_unmerged(adapter, "another weight")
    all_or_none(AdapterState.set_weight, [(adapter, number)], [(adapter, adapter.weight)])
    trim_idle(adapter.model.__dict__.get(ADAPTERS_ATTR, {}).values())


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


# -- The draws cached by an adapter's plan: counted and freed ----------------------------------------------------------


def drawn(plan: UpdatePlan) -> Iterator[FixedArrays]:
    """Yield what a plan keeps that can be computed again from its integers: draws, frozen and initial arrays."""
    for group in plan.arrays_plan.groups:
        yield from group.projection.map.components()
        yield from group.start.components()
        yield from group.frozen.components()
    if plan.theta is not None:
        for part in plan.theta.parts:
            yield from part.projection.map.components()


def held_by_draws(several: Iterable[FixedArrays]) -> int:
    """Return the bytes of arrays on the host and, where they are others, on devices; each counted once."""
    arrays: dict[int, int] = {}
    spare: dict[int, int] = {}
    for fixed in several:
        spare[id(fixed)] = fixed.spare_bytes
        for host in fixed.kept.values():
            arrays[host.__array_interface__["data"][0]] = host.nbytes
        for placed in fixed.placed.values():
            memory = placed.untyped_storage() if hasattr(placed, "untyped_storage") else None
            if memory is not None:
                arrays[memory.data_ptr()] = memory.nbytes()
    return sum(arrays.values()) + sum(spare.values())


# -- Caches of idle adapters: a limit in bytes per model ---------------------------------------------------------------

# An adapter that has acted caches what makes the next pass fast: its updates, and the draws of its F. Once others are
# activated in its place, that memory is useful only if it comes back. Beyond the limit, the adapters that have been
# idle longest lose their caches, which are recomputed when they act.


#: Default limit in bytes for the caches of a model's idle adapters.
DEFAULT_LIMIT = 32 * 2**20
_LIMIT_ATTR = "_tnadapt_cache_limit"
_turns = itertools.count(1)


@checks_arguments
def set_cache_limit(model: nn.Module, limit: int) -> None:
    """Set how many bytes the inactive adapters of a model keep together, so that they are fast once they come back.

    Parameters
    ----------
    model : Module
        The one that the adapters are attached to.
    limit : int
        In bytes. The default is 32 MiB. 0 keeps nothing of an adapter that is deactivated.

    Raises
    ------
    ConfigError
        If the limit is not an integer of at least 0.

    Notes
    -----
    An adapter that has acted without gradients keeps its updates (unless its layers apply them as factors) and the
    draws of its F. The limit counts those of adapters whose weight is 0, after :meth:`Adapter.activate`,
    :func:`mix` or the end of ``with rows(...)``; beyond it, those that were idle longest lose theirs. Active adapters
    keep what they need, whatever the limit is. Adapters with the same F share its draws.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> adapter = tnadapt.torch.attach(model)
    >>> set_cache_limit(model, 100 * 2**20)
    """
    model.__dict__[_LIMIT_ATTR] = integer("limit", limit, 0, 1 << 62, ConfigError)


def trim_idle(states: Iterable[AdapterState]) -> None:
    """Note which of a model's adapters are idle now, and free what they keep beyond the limit.

    Parameters
    ----------
    states : iterable of AdapterState
        All adapters of the model.
    """
    states = list(states)
    for state in states:
        if state.members is not None:
            state.members.drop_caches()
        if state.weight != 0.0 or state.by_rows:
            state.idle = None
        elif state.idle is None:
            state.idle = Idle(next(_turns), _bytes_held(state))
    idle = [(state.idle, state) for state in states if state.idle is not None and state.idle.held]
    total = sum(record.held for record, _ in idle)
    limits = [state.model.__dict__[_LIMIT_ATTR] for state in states if _LIMIT_ATTR in state.model.__dict__]
    limit = min(limits, default=DEFAULT_LIMIT)
    if total <= limit:
        return
    used = {id(fixed) for state in states if state.idle is None for fixed in drawn(state.plan)}
    for record, state in sorted(idle, key=lambda pair: pair[0].turn):
        if total <= limit:
            break
        total -= record.held
        state.clear_cache()
        for fixed in drawn(state.plan):
            if id(fixed) not in used:
                fixed.free()
        state.idle = record._replace(held=0)


def _bytes_held(state: AdapterState) -> int:
    """Return the bytes that an adapter caches beyond its own parameters."""
    return sum(cache.held() for cache in state.caches()) + held_by_draws(drawn(state.plan))


# -- The base, frozen while any adapter is attached --------------------------------------------------------------------


def freeze(adapter: AdapterState) -> None:
    """Turn off ``requires_grad`` in the adapter's model, except where an adapter there keeps a parameter trainable."""
    free: set[int] = set()
    before: dict[int, bool] = {}
    for other in [*overlapping(adapter.model), adapter]:
        for name, parameter in _base(other):
            if name in other.kept:
                free.add(id(parameter))
            if name in other.was_trainable:
                before[id(parameter)] = other.was_trainable[name]
    for name, parameter in _base(adapter):
        # The state before the first adapter, restored when the last one is detached.
        adapter.was_trainable[name] = before.get(id(parameter), parameter.requires_grad)
        parameter.requires_grad_(id(parameter) in free)


def restore(adapter: AdapterState) -> None:
    """Undo what ``attach`` did to the base, except where another adapter still needs it."""
    for module, name, parameter in adapter.untied:
        module._parameters[name] = parameter
    others = [other for other in overlapping(adapter.model) if other is not adapter]
    needed = {id(parameter) for other in others for name, parameter in _base(other) if name in other.was_trainable}
    for name, parameter in _base(adapter):
        if name in adapter.was_trainable and id(parameter) not in needed:
            parameter.requires_grad_(adapter.was_trainable[name])


def untie(adapter: AdapterState, name: str) -> None:
    """Replace a tied weight of the adapter's model by its own copy."""
    model = adapter.model
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    old = owner._parameters[parameter]
    assert old is not None
    new = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    adapter.untied.append((owner, parameter, old))
    owner._parameters[parameter] = new


def _base(adapter: AdapterState) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the adapter's model that do not belong to an adapter."""
    for name, parameter in adapter.model.named_parameters():
        if not is_array(name):
            yield name, parameter


# -- Adjustments of a quantized model while an adapter is attached -----------------------------------------------------

# - Layers whose library would change them in evaluation are told not to (:meth:`QuantizedLayer.while_attached`).
# - Layers that pass no gradient to their input and are not adapted are named in a warning.


def prepare(state: AdapterState) -> None:
    """Set what a quantized model needs for an adapter; what was there is recorded in ``state.settings``."""
    adapted = {id(patch.host) for patch in state.patches}
    blocking = []
    for path, module in state.model.named_modules():
        layer_type = quantized_type(module)
        if layer_type is None:
            continue
        for name, value in layer_type.while_attached(module).items():
            before = getattr(module, name)
            if before is not value:
                state.settings.append((module, name, before))
                setattr(module, name, value)
        if id(module) not in adapted and not layer_type.passes_gradient(module):
            blocking.append(path)
    if blocking:
        warn(
            f"{len(blocking)} layers pass no gradient to their input, because they round it ({blocking[0]}, …), so "
            "that adapters before them learn from a part of their gradient: adapt these layers, too "
            "(targets='all-linear'), or use a quantization that leaves the input alone",
        )


def put_back(state: AdapterState) -> None:
    """Undo :func:`prepare`, or leave that to another adapter of these layers; can be called again."""
    others = [other for other in overlapping(state.model) if other is not state]
    if others:
        known = {(id(module), name) for module, name, _ in others[0].settings}
        others[0].settings += [setting for setting in state.settings if (id(setting[0]), setting[1]) not in known]
    else:
        for module, name, before in state.settings:
            setattr(module, name, before)
    state.settings = []


# -- Adjustments of a transformers model for its adapters: saving, the Trainer, TRL's copies ---------------------------

# transformers knows only PEFT's adapters: ``save_pretrained`` would write a model that loads without its adapter. While
# adapters are attached, the method is replaced. The Trainer refuses to train a quantized model unless an adapter is on
# it, so the model gets the mark of one. (A model from a GGUF file counts as quantized, although its weights are
# dequantized.)
#
# TRL copies a model to vLLM by ``named_parameters``, its own or that of a module around it, which both go through
# ``named_modules``; under FSDP1, after a walk through ``named_children``. TRL first merges the adapters of PEFT models,
# but of no others. Its calls do not say what they are for, so the calling function is inspected.


_SAVE = "save_pretrained"
# The attribute by which transformers recognizes that a model has adapters.
_HAS_ADAPTERS = "_hf_peft_config_loaded"


class AdapterMethod:
    """One of these methods of one model.

    It is an object rather than a closure, so that ``copy.deepcopy`` and ``pickle`` connect a copied model to the copy.
    """

    #: Whether the model's mark as one with adapters is this package's.
    marked = False

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    @property
    def __func__(self) -> Callable[..., Any]:
        """The method of the model's class, as bound methods have it: torch's compiler compares it."""
        function: Callable[..., Any] = getattr(type(self.model), self.name)
        return function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method."""
        if self.name == _SAVE:
            return _save_pretrained(self.model, *args, **kwargs)
        _refuse_vllm(self.model)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


def install_methods(model: nn.Module) -> None:
    """Prepare a model with an adapter, if it is one of transformers'."""
    if not callable(getattr(type(model), _SAVE, None)) or _SAVE in model.__dict__:
        return
    for name in _METHODS:
        if callable(getattr(type(model), name, None)) and name not in model.__dict__:
            model.__dict__[name] = AdapterMethod(model, name)
    if getattr(model, "is_quantized", False) and getattr(model, _HAS_ADAPTERS, None) is False:
        model.__dict__[_SAVE].marked = model.__dict__[_HAS_ADAPTERS] = True


def _remove_methods(model: nn.Module) -> None:
    """Undo :func:`install_methods` once the last adapter is gone."""
    save = model.__dict__.get(_SAVE)
    if not isinstance(save, AdapterMethod) or model.__dict__.get(ADAPTERS_ATTR):
        return
    if save.marked:
        model.__dict__.pop(_HAS_ADAPTERS, None)
    # The save method comes last: while it is there, an interrupted removal can be repeated.
    for name in _METHODS:
        if isinstance(model.__dict__.get(name), AdapterMethod):
            del model.__dict__[name]


def _refuse_vllm(model: nn.Module) -> None:
    """Raise an error if TRL requests the weights to send them to vLLM, which would not get the adapters."""
    caller = sys._getframe(2)
    while caller.f_code.co_name in _PASSED_THROUGH and caller.f_back is not None:
        caller = caller.f_back
    place = f"{caller.f_globals.get('__name__')}.{caller.f_code.co_qualname}"
    if not place.startswith("trl.") or "vllm" not in place:
        return
    for state in attached(model).values():
        if state.managed_by is None and state.merged is None:
            raise TargetError(
                f"TRL would send vLLM the base weights without adapter {state.name!r}, and its arrays, which vLLM does "
                "not have: detach() it and train through tnadapt.torch.peft, by peft_config=TnadaptConfig(…), whose "
                "weights TRL merges before it sends them; or train without vLLM"
            )


def _save_pretrained(model: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """Save the model as its class does, with a warning if the result would load without its adapters."""
    states = attached(model).values()
    unmerged = [state.name for state in states if state.merged is None]
    if unmerged:
        listed = ", ".join(map(repr, unmerged))
        warnings.warn(
            f"save_pretrained writes the whole {type(model).__name__}, with the arrays of adapter {listed} beside the "
            "unchanged base: from_pretrained will load the base without its effect. To save the adapter alone, call "
            f"tnadapt.torch.adapters(model)[{unmerged[0]!r}].save_pretrained(folder). To save the changed model, call "
            "merge() of the adapter first. For a Trainer's checkpoints, call "
            "tnadapt.torch.adapter_checkpoints(trainer) before train()",
            stacklevel=3,
        )
    # The weights contain merged adapters, whose arrays are left out.
    elif states and kwargs.get("state_dict") is None and not args:
        kwargs["state_dict"] = {name: value for name, value in model.state_dict().items() if not is_array(name)}
    cls: Any = type(model)
    marked = model.__dict__[_SAVE].marked
    if marked:  # it would be saved in PEFT's format
        model.__dict__.pop(_HAS_ADAPTERS, None)
    try:
        return cls.save_pretrained(model, save_directory, *args, **kwargs)
    finally:
        if marked:
            model.__dict__[_HAS_ADAPTERS] = True


#: torch's functions between the caller of ``named_parameters`` and ``named_modules`` of a module inside.
_PASSED_THROUGH = ("named_parameters", "_named_members", "named_modules")
_METHODS = ("named_children", "named_modules", _SAVE)


# -- Removal, with or without leaving the update in the weights --------------------------------------------------------


def let_go(state: AdapterState) -> None:
    """Detach an adapter whose arrays the caller manages (:func:`~tnadapt.torch._state.register_in`)."""
    need_unmerged(state, "detach()")
    need_attached(state)
    try:
        take_off(state)
    except BaseException:  # finish when interrupted: half of it would leave some weights adapted
        take_off(state)
        raise


def let_go_merged(state: AdapterState, max_error: float | None = None) -> None:
    """Bake an adapter whose arrays the caller manages."""
    need_attached(state)
    if state.merged is None:
        merge(state, max_error)
    try:
        _take_off_merged(state.whole)
    except BaseException:  # finish when interrupted: half of it would add the update twice
        _take_off_merged(state.whole)
        raise


def _take_off_merged(state: AdapterState) -> None:
    state.untied.clear()  # the untied copy contains the update, so it must not be replaced
    take_off(state)
    # Last: while it counts as merged, the adapter adds nothing in a forward pass.
    state.merged = None


def take_off(state: AdapterState) -> None:
    """Remove everything that ``attach`` put into the model, even after a partial attach; can be called again."""
    for patch in dict.fromkeys(state.patches):
        patch.remove(state)
    # Hooks are found by their object rather than by the handles from registration, which are invalid in a copied model.
    for hooks in (state.model._forward_pre_hooks, state.model._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, PassHooks) and owner.state is state:
                del hooks[key]
                state.model._forward_hooks_always_called.pop(key, None)
    for name in state.parameter_names.values():
        if isinstance(state.owner, nn.ParameterDict) and name in state.owner:
            del state.owner[name]  # a ParameterDict also keeps a list of names
        state.owner._parameters.pop(name, None)
    restore(state)
    put_back(state)
    # Last: an adapter that is still listed can be removed again after an interruption.
    registered = state.model.__dict__.get(ADAPTERS_ATTR, {})
    registered.pop(state.name, None)
    if not registered:
        state.model.__dict__.pop(ADAPTERS_ATTR, None)
    _remove_methods(state.model)


def need_own_arrays(state: AdapterState, what: str) -> None:
    """Raise a TargetError if the adapter was detached, or its arrays are managed elsewhere."""
    need_attached(state)
    if state.managed_by is not None:
        raise TargetError(
            f"the arrays of adapter {state.name!r} are managed elsewhere, so {what} is refused: {state.managed_by}"
        )


# -- reference_model: a frozen copy that shares the base's tensors, for preference training ----------------------------


@checks_arguments
def reference_model(model: nn.Module, *, with_adapters: bool = False) -> nn.Module:
    """Return a frozen copy of a model, without its adapters, that shares the base's parameters.

    DPO, GRPO with a divergence, and distillation compare the model in training with a reference. This one takes almost
    no memory: only the modules are copied, and parameters that are trained.

    Parameters
    ----------
    model : Module
        A model with adapters, none of them merged.
    with_adapters : bool
        Whether the reference is the model with its adapters as they are now, in copies of their own, such as after
        supervised fine-tuning. By default it is the base.

    Returns
    -------
    Module
        Of the model's class, in evaluation mode. No parameter of it requires a gradient.

    Raises
    ------
    TargetError
        If the model has no adapter, or one is merged.

    Notes
    -----
    Parameters that ``keep_trainable`` left free are copied with their current values: create the reference before
    training. The frozen parameters are the same objects in both models, so do not move only one of them to another
    device or dtype, and do not shard them (FSDP). Merge the adapter that was trained once the reference is no longer
    used: the sum would be in both models, and ``merge()`` warns of it. Merging on the reference itself is refused.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.0, batch_first=True)
    >>> x = torch.randn(2, 3, 16)
    >>> before = model(x)
    >>> adapter = tnadapt.torch.attach(model)
    >>> reference = tnadapt.torch.reference_model(model)
    >>> with torch.no_grad():
    ...     for array in adapter.parameters():
    ...         _ = array.add_(1.0)
    >>> [torch.allclose(network(x), before, atol=1e-5) for network in (reference, model)]
    [True, False]
    >>> reference.linear1.weight is model.linear1.weight
    True

    In TRL: ``DPOTrainer(model, ref_model=tnadapt.torch.reference_model(model), …)``.
    """
    states = attached(model)
    if not states:
        raise TargetError(
            f"{type(model).__name__} has no adapter, so that all of its parameters may be trained: for a reference, "
            "copy.deepcopy() it"
        )
    merged = next((state for state in states.values() if state.merged is not None), None)
    if merged is not None:
        raise TargetError(f"adapter {merged.name!r} is merged into the weights that the reference shares: unmerge() it")
    # The frozen parameters of the base. Buffers are copied: they are small, and a forward pass may write to them.
    shared = {id(p): p for name, p in model.named_parameters() if not is_array(name) and not p.requires_grad}
    # A tensor in the memo is not copied.
    reference = copy.deepcopy(model, dict(shared))
    for state in states.values():
        state.references += (weakref.ref(reference),)
    for state in attached(reference).values():
        state.shares_weights = True
        # Removing an adapter restores the base's requires_grad, which here would change the model in training.
        state.was_trainable = dict.fromkeys(state.was_trainable, False)
        if not with_adapters:
            take_off(state)
    for parameter in reference.parameters():
        if id(parameter) not in shared:
            parameter.requires_grad_(False)
    return reference.eval()
