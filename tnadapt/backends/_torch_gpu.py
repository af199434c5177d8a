"""torch's way to the kernels for CUDA tensors: which tensors have one, and what is run on their rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ._kernels import kernels
from ._torch_maps import Map, Way, in_memory, linear_map

__all__ = ["fastfood", "fwht", "lacking", "shuffle", "there_are_kernels"]

#: The least that Triton promises to compile for.
_CAPABILITY = (8, 0)


def there_are_kernels(x: Tensor) -> bool:
    """Whether x is what Triton's kernels take, or stands for it in a transformation of torch.func."""
    return (
        x.is_cuda
        and in_memory(x)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= _CAPABILITY
    )


def lacking() -> frozenset[str]:
    """The methods there are no kernels for, though the device would take them: all of them without Triton."""
    return frozenset() if kernels("gpu.triton_launcher") else frozenset({"fwht", "fastfood", "shuffle"})


def fwht(x: Tensor, scale: float, axis: int, plain: Map) -> Tensor | None:
    """``scale * H x`` along an axis, counted from the last; None where Triton cannot be imported."""
    room, length = _room(x), x.shape[axis]
    if room is None:
        return None

    def transformed(x: Tensor) -> Tensor:
        rows = functools.partial(room.fwht, length=length, scale=scale, n_out=length)
        return _by_rows(rows, x.movedim(axis, -1)).movedim(-1, axis)

    way = Way(transformed, plain)
    return linear_map(x, way, way)  # H is symmetric


def fastfood(x: Tensor, draws: Any, n_in: int, adjoint: bool, plain: tuple[Map, Map]) -> Tensor | None:
    """The linear part of F along the last axis, or its adjoint; None where Triton cannot be imported."""
    room = _room(x)
    if room is None:
        return None
    f = room.Drawn.of(draws, n_in)
    there = Way(functools.partial(_by_rows, functools.partial(room.fastfood, f=f)), plain[0])
    back = Way(functools.partial(_by_rows, functools.partial(room.fastfood_adjoint, f=f)), plain[1])
    return linear_map(x, back, there) if adjoint else linear_map(x, there, back)


def shuffle(x: Tensor, seed: int, group: int, inverse: bool, plain: tuple[Map, Map]) -> Tensor | None:
    """The last axis permuted, or permuted back; None where Triton cannot be imported."""
    room = _room(x)
    if room is None:
        return None
    there, back = (
        Way(functools.partial(_by_rows, functools.partial(room.shuffle, seed=seed, group=group, inverse=way)), twin)
        for way, twin in zip((False, True), plain, strict=True)
    )
    return linear_map(x, back, there) if inverse else linear_map(x, there, back)


def _room(x: Tensor) -> Any:
    return kernels("gpu.triton_launcher") if x.dtype in (torch.float32, torch.float64) else None


def _by_rows(kernel: Map, x: Tensor) -> Tensor:
    """A kernel of (vectors, n_in), run on x's own device, for x of any batch and strides."""
    batch = x.shape[:-1]
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows = kernel(x.reshape(batch.numel(), x.shape[-1]).contiguous())
    return rows.reshape(*batch, rows.shape[-1])
