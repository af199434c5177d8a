"""Linear maps that a kernel computes on memory, as torch differentiates them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["KernelPair", "KernelWithFallback", "in_memory", "linear_map"]

Map = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class KernelWithFallback:
    """A linear map along axes that are counted from the last, whatever the batch before them.

    Attributes
    ----------
    kernel : callable
        On the memory of a tensor.
    fallback : callable
        The same in torch's own operations, for what has no memory of its own.
    """

    kernel: Map
    fallback: Map


@dataclasses.dataclass(frozen=True, repr=False)
class KernelPair:
    """A linear map and its adjoint.

    Attributes
    ----------
    forward, adjoint : KernelWithFallback
    """

    forward: KernelWithFallback
    adjoint: KernelWithFallback

    @property
    def transposed(self) -> KernelPair:
        """The adjoint, whose adjoint is the map itself."""
        return KernelPair(self.adjoint, self.forward)

    def __repr__(self) -> str:
        # A trace puts the pair in its graph, and compares two of them: no addresses.
        return "KernelPair(...)"


def linear_map(x: Tensor, pair: KernelPair) -> Tensor:
    """``pair.forward`` of x, differentiable to any order, in forward and backward mode."""
    # A batch of gradients at once (is_grads_batched) has no memory.
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return pair.forward.fallback(x)
    return cast(Tensor, LinearMap.apply(x, pair))  # type: ignore[no-untyped-call]


def in_memory(x: Tensor) -> bool:
    """Whether x has memory that a kernel may look at, or stands for such in a transformation of torch.func.

    Not so a tensor of another class, or that a compiler or a mode looks at: these follow torch's operations,
    and would see none.
    """
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not _traced_before_dispatch()
        and not _functionalized()
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


def _traced_before_dispatch() -> bool:
    """Whether make_fx(pre_dispatch=True) or an export looks at operations."""
    length: Callable[[], int] | None = getattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch", None)
    return length is not None and length() > 0


def _functionalized() -> bool:
    """Whether torch.func.functionalize is at work, which has no rule for autograd's functions."""
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key() == torch._C._functorch.TransformType.Functionalize for level in stack)


class LinearMap(torch.autograd.Function):
    """Its derivatives are itself, and the adjoint."""

    @staticmethod
    def forward(x: Tensor, pair: KernelPair) -> Tensor:
        if x.numel() and not x._is_zerotensor():
            stop = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
            if x.untyped_storage().nbytes() < stop * x.element_size():
                raise RuntimeError(
                    f"a tensor of shape {tuple(x.shape)} has no memory any more: its storage was freed, or shrunk to "
                    f"{x.untyped_storage().nbytes()} bytes"
                )
        # Zeros and opposites that torch has not yet made have no memory of that content.
        return pair.forward.kernel(x.clone() if x._is_zerotensor() else x.resolve_neg())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, KernelPair], output: Tensor) -> None:
        _, ctx.pair = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return linear_map(grads[0], ctx.pair.transposed), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return linear_map(tangents[0], ctx.pair)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, None], x: Tensor, pair: KernelPair) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        return linear_map(x.movedim(dim, 0), pair), 0
