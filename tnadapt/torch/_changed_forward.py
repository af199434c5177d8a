"""The part of adapters that are not sums in a forward pass: the changed weight, and the scaled output.

A layer works on the changed weight (:mod:`tnadapt.torch._changed_forward`), or leaves the weight alone and scales its
output: with q = m / ‖W + ΔW‖ and ``y = x (W + ΔW)ᵀ + b``, the layer's output is ``y + (q - 1) ∘ (y - b)``, which for
q = 1 is y to the bit. Each function is called for slots whose adapter alone acts on their rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.algebra.applying import Applying
from tnadapt.backends import load_backend
from tnadapt.errors import TargetError
from tnadapt.targets.target import Target

from ._delta import DeltaFunction, Slice, in_dispatch_mode, in_functorch
from ._delta_cache import Quotient, wide_pair
from ._forward_pass import ColumnDropout, delta
from ._linear import fixed_indices, index_tensor, linear
from ._merging import numbers
from ._state import AdapterSlot, current, mixing_weight, weight_on, weight_params

__all__ = [
    "ChangedLinear",
    "RowChange",
    "added_matrix",
    "changed",
    "changed_linear",
    "changed_weight",
    "scaled_output",
]


# -- A linear layer on W' where W' is not a sum, with W' recomputed in backward instead of saved -----------------------

# The counterpart of :mod:`tnadapt.torch._linear` for ``Config.apply`` other than "add". Each change is that of
# one target's rows; the targets of one weight do not overlap, because such adapters do not add up.


class RowChange(NamedTuple):
    """The change of a target's rows, without the arrays that it is computed from.

    Attributes
    ----------
    target : Target
    applying : Applying
    made : Slice or None
        Computes the update from the first arrays; None where the first array is the update itself.
    number : int
        Number of arrays of the update.
    own : int
        Number of the weight's own parameters, which follow.
    scale : float
        Factor of an update that is computed here.
    detach : bool
        Whether a norm counts as a constant for the gradient.
    """

    target: Target
    applying: Applying
    made: Slice | None
    number: int
    own: int
    scale: float
    detach: bool

    def delta(self, arrays: Sequence[Tensor]) -> Tensor:
        """Return the update, scaled."""
        delta = arrays[0] if self.made is None else self.made(*arrays[: self.number])
        return delta if self.scale == 1.0 else delta * self.scale

    def rows(self, weight: Tensor, arrays: Sequence[Tensor]) -> Tensor:
        """Return the changed rows for the stored weight, in the wider dtype of weight and update."""
        base, delta = wide_pair(self.target.select(weight), self.delta(arrays))
        own = [array.to(base.device) for array in arrays[self.number :]]
        return cast(Tensor, self.applying.merged(load_backend("torch"), base, delta, own, detach=self.detach))

    def pulled(
        self, weight: Tensor, arrays: Sequence[Tensor], needed: Sequence[bool], gradient: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the gradients of the target's rows of the weight, and of the arrays, given that of W'."""
        base, delta = wide_pair(self.target.select(weight), self.delta(arrays))
        own = arrays[self.number :]
        of_base, of_delta, of_own = self.applying.pulled(
            load_backend("torch"), base, delta, [array.to(base.device) for array in own], gradient.to(base.dtype),
            self.detach,
        )  # fmt: skip
        found: list[Tensor | None] = [None] * len(arrays)
        wanted = [index for index in range(self.number) if needed[index]]
        if wanted:
            moved = of_delta.to(arrays[0].device, arrays[0].dtype)
            moved = moved if self.scale == 1.0 else moved * self.scale
            pulled = [moved] if self.made is None else self.made.vjp(arrays[: self.number], wanted, moved)
            for index, part in zip(wanted, pulled, strict=True):
                found[index] = part
        for index, part in enumerate(of_own, start=self.number):
            found[index] = part.to(arrays[index].device, arrays[index].dtype) if needed[index] else None
        return of_base, found


