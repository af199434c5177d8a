"""Kernels on tensors of the host: they compute on the same memory, as a NumPy array."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._kernels import kernels
from ._torch_maps import Map, Way, in_memory, linear_map

__all__ = ["fastfood", "hadamard"]


def hadamard(x: Tensor, scale: float, axis: int, plain: Map) -> Tensor | None:
    """``scale * H x`` along an axis, counted from the last; None where x is not for a kernel."""
    if x.device.type != "cpu" or not in_memory(x) or kernels("walsh") is None:
        return None

    def transformed(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("walsh").transform(x.detach().numpy(), scale, axis))

    way = Way(transformed, plain)
    return linear_map(x, way, way)  # H is symmetric


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool, plain: tuple[Map, Map]) -> Tensor | None:
    """The linear part of a projection, or its adjoint; None where x is not for a kernel."""
    if not (draws.long and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and in_memory(x)):
        return None
    compiled = kernels("fastfood")
    if compiled is None or not compiled.takes(draws.padded):
        return None

    def projected(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(x.detach().numpy(), draws, n_in, False))

    def pulled(y: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(y.detach().numpy(), draws, n_in, True))

    there, back = Way(projected, plain[0]), Way(pulled, plain[1])
    return linear_map(x, back, there) if adjoint else linear_map(x, there, back)
