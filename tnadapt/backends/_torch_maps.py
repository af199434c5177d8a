"""Differentiable torch functions for linear maps that a kernel computes directly on memory."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["KernelPair", "KernelWithFallback", "in_memory", "linear_map", "on_memory", "recorded"]

Map = Callable[[Tensor], Tensor]
Result = TypeVar("Result")
# Classes of tensors whose elements a kernel may access.
_PLAIN = (Tensor, torch.nn.Parameter)
# torch includes this key for as long as there is a mode before dispatch, and asking for the key is faster.
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)


@dataclasses.dataclass(frozen=True)
class KernelWithFallback:
    """A linear map along axes counted from the last, for any batch before them.

    Attributes
    ----------
    kernel : callable
        Computes on the memory of a tensor.
    fallback : callable
        The same map in torch's operations, for tensors without memory.
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
        # The pair appears in traced graphs, which are compared with each other: its repr must not contain addresses.
        return "KernelPair(...)"


def linear_map(x: Tensor, pair: KernelPair) -> Tensor:
    """Apply ``pair.forward`` to x; differentiable to any order, in forward and backward mode."""
    # A batch of gradients (is_grads_batched) has no memory.
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return pair.forward.fallback(x)
    return cast(Tensor, LinearMap.apply(x, pair))  # type: ignore[no-untyped-call]


def in_memory(x: Tensor) -> bool:
    """Return whether x, or the tensor that it represents in a torch.func transformation, has memory for a kernel.

    False for tensors of other classes, and under a compiler or a dispatch mode: these intercept torch's operations, and
    a kernel calls none.
    """
    return (
        type(x) in _PLAIN
        and x.layout is torch.strided
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not _traced_before_dispatch()
        and not _functionalized()
        and not torch._is_functional_tensor(x)
        and not torch._C._functorch.is_legacy_batchedtensor(x)
    )


def on_memory(kernel: Callable[[Tensor], Result], x: Tensor) -> Result:
    """Call a kernel on a tensor whose memory is there and up to date; for one that is not :func:`recorded`."""
    if x._is_zerotensor():
        return kernel(x.clone())  # a lazy zero tensor does not have its values in memory yet
    if x.numel():
        if x.is_contiguous():
            stop = x.storage_offset() + x.numel()
        else:
            stop = x.storage_offset() + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
        if x.untyped_storage().nbytes() < stop * x.element_size():
            raise RuntimeError(
                f"a tensor of shape {tuple(x.shape)} has no memory any more: its storage was freed, or shrunk to "
                f"{x.untyped_storage().nbytes()} bytes"
            )
    # A lazily negated tensor does not have its values in memory, either.
    return kernel(x.resolve_neg() if x.is_neg() else x)


def recorded(x: Tensor) -> bool:
    """Return whether anything needs to know how a result was computed: derivatives, a transformation, or a tracer."""
    return (
        (x.requires_grad and torch.is_grad_enabled())
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)  # one that outlived its transformation
        or torch._C._get_tracing_state() is not None
    )


def _traced_before_dispatch() -> bool:
    """Return whether make_fx(pre_dispatch=True) or an export is tracing."""
    return _PRE_DISPATCH is not None and torch._C._dispatch_tls_is_dispatch_key_included(_PRE_DISPATCH)


def _functionalized() -> bool:
    """Return whether torch.func.functionalize is active, which has no rule for autograd functions."""
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(level.key() == torch._C._functorch.TransformType.Functionalize for level in stack)


class LinearMap(torch.autograd.Function):
    """A linear map as an autograd function: it is its own forward derivative, and backward applies the adjoint."""

    @staticmethod
    def forward(x: Tensor, pair: KernelPair) -> Tensor:
        return on_memory(pair.forward.kernel, x)

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


# torch binds the arguments to the signature in each call, and inspecting it takes longer than a small transform.
LinearMap.forward.__signature__ = inspect.signature(LinearMap.forward)  # type: ignore[attr-defined]