def changed(stored: Tensor, rows: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Return the stored weight with the rows of targets replaced by matrices ``(rows, cols)``, rounded to its dtype."""
    total = stored
    for target, matrix in rows:
        matrix = matrix.to(stored.dtype)
        if target.is_whole:
            return matrix.T if target.transposed else matrix.reshape(stored.shape)
        if total is stored:
            total = stored.clone(memory_format=torch.contiguous_format)
        target.write(total, matrix)
    return total


class ChangedLinear(torch.autograd.Function):
    """``x W'ᵀ + b``; backward recomputes W' from W and the arrays.

    Do not use it where :func:`tnadapt.torch._linear.in_functorch` or ``in_dispatch_mode`` returns True.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[RowChange], *arrays: Tensor
    ) -> Tensor:
        ctx.changes = changes
        ctx.save_for_backward(x, weight, *arrays)
        return linear(x, _total(weight, changes, arrays), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *arrays = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        # Under autocast the output and its gradient have the lower precision, and so have these products.
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        found: list[Tensor | None] = [None] * 4
        if need_x:
            total = _total(weight, ctx.changes, arrays)
            found[0] = (rows @ total.to(rows.dtype)).to(x.dtype).view(x.shape)
            del total
        whole = rows.T @ inputs
        of_rows: list[tuple[Target, Tensor]] = []
        start = 0
        for change in ctx.changes:
            stop = start + change.number + change.own
            gradient = change.target.select(whole)
            of_base, pulled = change.pulled(weight, arrays[start:stop], needed[start:stop], gradient)
            of_rows.append((change.target, of_base))
            found += pulled
            start = stop
        if need_weight:
            found[1] = changed(whole.to(weight.dtype), of_rows)
        if need_bias:
            found[2] = rows.sum(0)
        return tuple(found)


def _total(weight: Tensor, changes: Sequence[RowChange], arrays: Sequence[Tensor]) -> Tensor:
    found, start = list[tuple[Target, Tensor]](), 0
    for change in changes:
        stop = start + change.number + change.own
        found.append((change.target, change.rows(weight, arrays[start:stop])))
        start = stop
    return changed(weight, found)


# -- The part of adapters that are not sums in a forward pass: the changed weight, and the scaled output ---------------


def changed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return the output of a linear layer on its changed weight."""
    if _traced() or not torch.is_grad_enabled() or x.is_nested:
        return functional.linear(x, changed_weight(weight, slots), bias)
    changes, arrays = list[RowChange](), list[Tensor]()
    for slot in slots:
        state, own = slot.adapter, weight_params(slot.adapter, slot.index)
        made = state.cache.slice(slot.index)
        of_update = [delta(slot)] if made is None else current(state, made.names)
        scale = 1.0 if made is None else mixing_weight(state)
        changes.append(
            RowChange(slot.target, state.plan.applying, made, len(of_update), len(own), scale, state.detach_norm)
        )
        arrays += [*of_update, *own]
    return cast(Tensor, ChangedLinear.apply(x, weight, bias, tuple(changes), *arrays))  # type: ignore[no-untyped-call]


def changed_weight(stored: Tensor, slots: Sequence[AdapterSlot], drop: ColumnDropout | None = None) -> Tensor:
    """Return a changed weight, by ordinary operations; with dropout of columns of the changes."""
    if slots[0].target.index is not None:
        return _changed_matrices(stored, slots, drop)
    total = stored
    for slot in slots:
        rows = slot.target.select(total)
        total = changed(total, [(slot.target, _with_dropout(slot, stored, rows, drop))])
    return total


def _with_dropout(slot: AdapterSlot, stored: Tensor, rows: Tensor, drop: ColumnDropout | None) -> Tensor:
    found = _changed_rows(slot, stored, rows)
    return found if drop is None or not drop.acts(slot) else rows + drop(slot, found - rows)


def _changed_matrices(stored: Tensor, slots: Sequence[AdapterSlot], drop: ColumnDropout | None) -> Tensor:
    """Return a stack of matrices of which some are changed, with one operation on the whole stack."""
    by_index: dict[int, Tensor] = {}
    for slot in slots:
        assert slot.target.index is not None
        matrix, alone = by_index.get(slot.target.index, stored[slot.target.index]), slot.target.of_matrix()
        rows = _with_dropout(slot, stored, alone.select(matrix), drop)
        by_index[slot.target.index] = changed(matrix, [(alone, rows)])
    return stored.index_copy(0, fixed_indices(tuple(by_index), stored.device), torch.stack(list(by_index.values())))


def _changed_rows(slot: AdapterSlot, stored: Tensor, rows: Tensor) -> Tensor:
    state = slot.adapter
    applying, backend = state.plan.applying, load_backend("torch")
    update = delta(slot)
    base, update = wide_pair(rows, update)
    own = [array.to(base.device) for array in weight_params(state, slot.index)]
    if applying.rescales and applying.scales_outputs and not torch.is_grad_enabled() and not _traced():
        total = base + applying.change(backend, base, update)
        return cast(Tensor, total * quotient(slot, stored).view(-1, 1).to(total.dtype))
    found = applying.merged(backend, base, update, own, detach=state.detach_norm)
    return _unless_inactive(slot, found, base)


def quotient(slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return q of one weight, one number for each row; ``stored`` is None for a quantized weight."""
    state = slot.adapter
    made = None if torch.compiler.is_compiling() else state.cache.slice(slot.index)
    own = weight_params(state, slot.index)
    weight = functools.partial(_base, slot) if stored is None else functools.partial(slot.target.select, stored)
    names: tuple[str, ...] = ()
    if made is None:
        arrays, scale = [delta(slot), *own], 1.0
    else:
        names = (*made.names, *state.plan.weight_param_names[slot.index])
        arrays, scale = [*current(state, made.names), *own], mixing_weight(state)
    made_here = Quotient(state.plan.applying, weight, made, scale, state.detach_norm)
    # The node passes no gradient to the weight, and traces have to show single operations.
    if _traced() or (torch.is_grad_enabled() and stored is not None and stored.requires_grad):
        found = made_here(*arrays)
        return _unless_inactive(slot, found, torch.ones_like(found))
    if torch.is_grad_enabled():
        return cast(Tensor, DeltaFunction.apply(made_here, *arrays))  # type: ignore[no-untyped-call]
    if names and stored is not None:
        return state.quotients.get(slot.index, names, arrays, made_here, stored)
    return made_here(*arrays)


def scaled_output(y: Tensor, bias: Tensor | None, slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return a layer's output with the features of the target's rows times q; the bias is not scaled."""
    found = quotient(slot, stored)
    if slot.target.rows is not None:
        # Ones for all other features.
        place = torch.ones(slot.target.out, dtype=found.dtype, device=found.device)
        found = place.index_copy(0, index_tensor(slot.target, found.device), found)
    found = found.to(y.device)
    kind = torch.promote_types(y.dtype, found.dtype)
    own = y if bias is None else y - bias.to(y.device, y.dtype)
    return (y.to(kind) + (found - 1.0).to(kind) * own.to(kind)).to(y.dtype)


def added_matrix(slot: AdapterSlot, stored: Tensor | None) -> Tensor:
    """Return C, which is added to the weight, in the dtype of the update."""
    applying, update = slot.adapter.plan.applying, delta(slot)
    if applying.takes_factors:
        return update
    weight = _base(slot) if stored is None else slot.target.select(stored)
    base, wide = wide_pair(weight, update)
    return cast(Tensor, applying.change(load_backend("torch"), base, wide).to(update.dtype))


def _base(slot: AdapterSlot) -> Tensor:
    weight: Any = numbers(slot.owner, slot.target.parameter)
    if weight is None:
        raise TargetError(f"the values of {slot.target.name} can no longer be read")
    return cast(Tensor, slot.target.select(weight))


def _unless_inactive(slot: AdapterSlot, found: Tensor, otherwise: Tensor) -> Tensor:
    """Return what an adapter changes; in a compiled program, which serves all mixing weights, what is there at 0."""
    if not torch.compiler.is_compiling():
        return found
    return torch.where(weight_on(slot.adapter, found.device) == 0, otherwise, found)


def _traced() -> bool:
    return torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode()
