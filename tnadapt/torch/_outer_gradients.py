"""The update whose rows are outer products, and its gradients by two sums, in the buffer that holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._delta import OuterRows

__all__ = ["outer_vjp_once"]


class _Table(NamedTuple):
    """Rows of outer products in their buffer, cut to a length: the elements of left that are whole, and the last."""

    outer: OuterRows
    buffer: Tensor

    @property
    def whole(self) -> int:
        return self.outer.cols // self.outer.right.shape[1]

    @property
    def main(self) -> Tensor:
        wide = self.outer.right.shape[1]
        return self.buffer[:, : self.whole * wide].view(len(self.buffer), self.whole, wide)

    @property
    def rest(self) -> Tensor:
        return self.buffer[:, self.whole * self.outer.right.shape[1] :]

    def fill(self) -> None:
        left, right, rest = self.outer.left.detach(), self.outer.right.detach(), self.rest
        torch.mul(left[:, : self.whole].unsqueeze(2), right.unsqueeze(1), out=self.main)
        if rest.shape[1]:
            torch.mul(left[:, self.whole : self.whole + 1], right[:, : rest.shape[1]], out=rest)

    def of_right(self) -> Tensor:
        """Return the gradient of right, where the buffer holds that of the rows."""
        left, rest = self.outer.left.detach(), self.rest
        found = torch.bmm(left[:, : self.whole].unsqueeze(1), self.main).squeeze(1)
        if rest.shape[1]:
            found[:, : rest.shape[1]].addcmul_(left[:, self.whole : self.whole + 1], rest)
        return found

    def of_left(self) -> Tensor:
        """Return the gradient of left, where the buffer holds that of the rows; the buffer is overwritten."""
        left, right, rest = self.outer.left, self.outer.right.detach(), self.rest
        found = torch.zeros_like(left)
        torch.sum(self.main.mul_(right.unsqueeze(1)), 2, out=found[:, : self.whole])
        if rest.shape[1]:
            torch.sum(rest.mul_(right[:, : rest.shape[1]]), 1, out=found[:, self.whole])
        return found


def outer_vjp_once(
    outer: OuterRows, shape: tuple[int, int], weight: float, leaves: Sequence[Tensor]
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """Return an update, and a function from its gradient to those of the leaves, for a single use.

    Parameters
    ----------
    outer : OuterRows
        Computed from the leaves, with gradients.
    shape : (int, int)
        Of the update.
    weight : float
        Factor of the update.
    leaves : sequence of Tensor
    """
    buffer = torch.empty((len(outer.left), outer.cols), dtype=outer.left.dtype, device=outer.left.device)
    table = _Table(outer, buffer)
    with torch.no_grad():
        table.fill()
        _scale(buffer, outer.scale, weight)
    flat = buffer.view(-1)
    stop = outer.first + shape[0] * shape[1]
    delta = flat[outer.first : stop].view(shape)

    def pull(moved: Tensor) -> Sequence[Tensor]:
        # The gradient replaces the update inside the buffer of the rows.
        if moved.data_ptr() != delta.data_ptr():
            delta.copy_(moved)
        # The rest of the rows is not part of the update: its gradient is zero.
        flat[: outer.first].zero_()
        flat[stop:].zero_()
        _scale(buffer, outer.scale, weight)
        outputs, gradients = [], []
        if outer.right.requires_grad:
            outputs.append(outer.right)
            gradients.append(table.of_right())
        if outer.left.requires_grad:
            outputs.append(outer.left)
            gradients.append(table.of_left())
        return torch.autograd.grad(outputs, leaves, gradients)

    return delta, pull


def _scale(buffer: Tensor, *factors: float) -> None:
    for factor in factors:
        if factor != 1.0:
            buffer.mul_(factor)
