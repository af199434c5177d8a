"""EVA: LoRA's A starts at the principal components of the inputs of each layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, ShapeError, integer

from ._adapter import Adapter
from ._start_targets import Progress, adapter_of, as_base, called, start_targets

__all__ = ["PrincipalComponents", "eva"]

# Rows of inputs that are added at once, as a multiple of the components that are kept.
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
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        with torch.no_grad(), as_base(adapter):
            for done, batch in enumerate(batches, start=1):
                rows = None if mask is None else mask(batch)
                forward(adapter.model, batch)
                if progress is not None:
                    progress(done, total)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for target in targets:
        size, _ = target.target.shape
        right = observed[target.layer].leading(target.target.name)
        found[target.left] = torch.zeros(size, target.rank, device=right.device)
        found[target.right] = right.float()
    return found


def _kept(rank: int, keep: int | None, cols: int) -> int:
    if keep is not None:
        keep = integer("keep", keep, 1, 1 << 40, ConfigError)
        if keep < rank:
            raise ConfigError(f"keep={keep} components are fewer than the rank, {rank}: keep at least as many")
    return min(max(2 * rank, rank + 8) if keep is None else keep, cols)


def _chosen(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows of an input at the positions that a mask selects."""
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
            self._add(chunk.double())

    def _add(self, x: Tensor) -> None:
        if not len(x):
            return
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
        found = (self._rows[: self.rank] / values[: self.rank, None]).T
        signs = torch.sign(torch.gather(found, 0, found.abs().argmax(0, keepdim=True)))
        signed: Tensor = found * signs
        return signed
