"""The Triton kernels as operators that torch knows by name, for programs of torch.compile, which cannot trace a launch.

They act on ``(vectors, n)``, and have rules for shapes without numbers (fake tensors), gradients and vmap. Outside of
compiled programs :mod:`tnadapt.backends._torch_maps` costs less per call, and also has forward derivatives. An operator
can be registered without Triton, which is imported in the first call.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._kernels import kernels

__all__ = ["fastfood", "fwht", "shuffle"]


def _launcher(x: Tensor) -> Any:
    found = kernels("gpu.triton_launcher")
    if found is None:
        raise RuntimeError(
            f"this program was compiled with Triton kernels for a tensor on {x.device}, and Triton 3.5 or newer cannot "
            "be imported here: install it, or compile the program again"
        )
    return found


@torch.library.custom_op("tnadapt::fwht", mutates_args=())
def fwht(x: Tensor, scale: float) -> Tensor:
    """Compute ``scale * H x`` of every row."""
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        found: Tensor = _launcher(x).fwht(x.contiguous(), x.shape[1], scale, x.shape[1])
    return found


@torch.library.custom_op("tnadapt::fastfood", mutates_args=())
def fastfood(x: Tensor, gain: Tensor | None, recipe: str, n_in: int, n_out: int, adjoint: bool) -> Tensor:
    """Compute the linear part of F of every row, or its adjoint; without ``gain``, normal numbers are drawn as well.

    The recipe has the integers of the draws (:attr:`tnadapt.algebra.maps._fastfood_draws.FastfoodDraws.recipe`): as
    text, because a seed of 64 bits without a sign is no integer of an operator.
    """
    launcher = _launcher(x)
    length, period, seed, group, signs = map(int, recipe.split())
    f = launcher.Drawn(n_in, n_out, length, period, seed, group, bool(signs), gain)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        found: Tensor = (launcher.fastfood_adjoint if adjoint else launcher.fastfood)(x.contiguous(), f)
    return found


@torch.library.custom_op("tnadapt::shuffle", mutates_args=())
def shuffle(x: Tensor, recipe: str, inverse: bool) -> Tensor:
    """Permute every row, or invert the permutation; the recipe has seed and group."""
    seed, group = map(int, recipe.split())
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        found: Tensor = _launcher(x).shuffle(x.contiguous(), seed, group, inverse)
    return found


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


def _fwht_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return fwht(grad, *ctx.settings), None


def _fastfood_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    *rest, adjoint = ctx.settings
    return fastfood(grad, *rest, not adjoint), None, None, None, None, None


def _shuffle_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    recipe, inverse = ctx.settings
    return shuffle(grad, recipe, not inverse), None, None


fwht.register_autograd(_fwht_backward, setup_context=_keep_settings)
fastfood.register_autograd(_fastfood_backward, setup_context=_keep_settings)
shuffle.register_autograd(_shuffle_backward, setup_context=_keep_settings)


# -- vmap: more rows -------------------------------------------------------------------------------------------


def _more_rows(operator: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, *settings: Any) -> tuple[Tensor, int]:
        dim = in_dims[0]
        assert dim is not None, "vmap calls a rule only where something is batched"
        x = x.movedim(dim, 0)
        found = operator(x.reshape(math.prod(x.shape[:2]), x.shape[2]), *settings)
        return found.reshape(*x.shape[:2], found.shape[-1]), 0

    return rule


for _operator in (fwht, fastfood, shuffle):
    _operator.register_vmap(_more_rows(_operator))
