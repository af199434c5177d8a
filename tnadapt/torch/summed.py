"""A linear layer on the sum of its weight and updates, which is formed again in backward instead of being kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from ..target import Target

__all__ = ["Source", "SummedLinear", "summed"]


class Source(NamedTuple):
    """Where the update of some rows comes from.

    Attributes
    ----------
    target : Target
        Which rows.
    made : function of tensors, or None
        What makes the update, ``(rows, cols)``, of as many arrays as ``number`` says; None where the one array given is
        the update itself.
    number : int
    weight : float
        What it is multiplied with, where it is made here.
    """

    target: Target
    made: Callable[..., Tensor] | None = None
    number: int = 1
    weight: float = 1.0


def summed(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """The stored weight with updates added to their rows; summed in the wider dtype and rounded once."""
    kind = stored.dtype
    for _, delta in changes:
        kind = torch.promote_types(kind, delta.dtype)
    total, own = stored.to(kind), kind != stored.dtype
    for target, delta in changes:
        delta = delta.to(stored.device)
        if target.rows is None:
            total, own = total + (delta.T if target.transposed else delta.reshape(stored.shape)), True
            continue
        # The other rows stay as they are, to the bit. Of a weight in channels_last a block would be a copy.
        if not own or not total.is_contiguous():
            total, own = total.clone(memory_format=torch.contiguous_format), True
        target.block(total).add_(target.like_block(delta))
    return total.to(stored.dtype)


class SummedLinear(torch.autograd.Function):
    """``x (W + ΔW)ᵀ + b``; the sum, and ΔW if it is made here, are formed again in backward instead of being kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, sources: Sequence[Source], *arrays: Tensor) -> Tensor:
        deltas = []
        for source, own in _shared_out(sources, arrays):
            delta = own[0] if source.made is None else source.made(*own)
            deltas.append(delta if source.weight == 1.0 else delta * source.weight)
        total = summed(weight, [(source.target, delta) for source, delta in zip(sources, deltas, strict=True)])
        y = functional.linear(x, total, bias)
        # Of a batch it is a view, and a view that is made in here must not be written to in place, as an inplace ReLU
        # after the layer would. This is the same numbers, and no view.
        return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.sources, *arrays = inputs
        ctx.save_for_backward(x, weight, *arrays)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *arrays = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        # Under autocast the output, and so its gradient, is of the lower precision: so are the products.
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        changes: list[tuple[Target, Tensor]] = []
        pulls: list[Callable[[Tensor], Sequence[Tensor | None]] | None] = []
        start = 0
        for source, own in _shared_out(ctx.sources, arrays):
            delta, pull = _with_pull(source, own, needed[start : start + source.number])
            changes.append((source.target, delta))
            pulls.append(pull)
            start += source.number
        found: list[Tensor | None] = [None] * 4
        if need_x:
            total = summed(weight, changes)
            found[0] = (rows @ total.to(rows.dtype)).to(x.dtype).view(x.shape)
            del total
        whole = rows.T @ inputs if need_weight else None
        found[1] = None if whole is None else whole.to(weight.dtype)
        for source, (target, delta), pull in zip(ctx.sources, changes, pulls, strict=True):
            if pull is None:
                found += [None] * source.number
                continue
            moved = _of_rows(target, rows).T @ inputs if whole is None else target.select(whole)
            found += pull(moved.to(delta))
        if need_bias:
            found[2] = rows.sum(0)
        return tuple(found)


def _shared_out(sources: Sequence[Source], arrays: Sequence[Tensor]) -> list[tuple[Source, Sequence[Tensor]]]:
    """Each source with its arrays."""
    found, start = [], 0
    for source in sources:
        found.append((source, arrays[start : start + source.number]))
        start += source.number
    return found


def _with_pull(
    source: Source, arrays: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]] | None]:
    """The update again, and what takes its gradient to the gradients of the arrays (None: none is needed)."""
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
    # Of torch.func, as a backward pass may be batched or differentiated itself.
    delta, pulled = cast(Any, torch.func.vjp(of, *(arrays[index] for index in wanted)))

    def pull(moved: Tensor) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * len(arrays)
        for index, part in zip(wanted, pulled(moved), strict=True):
            result[index] = part
        return result

    return delta, pull


def _of_rows(target: Target, features: Tensor) -> Tensor:
    """Of ``(n, out)`` features those that the target's rows make, in order."""
    if target.rows is None:
        return features
    rows, count = target.rows, features.shape[0]
    blocks = features.view(count, rows.count, rows.stride)[:, :, rows.start : rows.start + rows.length]
    return blocks[:, 0] if rows.count == 1 else blocks.reshape(count, rows.count * rows.length)
