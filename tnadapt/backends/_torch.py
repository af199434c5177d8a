"""The torch backend, with the parts that torch.compile must not trace marked as such."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import array_api_compat.torch as namespace
import numpy as np
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from tnadapt.errors import BackendError

from . import (
    CALLED_AT_ONCE,
    LAUNCHED_AT_ONCE,
    OPTIONAL,
    Array,
    Backend,
    FixedArrays,
    Map,
    constant_result,
    kron_by_rows,
    kron_plain,
    short_rows,
)
from . import _torch_kernels as torch_kernels
from ._kernels import kernels

# Rows of up to this length are slow in products with broadcasting.
_SHORT = 8
# For smaller results, additional operations do not pay off.
_FEW = 1 << 15
_FLOAT_NAMES = {
    torch.float64: "float64", torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"
}  # fmt: skip

# torch.compile treats the return value as a constant and does not trace the call: see TorchBackend.fixed.
constant_result(FixedArrays.name_of)


class TorchBackend(Backend):
    """torch tensors, on any device; differentiable by autograd and torch.func."""

    name = "torch"
    types = (torch.Tensor, torch.nn.Parameter)

    def __init__(self) -> None:
        super().__init__(namespace)

    def owns(self, x: Any) -> bool:
        return isinstance(x, torch.Tensor)

    def dtype_name(self, x: Array) -> str:
        # Formatting a dtype takes longer than a dictionary lookup.
        return _FLOAT_NAMES.get(x.dtype) or super().dtype_name(x)

    def device(self, x: Array) -> Any:
        return x.device

    def is_concrete(self, x: Array) -> bool:
        # Under a compiler, a functional transform or forward differentiation, a tensor is more than its values, and
        # must not be kept.
        if type(x) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
            return False
        if is_functorch_wrapped_tensor(x):
            return False
        return forward_ad._current_level < 0 or forward_ad.unpack_dual(x).tangent is None  # type: ignore[no-untyped-call]

    def differentiates(self, x: Array) -> bool:
        return not self.is_concrete(x) or (x.requires_grad and torch.is_grad_enabled())

    def all_finite(self, x: Array) -> bool:
        # One pass, without an array of magnitudes. The sum of squares of finite numbers may overflow.
        if x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and x.numel() < 1 << 31:
            flat = x.detach().reshape(-1)
            if math.isfinite(float(torch.dot(flat, flat))):
                return True
        return super().all_finite(x)

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        try:
            place = torch.device("cpu" if device is None else device)
        except (RuntimeError, TypeError) as error:
            raise BackendError(f"torch knows no device {device!r}: {error}") from error
        library_dtype = None if dtype is None else self.dtype(dtype)
        try:
            return torch.tensor(array, dtype=library_dtype, device=place)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch cannot use device {device!r} here: {error}") from error

    def constant(self, array: np.ndarray, device: Any) -> Array:
        # The tensor is cached and used again, so it must not be an inference tensor, which autograd refuses to save.
        with torch.inference_mode(False):
            return torch.from_numpy(array).to(device)

    def fixed(self, source: FixedArrays, key: Hashable, device: Any, keep: bool = True) -> Array:
        # Export without Dynamo runs this code on placeholders, and must leave none behind: super() does not keep them.
        if not torch.compiler.is_dynamo_compiling():
            return super().fixed(source, key, device, keep)
        # torch.compile must not trace the drawing (NumPy's integer arithmetic): `name_of` runs outside the graph and
        # leaves the array as an attribute of `source`, which the graph then reads like any other tensor. The array is
        # always kept, whatever `keep` says: the compiled program needs it for as long as it exists.
        return getattr(source, source.name_of(self.name, key, device))

    def to_numpy(self, x: Array) -> np.ndarray:
        x = x.detach().cpu()
        return np.asarray(x.float() if x.dtype is torch.bfloat16 else x)

    def detached(self, x: Array) -> Array:
        return x.detach()

    def with_pullback(
        self, x: Array, values: Sequence[Array], pullback: Callable[[Array, Sequence[Array]], Array]
    ) -> list[Array]:
        return list(_WithPullback.apply(pullback, x, *values))  # type: ignore[no-untyped-call]

    def gradient(
        self, function: Callable[[dict[str, Array]], Array], arrays: dict[str, Array]
    ) -> dict[str, Array] | None:
        leaves = {name: array.detach().requires_grad_() for name, array in arrays.items()}
        gradients = torch.autograd.grad(function(leaves), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    def matmul(self, a: Array, b: Array) -> Array:
        return self._plain(torch.matmul, a, b)

    def precise_matmul(self, a: Array, b: Array) -> Array:
        if a.dtype is not torch.float32 or not _rounds_products(a.device.type):
            return self.matmul(a, b)
        # The setting is not changed temporarily: all threads share it, and a compiled program would not contain it.
        return self.matmul(a.double(), b.double()).float()

    def kron(self, a: Array, b: Array) -> Array:
        left, right = a.shape, b.shape
        if short_rows(left, right, _SHORT, _FEW):
            return kron_by_rows(self, a, b)
        # torch.kron has the least overhead, but raises an error for some tensors whose memory is not in C order.
        ordered = a.is_contiguous() and b.is_contiguous() and 1 not in left and 1 not in right
        return torch.kron(a, b) if ordered else kron_plain(self, a, b)

    def sum(self, x: Array, axis: int) -> Array:
        return self._plain(torch.sum, x, axis)

    def sqrt(self, x: Array) -> Array:
        # On the CPU torch.sqrt is MKL's, which is off by one unit in the last place for one number in fifty.
        if x.dtype is not torch.float64:
            return torch.sqrt(x.double()).to(x.dtype)
        root = torch.sqrt(x)
        with torch.no_grad():
            missing = _missing(root, x)
        return root + missing

    def _plain(self, function: Callable[..., Array], x: Array, *rest: Any) -> Array:
        # Autocast would compute in half precision, and ΔW would have another dtype than its parameters. torch has no
        # autocast for the meta device.
        if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return function(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    def split(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        # A single node in the graph: its backward pass writes the whole gradient once.
        return list(torch.split(x, list(sizes)))

    def pad_last(self, x: Array, size: int) -> Array:
        # torch supports batched gradients (is_grads_batched) for pad, but not for concat.
        missing = size - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    def take(self, x: Array, indices: Array, axis: int = -1) -> Array:
        return torch.index_select(x, axis, indices)

    def lacks(self, x: Array) -> frozenset[str]:
        if torch_kernels.there_are_kernels(x):
            return torch_kernels.lacking()
        compiled = {"fwht": "walsh", "fastfood": "fastfood"} if x.device.type == "cpu" else {}
        present = {"gradient", "dft2", *(name for name, part in compiled.items() if kernels(part))}
        return frozenset(set(OPTIONAL) - present)

    def at_once(self, x: Array) -> int:
        return {"cpu": CALLED_AT_ONCE, "cuda": LAUNCHED_AT_ONCE}.get(x.device.type, 0)

    def fwht(self, x: Array, scale: float, axis: int, fallback: Map) -> Array | None:
        return torch_kernels.fwht(x, scale, axis, fallback)

    def fwht_at_once(self, x: Array, normalize: bool) -> Array | None:
        return torch_kernels.fwht_at_once(x, normalize)

    def fwht_into(self, x: Array, scale: float, axis: int, out: Array) -> bool:
        self._refuse_derivatives(x, out)
        return torch_kernels.fwht_into(x, scale, axis, out)

    def write(self, out: Array, x: Array) -> None:
        self._refuse_derivatives(x, out)
        out.copy_(x)

    def _refuse_derivatives(self, *arrays: Array) -> None:
        if torch.is_grad_enabled() and any(array.requires_grad for array in arrays):
            raise BackendError(
                "no derivatives are recorded of a result that is written to a given tensor (out=…), and one of the "
                "tensors requires gradients: leave it out, or compute under torch.no_grad()"
            )

    def fastfood(self, x: Array, f: Any, adjoint: bool) -> Array | None:
        return torch_kernels.fastfood(self, x, f, adjoint)

    def shuffle(self, x: Array, recipe: str, inverse: bool, fallback: tuple[Map, Map]) -> Array | None:
        return torch_kernels.shuffle(x, recipe, inverse, fallback)

    def dft2(self, x: Array, fallback: Map) -> Array | None:
        return torch_kernels.dft2(x, fallback)


class _WithPullback(torch.autograd.Function):
    """Arrays that were computed without autograd, with a given derivative."""

    @staticmethod
    def forward(ctx: Any, pullback: Callable[[Array, Sequence[Array]], Array], x: Array, *values: Array) -> Any:
        ctx.pullback = pullback
        ctx.save_for_backward(x)
        return tuple(value.detach().clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> Any:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            gradient = ctx.pullback(x.detach(), [cotangent.detach() for cotangent in cotangents])
        if torch.is_grad_enabled():
            gradient = _OnceDifferentiable.apply(gradient, x, *cotangents)  # type: ignore[no-untyped-call]
        return None, gradient, *[None] * len(cotangents)


class _OnceDifferentiable(torch.autograd.Function):
    """A gradient without a derivative of its own, which autograd would otherwise take to be zero."""

    @staticmethod
    def forward(ctx: Any, gradient: Array, *inputs: Array) -> Array:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Array) -> Any:
        raise BackendError(
            "second derivatives of decompositions are not computed: leave create_graph=True out, or detach the gradient"
        )


@constant_result
def _rounds_products(device: str) -> bool:
    """Return whether products of float32 matrices may be computed in TF32 or bfloat16 on a type of device."""
    # torch.get_float32_matmul_precision() raises an error if the setting of only one library was changed.
    settings: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn, "xpu": torch.backends.mkldnn}.get(
        device
    )
    return settings is not None and settings.matmul.fp32_precision in ("tf32", "bf16")


def _missing(root: Array, x: Array) -> Array:
    """Return the correction of a float64 square root to the correctly rounded one: zero, or units in the last place."""
    # One step of Newton's method, with the square of the root as an exact sum of two numbers (Dekker).
    large = root * 134217729.0
    high = large - (large - root)
    low = root - high
    square = root * root
    error = ((high * high - square) + 2.0 * high * low) + low * low
    better = root + ((x - square) - error) / (2.0 * root)
    return torch.where(torch.isfinite(better), better - root, torch.zeros_like(root))
