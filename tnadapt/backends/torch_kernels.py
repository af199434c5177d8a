"""Kernels on tensors: autograd functions around what computes on the same memory as a NumPy array."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..kernels import kernels

__all__ = ["hadamard"]

Tensor = torch.Tensor


def hadamard(x: Tensor, scale: float, axis: int) -> Tensor | None:
    """``scale * H x`` along an axis; None where x is not for a kernel."""
    if not on_host(x) or kernels("hadamard") is None:
        return None
    return _Hadamard.apply(x, scale, axis % x.ndim)  # type: ignore[no-any-return, no-untyped-call]


def on_host(x: Tensor) -> bool:
    """Whether x is ordinary memory on the host, or stands for it in a transformation of torch.func.

    Not so a tensor of another class, or that a compiler or a mode looks at, or a batch of gradients at once
    (``is_grads_batched``): these follow torch's own operations, and would see none.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


def as_numpy(x: Tensor) -> np.ndarray:
    """The memory of a tensor of the host; not to be written to."""
    x = x.detach()
    # Zeros and opposites that torch has not yet made have no memory of that content.
    return (x.clone() if x._is_zerotensor() else x.resolve_neg()).numpy()


class _Hadamard(torch.autograd.Function):
    """A symmetric linear map: its derivatives are itself."""

    @staticmethod
    def forward(x: Tensor, scale: float, axis: int) -> Tensor:
        return torch.from_numpy(kernels("hadamard").transform(as_numpy(x), scale, axis))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.how = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_Hadamard.apply if on_host(grad) else _butterflies)(grad, *ctx.how), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Hadamard.apply(tangent, *ctx.how)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, scale: float, axis: int) -> tuple[Tensor, int]:
        batch = in_dims[0]
        assert batch is not None
        return _Hadamard.apply(x, scale, axis + (axis >= batch)), batch  # type: ignore[no-untyped-call]


def _butterflies(x: Tensor, scale: float, axis: int) -> Tensor:
    """The same in torch's own operations, for a gradient that the kernel cannot take."""
    moved = torch.movedim(x, axis, -1) * scale
    shape, half = moved.shape, 1
    while half < shape[-1]:
        low, high = moved.reshape(*shape[:-1], shape[-1] // (2 * half), 2, half).unbind(-2)
        moved = torch.stack((low + high, low - high), -2).reshape(shape)
        half *= 2
    return torch.movedim(moved, -1, axis)
