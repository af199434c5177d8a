"""The sum of a weight in half precision and its update in float32, rounded once, without arrays of the whole size."""

from __future__ import annotations

import torch
from torch import Tensor

from tnadapt.targets.target import Target

from ._interception import in_dispatch_mode, in_functorch

__all__ = ["BLOCK", "can_sum_in_blocks", "sum_in_blocks"]

#: Elements that are summed at a time: the float32 sums of a block stay in the cache.
BLOCK = 1 << 17


def can_sum_in_blocks(stored: Tensor, target: Target, delta: Tensor) -> bool:
    """Return whether :func:`sum_in_blocks` computes the sum: no gradient passes through it, and nothing watches it."""
    if stored.dtype not in (torch.bfloat16, torch.float16) or delta.dtype != torch.float32:
        return False
    if target.rows is not None or target.transposed or stored.device.type != "cpu" or delta.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (stored.requires_grad or delta.requires_grad):
        return False
    if torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode():
        return False
    return stored.is_contiguous() and delta.is_contiguous() and stored.numel() == delta.numel() > BLOCK


def sum_in_blocks(stored: Tensor, delta: Tensor) -> Tensor:
    """Return ``(stored.float() + delta).to(stored.dtype)``; requires :func:`can_sum_in_blocks`.

    The plain expression writes two arrays of four bytes an element, whose memory is new from the system at each call.
    """
    total = torch.empty_like(stored)
    with torch.no_grad():
        parts = zip(*(torch.split(tensor.reshape(-1), BLOCK) for tensor in (total, stored, delta)), strict=True)
        for out, weight, change in parts:
            out.copy_(weight.float().add_(change))
    return total
