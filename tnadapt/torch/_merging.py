"""Merging updates into the weights, quantized or not, and unmerging to exactly the original bits.

The invariant: from the moment ``adapter.merged`` is set, it holds the original rows of every target, and it is set
before the first weight is written. Whatever fails or interrupts a merge or an unmerge, the original rows can therefore
be written back, and writing them twice does no harm.
"""

from __future__ import annotations

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from tnadapt.algebra.rounding import PIECE, Float64Deltas, change_in_place, changed_spans
from tnadapt.backends import load_backend
from tnadapt.errors import BackendError, ConfigError, TargetError, safe_repr
from tnadapt.report import TextTable
from tnadapt.targets.target import Target

from ._delta import is_sharded
from ._quantized import QuantizedLayer, is_packed, quantized_type, twin
from ._state import AdapterState, Merged, full_arrays, need_attached, need_linear, not_a_sum, warn_of_references
from ._weights import numbers

# -- Original rows of a floating-point weight, kept while merged -------------------------------------------------------


class MergedRows(NamedTuple):
    """The rows of one merged weight: the original values, and a checksum of the merged ones."""

    before: Tensor
    checksum: int

    def check(self, state: AdapterState, target: Target, owner: nn.Module) -> None:
        """Raise a TargetError if the weight has another dtype or other values by now."""
        weight = _weight(target, owner)
        if weight.dtype != self.before.dtype:
            raise TargetError(
                f"{target.name} was {self.before.dtype} when it was merged and is {weight.dtype} now: its original "
                "bits cannot be restored; convert the model back, or detach by bake()"
            )
        # The model may have been moved to another device. Rows that already have their original values come from an
        # unmerge() that was interrupted.
        now = checksum(target.select(weight).to(self.before.device))
        if now != self.checksum and now != checksum(self.before):
            raise changed_since(state, target)

    def put_back(self, target: Target, owner: nn.Module) -> None:
        """Write the original rows back."""
        write(target, _weight(target, owner), self.before)


def changed_since(state: AdapterState, target: Target) -> TargetError:
    """Return the error for a weight that was changed after a merge."""
    return TargetError(
        f"{target.name} was changed after adapter {state.name!r} was merged into it (by another adapter, training or "
        "loading), and unmerging would discard that change: undo it first, or detach by bake()"
    )


def write(target: Target, weight: Tensor, matrix: Tensor) -> None:
    """Write ``(rows, cols)`` to the target's place in a stored weight."""
    if weight.ndim == 2 or weight.is_contiguous():
        target.write(weight, matrix)
        return
    # For a convolution in channels_last, a block would be a copy instead of a view.
    whole = weight.contiguous()
    target.write(whole, matrix)
    weight.copy_(whole)


def checksum(tensor: Tensor) -> int:
    """Return a checksum of the bits: CRC-32 on the CPU, elsewhere the sum and the weighted sum of integers."""
    if tensor.device.type == "cpu":
        # It copies nothing, and takes a few hundredths of the time of the sums.
        return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(dtype).reshape(-1).to(torch.int64)
    place = torch.arange(1, bits.numel() + 1, device=bits.device)
    return hash((int(bits.sum()), int((bits * place).sum())))


def _weight(target: Target, owner: nn.Module) -> Tensor:
    return cast(Tensor, owner._parameters[target.parameter]).detach()


# -- Quantized weights: dequantized, added to, quantized again by their library ----------------------------------------

# The state of a layer, its tensors and what its library stores with them, is taken out and kept as it is: nothing is
# copied or subtracted. A merged layer has another state of the same form, so putting the first one back restores every
# byte.


class RequantizedWeight(NamedTuple):
    """How well a quantized layer holds W + ΔW after a merge.

    Attributes
    ----------
    name : str
        The weight, as in a state dict.
    kind : str
        Class of the layer or, for torchao, of its weight.
    error : float
        ‖stored − (W + ΔW)‖ / ‖W + ΔW‖, of what the codes stand for, in the Frobenius norm.
    update_error : float
        ‖stored − (W + ΔW)‖ / ‖ΔW‖. At 1 the merge is as far off as leaving ΔW out.
    kept : float
        ⟨stored − W, ΔW⟩ / ‖ΔW‖²: the part of ΔW that the weight has moved by. 0 if the update vanished in rounding.
    """

    name: str
    kind: str
    error: float
    update_error: float
    kept: float


