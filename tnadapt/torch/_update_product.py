"""The product of an input with a cached update, as one operator of torch that a compiled program calls.

A compiled program cannot hold a cached tensor, and computing ΔW in it takes longer than the layer. The operator gets
the arrays, so the compiler knows what it reads, and finds ΔW in the cache, which compares these arrays with those that
it was computed from. It returns a new tensor, which the compiler may overwrite; ΔW itself it never sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ._delta_cache import DeltaCache, numbered_cache

__all__ = ["update_product", "wide_product"]


def update_product(cache: DeltaCache, x: Tensor, arrays: Sequence[Tensor], index: int) -> Tensor:
    """Return ``x ΔWᵀ`` in the dtype of x, in a program that is being compiled.

    Parameters
    ----------
    cache : DeltaCache
    x : Tensor, shape (..., cols)
    arrays : sequence of Tensor
        Those of ``cache.names(index)``.
    index : int
        The weight.
    """
    # The number is an attribute that the compiler guards on: a program is compiled again for another cache.
    return cast(Tensor, _update_product(x, list(arrays), cache.number, index, cache.plan.shapes[index][0]))


def wide_product(x: Tensor, update: Tensor) -> Tensor:
    """Return ``x ΔWᵀ`` in the wider dtype of both."""
    kind = torch.promote_types(x.dtype, update.dtype)
    return functional.linear(x.to(kind), update.to(kind))


@torch.library.custom_op("tnadapt::update_product", mutates_args=())
def _update_product(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    found = numbered_cache(cache)
    named = dict(zip(found.names(index), arrays, strict=True))
    update = found.get(lambda names: [named[name] for name in names], index, x.dtype)
    return wide_product(x, update.to(x.device).reshape(rows, x.shape[-1])).to(x.dtype)


@_update_product.register_fake
def _(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
