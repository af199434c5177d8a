"""Linear maps of torch tensors by kernels: derivatives, the FFT, and operators for compiled programs."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import array_api_compat.torch as namespace
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import FFT_DTYPES, dft2_by_fft, dft2_in_chunks
from ._kernels import kernels

# -- A kernel as a differentiable function of tensors ------------------------------------------------------------------


Map = Callable[[Tensor], Tensor]
Result = TypeVar("Result")
# Classes of tensors whose elements a kernel may access.
_PLAIN = (Tensor, torch.nn.Parameter)
# torch includes this key for as long as there is a mode before dispatch, and asking for the key is faster.
_PRE_DISPATCH = getattr(torch._C.DispatchKey, "PreDispatch", None)


@dataclasses.dataclass(frozen=True, repr=False)
class KernelPair:
    """A linear map and its adjoint along axes counted from the last, for any batch before them.

    Attributes
    ----------
    forward, adjoint : callable
        Compute on the memory of a tensor.
    fallbacks : (callable, callable)
        The same two in torch's operations, for tensors without memory.
    """

    forward: Map
    adjoint: Map
    fallbacks: tuple[Map, Map]

    @classmethod
    def symmetric(cls, kernel: Map, fallback: Map) -> KernelPair:
        return cls(kernel, kernel, (fallback, fallback))

    @property
    def transposed(self) -> KernelPair:
        """The adjoint, whose adjoint is the map itself."""
        return KernelPair(self.adjoint, self.forward, self.fallbacks[::-1])

    def __repr__(self) -> str:
        # The pair appears in traced graphs, which are compared with each other: its repr must not contain addresses.
        return "KernelPair(...)"


def linear_map(x: Tensor, pair: KernelPair) -> Tensor:
    """Apply ``pair.forward`` to x; differentiable to any order, in forward and backward mode."""
    # A batch of gradients (is_grads_batched) has no memory.
    if torch._C._functorch.is_legacy_batchedtensor(x):
        return pair.fallbacks[0](x)
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
        return on_memory(pair.forward, x)

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


# -- The FFT as a linear map that is its own adjoint -------------------------------------------------------------------


def dft2(x: Tensor, fallback: Map) -> Tensor | None:
    """Compute ``Re(ifft2(x))`` over the last two axes; None if torch has no FFT of x, or exports a program.

    torch's own gradient of an FFT is one of complex numbers, which takes longer than the map itself.
    """
    if str(x.dtype).removeprefix("torch.") not in FFT_DTYPES or not x.numel():
        return None
    if in_memory(x):
        return linear_map(x, KernelPair.symmetric(_transformed, fallback))
    # An exported program consists of matrix products, which run anywhere.
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return dft2_by_fft(namespace, x) if traced else None


def _transformed(x: Tensor) -> Tensor:
    x = x.detach()
    chunked = x.device.type == "cpu"
    transformed: Tensor = dft2_in_chunks(namespace, x, torch.empty_like) if chunked else dft2_by_fft(namespace, x)
    return transformed


# -- The Triton kernels as operators, for programs of torch.compile ----------------------------------------------------

# They act on ``(vectors, n)``, and have rules for shapes without numbers (fake tensors), gradients and vmap. Outside of
# compiled programs :func:`linear_map` costs less per call, and also has forward derivatives. An operator can be
# registered without Triton, which is imported in the first call.


def _launcher(x: Tensor) -> Any:
    launcher = kernels("gpu.triton_launcher")
    if launcher is None:
        raise RuntimeError(
            f"this program was compiled with Triton kernels for a tensor on {x.device}, and Triton 3.5 or newer cannot "
            "be imported here: install it, or compile the program again"
        )
    return launcher


@torch.library.custom_op("tnadapt::fwht", mutates_args=())
def fwht(x: Tensor, scale: float) -> Tensor:
    """Compute ``scale * H x`` of every row."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        transformed: Tensor = _launcher(x).fwht(x.contiguous(), x.shape[1], scale, x.shape[1])
    return transformed


@torch.library.custom_op("tnadapt::fastfood", mutates_args=())
def fastfood(x: Tensor, gain: Tensor | None, recipe: str, n_in: int, n_out: int, adjoint: bool) -> Tensor:
    """Compute the linear part of F of every row, or its adjoint; without ``gain``, normal numbers are drawn as well.

    The recipe has the integers of the draws (:attr:`tnadapt.algebra.maps.fastfood.FastfoodDraws.recipe`): as
    text, because a seed of 64 bits without a sign is no integer of an operator.
    """
    launcher = _launcher(x)
    length, period, seed, group, signs = map(int, recipe.split())
    f = launcher.Drawn(n_in, n_out, length, period, seed, group, bool(signs), gain)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        result: Tensor = (launcher.fastfood_adjoint if adjoint else launcher.fastfood)(x.contiguous(), f)
    return result


@torch.library.custom_op("tnadapt::shuffle", mutates_args=())
def shuffle(x: Tensor, recipe: str, inverse: bool) -> Tensor:
    """Permute every row, or invert the permutation; the recipe has seed and group."""
    seed, group = map(int, recipe.split())
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        shuffled: Tensor = _launcher(x).shuffle(x.contiguous(), seed, group, inverse)
    return shuffled


# -- Shapes ----------------------------------------------------------------------------------------------------


@fwht.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@fastfood.register_fake
def _(x: Tensor, gain: Tensor | None, recipe: str, n_in: int, n_out: int, adjoint: bool) -> Tensor:
    return x.new_empty(x.shape[0], n_in if adjoint else n_out)


@shuffle.register_fake
def _(x: Tensor, recipe: str, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


# -- Gradients: H is symmetric, and F and a permutation have adjoints ----------------------------------------------


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _backward(operator: Any, flips: bool) -> Any:
    """Return the rule of an operator; ``flips`` if its last setting is whether it is the adjoint."""

    def rule(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, last = ctx.settings
        return operator(grad, *others, not last if flips else last), *[None] * len(ctx.settings)

    return rule


# -- vmap: more rows -------------------------------------------------------------------------------------------


def _more_rows(operator: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *settings: Any) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        x = x.movedim(dim, 0)
        rows = operator(x.reshape(math.prod(x.shape[:2]), x.shape[2]), *settings)
        return rows.reshape(*x.shape[:2], rows.shape[-1]), 0

    return rule


for _operator, _flips in ((fwht, False), (fastfood, True), (shuffle, True)):
    _operator.register_autograd(_backward(_operator, _flips), setup_context=_keep_settings)
    _operator.register_vmap(_more_rows(_operator))
