"""torch's way to the kernels for CUDA tensors: which tensors have one, and how a kernel is differentiated.

A kernel here is a linear map along the last axis with a known adjoint, so its derivatives of every order, forward and
backward, are itself and the adjoint again; a batch of vmap is a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..kernels import kernels

__all__ = ["LinearMap", "fastfood", "fwht", "there_are_kernels"]

Map = Callable[[Tensor], Tensor]


def there_are_kernels(x: Tensor) -> bool:
    """Whether x is what Triton's kernels take, or stands for it in a transformation of torch.func.

    Not so a tensor of another class, or that a compiler or a mode looks at: these follow torch's own operations, and
    would see none.
    """
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and torch.version.hip is None
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and _get_current_dispatch_mode() is None
        and not torch._is_functional_tensor(x)
    )


def fwht(x: Tensor, scale: float, axis: int) -> Tensor | None:
    """``scale * H x`` along an axis; None where Triton cannot be imported."""
    if kernels("gpu.triton_launcher") is None or x.dtype not in (torch.float32, torch.float64):
        return None
    # H is symmetric.
    there = functools.partial(_run, "transform", scale=scale)
    return _apply(x.movedim(axis, -1), there, there).movedim(-1, axis)


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor | None:
    """The linear part of F along the last axis, or its adjoint; None where Triton cannot be imported."""
    room = kernels("gpu.triton_launcher")
    if room is None or x.dtype not in (torch.float32, torch.float64):
        return None
    f = room.Drawn.of(draws, n_in)
    there, back = (functools.partial(_run, "project", f=f, adjoint=way) for way in (adjoint, not adjoint))
    return _apply(x, there, back)


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


def _run(name: str, x: Tensor, **how: Any) -> Tensor:
    # A batch of gradients at once (is_grads_batched) has no memory; an operation that torch knows by its name gets
    # one gradient after another.
    if torch._C._functorch.is_legacy_batchedtensor(x):
        if "f" in how:
            # torch's integers have signs.
            how["f"] = [number - (number >> 63 << 64) for number in how["f"]]
        return cast(Tensor, getattr(torch.ops.tnadapt, name)(x, **how))
    return _KERNELS[name](x, **how)


def _transform(x: Tensor, scale: float) -> Tensor:
    length = x.shape[-1]
    return _by_rows(lambda rows: kernels("gpu.triton_launcher").fwht(rows, length, scale, length), x)


def _project(x: Tensor, f: Sequence[int], adjoint: bool) -> Tensor:
    room = kernels("gpu.triton_launcher")
    drawn = room.Drawn(*(number & (1 << 64) - 1 for number in f))
    return _by_rows(lambda rows: (room.fastfood_adjoint if adjoint else room.fastfood)(rows, drawn), x)


_KERNELS: dict[str, Callable[..., Tensor]] = {"transform": _transform, "project": _project}
torch.library.custom_op(
    "tnadapt::transform", _transform, mutates_args=(), schema="(Tensor x, float scale) -> Tensor"
)  # fmt: skip
torch.library.custom_op(
    "tnadapt::project", _project, mutates_args=(), schema="(Tensor x, int[] f, bool adjoint) -> Tensor"
)  # fmt: skip


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """A kernel of (vectors, n_in), run on x's own device, for x of any batch and strides."""
    batch = x.shape[:-1]
    # Zeros and opposites that torch has not yet made have no memory of that content.
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])
