"""Kernels as differentiable functions of torch tensors: on CPU memory, by Triton on CUDA, and in compiled programs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import array_api_compat.torch as namespace
import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import FFT_DTYPES, LEAST_FASTFOOD, constant_result, dft2_by_fft, dft2_in_chunks
from ._kernels import kernels

#: The dtypes of kernels, with NumPy's.
_DTYPES = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}

# -- A kernel as a differentiable function of tensors ------------------------------------------------------------------


Map = Callable[[Tensor], Tensor]
Result = TypeVar("Result")
# Classes of tensors whose elements a kernel may access.
_PLAIN = (Tensor, torch.nn.Parameter)
# torch includes this key while a pre-dispatch mode is active, and checking the key is faster.
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


# torch would bind the arguments to the signature in each call, which takes longer than a small transform.
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


# -- Kernels on CPU tensors, which share their memory with a NumPy array -----------------------------------------------


def _fwht_in_memory(x: Tensor, scale: float, axis: int, fallback: Map) -> Tensor | None:
    """Compute ``scale * H x`` along an axis, counted from the last, or return None if no kernel accepts x."""
    compiled = kernels("walsh") if x.is_cpu and in_memory(x) else None
    if compiled is None:
        return None
    # An autograd function takes longer than a small transform.
    if not recorded(x):
        return torch.from_numpy(compiled.transform(on_memory(_array, x), scale, axis))

    def transformed(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("walsh").transform(_array(x), scale, axis))

    return linear_map(x, KernelPair.symmetric(transformed, fallback))


def fwht_at_once(x: Tensor, normalize: bool) -> Tensor | None:
    """Compute the transform of a small vector without checks before; None for any other tensor."""
    if x.ndim != 1 or x.dtype not in _DTYPES or not (x.is_cpu and in_memory(x)) or recorded(x):
        return None
    compiled = kernels("walsh")
    transformed = None if compiled is None else compiled.transform_at_once(on_memory(_array, x), normalize)
    return None if transformed is None else torch.from_numpy(transformed)


def fwht_into(x: Tensor, scale: float, axis: int, out: Tensor) -> bool:
    """Compute ``scale * H x`` along an axis into a tensor, without derivatives; False if no kernel can."""
    if not (x.is_cpu and in_memory(x) and in_memory(out)) or recorded(x) or recorded(out):
        return False
    # Writing to a conjugated or negated view would take another way.
    compiled = kernels("walsh") if x.is_contiguous() and out.is_contiguous() and not out.is_neg() else None
    if compiled is None or out._is_zerotensor():
        return False
    source, target = on_memory(_array, x), on_memory(_array, out)
    if not (source.flags.aligned and target.flags.aligned):
        return False
    if x.data_ptr() != out.data_ptr() and np.may_share_memory(source, target):
        return False
    compiled.transform_into(source, target, scale, axis)
    torch.autograd.graph.increment_version(out)
    return True


def _array(x: Tensor) -> np.ndarray:
    """Return the memory of a tensor as an array."""
    return (x.detach() if x.requires_grad else x).numpy()


def _fastfood_in_memory(backend: Any, x: Tensor, f: Any, adjoint: bool) -> Tensor | None:
    """Compute the linear part of a projection, or its adjoint, or return None if no kernel accepts x."""
    if not (f.padded >= LEAST_FASTFOOD and x.is_cpu and x.dtype in _DTYPES and x.numel() and in_memory(x)):
        return None
    # A derivative would need the adjoint, which the kernels have in single precision.
    compiled, record = kernels("fastfood"), recorded(x)
    if compiled is None or not compiled.takes(_DTYPES[x.dtype], f.padded, adjoint or record):
        return None

    def projected(x: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(_array(x), f, False))

    def pulled(y: Tensor) -> Tensor:
        return torch.from_numpy(kernels("fastfood").linear(_array(y), f, True))

    if not record:
        return on_memory(pulled if adjoint else projected, x)
    pair = KernelPair(projected, pulled, f.plain(backend))
    return linear_map(x, pair.transposed if adjoint else pair)


# -- Triton kernels on CUDA tensors ------------------------------------------------------------------------------------


#: Compute capabilities with float64 at half the speed of float32, from NVIDIA's tables (not measured): drawing a normal
#: number there takes about as long as three copies of it (H100), but as 24 at 1/64 of the speed (RTX 4090). Cards
#: that are not listed cache the normal numbers, 4 bytes each.
_FAST_FLOAT64 = {(8, 0), (9, 0), (10, 0)}
#: The lowest compute capability that Triton supports.
_CAPABILITY = (8, 0)


def there_are_kernels(x: Tensor) -> bool:
    """Return whether the Triton kernels accept x, or the tensor that x represents in a torch.func transformation.

    In a compiled program they are operators of torch. An exported one has to run anywhere, so it contains none.
    """
    if torch.compiler.is_compiling():
        return is_supported(x) and not torch.compiler.is_exporting() and forward_ad._current_level < 0
    return is_supported(x) and in_memory(x)


def is_supported(x: Tensor) -> bool:
    """Return whether Triton compiles for the device of x."""
    return x.is_cuda and torch.version.hip is None and _is_capable(x.device)


@constant_result
def _is_capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _CAPABILITY


@constant_result
def _draws_fast(device: torch.device) -> bool:
    """Return whether a device draws normal numbers fast enough not to cache them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _FAST_FLOAT64


