"""What an adapter contributes to a forward pass: whether it acts, its updates and factors, and the hooks around it."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.factoring import Factored
from tnadapt.backends import load_backend
from tnadapt.errors import TargetError

from ._arrays import current, named_parameters
from ._delta import DeltaFunction
from ._merged_linear import DeltaSource
from ._sharding import refuse_reentrant
from ._state import AdapterSlot, AdapterState

__all__ = ["PassHooks", "acts", "check_recomputation", "delta", "delta_source", "factors", "scaled"]


def acts(state: AdapterState) -> bool:
    """Whether it has a part in a forward pass."""
    if not state.enabled or state.merged is not None:
        return False
    # A compiled program is one for all weights, zero included: it must contain the update.
    return torch.compiler.is_compiling() or state.weight != 0.0


def delta(slot: AdapterSlot) -> Tensor:
    """The update of one weight, times the adapter's weight."""
    state = slot.adapter
    _refuse_reentrant(state)
    own = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    made = state.cache.slice(slot.index) if own else None
    if made is None:
        return scaled(state, state.cache.get(lambda names: current(state, names), slot.index))
    return scaled(state, DeltaFunction.apply(made, *current(state, made.names)))  # type: ignore[no-untyped-call]


def delta_source(slot: AdapterSlot) -> tuple[DeltaSource, list[Tensor]]:
    """For a linear layer on the sum: where the update comes from, and the arrays that it is made of."""
    state = slot.adapter
    made = state.cache.slice(slot.index)
    if made is None:
        return DeltaSource(slot.target), [delta(slot)]
    return DeltaSource(slot.target, made, len(made.names), state.weight), current(state, made.names)


def factors(slot: AdapterSlot) -> Factored:
    """The factors of one weight's update; not times the adapter's weight."""
    state, how = slot.adapter, slot.factoring
    assert how is not None  # attach has seen to that
    if how.shared:
        _refuse_reentrant(state)
    return how(load_backend("torch"), dict(zip(how.names, current(state, how.names), strict=True)))


def scaled(state: AdapterState, value: Tensor) -> Tensor:
    """A tensor times the adapter's weight."""
    if torch.compiler.is_compiling():
        # where, not a product alone: an inactive adapter adds nothing even if there is a NaN in it.
        zero = state.weight_tensor == 0
        return torch.where(zero, torch.zeros_like(value), value * state.weight_tensor)
    return value if state.weight == 1.0 else value * state.weight


def _refuse_reentrant(state: AdapterState) -> None:
    # A pass that began with gradients and is without them here is inside of reentrant checkpointing.
    if state.cache.began_with_gradients and not torch.is_grad_enabled():
        refuse_reentrant(state.name)


# -- Activation checkpointing ----------------------------------------------------------------------------------


def check_recomputation(state: AdapterState) -> None:
    """Raise a RuntimeError where a checkpointed region runs again with other settings than in the forward pass."""
    if state.passes[1] and _settings(state) not in state.passes[1]:
        raise RuntimeError(
            f"adapter {state.name!r} was activated, mixed, merged or disabled between a forward pass with "
            "activation checkpointing and its backward pass, which runs a part of it again: do so after backward()"
        )


def _remember_settings(state: AdapterState) -> None:
    # Several passes may come before one backward pass (the base's answer beside the adapter's, as in DPO), so all
    # settings since the last optimiser step are allowed, not only the latest.
    written = sum(parameter._version for _, parameter in named_parameters(state) if not parameter.is_inference())
    if written != state.passes[0]:
        state.passes = written, set()
    state.passes[1].add(_settings(state))


def _settings(state: AdapterState) -> tuple[bool, float, bool]:
    return state.enabled, state.weight, state.merged is not None


# -- Hooks -----------------------------------------------------------------------------------------------------


class PassHooks:
    """Hooks on the model that an adapter is attached to.

    They are bound methods of a small object, which ``copy.deepcopy`` and ``pickle`` follow to the copy's own state.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def begin(self, module: nn.Module, args: Any) -> None:
        """Prepare for a forward pass of the whole model."""
        state = self.state
        if getattr(module, "_is_replica", False):
            raise TargetError(
                "nn.DataParallel copies the model for each device, and an adapter is on one model: use "
                "DistributedDataParallel, a process a device"
            )
        if not torch.compiler.is_compiling():
            state.threads.discard(threading.get_ident())
            if torch.is_grad_enabled():
                _remember_settings(state)
        if acts(state) and any(slot.strategy != "factored" for slot in state.slots):
            state.cache.begin()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Tidy up after it, also if it failed (then ``output`` is None)."""
        state = self.state
        state.cache.end()
        if torch.compiler.is_compiling() or state.warned or output is None or not acts(state):
            return
        if threading.get_ident() in state.threads:
            return
        state.warned = True
        warnings.warn(
            f"no module that adapter {state.name!r} is on was called in a forward pass of "
            f"{type(state.model).__name__}: its updates had no part in the result. If the model reads the weights in "
            f"another way than by calling {state.targets[0].module!r}, as fused projections do, merge() is the way",
            stacklevel=2,
        )
