"""A linear layer on W + ΔW that recomputes the sum in backward instead of saving it.

Written with ordinary operations, ``F.linear(x, W + ΔW)`` would save the sum of every layer until backward: the memory
of a second model. ΔW is cheap to compute from its arrays, so only these are saved. The custom function also reuses
memory: the sum is computed in the buffer of ΔW, and the gradient of ΔW in the buffer of the sum.

Invariants of the buffers: ``_summed_in_place`` overwrites ΔW only where ΔW was computed for this call and shares no
storage with a parameter. In backward the order is fixed: ΔW, then W + ΔW in its buffer, then the gradient with respect
to x, and only then the gradient of ΔW, which overwrites the sum. A buffer that is written to is never saved, and none
is reused where someone may still look at it (``once`` in ``backward``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.targets.target import RowIndices, Target

from ._delta import Slice
from ._interception import in_functorch
from ._outer_gradients import outer_vjp_once
from ._rounded_sum import can_sum_in_blocks, sum_in_blocks
from ._row_features import features_of, index_tensor

__all__ = ["DeltaSource", "MergedWeightLinear", "linear", "summed"]


class DeltaSource(NamedTuple):
    """The source of the update of a target's rows.

    Attributes
    ----------
    target : Target
        The rows that are updated.
    made : Slice or None
        Computes the update, ``(rows, cols)``, from ``number`` arrays; None where the single array given is the update
        itself.
    number : int
    weight : float
        Factor of an update that is computed here.
    """

    target: Target
    made: Slice | None = None
    number: int = 1
    weight: float = 1.0


def summed(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Return the stored weight plus the updates of its rows, summed in the wider dtype and rounded once."""
    if len(changes) == 1 and can_sum_in_blocks(stored, *changes[0]):
        return sum_in_blocks(stored, changes[0][1])
    kind = stored.dtype
    for _, delta in changes:
        kind = torch.promote_types(kind, delta.dtype)
    total, own = stored.to(kind), kind != stored.dtype
    for target, delta in changes:
        delta = delta.to(stored.device)
        if target.rows is None:
            total, own = total + (delta.T if target.transposed else delta.reshape(stored.shape)), True
            continue
        if isinstance(target.rows, RowIndices):
            axis = 1 if target.transposed else 0
            change = (delta.T if target.transposed else delta.reshape(-1, *stored.shape[1:])).to(kind)
            total, own = total.index_add(axis, index_tensor(target, stored.device), change), True
            continue
        # Only the target's rows are written, so the other rows keep their exact bits. In a channels_last weight the
        # block would be a copy instead of a view, hence the contiguous clone.
        if in_functorch():
            # Under vmap the update may have a batch dimension that the weight lacks. What new_ones returns has it, and
            # so has a selection by it, which is a copy.
            total, own = torch.where(delta.new_ones((), dtype=torch.bool), total, total), True
        elif not own or not total.is_contiguous():
            total, own = total.clone(memory_format=torch.contiguous_format), True
        target.block(total).add_(target.like_block(delta))
    return total.to(stored.dtype)


