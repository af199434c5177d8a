"""Taking an adapter off its model, with its update left in the weights or not."""

from __future__ import annotations

from torch import nn

from tnadapt.errors import TargetError

from ._forward_pass import PassHooks
from ._freezing import restore
from ._merging import merge
from ._state import ADAPTERS_ATTR, AdapterState, need_attached, need_unmerged

__all__ = ["bake", "detach", "let_go", "let_go_merged", "take_off"]


def detach(state: AdapterState) -> None:
    """See :meth:`Adapter.detach`."""
    _need_own_arrays(state, "detach()")
    let_go(state)


def bake(state: AdapterState) -> None:
    """See :meth:`Adapter.bake`."""
    _need_own_arrays(state, "bake()")
    let_go_merged(state)


def let_go(state: AdapterState) -> None:
    """Detach it; for the caller who manages its arrays (:func:`~._arrays.register_in`)."""
    need_unmerged(state, "detach()")
    need_attached(state)
    try:
        take_off(state)
    except BaseException:  # half of it would be a model with some of its weights adapted
        take_off(state)
        raise


def let_go_merged(state: AdapterState) -> None:
    """Bake it; for the caller who manages its arrays."""
    need_attached(state)
    if state.merged is None:
        merge(state)
    try:
        _take_off_merged(state)
    except BaseException:  # half of it would add the update twice
        _take_off_merged(state)
        raise


def _take_off_merged(state: AdapterState) -> None:
    state.untied.clear()  # its copy has the update in it
    take_off(state)
    # Last: while it counts as merged, it adds nothing in a forward pass.
    state.merged = None


def take_off(state: AdapterState) -> None:
    """Remove all that ``attach`` put into the model, also of an attachment in part; may be repeated."""
    for patch in dict.fromkeys(state.patches):
        patch.remove(state)
    # By what they are and not by the handles that registering them gave: those do not belong to a copied model.
    for hooks in (state.model._forward_pre_hooks, state.model._forward_hooks):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, PassHooks) and owner.state is state:
                del hooks[key]
                state.model._forward_hooks_always_called.pop(key, None)
    for name in state.parameter_names.values():
        if isinstance(state.owner, nn.ParameterDict) and name in state.owner:
            del state.owner[name]  # it has a list of names, too
        state.owner._parameters.pop(name, None)
    restore(state)
    # Last: an adapter that the model lists can be taken off again after an interrupt.
    registered = state.model.__dict__.get(ADAPTERS_ATTR, {})
    registered.pop(state.name, None)
    if not registered:
        state.model.__dict__.pop(ADAPTERS_ATTR, None)


def _need_own_arrays(state: AdapterState, what: str) -> None:
    need_attached(state)
    if state.managed_by is not None:
        raise TargetError(
            f"the arrays of adapter {state.name!r} are not its own, so {what} is refused: {state.managed_by}"
        )
