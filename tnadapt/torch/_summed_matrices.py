"""The sum of a parameter that stacks several matrices (experts) and the updates of these matrices.

Written with ordinary operations, the sum would need the stacked updates, the sum in the wider dtype and one node of the
graph for each matrix. :class:`SummedMatrices` writes one matrix after the other into a copy of the parameter, and saves
only the arrays that the updates are computed from. The sum itself is an operand of the module's products, which save
it for their own backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tnadapt.targets.target import Target

from ._dropout import ColumnDropout
from ._forward_pass import delta, delta_source
from ._interception import in_dispatch_mode, in_functorch
from ._merged_linear import DeltaSource
from ._row_features import fixed_indices, index_tensor
from ._state import AdapterSlot

__all__ = ["SummedMatrices", "stacked_sum", "summed_matrices"]


def summed_matrices(stored: Tensor, slots: Sequence[AdapterSlot], drop: ColumnDropout) -> Tensor:
    """Return a stack of matrices with the updates of some of them, each rounded once to its dtype."""
    slots = sorted(slots, key=lambda slot: cast(int, slot.target.index))
    dropping = any(drop.acts(slot) for slot in slots)
    if dropping or torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode():
        return stacked_sum(stored, [(slot.target, drop(slot, delta(slot))) for slot in slots])
    if not torch.is_grad_enabled():
        return _written(stored, ((slot.target, delta(slot)) for slot in slots))
    sources: list[DeltaSource] = []
    arrays: list[Tensor] = []
    for slot in slots:
        source, own = delta_source(slot)
        sources.append(source)
        arrays += own
    return cast(Tensor, SummedMatrices.apply(stored, tuple(sources), *arrays))  # type: ignore[no-untyped-call]


def stacked_sum(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Compute the same sum by operations on the whole stack: the reference, and the form for compilers."""
    kind = torch.promote_types(stored.dtype, changes[0][1].dtype)
    by_index: dict[int, Tensor] = {}
    for target, change in changes:
        assert target.index is not None
        matrix = by_index.get(target.index)
        matrix = stored[target.index].to(kind) if matrix is None else matrix
        change = change.to(stored.device, kind)
        if target.rows is not None:
            whole = torch.zeros(target.out, target.shape[1], dtype=kind, device=stored.device)
            places = index_tensor(target, stored.device)
            change = whole.index_copy(0, places, change)
        by_index[target.index] = matrix + (change.mT if target.transposed else change)
    numbers = fixed_indices(tuple(by_index), stored.device)
    return stored.index_copy(0, numbers, torch.stack(list(by_index.values())).to(stored.dtype))


class SummedMatrices(torch.autograd.Function):
    """The sum as one autograd node; backward recomputes what the gradient of each update needs."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, sources: Sequence[DeltaSource], *arrays: Tensor) -> Tensor:
        ctx.sources, ctx.kind = sources, stored.dtype
        ctx.save_for_backward(*arrays)
        return _written(stored, _changes(sources, arrays))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrays, (moved,) = ctx.saved_tensors, grads
        found: list[Tensor | None] = [moved if ctx.needs_input_grad[0] else None, None]
        start = 0
        for source in ctx.sources:
            own = arrays[start : start + source.number]
            needed = ctx.needs_input_grad[2 + start : 2 + start + source.number]
            found += _pulled(source, own, needed, source.target.select(moved))
            start += source.number
        return tuple(found)


def _changes(sources: Sequence[DeltaSource], arrays: Sequence[Tensor]) -> Iterator[tuple[Target, Tensor]]:
    start = 0
    for source in sources:
        own = arrays[start : start + source.number]
        change = own[0] if source.made is None else source.made(*own)
        yield source.target, change if source.weight == 1.0 else change * source.weight
        start += source.number


def _written(stored: Tensor, changes: Iterable[tuple[Target, Tensor]]) -> Tensor:
    """Return a copy of the stack with one matrix after the other changed; changes of one matrix follow each other."""
    total = stored.detach().clone(memory_format=torch.contiguous_format)
    for index, own in itertools.groupby(changes, lambda change: change[0].index):
        assert index is not None
        matrix = stored.detach()[index]
        for target, change in own:
            matrix = _wide_sum(matrix, target.of_matrix(), change)
        total[index] = matrix  # rounded here
    return total


def _wide_sum(matrix: Tensor, target: Target, change: Tensor) -> Tensor:
    kind = torch.promote_types(matrix.dtype, change.dtype)
    change = change.to(matrix.device, kind)
    if target.rows is None:
        return matrix.to(kind) + (change.T if target.transposed else change)
    total = matrix.to(kind, copy=True)
    target.write(total, target.select(total) + change)
    return total


def _pulled(
    source: DeltaSource, arrays: Sequence[Tensor], needed: Sequence[bool], moved: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the arrays of one update, given that of the update."""
    found: list[Tensor | None] = [None] * len(arrays)
    wanted = [place for place, need in enumerate(needed) if need]
    if not wanted:
        return found
    moved = moved.to(arrays[0].device, arrays[0].dtype)
    moved = moved if source.weight == 1.0 else moved * source.weight
    parts = [moved] if source.made is None else source.made.vjp(arrays, wanted, moved)
    for place, part in zip(wanted, parts, strict=True):
        found[place] = part
    return found
