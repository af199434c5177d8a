"""Removal of an adapter from its model, with or without its update left in the weights."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TargetError

from ._forward_pass import PassHooks
from ._merging import merge
from ._registry import TransformersModel, attached, put_back, restore
from ._state import ADAPTERS_ATTR, AdapterState, is_array, need_attached, need_unmerged

__all__ = [
    "bake",
    "detach",
    "let_go",
    "let_go_merged",
    "reference_model",
    "take_off",
]


# -- Removal of an adapter from its model, with or without its update left in the weights ------------------------------


def detach(state: AdapterState) -> None:
    """Detach an adapter; see :meth:`Adapter.detach`."""
    _need_own_arrays(state, "detach()")
    let_go(state)


def bake(state: AdapterState, max_error: float | None = None) -> None:
    """Merge an adapter for good; see :meth:`Adapter.bake`."""
    _need_own_arrays(state, "bake()")
    let_go_merged(state, max_error)


def let_go(state: AdapterState) -> None:
    """Detach an adapter whose arrays the caller manages (:func:`~._arrays.register_in`)."""
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
        _take_off_merged(state)
    except BaseException:  # finish when interrupted: half of it would add the update twice
        _take_off_merged(state)
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
    TransformersModel.remove(state.model)


def _need_own_arrays(state: AdapterState, what: str) -> None:
    need_attached(state)
    if state.managed_by is not None:
        raise TargetError(
            f"the arrays of adapter {state.name!r} are managed elsewhere, so {what} is refused: {state.managed_by}"
        )


# -- A frozen copy of a model that shares the base's tensors: the reference of preference training ---------------------


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
    >>> [torch.allclose(one(x), before, atol=1e-5) for one in (reference, model)]
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
    shared = _shared(model)
    # A tensor that the memo names is not copied.
    reference = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for state in states.values():
        state.references.add(reference)
    for state in attached(reference).values():
        state.shares_weights = True
        # Removing an adapter restores what was trainable before attach(), which here would be in the model in training.
        state.was_trainable = dict.fromkeys(state.was_trainable, False)
        if not with_adapters:
            take_off(state)
    own = {id(tensor) for tensor in shared}
    for parameter in reference.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
    return reference.eval()


def _shared(model: nn.Module) -> list[Tensor]:
    """Return the parameters of the base that are frozen; buffers are small, and a forward pass may write to them."""
    frozen: list[Tensor] = [
        parameter for name, parameter in model.named_parameters() if not is_array(name) and not parameter.requires_grad
    ]
    return frozen
