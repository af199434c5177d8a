"""torch's way to the kernels for CUDA tensors: which tensors have one, and how a kernel is differentiated.

A kernel here is a linear map along the last axis with a known adjoint, so its derivatives of every order, forward and
backward, are itself and the adjoint again; a batch of vmap is a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import kernels

__all__ = ["LinearMap", "fastfood", "fwht", "there_are_kernels"]

Map = Callable[[Tensor], Tensor]


class LinearMap(torch.autograd.Function):
    """``there(x)`` along the last axis of x, whatever the batch; ``back`` is its adjoint."""

    @staticmethod
    def forward(x: Tensor, there: Map, back: Map) -> Tensor:
        return there(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Map, Map], output: Tensor) -> None:
        _, ctx.there, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _apply(grads[0], ctx.back, ctx.there), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _apply(tangents[0], ctx.there, ctx.back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None, None], x: Tensor, there: Map, back: Map) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        return _apply(x.movedim(dim, 0), there, back), 0


def _apply(x: Tensor, there: Map, back: Map) -> Tensor:
    return cast(Tensor, LinearMap.apply(x, there, back))  # type: ignore[no-untyped-call]


def there_are_kernels(x: Tensor) -> bool:
    """Whether x is what Triton's kernels take. A compiled program is better off with what its compiler can see into."""
    return x.is_cuda and torch.version.hip is None and not torch.compiler.is_compiling()


def fwht(x: Tensor, scale: float, axis: int) -> Tensor | None:
    """``scale * H x`` along an axis; None where Triton cannot be imported."""
    room = kernels("gpu.triton_launcher")
    if room is None or x.dtype not in (torch.float32, torch.float64):
        return None
    length = x.shape[axis]
    # H is symmetric.
    there = functools.partial(_by_rows, functools.partial(room.fwht, length=length, scale=scale, n_out=length))
    return _apply(x.movedim(axis, -1), there, there).movedim(-1, axis)


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor | None:
    """The linear part of F along the last axis, or its adjoint; None where Triton cannot be imported."""
    room = kernels("gpu.triton_launcher")
    if room is None or x.dtype not in (torch.float32, torch.float64):
        return None
    f = room.Drawn.of(draws, n_in)
    there = functools.partial(_by_rows, functools.partial(room.fastfood, f=f))
    back = functools.partial(_by_rows, functools.partial(room.fastfood_adjoint, f=f))
    return _apply(x, back, there) if adjoint else _apply(x, there, back)


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """A kernel of (vectors, n_in), run on x's own device, for x of any batch and strides."""
    batch = x.shape[:-1]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])
