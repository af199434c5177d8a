"""The matrices of experts that a module keeps stacked in parameters of three axes, and multiplies by itself."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["sees_tokens_in_order", "shows_products", "stacks_of", "tokens_of_one"]

# Classes that do not say how they store their matrices: whether as (in, out).
_TRANSPOSED = {
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}


def stacks_of(module: nn.Module) -> list[tuple[str, tuple[int, int, int], bool]]:
    """Return the parameters of a module that stack the matrices of experts along their first axis.

    Parameters
    ----------
    module : Module

    Returns
    -------
    list of (str, tuple of int, bool)
        Name, shape, and whether each matrix is stored as ``(in, out)``. Empty for a module that does not say this, as
        transformers' modules of experts do by their attributes, and is not in the table of classes that is kept here.
    """
    transposed = _is_transposed(module)
    if transposed is None:
        return []
    return [
        (name, (tensor.shape[0], tensor.shape[1], tensor.shape[2]), transposed)
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.ndim == 3 and tensor.is_floating_point()
    ]


def sees_tokens_in_order(module: nn.Module) -> bool:
    """Return whether a module of experts gets all tokens in the batch's order, next to the experts of each.

    Others get the tokens sorted, or repeated, by expert. Those of transformers that are called with the choice of
    experts do the sorting themselves.
    """
    names = list(inspect.signature(type(module).forward).parameters)
    return names[1:2] == ["hidden_states"] and names[2:3] in (["top_k_index"], ["router_indices"])


# Of transformers' ways to multiply, those that consist of torch's functions.
_OF_TORCH = (None, "eager", "grouped_mm", "batched_mm")


def shows_products(module: Any) -> bool:
    """Return whether the products of a module of experts are functions of torch, and not kernels of other libraries."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) in _OF_TORCH


def tokens_of_one(module: Any, tokens: int, experts: int) -> int:
    """Return how many of a layer's tokens one of its experts gets on average."""
    chosen = getattr(getattr(module, "config", None), "num_experts_per_tok", None)
    return max(1, tokens * (chosen if isinstance(chosen, int) else 1) // experts)


def _is_transposed(module: Any) -> bool | None:
    # Set on every module by transformers.integrations.moe.use_experts_implementation.
    own: Any = module.__dict__.get("is_transposed")
    if isinstance(own, bool) and isinstance(module.__dict__.get("is_concatenated"), bool):
        return own
    return next((_TRANSPOSED[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _TRANSPOSED), None)
