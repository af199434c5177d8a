"""Freezing of the base model: frozen while any adapter is attached, restored when the last one is detached."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ._registry import overlapping
from ._state import AdapterState, UntiedWeight, is_array

__all__ = ["freeze", "restore", "untie"]


def freeze(adapter: AdapterState) -> None:
    """Turn off ``requires_grad`` in the adapter's model, except where an adapter there keeps a parameter trainable."""
    free: set[int] = set()
    before: dict[int, bool] = {}
    for other in [*overlapping(adapter.model), adapter]:
        free.update(id(parameter) for name, parameter in _base(other) if name in other.kept)
        before.update((id(parameter), other.was_trainable[name]) for name, parameter in _held(other))
    for name, parameter in _base(adapter):
        # The state before the first adapter, which the last one to be detached restores.
        adapter.was_trainable[name] = before.get(id(parameter), parameter.requires_grad)
        parameter.requires_grad_(id(parameter) in free)


def restore(adapter: AdapterState) -> None:
    """Undo what ``attach`` did to the base, except where another adapter still needs it."""
    for module, name, parameter in adapter.untied:
        module._parameters[name] = parameter
    others = [other for other in overlapping(adapter.model) if other is not adapter]
    needed = {id(parameter) for other in others for _, parameter in _held(other)}
    for name, parameter in _held(adapter):
        if id(parameter) not in needed:
            parameter.requires_grad_(adapter.was_trainable[name])


def untie(adapter: AdapterState, name: str) -> None:
    """Replace a tied weight of the adapter's model by its own copy."""
    model = adapter.model
    module, _, parameter = name.rpartition(".")
    owner = model.get_submodule(module)
    old = owner._parameters[parameter]
    assert old is not None
    own = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
    adapter.untied.append(UntiedWeight(owner, parameter, old))
    owner._parameters[parameter] = own


def _base(adapter: AdapterState) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the adapter's model that do not belong to an adapter."""
    for name, parameter in adapter.model.named_parameters():
        if not is_array(name):
            yield name, parameter


def _held(adapter: AdapterState) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the base parameters whose original ``requires_grad`` the adapter has recorded."""
    return ((name, parameter) for name, parameter in _base(adapter) if name in adapter.was_trainable)
