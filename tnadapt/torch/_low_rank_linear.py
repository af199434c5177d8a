"""A linear layer with low-rank updates by torch's own operations, for small layers and for passes without gradients.

:class:`~tnadapt.torch._factored_linear.FactoredLinear` saves memory traffic in backward, at the price of a backward
pass in Python. For a small layer the Python costs more than it saves. Where the factors have another dtype than the
layer, as next to a base in half precision, a product of its own for each update is all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = ["MOST_ELEMENTS", "LowRank", "is_small", "low_rank_linear", "mixed_low_rank_linear"]

#: Up to this many elements of the input and of the output, these operations take less time in forward and backward.
#: In backward they write the gradient of the input twice and add, where the other function accumulates in place.
MOST_ELEMENTS = 1 << 16


class LowRank(NamedTuple):
    """An update ``mixing * scale * left @ right.T``.

    Attributes
    ----------
    left : Tensor, shape (rows, width)
    right : Tensor, shape (cols, width)
    scale : float
    mixing : float
        The adapter's mixing weight, where it is not a part of the scale.
    """

    left: Tensor
    right: Tensor
    scale: float
    mixing: float = 1.0


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer is so small that :func:`low_rank_linear` is the faster way with gradients, too."""
    out, cols = weight.shape
    given = x.numel()
    return given <= MOST_ELEMENTS and given * out <= MOST_ELEMENTS * cols


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[LowRank]) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update on all features; requires contiguous x, and one dtype and device."""
    rows = x if x.ndim == 2 else x.view(-1, x.shape[-1])
    y = functional.linear(rows, weight, bias)
    for left, right, scale, mixing in changes:
        y.addmm_(rows @ right, left.T, alpha=scale * mixing)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def mixed_low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[LowRank]) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update, computed in the dtype of its factors and rounded to that of x."""
    y = functional.linear(x, weight, bias)
    for left, right, scale, mixing in changes:
        # The operations of the general way, in its order: a product of both factors would round differently.
        change = functional.linear(functional.linear(x.to(left.dtype), right.T), left)
        change = change if scale == 1.0 else change * scale
        change = change if mixing == 1.0 else change * mixing
        y = y + change.to(y.dtype)
    return y
