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

__all__ = ["LinearMap", "fastfood", "fwht", "shuffle", "there_are_kernels"]

Map = Callable[[Tensor], Tensor]

#: The least that Triton promises to compile for.
_CAPABILITY = (8, 0)


def there_are_kernels(x: Tensor) -> bool:
    """Whether x is what Triton's kernels take, or stands for it in a transformation of torch.func.

    Not so a tensor of another class, or that a compiler or a mode looks at: these follow torch's own operations, and
    would see none.
    """
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= _CAPABILITY
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.layout is torch.strided
        and _get_current_dispatch_mode() is None
        and not torch._is_functional_tensor(x)
    )


def fwht(x: Tensor, scale: float, axis: int) -> Tensor | None:
    """``scale * H x`` along an axis; None where Triton cannot be imported."""
    if _room(x) is None:
        return None
    # H is symmetric.
    there = functools.partial(_run, "transform", scale=scale)
    return _apply(x.movedim(axis, -1), there, there).movedim(-1, axis)


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool) -> Tensor | None:
    """The linear part of F along the last axis, or its adjoint; None where Triton cannot be imported."""
    room = _room(x)
    if room is None:
        return None
    numbers = room.Drawn.of(draws, n_in)
    there, back = (functools.partial(_run, "project", numbers=numbers, adjoint=way) for way in (adjoint, not adjoint))
    return _apply(x, there, back)


def shuffle(x: Tensor, seed: int, group: int, inverse: bool) -> Tensor | None:
    """The last axis permuted, or permuted back; None where Triton cannot be imported."""
    if _room(x) is None:
        return None
    numbers = (seed, group)
    there, back = (functools.partial(_run, "shuffle", numbers=numbers, inverse=way) for way in (inverse, not inverse))
    return _apply(x, there, back)


def _room(x: Tensor) -> Any:
    return kernels("gpu.triton_launcher") if x.dtype in (torch.float32, torch.float64) else None


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
        if "numbers" in how:
            # torch's integers have signs.
            how["numbers"] = [number - (number >> 63 << 64) for number in how["numbers"]]
        return cast(Tensor, getattr(torch.ops.tnadapt, name)(x, **how))
    return _KERNELS[name](x, **how)


def _transform(x: Tensor, scale: float) -> Tensor:
    length = x.shape[-1]
    return _by_rows(lambda rows: kernels("gpu.triton_launcher").fwht(rows, length, scale, length), x)


def _project(x: Tensor, numbers: Sequence[int], adjoint: bool) -> Tensor:
    room = kernels("gpu.triton_launcher")
    f = room.Drawn(*map(_unsigned, numbers))
    return _by_rows(lambda rows: (room.fastfood_adjoint if adjoint else room.fastfood)(rows, f), x)


def _shuffle(x: Tensor, numbers: Sequence[int], inverse: bool) -> Tensor:
    seed, group = map(_unsigned, numbers)
    return _by_rows(lambda rows: kernels("gpu.triton_launcher").shuffle(rows, seed, group, inverse), x)


def _unsigned(number: int) -> int:
    return number & (1 << 64) - 1


_KERNELS: dict[str, Callable[..., Tensor]] = {"transform": _transform, "project": _project, "shuffle": _shuffle}
for _name, _arguments in {
    "transform": "float scale",
    "project": "int[] numbers, bool adjoint",
    "shuffle": "int[] numbers, bool inverse",
}.items():
    torch.library.custom_op(
        f"tnadapt::{_name}", _KERNELS[_name], mutates_args=(), schema=f"(Tensor x, {_arguments}) -> Tensor"
    )


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """A kernel of (vectors, n_in), run on x's own device, for x of any batch and strides."""
    batch = x.shape[:-1]
    # Zeros and opposites that torch has not yet made have no memory of that content.
    x = x.clone() if x._is_zerotensor() else x.resolve_neg()
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])
