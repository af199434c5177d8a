"""LoRA-GA: LoRA's factors start at singular vectors of the gradient of each weight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from ._adapter import Adapter
from ._start_targets import Progress, StartTarget, adapter_of, as_base, start_targets

__all__ = ["lora_ga"]

#: For each direction, the singular vectors of which A and B are made, given the rank.
_DIRECTIONS: dict[str, Callable[[int], tuple[slice, slice]]] = {
    "ArB2r": lambda r: (slice(0, r), slice(r, 2 * r)),
    "A2rBr": lambda r: (slice(r, 2 * r), slice(0, r)),
    "ArBr": lambda r: (slice(1, 2 * r, 2), slice(0, 2 * r, 2)),
}


def _stable(target: StartTarget, values: Tensor, gamma: float) -> tuple[float, Tensor | float]:
    factor = target.target.shape[0] ** 0.25 / gamma**0.5
    return factor, factor


def _gradient_descent(target: StartTarget, values: Tensor, gamma: float) -> tuple[float, Tensor | float]:
    return 1.0 / target.scale, 1.0 / target.scale


def _unit(target: StartTarget, values: Tensor, gamma: float) -> tuple[float, Tensor | float]:
    return 1.0, 1.0


def _of_peft(target: StartTarget, values: Tensor, gamma: float) -> tuple[float, Tensor | float]:
    return 1.0, values * (target.target.shape[0] ** 0.25 / gamma**0.5)


#: For each scale, the factors of A and of the columns of B, given the singular values that belong to B.
_SCALES: dict[str, Callable[[StartTarget, Tensor, float], tuple[float, Tensor | float]]] = {
    "stable": _stable,
    "gd": _gradient_descent,
    "unit": _unit,
    "peft": _of_peft,
}


@checks_arguments
def lora_ga(
    adapter: Adapter | nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    direction: str = "ArB2r",
    scale: str = "stable",
    gamma: float = 16.0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compute LoRA-GA's start: A and B from the singular vectors of the gradient of each weight.

    Parameters
    ----------
    adapter : Adapter or Module
        An adapter with ``tnadapt.presets.lora(rank, start="given")`` on linear layers, or a model with only that one.
    batches : iterable
        A few batches of the task's data; their gradients are averaged.
    loss : callable
        Returns the loss of a batch, ``loss(model, batch)``, as training would.
    direction : {"ArB2r", "A2rBr", "ArBr"}
        Which singular vectors A and B are made of: A of the first r and B of the next, the reverse, or alternating.
    scale : {"stable", "gd", "unit", "peft"}
        The factor of both: ``rows**(1/4) / sqrt(gamma)``, ``1 / s`` with s = alpha / rank, or 1. "peft" is what PEFT
        calls "stable": A has norm 1, and B is also multiplied by the singular values.
    gamma : float
        The γ of "stable"; larger is smaller.
    progress : callable, optional
        Called with the number of batches done, and their number if it is known.

    Returns
    -------
    dict of str to Tensor
        For :meth:`tnadapt.torch.Adapter.start_from`: ``factor0`` is B, ``factor1`` A transposed. The largest entry of
        each left singular vector is positive.

    Raises
    ------
    ConfigError
        If the adapter is not LoRA of linear layers with ``start="given"``, twice the rank is more than a weight has
        singular values, or a setting is unknown.
    ShapeError
        If there is no batch, a loss is not a number, or a gradient has too few singular values.
    TargetError
        If the model has no adapter, or several, or a weight is quantized.

    Notes
    -----
    The model runs without the adapter and in evaluation mode, so that dropout draws nothing. Memory: the gradient of
    every adapted weight, and their sums in float32 (float64 for a float64 weight); the singular value decompositions
    are computed in float64, one after another, at about ``20 d n min(d, n)`` multiply-adds each.

    References
    ----------
    Wang, Yu, Li, "LoRA-GA: low-rank adaptation with gradient approximation", arXiv 2407.05000.

    Examples
    --------
    >>> import torch, tnadapt as tna, tnadapt.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> adapter = tnadapt.torch.attach(model, tna.presets.lora(2, start="given"), "all-linear")
    >>> x = torch.randn(3, 10, 6)
    >>> adapter.start_from(tnadapt.torch.starts.lora_ga(adapter, x, lambda model, batch: model(batch).square().mean()))
    >>> model(x).square().mean().backward()
    >>> all(p.grad.any() for p in adapter.parameters())
    True
    """
    for what, given, known in (("direction", direction, _DIRECTIONS), ("scale", scale, _SCALES)):
        if given not in known:
            raise ConfigError(f"{what} must be one of {', '.join(map(repr, known))}; got {safe_repr(given)}")
    if not 0.0 < gamma <= sys.float_info.max:
        raise ConfigError(f"gamma must be a positive number; got {safe_repr(gamma)}")
    adapter = adapter_of(adapter)
    targets = start_targets(adapter, "lora_ga")
    for target in targets:
        if 2 * target.rank > min(target.target.shape):
            raise ConfigError(
                f"lora_ga takes 2 * rank singular vectors of a gradient, and that of {target.target.name}, of "
                f"{target.target.shape}, has {min(target.target.shape)}: use a rank of "
                f"{min(target.target.shape) // 2} or less"
            )
    gradients = _gradients(adapter, targets, batches, loss, progress)
    found = {}
    for target in targets:
        whole = gradients[target.layer]
        left, values, right = torch.linalg.svd(target.target.select(whole).double(), full_matrices=False)
        if not values[2 * target.rank - 1] > 1e-9 * values[0]:
            raise ShapeError(
                f"the gradient of {target.target.name} has fewer than {2 * target.rank} singular values above rounding "
                "errors: give more batches, or a smaller rank"
            )
        signs = torch.sign(torch.gather(left, 0, left.abs().argmax(0, keepdim=True)))[0]
        of_a, of_b = _DIRECTIONS[direction](target.rank)
        by_a, by_b = _SCALES[scale](target, values[of_b], gamma)
        found[target.left] = ((left * signs)[:, of_b] * by_b).float()
        found[target.right] = ((right.T * signs)[:, of_a] * by_a).float()
    return found


