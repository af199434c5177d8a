"""Data-driven starts (EVA, LoRA-GA): functions that return arrays for :meth:`tnadapt.torch.Adapter.start_from`.

The adapter's config needs ``start="given"`` and LoRA's form, as ``tnadapt.presets.lora(8, start="given")`` has it. Each
function leaves the model and the adapter as they were, and its result depends on nothing but the model and the batches:

- :func:`eva`: A from the principal components of each layer's inputs; B is zero.
- :func:`lora_ga`: A and B from the singular vectors of each weight's gradient.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.errors import ConfigError, ShapeError, TargetError, safe_repr
from tnadapt.targets.target import Target

from ._adapter import Adapter, adapters

__all__ = ["eva", "lora_ga"]


# -- Common parts of data-driven starts --------------------------------------------------------------------------------


#: Called with the number of batches so far, and their number if it is known.
Progress = Callable[[int, int | None], None]


class StartTarget(NamedTuple):
    """One weight of LoRA's form.

    Attributes
    ----------
    layer : Module
        The linear layer that has the weight.
    target : Target
    left, right : str
        The plan's names of B, (rows, rank), and of A transposed, (cols, rank).
    rank : int
    """

    layer: nn.Module
    target: Target
    left: str
    right: str
    rank: int


def adapter_of(handle: Adapter | nn.Module) -> Adapter:
    """Return an adapter, or the only one on a model."""
    if isinstance(handle, Adapter):
        return handle
    if not isinstance(handle, nn.Module):
        raise TargetError(f"expected an adapter, or a model with one; got {type(handle).__name__}")
    attached = list(adapters(handle).values())
    if len(attached) != 1:
        raise TargetError(
            f"this {type(handle).__name__} has {len(attached)} adapters"
            + ("; give one of them instead of the model" if attached else ": attach one first")
        )
    return attached[0]


def start_targets(adapter: Adapter, what: str) -> list[StartTarget]:
    """Return the targets of an adapter; raise an error unless each is LoRA of a linear layer."""
    state, plan = adapter._state, adapter.plan
    if not plan.point.brought or plan.theta is not None:
        raise ConfigError(
            f"{what} computes arrays for adapter.start_from(), which needs a config with start='given' and no map "
            f"before the network, such as tnadapt.presets.lora(8, start='given'); adapter {adapter.name!r} has "
            f"start={plan.config.start!r} and before={plan.config.before!r}"
        )
    shared = next((target for target in state.targets if target.tied), None)
    if shared is not None:
        raise ConfigError(
            f"{what} observes one layer for each weight, and {shared.name} is tied to {', '.join(shared.tied)}: leave "
            "it out of the targets"
        )
    targets = []
    for slot, patch in zip(state.slots, state.patches, strict=True):
        layer, target = slot.owner, slot.target
        linear = type(layer).forward is nn.Linear.forward or type(layer).__name__ == "Conv1D"
        if not linear or patch.host is not layer or target.parameter != "weight":
            raise ConfigError(
                f"{what} needs linear layers, whose inputs it observes; {target.name} is read by "
                f"{type(patch.host).__name__}: leave it out of the targets"
            )
        (first, *others) = plan.layout.of_weight(slot.index)
        place, group = plan.start_place(first.group), plan.groups[first.group]
        if others or not place.is_lora:
            raise ConfigError(
                f"{what} computes LoRA's two factors of each weight, and {target.name} has the arrays "
                f"{', '.join(group.names.values())}: attach with tnadapt.presets.lora(rank, start='given')"
            )
        left, right = group.names.values()
        targets.append(StartTarget(layer, target, left, right, place.shapes["split0.factor0"][1]))
    return targets


def called(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _reported(batches: Iterable[Any], progress: Progress | None) -> Iterator[Any]:
    """Yield batches, and report each one that is done."""
    total = len(batches) if isinstance(batches, Sized) else None
    for done, batch in enumerate(batches, start=1):
        yield batch
        if progress is not None:
            progress(done, total)


@contextlib.contextmanager
def as_base(adapter: Adapter) -> Iterator[None]:
    """Let the model compute without this adapter and in evaluation mode; restore both afterwards."""
    modes = {module: module.training for module in adapter.model.modules()}
    try:
        adapter.model.eval()
        with adapter.disabled():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


# -- EVA: principal components of each layer's inputs ------------------------------------------------------------------


# Rows of inputs that are added at once, as a multiple of the number of components.
_CHUNK = 4


@checks_arguments
def eva(
    adapter: Adapter | nn.Module,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] = called,
    mask: Callable[[Any], Tensor] | None = None,
    keep: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compute EVA's start of LoRA: A from the principal components of the inputs, and B zero.

    Parameters
    ----------
    adapter : Adapter or Module
        An adapter with ``tnadapt.presets.lora(rank, start="given")`` on linear layers, or a model with only that one.
    batches : iterable
        Batches of the task's data, such as a DataLoader; a few hundred rows for each component suffice.
    forward : callable
        Calls the model with a batch. By default, a mapping gives keyword arguments, a tuple or list positional ones,
        and anything else is the only argument.
    mask : callable, optional
        Returns the positions of a batch to use, as booleans of the leading shape of every layer's input: for instance
        ``lambda batch: batch["attention_mask"].bool()``. All by default.
    keep : int, optional
        Number of components kept from one chunk of inputs to the next, at least the rank; by default twice the rank,
        and at least 8 more than it. As many as the input has features give the exact components.
    progress : callable, optional
        Called with the number of batches done, and their number if it is known.

    Returns
    -------
    dict of str to Tensor
        For :meth:`tnadapt.torch.Adapter.start_from`: the ``rank`` components of the largest variance as the columns of
        ``factor1``, orthonormal, the largest entry of each positive; and zeros for ``factor0``.

    Raises
    ------
    ConfigError
        If the adapter is not LoRA of linear layers with ``start="given"``, or ``keep`` is smaller than the rank.
    ShapeError
        If a layer was called with fewer rows than the rank, or a mask has another shape than the inputs.
    TargetError
        If the model has no adapter, or several.

    Notes
    -----
    Incremental principal component analysis in float64 (Ross et al., 2008): of the inputs minus their mean, without a
    second pass. The model runs without the adapter and in evaluation mode. Memory: ``keep`` vectors of the input's
    length for each layer, and the work of ``5 keep`` rows. Layers with several targets (a fused qkv) are observed once.
    All weights have the rank of the config: ranks are not redistributed, as the paper does.

    References
    ----------
    Paischer et al., "One initialization to rule them all: fine-tuning via explained variance adaptation", arXiv
    2410.07170.

    Examples
    --------
    >>> import torch, tnadapt as tna, tnadapt.torch
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> adapter = tnadapt.torch.attach(model, tna.presets.lora(2, start="given"), "all-linear")
    >>> arrays = tnadapt.torch.starts.eva(adapter, torch.randn(3, 10, 6) * torch.tensor([9.0, 5.0, 1.0, 1.0, 1.0, 1.0]))
    >>> adapter.start_from(arrays)
    >>> arrays["group0.split0.factor1"].abs().argmax(0)
    tensor([0, 1])
    """
    adapter = adapter_of(adapter)
    targets = start_targets(adapter, "eva")
    observed = {
        target.layer: PrincipalComponents(target.rank, _kept(target.rank, keep, target.target.shape[1]))
        for target in targets
    }
    rows: Tensor | None = None

    def see(components: PrincipalComponents, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        components.add(x.detach().reshape(-1, x.shape[-1]) if rows is None else _chosen(x.detach(), rows))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(see, components), with_kwargs=True)
        for layer, components in observed.items()
    ]
    try:
        with torch.no_grad(), as_base(adapter):
            for batch in _reported(batches, progress):
                rows = None if mask is None else mask(batch)
                forward(adapter.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    arrays = {}
    for target in targets:
        size, _ = target.target.shape
        right = observed[target.layer].leading(target.target.name)
        arrays[target.left] = torch.zeros(size, target.rank, device=right.device)
        arrays[target.right] = right.float()
    return arrays


def _kept(rank: int, keep: int | None, cols: int) -> int:
    if keep is not None:
        keep = integer("keep", keep, 1, 1 << 40, ConfigError)
        if keep < rank:
            raise ConfigError(f"keep={keep} components are fewer than the rank, {rank}: keep at least as many")
    return min(max(2 * rank, rank + 8) if keep is None else keep, cols)


def _chosen(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of an input that a mask selects."""
    if rows.dtype is not torch.bool or rows.shape != x.shape[:-1]:
        raise ShapeError(
            f"mask must return booleans of the leading shape of the inputs, {tuple(x.shape[:-1])}; it returned "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    return x[rows.to(x.device)]


class PrincipalComponents:
    """Incremental principal component analysis, in float64.

    Parameters
    ----------
    rank : int
        Number of components wanted.
    keep : int
        Number of components that are kept between additions.

    Notes
    -----
    The rows ``S Vᵀ`` of the decomposition so far stand for all rows added, up to what was dropped. New rows and a row
    for the difference of the means are put below, and decomposed again: exact if nothing was dropped.

    Examples
    --------
    >>> components = PrincipalComponents(1, 2)
    >>> components.add(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    >>> components.add(torch.tensor([[5.0, 0.1]]))
    >>> components.leading("x").abs().round(decimals=1)
    tensor([[1.],
            [0.]], dtype=torch.float64)
    """

    def __init__(self, rank: int, keep: int) -> None:
        self.rank, self.keep = rank, keep
        self._count = 0
        self._rows: Tensor | None = None
        self._mean: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add rows, (n, features)."""
        for chunk in torch.split(x, _CHUNK * self.keep):
            if len(chunk):
                self._add(chunk.double())

    def _add(self, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise ShapeError("an input of a layer holds NaN or infinity, which has no principal components")
        mean, count = x.mean(0), len(x)
        stacked = [x - mean]
        if self._mean is None or self._rows is None:
            self._mean = mean
        else:
            factor = (self._count * count / (self._count + count)) ** 0.5
            stacked = [self._rows, *stacked, factor * (self._mean - mean)[None]]
            self._mean = self._mean + (mean - self._mean) * (count / (self._count + count))
        self._count += count
        _, values, right = torch.linalg.svd(torch.cat(stacked), full_matrices=False)
        self._rows = values[: self.keep, None] * right[: self.keep]

    def leading(self, what: str) -> Tensor:
        """Return the components of the largest variance as columns, the largest entry of each positive."""
        if self._rows is None or self._count <= self.rank:
            raise ShapeError(
                f"the layer of {what} was called with {self._count} rows, and {self.rank} components need more than "
                f"{self.rank}: give more batches, and check that the model calls this layer"
            )
        values = torch.linalg.vector_norm(self._rows, dim=1)
        if values[self.rank - 1] <= 1e-9 * values[0]:
            raise ShapeError(
                f"the inputs of {what} vary in fewer than {self.rank} directions: give more batches, or a smaller rank"
            )
        components = (self._rows[: self.rank] / values[: self.rank, None]).T
        signs = torch.sign(torch.gather(components, 0, components.abs().argmax(0, keepdim=True)))
        signed: Tensor = components * signs
        return signed


# -- LoRA-GA: singular vectors of each weight's gradient ---------------------------------------------------------------


#: The words for the factors of A and B.
_SCALES = ("stable", "peft")


@checks_arguments
def lora_ga(
    adapter: Adapter | nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
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
    scale : {"stable", "peft"}
        The factor of both: ``rows**(1/4) / sqrt(gamma)``. "peft" is what PEFT calls "stable": A has norm 1, and B is
        also multiplied by the singular values.
    gamma : float
        The γ of "stable"; larger is smaller.
    progress : callable, optional
        Called with the number of batches done, and their number if it is known.

    Returns
    -------
    dict of str to Tensor
        For :meth:`tnadapt.torch.Adapter.start_from`: ``factor1``, A transposed, has the first r singular vectors, and
        ``factor0``, B, the next r. The largest entry of each left singular vector is positive.

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
    if scale not in _SCALES:
        raise ConfigError(f"scale must be one of {', '.join(map(repr, _SCALES))}; got {safe_repr(scale)}")
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
    arrays = {}
    for target in targets:
        whole = gradients[target.layer]
        left, values, right = torch.linalg.svd(target.target.select(whole).double(), full_matrices=False)
        if not values[2 * target.rank - 1] > 1e-9 * values[0]:
            raise ShapeError(
                f"the gradient of {target.target.name} has fewer than {2 * target.rank} singular values above rounding "
                "errors: give more batches, or a smaller rank"
            )
        signs = torch.sign(torch.gather(left, 0, left.abs().argmax(0, keepdim=True)))[0]
        of_a, of_b = slice(0, target.rank), slice(target.rank, 2 * target.rank)
        factor = target.target.shape[0] ** 0.25 / gamma**0.5
        by_a, by_b = (factor, factor) if scale == "stable" else (1.0, values[of_b] * factor)
        arrays[target.left] = ((left * signs)[:, of_b] * by_b).float()
        arrays[target.right] = ((right.T * signs)[:, of_a] * by_a).float()
    return arrays


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
    done = 0
    sums: dict[nn.Module, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        with torch.enable_grad(), as_base(adapter):
            for batch in _reported(batches, progress):
                value = loss(adapter.model, batch)
                if not isinstance(value, Tensor) or value.numel() != 1 or not bool(torch.isfinite(value)):
                    raise ShapeError(f"loss must return one finite number as a tensor; got {safe_repr(value)}")
                for layer, gradient in zip(weights, _of(value, weights, adapter), strict=True):
                    wide = torch.float64 if gradient.dtype is torch.float64 else torch.float32
                    sums[layer] = sums[layer] + gradient if layer in sums else gradient.to(wide)
                done += 1
    finally:
        for layer, weight in weights.items():
            weight.requires_grad_(was[layer])
    if not done:
        raise ShapeError("lora_ga needs at least one batch; there was none")
    return {layer: gradient / done for layer, gradient in sums.items()}


def _of(value: Tensor, weights: dict[nn.Module, nn.Parameter], adapter: Adapter) -> tuple[Tensor, ...]:
    gradients = torch.autograd.grad(value.reshape(()), list(weights.values()), allow_unused=True)
    if any(gradient is None for gradient in gradients):
        raise ShapeError(
            f"the loss does not depend on every weight of adapter {adapter.name!r}: give a loss of the model's output "
            "that does, or adapt fewer weights"
        )
    return gradients
