"""Compiled kernels on CPU tensors, which share their memory with a NumPy array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._kernels import kernels
from ._torch_maps import KernelPair, KernelWithFallback, Map, in_memory, linear_map, on_memory, recorded

__all__ = ["fastfood", "hadamard"]


def hadamard(x: Tensor, scale: float, axis: int, fallback: Map) -> Tensor | None:
    """Compute ``scale * H x`` along an axis, counted from the last; None if no kernel accepts x."""
    if x.device.type != "cpu" or not in_memory(x) or kernels("walsh") is None:
        return None

    def transformed(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("walsh").transform(x.detach().numpy(), scale, axis))

    # An autograd function takes longer than a small transform.
    if not recorded(x):
        return on_memory(transformed, x)
    symmetric = KernelWithFallback(transformed, fallback)
    return linear_map(x, KernelPair(symmetric, symmetric))


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool, fallback: tuple[Map, Map]) -> Tensor | None:
    """Compute the linear part of a projection, or its adjoint; None if no kernel accepts x."""
    if not (draws.long and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and in_memory(x)):
        return None
    compiled = kernels("fastfood")
    if compiled is None or not compiled.takes(draws.padded):
        return None

    def projected(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(x.detach().numpy(), draws, n_in, False))

    def pulled(y: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(y.detach().numpy(), draws, n_in, True))

    if not recorded(x):
        return on_memory(pulled if adjoint else projected, x)
    pair = KernelPair(KernelWithFallback(projected, fallback[0]), KernelWithFallback(pulled, fallback[1]))
    return linear_map(x, pair.transposed if adjoint else pair)
