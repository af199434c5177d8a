"""A linear layer on few rows of input, without gradients: decoding, token by token.

``x (W + ΔW)ᵀ`` writes a sum as large as the weight, for a product that does little more than read it once. For few rows
``x Wᵀ + x ΔWᵀ`` is cheaper: nothing of the size of the weight is written. ΔW is cached in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ._arrays import current
from ._forward_pass import rounded_delta, scaled
from ._interception import in_dispatch_mode, in_functorch
from ._row_assignment import mixing_weight
from ._row_features import add_features
from ._state import AdapterSlot
from ._update_product import update_product, wide_product

__all__ = ["LEAST_ELEMENTS", "MOST_ROWS", "added_products", "has_few_rows"]

#: Up to this many rows, the second product takes less time than the sum, whose rounding to half precision is slow.
MOST_ROWS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 32, torch.float16: 32}
#: For a smaller weight there is nothing to gain, and its outputs keep the bits that they have with gradients.
LEAST_ELEMENTS = 1 << 16


def has_few_rows(x: Tensor, weight: Tensor, slots: Sequence[AdapterSlot]) -> bool:
    """Return whether :func:`added_products` is the cheaper way to compute the output of a layer."""
    if torch.is_grad_enabled() or x.is_nested or x.ndim == 0 or weight.numel() < LEAST_ELEMENTS:
        return False
    if any(slot.target.transposed for slot in slots) or x.numel() > MOST_ROWS.get(weight.dtype, 0) * x.shape[-1]:
        return False
    if torch.compiler.is_compiling():
        # An exported program has to contain the computation, as it is run without this library.
        return not torch.compiler.is_exporting()
    return not in_functorch() and not in_dispatch_mode()


def added_products(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return ``x Wᵀ + b`` plus the product of x with each update; requires :func:`has_few_rows`."""
    y = functional.linear(x, weight, bias)
    for slot in slots:
        state = slot.adapter
        if torch.compiler.is_compiling():
            y = add_features(y, slot.target, scaled(state, _compiled_product(slot, x.to(y.dtype))))
            continue
        update = rounded_delta(slot, weight.dtype).to(x.device).reshape(-1, weight.shape[-1])
        scale = mixing_weight(state)
        # An update that is not cached keeps its own dtype where that is the wider one: converting it takes longer.
        change = wide_product(x, update)
        y = add_features(y, slot.target, change if scale == 1.0 else change * scale)
    return y


def _compiled_product(slot: AdapterSlot, x: Tensor) -> Tensor:
    cache, index = slot.adapter.cache, slot.index
    if x.device.type != "cpu" and cache.slice(index) is not None:
        # On a device such an update is not cached, and the compiler can fuse its computation.
        return wide_product(x, rounded_delta(slot, x.dtype).reshape(-1, x.shape[-1]))
    return update_product(cache, x, current(slot.adapter, cache.names(index)), index)