class RequantizationReport(tuple[RequantizedWeight, ...]):
    """The quantized weights of a merge, one :class:`RequantizedWeight` each; ``print`` it for a table."""

    __slots__ = ()

    @property
    def update_error(self) -> float:
        """The largest ``update_error``; 0 if no weight is quantized."""
        return max((row.update_error for row in self), default=0.0)

    @property
    def kept(self) -> float:
        """The smallest ``kept``; 1 if no weight is quantized."""
        return min((row.kept for row in self), default=1.0)

    def __str__(self) -> str:
        if not self:
            return "no quantized weight was merged into"
        head = ("weight", "layer", "error", "update's", "kept")
        rows = [(row.name, row.kind, *(f"{number:.4f}" for number in row[2:])) for row in self]
        return str(TextTable(rows, head))


class MergedCodes(NamedTuple):
    """What is kept of a quantized layer while an update of some of its rows is merged."""

    kind: QuantizedLayer
    owner: nn.Module
    target: Target
    state: Mapping[str, Any]
    checksum: int

    @property
    def before(self) -> Tensor:
        """The original rows as numbers."""
        return cast(Tensor, self.target.select(_dequantized(self.kind, self.owner, self.state)))

    def check(self, state: AdapterState, target: Target, owner: nn.Module) -> None:
        """Raise a TargetError if the layer stands for other numbers by now, or is elsewhere."""
        now = self.kind.dequantize(owner)
        before = _dequantized(self.kind, owner, self.state)
        if now is None or now.device != before.device:
            where = "nowhere" if now is None else now.device
            raise TargetError(
                f"{target.name} was on {before.device} when it was merged and is on {where} now: its original codes "
                "cannot be restored; move the model back, or detach by bake()"
            )
        after = checksum(now)
        if after != self.checksum and after != checksum(before):
            raise changed_since(state, target)

    def put_back(self, target: Target, owner: nn.Module) -> None:
        """Put the original state back."""
        self.kind.restore(owner, self.state)


def requantized(
    adapter: AdapterState, indices: Sequence[int], layer_type: QuantizedLayer, updates: _Exact
) -> tuple[list[MergedCodes], Mapping[str, Any], RequantizedWeight]:
    """Return what is kept for each of a layer's targets, its merged state, and the report's row; change nothing.

    Raises
    ------
    TargetError
        If the layer cannot be merged into.
    BackendError
        If the library's codes stand for numbers that are not finite.
    """
    owner = adapter.slots[indices[0]].owner
    targets = [adapter.targets[index] for index in indices]
    name = targets[0].name
    if any(slot.index in indices and slot.owner is not owner for slot in adapter.slots):
        raise TargetError(
            f"{name} is quantized and tied to another weight, which would keep the codes without the update: keep the "
            "adapter attached, or attach with untie=True"
        )
    numbers = layer_type.dequantize(owner)
    if numbers is None:
        raise TargetError(
            f"{name} of {type(owner).__name__} cannot be merged into: it is on the meta device, or in a layout whose "
            "numbers cannot be read; keep the adapter attached"
        )
    before = numbers.float()
    wanted = before.clone()
    for index, target in zip(indices, targets, strict=True):
        # The sums of rows that do not overlap are independent of each other.
        target.write(wanted, updates.sum(index, target, before))
    try:
        state = layer_type.requantize(owner, wanted)
    except TargetError as error:
        raise TargetError(f"{name} is quantized: {error}") from None
    if set(state) != set(layer_type.stored):
        raise TargetError(
            f"{type(layer_type).__name__}.requantize() returned {', '.join(sorted(state)) or 'nothing'}, and its "
            f"stored is {', '.join(layer_type.stored) or 'empty'}: it must return these names"
        )
    changed = (wanted != before).any(1)
    if not bool(changed.any()):
        state = layer_type.state(owner)  # a library may round even its own dequantized numbers to others
    elif not bool(changed.all()):
        state = layer_type.keep_rows(owner, state, changed)
    after = _dequantized(layer_type, owner, state)
    if not bool(torch.isfinite(after).all()):
        raise BackendError(
            f"{name} plus its update cannot be quantized as {_kind_name(owner)}: the result is not finite; no weight "
            "was changed"
        )
    kept = [MergedCodes(layer_type, owner, target, layer_type.state(owner), checksum(after)) for target in targets]
    return kept, state, _measured(name, owner, before, wanted, after)


