"""A linear layer on W' where W' is not a sum, with W' recomputed in backward instead of saved.

The counterpart of :mod:`tnadapt.torch._merged_linear` for ``Config.apply`` other than "add". Each change is that of one
target's rows; the targets of one weight do not overlap, because such adapters do not add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from tnadapt.algebra.applying import Applying
from tnadapt.backends import load_backend
from tnadapt.targets.target import Target

from ._delta import Slice
from ._merged_linear import linear
from ._quotient import wide_pair

__all__ = ["ChangedLinear", "RowChange", "changed"]


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

    Do not use it where :func:`tnadapt.torch._merged_linear.in_functorch` or ``in_dispatch_mode`` returns True.
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
