"""What the adapters of groups of rows add to a layer's output, low-rank updates by grouped products.

The plain form is a loop over groups: :func:`looped`. Where each group's adapter has one low-rank matrix for the same
target, and all have the same shape, the factors are stacked, and two batched products serve all groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from tnadapt.targets.target import RowIndices, Target

from ._forward_pass import delta, factors
from ._row_assignment import RowAssignment, mixing_weight
from ._row_features import add_features
from ._state import AdapterSlot

__all__ = ["add_changes", "grouped", "looped"]

#: The rows of a group, and its adapter's slots in the layer.
Slots = tuple[Sequence[int], Sequence[AdapterSlot]]
Output = Callable[[AdapterSlot, Tensor], Tensor]
#: Rows and what is added to them, by the features that they are added to.
Changes = dict[Target | None, list[tuple[Sequence[int], Tensor]]]


def add_changes(
    output: Output, assignment: RowAssignment, groups: Sequence[Slots], x: Tensor, y: Tensor, in_place: bool
) -> Tensor:
    """Return y plus the changes of all groups; x and y are ``(names, rows of each, features)``."""
    acting = [(rows, slots) for rows, slots in groups if slots]
    found = grouped(assignment, acting, x)
    if found is None:
        found = looped(output, assignment, acting, x)
    for target, several in found.items():
        rows = [row for numbers, _ in several for row in numbers]
        change = torch.cat([part for _, part in several]) if len(several) > 1 else several[0][1]
        y = _plus(y, target, assignment.index(rows, y.device), change.to(y.dtype), in_place)
    return y


def looped(output: Output, assignment: RowAssignment, groups: Sequence[Slots], x: Tensor) -> Changes:
    """Compute each group's changes alone."""
    found: Changes = {}
    for rows, slots in groups:
        part = x.index_select(0, assignment.index(rows, x.device))
        for slot in slots:
            key = slot.target if slot.target.rows is not None else None
            if slot.strategy == "weight":
                update = delta(slot)
                autocast = torch.is_autocast_enabled(x.device.type)
                made = torch.nn.functional.linear(part, update.to(x.device) if autocast else update.to(x))
            else:
                made = output(slot, part)
            found.setdefault(key, []).append((rows, made))
    return found


def grouped(assignment: RowAssignment, groups: Sequence[Slots], x: Tensor) -> Changes | None:
    """Compute the changes of all groups by batched products; None where these do not apply."""
    first = groups[0][1]
    if len(groups) == 1 or not _are_alike(groups):
        return None
    order = [row for rows, _ in groups for row in rows]
    counts = {len(rows) for rows, _ in groups}
    if len(counts) > 1:
        numbers = [place for place, (rows, _) in enumerate(groups) for _ in rows]
    found: Changes = {}
    blocks = x.index_select(0, assignment.index(order, x.device))
    for place, slot in enumerate(first):
        several = [factors(slots[place]) for _, slots in groups]
        pairs = [one.terms[0][0] for one in several]
        if any(pair.right is None or pair.left.shape != pairs[0].left.shape for pair in pairs):
            return None
        if len({(pair.left.dtype, pair.left.device) for pair in pairs}) > 1 or pairs[0].left.device != x.device:
            return None
        scales = [
            one.scale * mixing_weight(slots[place].adapter) for one, (_, slots) in zip(several, groups, strict=True)
        ]
        # Different scales multiply the factors one by one: a tensor of scales would be copied to the device.
        lefts = [pair.left for pair in pairs]
        if len(set(scales)) > 1:
            lefts = [left * scale for left, scale in zip(lefts, scales, strict=True)]
        left, right = torch.stack(lefts), torch.stack([cast(Tensor, pair.right) for pair in pairs])
        if len(set(scales)) == 1 and scales[0] != 1.0:
            left = left * scales[0]
        given = blocks if torch.is_autocast_enabled(x.device.type) else blocks.to(left.dtype)
        if len(counts) > 1:
            # A copy of the factors for each row: narrow matrices, and fewer calls than groups.
            index = assignment.index(numbers, x.device)
            left, right = left.index_select(0, index), right.index_select(0, index)
        else:
            given = given.reshape(len(groups), -1, given.shape[-1])
        made = torch.bmm(torch.bmm(given, right), left.mT).reshape(*blocks.shape[:-1], left.shape[1])
        found.setdefault(slot.target if slot.target.rows is not None else None, []).append((order, made))
    return found


def _are_alike(groups: Sequence[Slots]) -> bool:
    """Return whether all groups update the same features, each by one low-rank matrix."""
    targets = [slot.target for slot in groups[0][1]]
    for _, slots in groups:
        if [slot.target for slot in slots] != targets:
            return False
        for slot in slots:
            plain = slot.factoring is not None and slot.factoring.is_plain
            if slot.strategy != "factored" or not plain or slot.adapter.activation is not None:
                return False
    return True


def _plus(y: Tensor, target: Target | None, rows: Tensor, change: Tensor, in_place: bool) -> Tensor:
    """Return y with a change added to some rows, and there to the features of the target's rows."""
    part, own = y, None if target is None else target.rows
    if target is not None and isinstance(own, RowIndices):
        found = add_features(y.index_select(0, rows), target, change)
        return y.index_copy_(0, rows, found) if in_place else y.index_copy(0, rows, found)
    assert not isinstance(own, RowIndices)
    if own is not None:
        blocks = y.view(*y.shape[:-1], own.count, own.stride) if in_place else y.reshape(*y.shape[:-1], own.count, -1)
        part = blocks[..., own.start : own.start + own.length]
        change = change.reshape(*change.shape[:-1], own.count, own.length)
    if in_place:
        part.index_add_(0, rows, change)
        return y
    part = part.index_add(0, rows, change)
    if own is None:
        return part
    return torch.cat([blocks[..., : own.start], part, blocks[..., own.start + own.length :]], -1).reshape(y.shape)
