"""The gradient of a layer that rounds its input: that of x times the dequantized weight, as if nothing were rounded.

Layers that quantize their input in each call (int8 by int8) have no backward: rounding has none. Without one, the
arrays of all adapted layers before them would silently get a part of their gradients only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._quantized import quantized_type

__all__ = ["blocks_gradient", "straight_through"]


def blocks_gradient(module: nn.Module) -> bool:
    """Return whether backward through a layer does not compute the gradient of its input."""
    kind = quantized_type(module)
    return kind is not None and not kind.passes_gradient(module)


def straight_through(x: Tensor, host: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a layer's output, with the gradient of the product with its dequantized weight.

    Parameters
    ----------
    x : Tensor
    host : Module
        The layer.
    run : callable
        Its forward.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return run(x)
    y = cast(Tensor, _StraightThrough.apply(x, host, run))  # type: ignore[no-untyped-call]
    bias: Any = host._parameters.get("bias")
    # Nothing is added, except to the gradient.
    return y if bias is None or not bias.requires_grad else y + (bias - bias.detach()).to(y.dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, host: nn.Module, run: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.host, ctx.dtype = host, x.dtype
        return run(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        kind = quantized_type(ctx.host)
        weight = None if kind is None else kind.dequantize(ctx.host)
        if weight is None:
            raise TargetError(
                f"{type(ctx.host).__name__} passes no gradient to its input, and its weight cannot be dequantized to "
                "compute one: attach to a freshly loaded model, before its first evaluation, or use a type of "
                "quantization that leaves the input alone"
            )
        return (grad @ weight.to(grad.dtype)).to(ctx.dtype), None, None