@constant_result
def _has_launcher() -> bool:
    return kernels("gpu.triton_launcher") is not None


def lacking() -> frozenset[str]:
    """Return the methods without a kernel on a supported device: none with Triton, all of them without."""
    return frozenset() if kernels("gpu.triton_launcher") else frozenset({"fwht", "fastfood", "shuffle"})


def _launches(x: Tensor) -> bool:
    """Return whether the Triton kernels can be run on x, of a supported device."""
    if x.dtype not in _DTYPES:
        return False
    return _has_launcher() if torch.compiler.is_compiling() else kernels("gpu.triton_launcher") is not None


def _launcher(x: Tensor) -> Any:
    launcher = kernels("gpu.triton_launcher")
    if launcher is None:
        raise RuntimeError(
            f"this program was compiled with Triton kernels for a tensor on {x.device}, and Triton 3.5 or newer cannot "
            "be imported here: install it, or compile the program again"
        )
    return launcher


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """Run a kernel for (vectors, n_in) on x's device, for x with any batch and strides."""
    batch = x.shape[:-1]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])


# The kernels are operators of torch in compiled programs, for ``(vectors, n)``: with rules for shapes without numbers
# (fake tensors), gradients and vmap. Outside of them :func:`linear_map` costs less per call, and also has forward
# derivatives. An operator can be registered without Triton, which is imported in the first call.


def _hadamard_rows(x: Tensor, scale: float) -> Tensor:
    """Compute ``scale * H x`` of every row."""
    launcher, length = _launcher(x), x.shape[-1]
    return _by_rows(lambda rows: launcher.fwht(rows, length, scale, length), x)


def _fastfood_rows(x: Tensor, gain: Tensor | None, recipe: str, n_in: int, n_out: int, adjoint: bool) -> Tensor:
    """Compute the linear part of F of every row, or its adjoint, drawing the normal numbers too if ``gain`` is None."""
    launcher = _launcher(x)
    # The recipe (:attr:`tnadapt.algebra.maps.fastfood.Linear.recipe`) is text, because a seed is an unsigned 64-bit
    # integer, which operators do not take.
    length, period, seed, group, signs = map(int, recipe.split())
    f = launcher.Drawn(n_in, n_out, length, period, seed, group, bool(signs), gain)
    return _by_rows(functools.partial(launcher.fastfood_adjoint if adjoint else launcher.fastfood, f=f), x)


def _shuffled_rows(x: Tensor, recipe: str, inverse: bool) -> Tensor:
    """Permute every row, or invert the permutation of the seed and group in ``recipe``."""
    seed, group = map(int, recipe.split())
    return _by_rows(functools.partial(_launcher(x).shuffle, seed=seed, group=group, inverse=inverse), x)