def _gradients(
    adapter: Adapter,
    targets: list[StartTarget],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    progress: Progress | None,
) -> dict[nn.Module, Tensor]:
    """Return the mean gradient of each layer's weight."""
    weights: dict[nn.Module, nn.Parameter] = {}
    for target in targets:
        weight = target.layer._parameters.get("weight")
        if weight is None or not weight.is_floating_point():
            raise ConfigError(
                f"lora_ga needs the gradient of {target.target.name}, which is quantized and has none: use "
                "tnadapt.torch.starts.eva, or leave it out of the targets"
            )
        weights[target.layer] = weight
    was = {layer: weight.requires_grad for layer, weight in weights.items()}
    total, done = len(batches) if isinstance(batches, Sized) else None, 0
    sums: dict[nn.Module, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad(), as_base(adapter):
            for done, batch in enumerate(batches, start=1):
                value = loss(adapter.model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
                    raise ShapeError(f"loss must return one finite number as a tensor; got {safe_repr(value)}")
                for layer, gradient in zip(weights, _of(value, weights, adapter), strict=True):
                    wide = torch.float64 if gradient.dtype is torch.float64 else torch.float32
                    sums[layer] = sums[layer] + gradient if layer in sums else gradient.to(wide)
                if progress is not None:
                    progress(done, total)
    finally:
        for layer, weight in weights.items():
            weight.requires_grad_(was[layer])
    if not done:
        raise ShapeError("lora_ga needs at least one batch; there was none")
    return {layer: gradient / done for layer, gradient in sums.items()}


def _of(value: Tensor, weights: dict[nn.Module, nn.Parameter], adapter: Adapter) -> tuple[Tensor, ...]:
    found = torch.autograd.grad(value.reshape(()), list(weights.values()), allow_unused=True)
    if any(gradient is None for gradient in found):
        raise ShapeError(
            f"the loss does not depend on every weight of adapter {adapter.name!r}: give a loss of the model's output "
            "that does, or adapt fewer weights"
        )
    return found