def _dequantized(layer_type: QuantizedLayer, owner: nn.Module, state: Mapping[str, Any]) -> Tensor:
    """Return the numbers that a state of a layer stands for, without changing the layer."""
    other = twin(owner)
    layer_type.restore(other, state)
    numbers = layer_type.dequantize(other)
    if numbers is None:
        raise TargetError(f"{type(layer_type).__name__} cannot dequantize what its requantize() returned")
    return numbers


def _measured(name: str, owner: nn.Module, before: Tensor, wanted: Tensor, after: Tensor) -> RequantizedWeight:
    base, goal, requantized = (tensor.double() for tensor in (before, wanted, after))
    change, off = goal - base, float((requantized - goal).norm())
    size = float(change.norm())
    kept = float(((requantized - base) * change).sum()) / size**2 if size else 1.0
    whole = float(goal.norm())
    return RequantizedWeight(name, _kind_name(owner), off / whole if whole else 0.0, off / size if size else 0.0, kept)


def _kind_name(owner: nn.Module) -> str:
    weight = owner._parameters.get("weight")
    plain = weight is None or type(weight) in (Tensor, nn.Parameter)
    return type(owner).__name__ if plain or type(owner) is not nn.Linear else type(weight).__name__


# -- Merging and unmerging ---------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(adapter: AdapterState, max_error: float | None = None) -> None:
    """Merge an adapter; see :meth:`Adapter.merge`."""
    is_number = isinstance(max_error, (int, float)) and not isinstance(max_error, bool)
    if max_error is not None and not (is_number and max_error >= 0.0):
        raise ConfigError(f"max_error must be a number from 0 up, or None; got {safe_repr(max_error)}")
    need_attached(adapter)
    if adapter.merged is not None:
        raise TargetError(
            f"adapter {adapter.name!r} is merged already; a second merge would add its update twice: unmerge() it first"
        )
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
    warn_of_references(adapter)
    try:
        # Set before any weight is written: whatever happens from here on, unmerge() has the original bits.
        adapter.merged = merged
        for write_one in writes:
            write_one()
    except BaseException:  # KeyboardInterrupt, too
        _put_back(adapter, merged)
        raise
    adapter.merge_report = report
    adapter.cache.forget()


def _prepared(adapter: AdapterState) -> tuple[list[Merged], list[Callable[[], None]], RequantizationReport]:
    """Return what is kept of each target, the calls that write all sums, and the report, without any change."""
    # Everything is computed and checked here, before the first weight is changed.
    plain: dict[int, Tensor] = {}
    quantized: dict[int, tuple[QuantizedLayer, list[int]]] = {}
    for index in range(len(adapter.targets)):
        owner = adapter.slots[index].owner
        layer_type = quantized_type(owner)
        if layer_type is None:
            plain[index] = _writable(adapter, index)
        else:
            quantized.setdefault(id(owner), (layer_type, []))[1].append(index)
    updates, merged = _Exact(adapter), dict[int, Merged]()
    writes: list[Callable[[], None]] = []
    for index, weight in plain.items():
        target = adapter.targets[index]
        after = updates.sum(index, target, weight)
        merged[index] = MergedRows(target.select(weight).clone(), checksum(after))
        writes.append(functools.partial(write, target, weight, after))
    rows = []
    for layer_type, indices in quantized.values():
        kept, state, row = requantized(adapter, indices, layer_type, updates)
        merged.update(zip(indices, kept, strict=True))
        writes.append(functools.partial(layer_type.restore, kept[0].owner, state))
        rows.append(row)
    return [merged[index] for index in range(len(adapter.targets))], writes, RequantizationReport(rows)


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
        # Devices other than CUDA may lack float64, so their sums are computed on the host.
        where = weight.device if weight.device.type == "cuda" else torch.device("cpu")
        dtype = str(weight.dtype).removeprefix("torch.")
        after = target.select(weight).to(where, copy=True).contiguous()
        pieces: Iterator[tuple[int, Any]] = self._on(where).of(index)
        if self.adapter.weight != 1.0:
            pieces = ((start, piece * self.adapter.weight) for start, piece in pieces)
        flat, plan = after.view(-1), self.adapter.plan
        weight_params = [self._arrays[name].to(where) for name in plan.weight_param_names[index]]
        if where.type == "cpu":
            problem = change_in_place(
                plan.applying, _bits(flat), target.shape, dtype, pieces, [_numbers(array) for array in weight_params],
                self._trained,
            )  # fmt: skip
        else:
            if not plan.applying.additive:
                spans = changed_spans(
                    plan.applying, load_backend("torch"), target.shape, lambda start, stop: flat[start:stop].double(),
                    pieces, [array.double() for array in weight_params], self._trained,
                )  # fmt: skip
                pieces = ((start, values) for start, values, _ in spans)
            problem = _write_in_place(flat, pieces, plan.applying.additive)
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

    def _on(self, where: torch.device) -> Float64Deltas:
        if where not in self._updates:
            tensors = {name: array.to(where) for name, array in self._arrays.items()}
            arrays = {name: _numbers(array) for name, array in tensors.items()} if where.type == "cpu" else tensors
            self._updates[where] = Float64Deltas(self.adapter.plan, arrays, self._trained, _PIECES[where.type])
        return self._updates[where]


