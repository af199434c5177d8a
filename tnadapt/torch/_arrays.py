"""An adapter's arrays: the parameters that hold them, loading new values, and the updates ΔW computed from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tnadapt.errors import ShapeError

from ._sharding import copy_all, gather_full, reshard
from ._state import AdapterState, need_linear, need_unmerged

__all__ = [
    "checked_pairs",
    "current",
    "deltas",
    "full_arrays",
    "load_arrays",
    "named_parameters",
    "pairs",
    "register_in",
    "weight_params",
]


def named_parameters(state: AdapterState) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with the arrays' names in the plan."""
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
    # Looked up at each use: FSDP and load_state_dict(assign=True) replace the parameter objects.
    return [state.owner._parameters[state.parameter_names[name]] for name in names]  # type: ignore[misc]


def full_arrays(state: AdapterState) -> dict[str, Tensor]:
    """Return all parameters by the names of their arrays; sharded ones are gathered (every process must call)."""
    return {name: gather_full(parameter) for name, parameter in named_parameters(state)}


def deltas(state: AdapterState) -> list[Tensor]:
    """Return the update of every target; see :meth:`Adapter.deltas`."""
    need_linear(state, "there is no ΔW")
    return state.plan.deltas(full_arrays(state))


def load_arrays(state: AdapterState, arrays: Mapping[str, Any]) -> None:
    """Copy arrays into the parameters; see :meth:`Adapter.load_arrays`."""
    copy_all(checked_pairs(state, arrays))


def checked_pairs(state: AdapterState, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
    """Pair each parameter with what to copy into it from an array of a file; raise a ShapeError if they do not fit."""
    need_unmerged(state, "new arrays")
    expected = state.plan.param_shapes
    found = {name: tuple(getattr(array, "shape", ())) for name, array in arrays.items()}
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))[:4]
        raise ShapeError(f"adapter {state.name!r} needs arrays named and shaped as its plan says; differing: {wrong}")
    return pairs(state, state.plan.from_arrays(arrays))


def pairs(state: AdapterState, arrays: Mapping[str, Any]) -> list[tuple[nn.Parameter, Any]]:
    """Pair each parameter with its new value, in its unit; names and shapes are known to fit."""
    need_unmerged(state, "new arrays")
    reshard(state.model, state.owner)
    return [(parameter, arrays[name]) for name, parameter in named_parameters(state) if name in arrays]


def register_in(state: AdapterState, owner: nn.ParameterDict, instead: str) -> None:
    """Register the parameters in ``owner`` instead of on the model, under their array names with ``_`` for dots.

    The parameters stay the same objects. The caller keeps ``owner`` in the same module tree as the model, so that
    moving, sharding and copying treat them alike, and removes the adapter with :func:`~._removal.let_go` or
    :func:`~._removal.let_go_merged`; ``detach()`` and ``bake()`` then raise an error that names ``instead``.
    """
    names = {array: array.replace(".", "_") for array in state.parameter_names}
    left, old = state.owner, list(state.parameter_names.values())
    # Added to the new owner before they leave the old one: at every moment, lookups find the parameters.
    for array, parameter in named_parameters(state):
        owner[names[array]] = parameter
    try:
        _move(state, owner, names, instead, left, old)
    except BaseException:  # finish the move when interrupted: half of it would leave them in two places
        _move(state, owner, names, instead, left, old)
        raise


def _move(
    state: AdapterState, owner: nn.Module, names: dict[str, str], instead: str, left: nn.Module, old: Sequence[str]
) -> None:
    state.owner, state.parameter_names, state.managed_by = owner, names, instead
    for name in old:
        left._parameters.pop(name, None)
