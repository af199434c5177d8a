"""``init_weights=False``: an adapter with a random update from the start, as in PEFT's methods."""

from __future__ import annotations

import math

import torch

from .._adapter import Adapter

__all__ = ["start_randomly"]


@torch.no_grad()
def start_randomly(handle: Adapter) -> None:
    """Add normal numbers from torch's generator to the arrays that start from zero, or to all if none does.

    PEFT's methods draw from that generator, too, so ``torch.manual_seed`` has the same effect.
    """
    units = handle.plan.units
    named = [(name, array) for name, array in handle.named_parameters() if array.device.type != "meta"]
    arrays = [array for _, array in named]
    zero = [array for array in arrays if not array.any()]
    # A single array is the update itself, so its numbers must be small; otherwise the small initial values of the other
    # arrays scale the product.
    # They are smaller still if the scale or F enlarges them, as WaveFT's scale of 25 does.
    # θ moves all arrays of a product at once.
    alone = len(arrays) == handle.plan.num_groups or handle.plan.theta is not None
    if not zero and not handle.plan.point.leaves_zero:
        # All arrays move at once, and some are identities.
        for array in arrays:
            array.add_(torch.randn_like(array), alpha=0.3 * float(array.square().mean().sqrt()))
        return
    enlarged = max(group.network.scale * math.sqrt(group.projection.map.variance()) for group in handle.plan.groups)
    for name, array in named:
        if not zero or not array.any():
            array.add_(torch.randn_like(array), alpha=(0.1 / max(1.0, enlarged) if alone else 1.0) / units[name])
