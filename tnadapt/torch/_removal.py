"""Removal of an adapter from its model, with or without its update left in the weights."""

from __future__ import annotations

from torch import nn

from tnadapt.errors import TargetError

from ._forward_pass import PassHooks
from ._freezing import restore
from ._merging import merge
from ._quantized_base import put_back
from ._state import ADAPTERS_ATTR, AdapterState, need_attached, need_unmerged
from ._transformers_model import TransformersModel

__all__ = ["bake", "detach", "let_go", "let_go_merged", "take_off"]


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
