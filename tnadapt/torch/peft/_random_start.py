"""``init_weights=False``: an adapter that changes its model before it is trained, as PEFT's methods have it."""

from __future__ import annotations

import torch

from .._adapter import Adapter

__all__ = ["start_randomly"]


@torch.no_grad()
def start_randomly(handle: Adapter) -> None:
    """Add normal numbers of torch's own generator to the arrays that start from zero, or to all if none does.

    PEFT's methods draw from that generator, too, so that ``torch.manual_seed`` makes two adapters equal or different.
    """
    arrays = [array for _, array in handle.named_parameters() if array.device.type != "meta"]
    zero = [array for array in arrays if not array.any()]
    # Alone, an array is the update itself; among others, the small ones of the rest are its factors.
    alone = len(arrays) == handle.plan.num_groups
    for array in zero or arrays:
        array.add_(torch.randn_like(array), alpha=0.1 if alone else 1.0)