def _summed_in_place(stored: Tensor, changes: Sequence[tuple[Target, Tensor]], arrays: Sequence[Tensor]) -> Tensor:
    """Return the same sum, computed in the buffer of the update where possible; the update is then overwritten."""
    target, delta = changes[0]
    alike = (delta.dtype, delta.device, delta.shape) == (stored.dtype, stored.device, stored.shape)
    if len(changes) > 1 or not alike or target.rows is not None or target.transposed or not delta.is_contiguous():
        return summed(stored, changes)
    memory = delta.untyped_storage()._cdata
    if any(array.untyped_storage()._cdata == memory for array in arrays):
        return summed(stored, changes)  # a dense update is a view of its parameters
    return delta.add_(stored)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x Wᵀ + b`` for a custom function to return: no view.

    For batched x the output of ``functional.linear`` is one, and autograd forbids writes in place to a view created
    inside a custom function, as by an inplace ReLU after the layer.
    """
    y = functional.linear(x, weight, bias)
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y


class MergedWeightLinear(torch.autograd.Function):
    """``x (W + ΔW)ᵀ + b``; backward recomputes the sum, and ΔW if it is computed here, instead of saving them.

    Do not use it where :func:`in_functorch` or :func:`in_dispatch_mode` returns True.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sources: Sequence[DeltaSource], *arrays: Tensor
    ) -> Tensor:
        ctx.sources = sources
        ctx.save_for_backward(x, weight, *arrays)
        changes = []
        for source, own in _shared_out(sources, arrays):
            delta = own[0] if source.made is None else source.made(*own)
            changes.append((source.target, delta if source.weight == 1.0 else delta * source.weight))
        return linear(x, _summed_in_place(weight, changes, arrays), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *arrays = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        # Under autocast the output and its gradient have the lower precision, and so have these products.
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        # Buffers are reused only if no one needs the intermediate results again: not where this backward pass is
        # itself differentiated (create_graph=True) or batched (vmap).
        batched = torch._C._functorch.is_legacy_batchedtensor(grads[0])
        once = not torch.is_grad_enabled() and not in_functorch() and not batched
        changes: list[tuple[Target, Tensor]] = []
        pulls: list[Callable[[Tensor], Sequence[Tensor | None]] | None] = []
        start = 0
        for source, own in _shared_out(ctx.sources, arrays):
            delta, pull = _recompute_vjp(source, own, needed[start : start + source.number], once)
            changes.append((source.target, delta))
            pulls.append(pull)
            start += source.number
        kinds = [delta.dtype for _, delta in changes]
        found: list[Tensor | None] = [None] * 4
        scratch: Tensor | None = None
        if need_x:
            total = _summed_in_place(weight, changes, arrays) if once else summed(weight, changes)
            found[0] = (rows @ total.to(rows.dtype)).to(x.dtype).view(x.shape)
            scratch = total if once and total.dtype == rows.dtype else None
        del changes
        whole = rows.T @ inputs if need_weight else None
        found[1] = None if whole is None else whole.to(weight.dtype)
        for source, pull, kind in zip(ctx.sources, pulls, kinds, strict=True):
            if pull is None:
                found += [None] * source.number
            elif whole is not None:
                found += pull(source.target.select(whole).to(kind))
            elif scratch is not None and scratch.shape == source.target.shape and scratch.is_contiguous():
                # The sum is no longer needed: its buffer is warm in the cache, and reusing it saves an allocation.
                found += pull(torch.mm(rows.T, inputs, out=scratch).to(kind))
                scratch = None
            else:
                found += pull((features_of(source.target, rows).T @ inputs).to(kind))
        if need_bias:
            found[2] = rows.sum(0)
        return tuple(found)


def _shared_out(sources: Sequence[DeltaSource], arrays: Sequence[Tensor]) -> list[tuple[DeltaSource, Sequence[Tensor]]]:
    """Pair each source with its arrays."""
    found, start = [], 0
    for source in sources:
        found.append((source, arrays[start : start + source.number]))
        start += source.number
    return found


def _recompute_vjp(
    source: DeltaSource, arrays: Sequence[Tensor], needed: Sequence[bool], once: bool
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]] | None]:
    """Recompute the update; also return the function from its gradient to those of the arrays (None if none needed)."""
    if source.made is None:
        return arrays[0], (lambda moved: [moved]) if needed[0] else None
    made, weight = source.made, source.weight
    wanted = [index for index, need in enumerate(needed) if need]

    def of(*moved: Tensor) -> Tensor:
        given = list(arrays)
        for index, array in zip(wanted, moved, strict=True):
            given[index] = array
        delta = made(*given)
        return delta if weight == 1.0 else delta * weight

    if not wanted:
        return of(), None
    if once:
        delta, pulled = _recompute_vjp_once(made, weight, arrays, wanted)
    else:
        delta, pulled = cast(Any, torch.func.vjp(of, *(arrays[index] for index in wanted)))

    def pull(moved: Tensor) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * len(arrays)
        for index, part in zip(wanted, pulled(moved), strict=True):
            result[index] = part
        return result

    return delta, pull


def _recompute_vjp_once(
    made: Slice, weight: float, arrays: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """Do what torch.func.vjp does, for a single use: a third of its overhead, and no memory beyond the update's."""
    # A separate graph from detached leaves to the update: autograd.grad stops at these leaves.
    given = list(arrays)
    for index in wanted:
        given[index] = arrays[index].detach().requires_grad_()
    leaves = [given[index] for index in wanted]
    with torch.enable_grad():
        outer = made.outer(*given)
        if outer is not None:
            return outer_vjp_once(outer, made.shape, weight, leaves)
        factors = made.factors(*given)
        if factors is None:
            value = made(*given)
            value = value if weight == 1.0 else value * weight
            return value.detach(), lambda moved: torch.autograd.grad(value, leaves, moved)
    # The update is a contiguous run of elements of left @ right (a slice of a group's matrix, which may begin in the
    # middle of a row). The product is differentiated by hand below, in the buffer that holds it.
    left, right, first = factors
    scratch = torch.mm(left.detach(), right.detach())
    if weight != 1.0:
        scratch.mul_(weight)
    flat = scratch.view(-1)
    stop = first + made.size
    delta = flat[first:stop].view(made.shape)

    def pull(moved: Tensor) -> Sequence[Tensor]:
        # The gradient replaces the update inside the buffer of the whole product.
        if moved.data_ptr() != delta.data_ptr():
            delta.copy_(moved)
        # The rest of the product is not part of the update: its gradient is zero.
        flat[:first].zero_()
        flat[stop:].zero_()
        if weight != 1.0:
            scratch.mul_(weight)
        outputs, gradients = [], []
        if left.requires_grad:
            outputs.append(left)
            # In this form the long sides of both operands are contiguous: it takes a quarter of the time.
            gradients.append((right.detach().contiguous() @ scratch.T).T)
        if right.requires_grad:
            outputs.append(right)
            gradients.append(left.detach().T @ scratch)
        return torch.autograd.grad(outputs, leaves, gradients)

    return delta, pull
