"""Linear maps that a kernel computes on memory, as torch differentiates them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["Way", "in_memory", "linear_map"]

Map = Callable[[Tensor], Tensor]


class Way(NamedTuple):
    """A linear map along axes that are counted from the last, whatever the batch before them.

    Attributes
    ----------
    kernel : callable
        On the memory of a tensor.
    plain : callable
        The same in torch's own operations, for what has no memory of its own.
    """

    kernel: Map
    plain: Map


def linear_map(x: Tensor, there: Way, back: Way) -> Tensor:
    """``there(x)``, differentiable to any order, forward and backward; ``back`` is its adjoint."""
    # A batch of gradients at once (is_grads_batched) has no memory.
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return there.plain(x)
    return cast(Tensor, LinearMap.apply(x, there, back))  # type: ignore[no-untyped-call]


def in_memory(x: Tensor) -> bool:
    """Whether x has memory that a kernel may look at, or stands for such in a transformation of torch.func.

    Not so a tensor of another class, or that a compiler, a trace or a mode looks at: these follow torch's operations,
    and would see none.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and _get_current_dispatch_mode() is None
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


class LinearMap(torch.autograd.Function):
    """Its derivatives are itself, and the adjoint."""

    @staticmethod
    def forward(x: Tensor, there: Way, back: Way) -> Tensor:
        # Zeros and opposites that torch has not yet made have no memory of that content.
        return there.kernel(x.clone() if x._is_zerotensor() else x.resolve_neg())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Way, Way], output: Tensor) -> None:
        _, ctx.there, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return linear_map(grads[0], ctx.back, ctx.there), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return linear_map(tangents[0], ctx.there, ctx.back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None, None], x: Tensor, there: Way, back: Way) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        return linear_map(x.movedim(dim, 0), there, back), 0
