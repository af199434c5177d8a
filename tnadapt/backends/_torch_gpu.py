"""CUDA tensors of torch: which of them the Triton kernels take, and the launch on their rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _torch_maps as operators
from . import constant_result
from ._kernels import kernels
from ._torch_maps import KernelPair, Map, in_memory, linear_map

#: Compute capabilities with float64 at half the speed of float32, from NVIDIA's tables (not measured): drawing a normal
#: number there takes about as long as three copies of it (H100), elsewhere at 1/64 of the speed 24 (RTX 4090). So cards
#: that are not listed keep 4 bytes for each.
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
    """Return whether a device draws normal numbers in less time than it would take to justify keeping them."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _FAST_FLOAT64


@constant_result
def _has_launcher() -> bool:
    return kernels("gpu.triton_launcher") is not None


def lacking() -> frozenset[str]:
    """Return the methods without a kernel on a supported device: none with Triton, all of them without."""
    return frozenset() if kernels("gpu.triton_launcher") else frozenset({"fwht", "fastfood", "shuffle"})


def fwht(x: Tensor, scale: float, axis: int, fallback: Map) -> Tensor | None:
    """Compute ``scale * H x`` along an axis, counted from the last; None if there is no kernel for x."""
    if torch.compiler.is_compiling():
        last = _compiled(operators.fwht, x.movedim(axis, -1), scale)
        return None if last is None else last.movedim(-1, axis)
    launcher, length = _launcher(x), x.shape[axis]
    if launcher is None:
        return None

    def transformed(x: Tensor) -> Tensor:
        rows = functools.partial(launcher.fwht, length=length, scale=scale, n_out=length)
        return _by_rows(rows, x.movedim(axis, -1)).movedim(-1, axis)

    return linear_map(x, KernelPair.symmetric(transformed, fallback))


def fastfood(backend: Any, x: Tensor, draws: Any, n_in: int, adjoint: bool, fallback: tuple[Map, Map]) -> Tensor | None:
    """Compute the linear part of F along the last axis, or its adjoint; None if there is no kernel for x."""
    if torch.compiler.is_compiling():
        gain = None if _draws_fast(x.device) else backend.fixed(draws, "gain", x.device)
        return _compiled(operators.fastfood, x, gain, draws.recipe, n_in, draws.lengths["diagonal"], adjoint)
    launcher = _launcher(x)
    if launcher is None:
        return None
    f = launcher.Drawn.of(draws, n_in, None if _draws_fast(x.device) else backend.fixed(draws, "gain", x.device))
    forward, pulled = functools.partial(launcher.fastfood, f=f), functools.partial(launcher.fastfood_adjoint, f=f)
    pair = KernelPair(functools.partial(_by_rows, forward), functools.partial(_by_rows, pulled), fallback)
    return linear_map(x, pair.transposed if adjoint else pair)


def shuffle(x: Tensor, recipe: str, inverse: bool, fallback: tuple[Map, Map]) -> Tensor | None:
    """Permute the last axis, or invert the permutation; None if there is no kernel for x."""
    if torch.compiler.is_compiling():
        return _compiled(operators.shuffle, x, recipe, inverse)
    launcher = _launcher(x)
    if launcher is None:
        return None
    seed, group = map(int, recipe.split())

    def permuted(x: Tensor, back: bool) -> Tensor:
        return _by_rows(functools.partial(launcher.shuffle, seed=seed, group=group, inverse=back), x)

    pair = KernelPair(functools.partial(permuted, back=False), functools.partial(permuted, back=True), fallback)
    return linear_map(x, pair.transposed if inverse else pair)


def _compiled(operator: Any, x: Tensor, *settings: Any) -> Tensor | None:
    """Call an operator for (vectors, n) on x with any batch; None if there is no kernel for x."""
    if x.dtype not in (torch.float32, torch.float64) or not _has_launcher():
        return None
    rows: Tensor = operator(x.reshape(-1, x.shape[-1]), *settings)
    return rows.reshape(*x.shape[:-1], rows.shape[-1])


def _launcher(x: Tensor) -> Any:
    return kernels("gpu.triton_launcher") if x.dtype in (torch.float32, torch.float64) else None


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """Run a kernel for (vectors, n_in) on x's device, for x with any batch and strides."""
    batch = x.shape[:-1]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])