fwht_operator = torch.library.custom_op("tnadapt::fwht", _hadamard_rows, mutates_args=())
fastfood_operator = torch.library.custom_op("tnadapt::fastfood", _fastfood_rows, mutates_args=())
shuffle_operator = torch.library.custom_op("tnadapt::shuffle", _shuffled_rows, mutates_args=())


@fwht_operator.register_fake
def _(x: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape)


@fastfood_operator.register_fake
def _(x: Tensor, gain: Tensor | None, recipe: str, n_in: int, n_out: int, adjoint: bool) -> Tensor:
    return x.new_empty(x.shape[0], n_in if adjoint else n_out)


@shuffle_operator.register_fake
def _(x: Tensor, recipe: str, inverse: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _backward(operator: Any, flips: bool) -> Any:
    """Return an operator's gradient rule: the operator itself, its last flag (adjoint or not) flipped if ``flips``."""

    def rule(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, last = ctx.settings
        return operator(grad, *others, not last if flips else last), *[None] * len(ctx.settings)

    return rule


def _in_batches(operator: Any, x: Tensor, *settings: Any) -> Tensor:
    """Call an operator for (vectors, n) on x with any batch."""
    rows: Tensor = operator(x.reshape(-1, x.shape[-1]), *settings)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _more_rows(operator: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *settings: Any) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        x = x.movedim(dim, 0)
        rows = operator(x.reshape(math.prod(x.shape[:2]), x.shape[2]), *settings)
        return rows.reshape(*x.shape[:2], rows.shape[-1]), 0

    return rule


for _operator, _flips in ((fwht_operator, False), (fastfood_operator, True), (shuffle_operator, True)):
    _operator.register_autograd(_backward(_operator, _flips), setup_context=_keep_settings)
    _operator.register_vmap(_more_rows(_operator))


# -- The kernel for a tensor, on any device ----------------------------------------------------------------------------


def fwht(x: Tensor, scale: float, axis: int, fallback: Map) -> Tensor | None:
    """Compute ``scale * H x`` along an axis, counted from the last; None if no kernel accepts x."""
    if not there_are_kernels(x):
        return _fwht_in_memory(x, scale, axis, fallback)
    if not _launches(x):
        return None
    if torch.compiler.is_compiling():
        return _in_batches(fwht_operator, x.movedim(axis, -1), scale).movedim(-1, axis)

    def transformed(x: Tensor) -> Tensor:
        return _hadamard_rows(x.movedim(axis, -1), scale).movedim(-1, axis)

    return linear_map(x, KernelPair.symmetric(transformed, fallback))


def fastfood(backend: Any, x: Tensor, f: Any, adjoint: bool) -> Tensor | None:
    """Compute the linear part of F along the last axis, or its adjoint; None if no kernel accepts x."""
    if not there_are_kernels(x):
        return _fastfood_in_memory(backend, x, f, adjoint)
    if not _launches(x):
        return None
    gain = None if _draws_fast(x.device) else backend.fixed(f, "gain", x.device)
    settings = gain, f.recipe, f.n_in, f.n_out
    if torch.compiler.is_compiling():
        return _in_batches(fastfood_operator, x, *settings, adjoint)
    forward, pulled = (lambda x, back=back: _fastfood_rows(x, *settings, back) for back in (False, True))
    pair = KernelPair(forward, pulled, f.plain(backend))
    return linear_map(x, pair.transposed if adjoint else pair)


def shuffle(x: Tensor, recipe: str, inverse: bool, fallback: tuple[Map, Map]) -> Tensor | None:
    """Permute the last axis, or invert the permutation; None if no kernel accepts x."""
    if not (there_are_kernels(x) and _launches(x)):
        return None
    if torch.compiler.is_compiling():
        return _in_batches(shuffle_operator, x, recipe, inverse)
    forward, back = (functools.partial(_shuffled_rows, recipe=recipe, inverse=inverse) for inverse in (False, True))
    pair = KernelPair(forward, back, fallback)
    return linear_map(x, pair.transposed if inverse else pair)
