"""Merging updates into the weights, and unmerging to exactly the original bits.

The invariant: from the moment ``adapter.merged`` is set, it holds the original rows of every target, and it is set
before the first weight is written. Whatever fails or interrupts a merge or an unmerge, the original rows can therefore
be written back, and writing them twice does no harm.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.algebra.changed_weights import change_in_place, changed_spans
from tnadapt.algebra.rounding import PIECE, Float64Deltas
from tnadapt.backends import load_backend
from tnadapt.errors import BackendError, ConfigError, TargetError, safe_repr
from tnadapt.targets.target import Target

from ._arrays import full_arrays
from ._merged_rows import MergedRows, checksum, write
from ._quantized import is_packed, quantized_type
from ._requantizing import RequantizationReport, requantized
from ._sharding import gather_full, is_sharded
from ._state import AdapterState, Merged, need_attached, need_linear, not_a_sum

__all__ = ["computed", "disabled", "merge", "original", "stored", "unmerge"]


@torch.no_grad()
def merge(adapter: AdapterState, max_error: float | None = None) -> None:
    """Merge an adapter; see :meth:`Adapter.merge`."""
    is_number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
    if max_error is not None and not (is_number and max_error >= 0.0):
        raise ConfigError(f"max_error must be a number from 0 up, or None; got {safe_repr(max_error)}")
    need_attached(adapter)
    if adapter.merged is not None:
        raise TargetError(f"adapter {adapter.name!r} is merged already; a second merge would add its update twice")
    if not adapter.enabled:
        raise TargetError(f"adapter {adapter.name!r} is disabled; merge it outside of disabled()")
    if adapter.shares_weights:
        raise TargetError(
            f"adapter {adapter.name!r} is on a reference model, whose weights are those of the model in training: a "
            "merge would change both; leave it attached"
        )
    need_linear(adapter, "it cannot be merged")
    if adapter.weight == 0.0:
        raise TargetError(f"adapter {adapter.name!r} is not active (its weight is 0): call activate() first")
    for rival in dict.fromkeys(rival for patch in dict.fromkeys(adapter.patches) for rival in patch.rivals(adapter)):
        if rival.merged is not None:
            raise TargetError(
                f"adapter {rival.name!r} is merged into a weight of adapter {adapter.name!r}, and "
                f"{not_a_sum(adapter, rival)}: unmerge {rival.name!r} first"
            )
    merged, writes, report = _prepared(adapter)
    if max_error is not None and report.update_error > max_error:
        worst = max(report, key=lambda row: row.update_error)
        raise TargetError(
            f"quantizing {worst.name} plus its update again is off by {worst.update_error:.3g} of the update's norm, "
            f"more than max_error={max_error:g}; no weight was changed: keep the adapter attached, or merge into the "
            "unquantized model"
        )
    adapter.references.warn_of_merge(adapter.name)
    try:
        # Set before any weight is written to: whatever happens from here on, unmerge() has the original bits.
        adapter.merged = merged
        for write_one in writes:
            write_one()
    except BaseException:  # KeyboardInterrupt, too
        _put_back(adapter, merged)
        raise
    adapter.merge_report = report
    adapter.cache.forget()


def _prepared(adapter: AdapterState) -> tuple[list[Merged], list[Callable[[], None]], RequantizationReport]:
    """Return what is kept of each target, the calls that write all sums, and the report; change nothing.

    Everything is computed and checked here, before the first weight is changed.
    """
    indices = range(len(adapter.targets))
    plain = {index: _writable(adapter, index) for index in indices if not _requantizes(adapter, index)}
    updates = _Exact(adapter)
    merged: dict[int, Merged] = {}
    writes: list[Callable[[], None]] = []
    for index, weight in plain.items():
        target = adapter.targets[index]
        after = updates.sum(index, target, weight)
        merged[index] = MergedRows(target.select(weight).clone(), checksum(after))
        writes.append(functools.partial(write, target, weight, after))
    rows = []
    for layer in requantized(adapter, updates.sum):
        merged.update(zip(layer.indices, layer.kept, strict=True))
        writes.append(layer.write)
        rows.append(layer.row)
    return [merged[index] for index in indices], writes, RequantizationReport(rows)


# Elements per piece: small enough for the CPU's cache, and large enough on CUDA to launch few kernels.
_PIECES = {"cpu": PIECE, "cuda": 1 << 24}


class _Exact:
    """Sums of weights and updates with the arithmetic of :mod:`tnadapt.algebra.rounding`, on each weight's device."""

    def __init__(self, adapter: AdapterState) -> None:
        self.adapter = adapter
        self._arrays = {name: array.detach() for name, array in full_arrays(adapter).items()}
        self._trained = str(next(iter(self._arrays.values())).dtype).removeprefix("torch.")
        self._updates: dict[torch.device, Float64Deltas] = {}

    def sum(self, index: int, target: Target, weight: Tensor) -> Tensor:
        """Return the weight plus its update, ``(rows, cols)``, in the weight's dtype, as a new tensor."""
        # Other devices than CUDA may lack float64, so these are computed on the host.
        where = weight.device if weight.device.type == "cuda" else torch.device("cpu")
        dtype = str(weight.dtype).removeprefix("torch.")
        after = target.select(weight).to(where, copy=True).contiguous()
        pieces: Iterator[tuple[int, Any]] = self._on(where).of(index)
        if self.adapter.weight != 1.0:
            pieces = ((start, piece * self.adapter.weight) for start, piece in pieces)
        flat, plan = after.view(-1), self.adapter.plan
        own = [self._arrays[name].to(where) for name in plan.weight_param_names[index]]
        if where.type == "cpu":
            problem = change_in_place(
                plan.applying, _bits(flat), target.shape, dtype, pieces, [_numbers(array) for array in own],
                self._trained,
            )  # fmt: skip
        else:
            if not plan.applying.additive:
                pieces = self._changes(flat, target, pieces, own)
            problem = _add_in_place(flat, pieces) if plan.applying.additive else _replace(flat, pieces)
        if problem == "update":
            raise BackendError(
                f"the update of {target.name} is not finite (NaN or infinity in adapter {self.adapter.name!r}); "
                "no weight was changed: load another file, or reset()"
            )
        if problem is not None:
            raise BackendError(
                f"{target.name} plus its update exceeds the range of {weight.dtype}; no weight was changed: "
                "merge in a wider dtype, or into the float32 model"
            )
        return cast(Tensor, after.to(weight.device))

    def _changes(
        self, flat: Tensor, target: Target, pieces: Iterator[tuple[int, Tensor]], own: Sequence[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the changed weight in float64, where it is not a sum."""
        wide = [array.double() for array in own]
        spans = changed_spans(
            self.adapter.plan.applying, load_backend("torch"), target.shape,
            lambda start, stop: flat[start:stop].double(), pieces, wide, self._trained,
        )  # fmt: skip
        return ((start, found) for start, found, _ in spans)

    def _on(self, where: torch.device) -> Float64Deltas:
        if where not in self._updates:
            moved = {name: array.to(where) for name, array in self._arrays.items()}
            arrays = {name: _numbers(array) for name, array in moved.items()} if where.type == "cpu" else moved
            self._updates[where] = Float64Deltas(self.adapter.plan, arrays, self._trained, _PIECES[where.type])
        return self._updates[where]


def _numbers(array: Tensor) -> np.ndarray:
    return (array.float() if array.dtype is torch.bfloat16 else array).numpy()


def _bits(flat: Tensor) -> np.ndarray:
    """Return a NumPy view of a tensor's memory; bfloat16 as its bits."""
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype is torch.bfloat16 else flat.numpy()


def _add_in_place(flat: Tensor, pieces: Iterator[tuple[int, Tensor]]) -> str | None:
    """Do :func:`tnadapt.algebra.rounding.add_in_place` on the weight's device."""
    for start, piece in pieces:
        part = flat[start : start + piece.numel()]
        total = part.double() + piece
        after = (total if part.dtype is torch.float64 else total.float()).to(part.dtype)
        if bool((~torch.isfinite(after) & torch.isfinite(part)).any()):
            return "range" if bool(torch.isfinite(piece).all()) else "update"
        part.copy_(after)
    return None


def _replace(flat: Tensor, spans: Iterator[tuple[int, Tensor]]) -> str | None:
    """Do :func:`tnadapt.algebra.changed_weights.change_in_place` on the weight's device."""
    for start, found in spans:
        part = flat[start : start + found.numel()]
        after = (found if part.dtype is torch.float64 else found.float()).to(part.dtype)
        if bool((~torch.isfinite(after) & torch.isfinite(part)).any()):
            return "range" if bool(torch.isfinite(found).all()) else "update"
        part.copy_(after)
    return None


@torch.no_grad()
def unmerge(adapter: AdapterState) -> None:
    """Restore the original weights; see :meth:`Adapter.unmerge`."""
    if adapter.merged is None:
        raise TargetError(f"adapter {adapter.name!r} is not merged; there is nothing to undo")
    before = adapter.merged
    for index, (target, one) in enumerate(zip(adapter.targets, before, strict=True)):
        if not _requantizes(adapter, index):
            _writable(adapter, index)
        one.check(adapter, target, owner_of(adapter, index))
    try:
        _put_back(adapter, before)
    except BaseException:  # finish when interrupted: half of it would be neither the merged model nor the base
        _put_back(adapter, before)
        raise
    adapter.merge_report = None


@contextlib.contextmanager
def disabled(adapter: AdapterState) -> Iterator[None]:
    """Disable an adapter inside ``with``; see :meth:`Adapter.disabled`."""
    was, merged = adapter.enabled, adapter.merged is not None
    try:
        try:
            if merged:
                unmerge(adapter)
            adapter.enabled = False
            yield
        finally:
            _enable(adapter, was, merged)
    finally:
        _enable(adapter, was, merged)  # repeated in case a KeyboardInterrupt arrives during the first call


def _enable(adapter: AdapterState, enabled: bool, merged: bool) -> None:
    adapter.enabled = enabled
    if merged and adapter.merged is None:
        merge(adapter)


def _put_back(adapter: AdapterState, merged: Sequence[Merged]) -> None:
    """Write the original rows back into the weights; can be repeated."""
    for target, slot, one in zip(adapter.targets, adapter.slots, merged, strict=False):  # tied weights have more slots
        one.put_back(target, slot.owner)
    adapter.merged = None


def _requantizes(adapter: AdapterState, index: int) -> bool:
    """Return whether a weight is of a known quantized type."""
    return quantized_type(owner_of(adapter, index)) is not None


def original(adapter: AdapterState, index: int) -> Tensor | None:
    """Return a target's weight ``(rows, cols)`` without this adapter's update, merged or not; None if unknown.

    A parametrized weight is returned as computed.
    """
    if adapter.merged is not None:
        return adapter.merged[index].before
    weight = numbers(owner_of(adapter, index), adapter.targets[index].parameter)
    return None if weight is None else cast(Tensor, adapter.targets[index].select(weight))


def numbers(owner: nn.Module, parameter: str) -> Tensor | None:
    """Return a whole weight as numbers: gathered, computed if parametrized, dequantized; None if unknown."""
    quantized = quantized_type(owner)
    if quantized is not None:
        return quantized.dequantize(owner)
    weight: Tensor | None = owner._parameters.get(parameter)
    weight = computed(owner, parameter) if weight is None else weight
    if weight is None or is_packed(weight) or not weight.is_floating_point():
        return None
    return gather_full(weight.detach())


def stored(adapter: AdapterState, index: int) -> Tensor | None:
    """Return the parameter that holds a target; None if a quantized layer has none of that name."""
    return owner_of(adapter, index)._parameters.get(adapter.targets[index].parameter)


def computed(owner: nn.Module, parameter: str) -> Tensor | None:
    """Return the current value of a parametrized weight; None if it is not parametrized."""
    with torch.no_grad():
        return getattr(owner, parameter) if hasattr(owner, "parametrizations") else None


def owner_of(adapter: AdapterState, index: int) -> nn.Module:
    """Return the module that holds a target's weight."""
    need_attached(adapter)
    return adapter.slots[index].owner


def _writable(adapter: AdapterState, index: int) -> Tensor:
    weight = stored(adapter, index)
    name = adapter.targets[index].name
    if weight is None and computed(owner_of(adapter, index), adapter.targets[index].parameter) is not None:
        raise TargetError(
            f"{name} is parametrized (computed from other parameters), so an update cannot be merged into it; keep the "
            "adapter attached, or call torch.nn.utils.parametrize.remove_parametrizations() first"
        )
    # torch also counts float8 and narrower types as floating point, hence the check of the element size.
    if weight is None or is_packed(weight) or not weight.is_floating_point() or weight.element_size() < 2:
        raise TargetError(
            f"{name} is quantized, and {type(owner_of(adapter, index)).__name__} is no type that tnadapt can merge "
            "into: keep the adapter attached, or register the type with tnadapt.torch.register_quantized"
        )
    if is_sharded(weight):
        raise TargetError(f"{name} is sharded over processes: save the adapter and merge it in one process")
    if weight.device.type == "meta":
        raise TargetError(f"{name} is on the meta device and has no values to merge into")
    return weight.detach()
