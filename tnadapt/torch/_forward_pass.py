"""An adapter's part in a forward pass: whether it acts, its updates and factors, and the hooks around the pass."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.factoring import Factored
from tnadapt.backends import load_backend
from tnadapt.errors import TargetError

from ._array_snapshot import on_host
from ._arrays import current, named_parameters
from ._delta import DeltaFunction
from ._idle_training import warn_idle
from ._merged_linear import DeltaSource
from ._row_assignment import assignment_of, mixing_weight
from ._sharding import refuse_reentrant
from ._state import AdapterSlot, AdapterState, weight_on

__all__ = [
    "PassHooks",
    "acts",
    "check_recomputation",
    "delta",
    "delta_source",
    "factors",
    "in_backward",
    "rounded_delta",
    "scaled",
]

#: The number of the backward pass that is running, or -1. Private to torch: a version without it only loses the check.
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def acts(state: AdapterState) -> bool:
    """Return whether the adapter contributes to a forward pass."""
    if not state.enabled or state.merged is not None:
        return False
    # One compiled program serves all mixing weights, zero included, so it must contain the update.
    return torch.compiler.is_compiling() or mixing_weight(state) != 0.0


def delta(slot: AdapterSlot) -> Tensor:
    """Return the update of one weight, times the adapter's mixing weight."""
    state = slot.adapter
    _refuse_reentrant(state)
    own = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    made = state.cache.slice(slot.index) if own else None
    if made is None:
        return scaled(state, state.cache.get(lambda names: current(state, names), slot.index))
    return scaled(state, DeltaFunction.apply(made, *current(state, made.names)))  # type: ignore[no-untyped-call]


def rounded_delta(slot: AdapterSlot, dtype: torch.dtype) -> Tensor:
    """Return the update of one weight, in a dtype if it is cached; without the mixing weight, and without gradients."""
    state = slot.adapter
    _refuse_reentrant(state)
    return state.cache.get(lambda names: current(state, names), slot.index, dtype)


def delta_source(slot: AdapterSlot) -> tuple[DeltaSource, list[Tensor]]:
    """Return the source of an update for :class:`MergedWeightLinear`, and the arrays it is computed from."""
    state = slot.adapter
    made = state.cache.slice(slot.index)
    if made is None:
        return DeltaSource(slot.target), [delta(slot)]
    return DeltaSource(slot.target, made, len(made.names), mixing_weight(state)), current(state, made.names)


def factors(slot: AdapterSlot) -> Factored:
    """Return the factors of one weight's update, without the adapter's mixing weight."""
    state, how = slot.adapter, slot.factoring
    assert how is not None  # ensured by attach
    if how.shared:
        _refuse_reentrant(state)
    return how(load_backend("torch"), dict(zip(how.names, current(state, how.names), strict=True)))


def scaled(state: AdapterState, value: Tensor) -> Tensor:
    """Return a tensor times the adapter's mixing weight."""
    if torch.compiler.is_compiling():
        # torch.where rather than a product alone: an inactive adapter adds nothing, even if it contains a NaN.
        weight = weight_on(state, value.device)
        return torch.where(weight == 0, torch.zeros_like(value), value * weight)
    factor = mixing_weight(state)
    return value if factor == 1.0 else value * factor


def _refuse_reentrant(state: AdapterState) -> None:
    # A pass that began with gradients but runs without them here is inside reentrant checkpointing.
    if state.cache.began_with_gradients and not torch.is_grad_enabled():
        refuse_reentrant(state.name)


# -- Activation checkpointing ----------------------------------------------------------------------------------


def in_backward() -> bool:
    """Return whether a backward pass is running, as when a checkpointed region is recomputed."""
    return _graph_task() != -1


def check_recomputation(state: AdapterState) -> None:
    """Raise a RuntimeError if a checkpointed region is recomputed with settings that differ from the forward pass."""
    if state.passes[1] and _settings(state) not in state.passes[1]:
        raise RuntimeError(
            f"adapter {state.name!r} was activated, mixed, merged or disabled, or rows() left, between a forward pass "
            "with activation checkpointing and its backward pass, which recomputes parts of it: do so after backward()"
        )


def _remember_settings(state: AdapterState) -> None:
    # Several passes may precede one backward pass (DPO runs the base model and the adapted one), so all settings since
    # the last optimiser step are allowed, not only the latest. The version counters tell when a step was taken.
    written = sum(parameter._version for _, parameter in named_parameters(state) if not parameter.is_inference())
    if written != state.passes[0]:
        state.passes = written, set()
    state.passes[1].add(_settings(state))


def _settings(state: AdapterState) -> tuple[Hashable, ...]:
    found = assignment_of(state)
    return state.enabled, mixing_weight(state), state.merged is not None, None if found is None else found.names


# -- Hooks -----------------------------------------------------------------------------------------------------


class PassHooks:
    """Hooks on the model that an adapter is attached to.

    They are bound methods of a small object rather than closures, so that ``copy.deepcopy`` and ``pickle`` connect a
    copied model to the copied state.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def begin(self, module: nn.Module, args: Any) -> None:
        """Prepare for a forward pass of the whole model (forward pre-hook)."""
        state = self.state
        if getattr(module, "_is_replica", False):
            raise TargetError(
                "nn.DataParallel copies the model for each device, and an adapter is on one model: use "
                "DistributedDataParallel, with one process per device"
            )
        if not torch.compiler.is_compiling():
            state.threads.discard(threading.get_ident())
            if torch.is_grad_enabled():
                _remember_settings(state)
            if hasattr(state.owner, "unshard") and not all(on_host(array) for _, array in named_parameters(state)):
                # FSDP2 writes gathered shards into the same memory, and keeps the version counters.
                state.clear_cache()
        elif torch.is_grad_enabled() and state.made is not None:
            state.made.forget()  # as in DeltaCache.begin
        if acts(state) and any(slot.strategy != "factored" for slot in state.slots):
            state.cache.begin()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Clean up after the pass, also if it failed; ``output`` is then None (forward hook)."""
        state = self.state
        state.cache.end()
        if state.made is not None:
            state.made.end()
        if torch.compiler.is_compiling() or output is None:
            return
        if not acts(state):
            if module.training:
                warn_idle(state, args, output)
            return
        if state.warned:
            return
        if threading.get_ident() in state.threads:
            return
        state.warned = True
        warnings.warn(
            f"none of the modules that adapter {state.name!r} updates was called in a forward pass of "
            f"{type(state.model).__name__}: its updates did not affect the result. If the model reads the weights "
            f"without calling {state.targets[0].module!r}, as fused projections do, call merge()",
            stacklevel=2,
        )
