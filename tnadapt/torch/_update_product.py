"""The product of an input with a cached update, as one operator of torch that a compiled program calls.

A compiled program cannot hold a cached tensor, and computing ΔW in it takes longer than the layer. The operator gets
the arrays, so the compiler knows what it reads, and finds ΔW in the cache, which compares these arrays with those that
it was computed from. It returns a new tensor, which the compiler may overwrite; ΔW itself it never sees.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from ._delta_cache import DeltaCache

__all__ = ["update_product", "wide_product"]

# An operator takes tensors and numbers only. Caches are numbered when the first program that uses them is compiled.
_caches: weakref.WeakValueDictionary[int, DeltaCache] = weakref.WeakValueDictionary()
_numbers: weakref.WeakKeyDictionary[DeltaCache, int] = weakref.WeakKeyDictionary()
_count = itertools.count()


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
    return cast(Tensor, _update_product(x, list(arrays), _number(cache), index, cache.plan.shapes[index][0]))


def wide_product(x: Tensor, update: Tensor) -> Tensor:
    """Return ``x ΔWᵀ`` in the wider dtype of both."""
    kind = torch.promote_types(x.dtype, update.dtype)
    return functional.linear(x.to(kind), update.to(kind))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _number(cache: DeltaCache) -> int:
    """Return the number by which the operator finds a cache."""
    found = _numbers.get(cache)
    if found is None:
        found = _numbers[cache] = next(_count)
        _caches[found] = cache
    return found


@torch.library.custom_op("tnadapt::update_product", mutates_args=())
def _update_product(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    found = _caches[cache]
    named = dict(zip(found.names(index), arrays, strict=True))
    update = found.get(lambda names: [named[name] for name in names], index, x.dtype)
    return wide_product(x, update.to(x.device).reshape(rows, x.shape[-1])).to(x.dtype)


@_update_product.register_fake
def _(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
