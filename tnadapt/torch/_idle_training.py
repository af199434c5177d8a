"""A warning of training that leaves an adapter as it is, since it is merged or inactive.

Where nothing else is trained, torch raises an error, as the loss has no gradient. It does not where the model keeps
parameters of its own trainable, or its inputs require gradients for activation checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._arrays import named_parameters
from ._row_assignment import mixing_weight
from ._state import ADAPTERS_ATTR, AdapterState

__all__ = ["warn_idle"]


def warn_idle(state: AdapterState, args: Any, output: Any) -> None:
    """Warn once if a forward pass in training mode is part of a training that cannot change an adapter.

    Parameters
    ----------
    state : AdapterState
        An adapter that did not act in the pass.
    args, output : any
        Those of the pass. A caller whose inputs require gradients may want these alone.
    """
    if state.idle_warned or not state.enabled or state.shares_weights or not torch.is_grad_enabled():
        return
    # Whoever trains one adapter with another merged or inactive has chosen so.
    others = state.model.__dict__.get(ADAPTERS_ATTR, {}).values()
    if any(other.merged is None and mixing_weight(other) != 0.0 for other in others):
        return
    trained = any(parameter.requires_grad for _, parameter in named_parameters(state))
    if not trained or not _has_gradient(output) or _has_gradient(args):
        return
    state.idle_warned = True
    merged = state.merged is not None
    what, way = ("merged", "unmerge() it") if merged else ("not active (its weight is 0)", "activate() it")
    warnings.warn(
        f"adapter {state.name!r} is {what}, so training does not change it: {way} first; to train only what else is "
        "trainable, bake() or detach() it",
        stacklevel=2,
    )


def _has_gradient(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_has_gradient, values))
