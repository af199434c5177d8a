"""A linear layer with low-rank updates by torch's own operations, for small layers and for passes without gradients.

:class:`~tnadapt.torch._factored_linear.FactoredLinear` saves memory traffic in backward, at the price of a backward
pass in Python. For a small layer the Python costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

__all__ = ["MOST_ELEMENTS", "LowRank", "is_small", "low_rank_linear"]

#: Up to this many elements of the input and of the output, these operations take less time in forward and backward.
#: In backward they write the gradient of the input twice and add, where the other function accumulates in place.
MOST_ELEMENTS = 1 << 16


class LowRank(NamedTuple):
    """An update ``scale * left @ right.T``.

    Attributes
    ----------
    left : Tensor, shape (rows, width)
    right : Tensor, shape (cols, width)
    scale : float
    """

    left: Tensor
    right: Tensor
    scale: float


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer is so small that :func:`low_rank_linear` is the faster way with gradients, too."""
    out, cols = weight.shape
    given = x.numel()
    return given <= MOST_ELEMENTS and given * out <= MOST_ELEMENTS * cols


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[LowRank]) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update on all features; requires contiguous x, and one dtype and device."""
    rows = x if x.ndim == 2 else x.view(-1, x.shape[-1])
    y = functional.linear(rows, weight, bias)
    for left, right, scale in changes:
        y.addmm_(rows @ right, left.T, alpha=scale)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])
