"""Compiled kernels on CPU tensors, which share their memory with a NumPy array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._kernels import kernels
from ._torch_maps import KernelPair, KernelWithFallback, in_memory, linear_map, on_memory, recorded
from .backend import Map

__all__ = ["fastfood", "hadamard", "hadamard_at_once", "hadamard_into"]

# The dtypes of kernels, with NumPy's.
_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def hadamard(x: Tensor, scale: float, axis: int, fallback: Map) -> Tensor | None:
    """Compute ``scale * H x`` along an axis, counted from the last; None if no kernel accepts x."""
    compiled = kernels("walsh") if x.is_cpu and in_memory(x) else None
    if compiled is None:
        return None
    # An autograd function takes longer than a small transform.
    if not recorded(x):
        return torch.from_numpy(compiled.transform(on_memory(_array, x), scale, axis))

    def transformed(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("walsh").transform(_array(x), scale, axis))

    symmetric = KernelWithFallback(transformed, fallback)
    return linear_map(x, KernelPair(symmetric, symmetric))


def hadamard_at_once(x: Tensor, normalize: bool) -> Tensor | None:
    """Compute the transform of a small vector without checks before; None for any other tensor."""
    if x.ndim != 1 or x.dtype not in _DTYPES or not (x.is_cpu and in_memory(x)) or recorded(x):
        return None
    compiled = kernels("walsh")
    found = None if compiled is None else compiled.transform_at_once(on_memory(_array, x), normalize)
    return None if found is None else torch.from_numpy(found)


def hadamard_into(x: Tensor, scale: float, axis: int, out: Tensor) -> bool:
    """Compute ``scale * H x`` along an axis into a tensor, without derivatives; False if no kernel can."""
    if not (x.is_cpu and in_memory(x) and in_memory(out)) or recorded(x) or recorded(out):
        return False
    # A conjugated or negated view of out would have to be written to in another way.
    compiled = kernels("walsh") if x.is_contiguous() and out.is_contiguous() and not out.is_neg() else None
    if compiled is None or out._is_zerotensor():
        return False
    source, target = on_memory(_array, x), on_memory(_array, out)
    if not (source.flags.aligned and target.flags.aligned):
        return False
    if x.data_ptr() != out.data_ptr() and np.may_share_memory(source, target):
        return False
    compiled.transform_into(source, target, scale, axis)
    torch.autograd.graph.increment_version(out)
    return True


def _array(x: Tensor) -> np.ndarray:
    """Return the memory of a tensor as an array."""
    return (x.detach() if x.requires_grad else x).numpy()


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool, fallback: tuple[Map, Map]) -> Tensor | None:
    """Compute the linear part of a projection, or its adjoint; None if no kernel accepts x."""
    if not (draws.long and x.is_cpu and x.dtype in _DTYPES and x.numel() and in_memory(x)):
        return None
    # A derivative would need the adjoint, which the kernels have in single precision.
    compiled, record = kernels("fastfood"), recorded(x)
    if compiled is None or not compiled.takes(_DTYPES[x.dtype], draws.padded, adjoint or record):
        return None

    def projected(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(_array(x), draws, n_in, False))

    def pulled(y: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(_array(y), draws, n_in, True))

    if not record:
        return on_memory(pulled if adjoint else projected, x)
    pair = KernelPair(KernelWithFallback(projected, fallback[0]), KernelWithFallback(pulled, fallback[1]))
    return linear_map(x, pair.transposed if adjoint else pair)