def _numbers(array: Tensor) -> np.ndarray:
    return (array.float() if array.dtype is torch.bfloat16 else array).numpy()


def _bits(flat: Tensor) -> np.ndarray:
    """Return a NumPy view of a tensor's memory, with bfloat16 as its bits."""
    return flat.view(torch.int16).numpy().view(np.uint16) if flat.dtype is torch.bfloat16 else flat.numpy()


def _write_in_place(flat: Tensor, pieces: Iterator[tuple[int, Tensor]], add: bool) -> str | None:
    """Run :func:`tnadapt.algebra.rounding.change_in_place` on the device, adding pieces that are not W' itself."""
    for start, piece in pieces:
        part = flat[start : start + piece.numel()]
        total = part.double() + piece if add else piece
        after = (total if part.dtype is torch.float64 else total.float()).to(part.dtype)
        if bool((~torch.isfinite(after) & torch.isfinite(part)).any()):
            return "range" if bool(torch.isfinite(piece).all()) else "update"
        part.copy_(after)
    return None


@torch.no_grad()
def unmerge(adapter: AdapterState) -> None:
    """Restore the original weights; see :meth:`Adapter.unmerge`."""
    if adapter.merged is None:
        raise TargetError(f"adapter {adapter.name!r} is not merged; there is nothing to undo")
    before = adapter.merged
    for index, (target, original) in enumerate(zip(adapter.targets, before, strict=True)):
        if quantized_type(owner_of(adapter, index)) is None:
            _writable(adapter, index)
        original.check(adapter, target, owner_of(adapter, index))
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
    """Write the original rows back into the weights, however often it is called."""
    # Tied weights have more slots.
    for target, slot, original in zip(adapter.targets, adapter.slots, merged, strict=False):
        original.put_back(target, slot.owner)
    adapter.merged = None


def original(adapter: AdapterState, index: int) -> Tensor | None:
    """Return a target's weight ``(rows, cols)`` without this adapter's update, merged or not; None if unknown.

    A parametrized weight is returned as computed.
    """
    if adapter.merged is not None:
        return adapter.merged[index].before
    weight = numbers(owner_of(adapter, index), adapter.targets[index].parameter)
    return None if weight is None else cast(Tensor, adapter.targets[index].select(weight))


def stored(adapter: AdapterState, index: int) -> Tensor | None:
    """Return the parameter that holds a target; None if a quantized layer has none of that name."""
    return owner_of(adapter, index)._parameters.get(adapter.targets[index].parameter)


def owner_of(adapter: AdapterState, index: int) -> nn.Module:
    """Return the module that holds a target's weight."""
    need_attached(adapter)
    return adapter.slots[index].owner


def _writable(adapter: AdapterState, index: int) -> Tensor:
    owner, name = owner_of(adapter, index), adapter.targets[index].name
    weight = stored(adapter, index)
    if weight is None and hasattr(owner, "parametrizations"):
        raise TargetError(
            f"{name} is parametrized (computed from other parameters), so an update cannot be merged into it; keep the "
            "adapter attached, or call torch.nn.utils.parametrize.remove_parametrizations() first"
        )
    # torch also counts float8 and narrower types as floating point, hence the check of the element size.
    if weight is None or is_packed(weight) or not weight.is_floating_point() or weight.element_size() < 2:
        raise TargetError(
            f"{name} is quantized, and {type(owner).__name__} is no type that tnadapt can merge "
            "into: keep the adapter attached, or register the type with tnadapt.torch.register_quantized"
        )
    if is_sharded(weight):
        raise TargetError(f"{name} is sharded over processes: save the adapter and merge it in one process")
    if weight.device.type == "meta":
        raise TargetError(f"{name} is on the meta device and has no values to merge into")
    return weight.detach()
