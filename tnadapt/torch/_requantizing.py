"""Merging into quantized weights: dequantized, added to, quantized again by their library, and put back exactly.

The state of a layer, its tensors and what its library keeps with them, is taken out and kept as it is: nothing is
copied or subtracted. A merged layer has another state of the same form, so that putting back the first restores every
byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnadapt.errors import BackendError, TargetError
from tnadapt.report import text_table
from tnadapt.targets.target import Target

from ._merged_rows import changed_since, checksum
from ._quantized import QuantizedLayer, quantized_type, twin
from ._state import AdapterState

__all__ = ["MergedCodes", "RequantizationReport", "RequantizedWeight", "requantized"]


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
        return "\n".join(text_table([head, *rows]))


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
        found: Tensor = self.target.select(_numbers(self.kind, self.owner, self.state))
        return found

    def check(self, state: AdapterState, target: Target, owner: nn.Module) -> None:
        """Raise a TargetError if the layer stands for other numbers by now, or is elsewhere."""
        now = self.kind.dequantize(owner)
        before = _numbers(self.kind, owner, self.state)
        if now is None or now.device != before.device:
            where = "nowhere" if now is None else now.device
            raise TargetError(
                f"{target.name} was on {before.device} when it was merged and is on {where} now: its original codes "
                "cannot be restored; move the model back, or detach by bake()"
            )
        if checksum(now) not in (self.checksum, checksum(before)):
            raise changed_since(state, target)

    def put_back(self, target: Target, owner: nn.Module) -> None:
        """Put the original state back."""
        self.kind.restore(owner, self.state)


class Requantized(NamedTuple):
    """A layer that is ready to be merged into: what is kept for each of its targets, and the new state."""

    indices: Sequence[int]
    kept: Sequence[MergedCodes]
    kind: QuantizedLayer
    owner: nn.Module
    state: Mapping[str, Any]
    row: RequantizedWeight

    def write(self) -> None:
        """Put the new state in place."""
        self.kind.restore(self.owner, self.state)


#: Returns a target's rows plus their update, given its index, the target, and the weight in float32.
Sum = Callable[[int, Target, Tensor], Tensor]


def requantized(adapter: AdapterState, added: Sum) -> Iterator[Requantized]:
    """Yield the quantized layers of an adapter's targets with their merged states; change nothing.

    Raises
    ------
    TargetError
        If a layer cannot be merged into.
    BackendError
        If the library's codes stand for numbers that are not finite.
    """
    owners: dict[int, list[int]] = {}
    for index in range(len(adapter.targets)):
        slot = adapter.slots[index]
        if quantized_type(slot.owner) is not None:
            owners.setdefault(id(slot.owner), []).append(index)
    for indices in owners.values():
        yield _layer(adapter, indices, added)


def _layer(adapter: AdapterState, indices: Sequence[int], added: Sum) -> Requantized:
    owner = adapter.slots[indices[0]].owner
    targets = [adapter.targets[index] for index in indices]
    kind, name = quantized_type(owner), targets[0].name
    assert kind is not None
    if any(slot.index in indices and slot.owner is not owner for slot in adapter.slots):
        raise TargetError(
            f"{name} is quantized and tied to another weight, which would keep the codes without the update: keep the "
            "adapter attached, or attach with untie=True"
        )
    numbers = kind.dequantize(owner)
    if numbers is None:
        raise TargetError(
            f"{name} of {type(owner).__name__} cannot be merged into: it is on the meta device, or in a layout whose "
            "numbers cannot be read; keep the adapter attached"
        )
    before = numbers.float()
    wanted = before.clone()
    for index, target in zip(indices, targets, strict=True):
        # The sums of rows that do not overlap are independent of each other.
        target.write(wanted, added(index, target, before))
    state = _quantize(kind, owner, name, wanted)
    changed = (wanted != before).any(1)
    if not bool(changed.any()):
        state = kind.state(owner)  # a library may round even its own numbers to others
    elif not bool(changed.all()):
        state = kind.keep_rows(owner, state, changed)
    after = _numbers(kind, owner, state)
    if not bool(torch.isfinite(after).all()):
        raise BackendError(
            f"{name} plus its update cannot be quantized as {_kind_name(owner)}: the result is not finite; no weight "
            "was changed"
        )
    kept = [MergedCodes(kind, owner, target, kind.state(owner), checksum(after)) for target in targets]
    return Requantized(indices, kept, kind, owner, state, _measured(name, owner, before, wanted, after))


def _quantize(kind: QuantizedLayer, owner: nn.Module, name: str, wanted: Tensor) -> Mapping[str, Any]:
    try:
        state = kind.requantize(owner, wanted)
    except TargetError as error:
        raise TargetError(f"{name} is quantized: {error}") from None
    if set(state) != set(kind.stored):
        raise TargetError(
            f"{type(kind).__name__}.requantize() returned {', '.join(sorted(state)) or 'nothing'}, and its stored is "
            f"{', '.join(kind.stored) or 'empty'}: it must return these names"
        )
    return state


def _numbers(kind: QuantizedLayer, owner: nn.Module, state: Mapping[str, Any]) -> Tensor:
    """Return what a state of a layer stands for; the layer keeps its own."""
    other = twin(owner)
    kind.restore(other, state)
    found = kind.dequantize(other)
    if found is None:
        raise TargetError(f"{type(kind).__name__} cannot dequantize what its requantize() returned")
    return found


def _measured(name: str, owner: nn.Module, before: Tensor, wanted: Tensor, after: Tensor) -> RequantizedWeight:
    base, goal, found = (tensor.double() for tensor in (before, wanted, after))
    change, off = goal - base, float((found - goal).norm())
    size = float(change.norm())
    kept = float(((found - base) * change).sum()) / size**2 if size else 1.0
    whole = float(goal.norm())
    return RequantizedWeight(name, _kind_name(owner), off / whole if whole else 0.0, off / size if size else 0.0, kept)


def _kind_name(owner: nn.Module) -> str:
    weight = owner._parameters.get("weight")
    plain = weight is None or type(weight) in (Tensor, nn.Parameter)
    return type(owner).__name__ if plain or type(owner) is not nn.Linear else type(weight).__name__
