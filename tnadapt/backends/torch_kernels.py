"""Kernels on tensors: autograd functions around what computes on the same memory as a NumPy array."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..kernels import kernels

__all__ = ["fastfood", "hadamard"]

Tensor = torch.Tensor


def hadamard(x: Tensor, scale: float, axis: int) -> Tensor | None:
    """``scale * H x`` along an axis; None where x is not for a kernel."""
    if not on_host(x) or kernels("hadamard") is None:
        return None
    return _Hadamard.apply(x, scale, axis % x.ndim)  # type: ignore[no-any-return, no-untyped-call]


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor | None:
    """The linear part of a projection, or its adjoint; None where x is not for a kernel."""
    if not (draws.long and on_host(x) and x.dtype == torch.float32 and x.numel()):
        return None
    compiled = kernels("fastfood")
    if compiled is None or not compiled.takes(draws.padded):
        return None
    return _Fastfood.apply(x, draws, n_in, adjoint)  # type: ignore[no-any-return, no-untyped-call]


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


class _Fastfood(torch.autograd.Function):
    """A linear map, and its adjoint: each the derivative of the other."""

    @staticmethod
    def forward(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(as_numpy(x), draws, n_in, adjoint))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.draws, ctx.n_in, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        way = _Fastfood.apply if on_host(grad) else _fastfood_by_hand
        return way(grad, ctx.draws, ctx.n_in, not ctx.adjoint), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Fastfood.apply(tangent, ctx.draws, ctx.n_in, ctx.adjoint)  # type: ignore[no-any-return, no-untyped-call]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, draws: Any, n_in: int, adjoint: bool
    ) -> tuple[Tensor, int]:
        batch = in_dims[0]
        assert batch is not None
        return _Fastfood.apply(x.movedim(batch, 0), draws, n_in, adjoint), 0  # type: ignore[no-untyped-call]


def _fastfood_by_hand(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor:
    """The same in torch's own operations, for a gradient that the kernel cannot take; nothing is kept."""
    size, n_out = draws.padded, draws.lengths["diagonal"]
    g = torch.from_numpy(draws.part("g", 0, size)).to(x)
    diagonal = torch.from_numpy(draws.part("diagonal", 0, n_out)).to(x)
    index = torch.from_numpy(draws.part("inverse" if adjoint else "perm", 0, size)).to(x.device)
    scale = 1 / math.sqrt(size)
    if adjoint:
        u = _butterflies(torch.nn.functional.pad(x * diagonal, (0, size - n_out)), scale, -1)
        return _butterflies(u[..., index] * g, scale, -1)[..., :n_in]
    h = _butterflies(torch.nn.functional.pad(x, (0, size - n_in)), scale, -1)
    return _butterflies((h * g)[..., index], scale, -1)[..., :n_out] * diagonal
