"""What the updates of experts add to the products of the tokens that are routed to them.

The strategies "factored" and "additive" for one of the matrices that a parameter stacks: as in a linear layer, the
update is added to the output of the product with W. Only experts that have tokens compute anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._changed_forward import scaled_output
from ._dropout import dropped_inputs
from ._row_features import add_features
from ._state import AdapterSlot

__all__ = ["RoutedChanges"]


class RoutedChanges:
    """The updates of the matrices of one parameter, as functions of outputs and inputs.

    Parameters
    ----------
    stored : Tensor, shape (matrices, …, …)
        The base weight.
    base : Tensor
        What the module multiplies by: the base weight, or its sum with updates of the strategy "weight".
    slots : sequence of AdapterSlot
        Those that are added to outputs.
    host : Module
    output : function of (AdapterSlot, Tensor)
        What a slot adds to the output for an input.
    total : function
        Computes the changed weight with all updates, for whatever is no product.
    """

    def __init__(
        self,
        stored: Tensor,
        base: Tensor,
        slots: Sequence[AdapterSlot],
        host: nn.Module,
        output: Callable[[AdapterSlot, Tensor], Tensor],
        total: Callable[[], Tensor],
    ) -> None:
        self.stored, self.base, self.host = stored, base, host
        self.transposed = slots[0].target.transposed  # the same for all matrices of a parameter
        self.by_index: dict[int, list[AdapterSlot]] = {}
        for slot in slots:
            assert slot.target.index is not None
            self.by_index.setdefault(slot.target.index, []).append(slot)
        self._output, self._total = output, total
        self._sum: Tensor | None = None

    def total(self) -> Tensor:
        """Return the changed weight, computed once."""
        if self._sum is None:
            self._sum = self._total()
        return self._sum

    def of_one(self, y: Tensor, x: Tensor, index: int) -> Tensor:
        """Return ``x W'ᵀ`` for one of the matrices, given ``y = x Wᵀ``."""
        slots = self.by_index.get(index, [])
        dropping = [slot for slot in slots if slot.adapter.dropout > 0.0 and self.host.training]
        y = self._changed(y, x, [slot for slot in slots if slot not in dropping])
        for dropped, own in dropped_inputs(dropping, x):
            if own[0].adapter.plan.applying.additive:
                y = self._changed(y, dropped, own)
                continue
            # Only the change sees the dropped input, whatever it is.
            matrix = self.base[index]
            plain = functional.linear(dropped, matrix.mT if self.transposed else matrix)
            y = y + (self._changed(plain, dropped, own) - plain)
        return y

    def of_segments(self, y: Tensor, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the outputs for rows that are sorted by expert, given the numbers of rows of each.

        Parameters
        ----------
        y : Tensor, shape (n, out)
        x : Tensor, shape (n, in)
        counts : sequence of int
            Rows beyond their sum belong to no expert and are left alone.
        """
        if not any(counts[index] for index in self.by_index):
            return y
        sizes = [*counts, y.shape[0] - sum(counts)]
        parts = list(torch.split(y, sizes))
        for index, rows in enumerate(torch.split(x, sizes)[:-1]):
            if len(rows) and index in self.by_index:
                parts[index] = self.of_one(parts[index], rows, index)
        return torch.cat(parts)

    def of_batch(self, y: Tensor, x: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the outputs of a batch of products, each with the matrix of its number; None for each with its own.

        Parameters
        ----------
        y : Tensor, shape (batch, n, out)
        x : Tensor, shape (batch, n, in)
        numbers : Tensor of int, shape (batch,)
        """
        matrices, count = self.stored.shape[0], y.shape[1]
        if numbers is None:
            return self.of_segments(y.flatten(0, 1), x.flatten(0, 1), [count] * matrices).view(y.shape)
        order = torch.argsort(numbers, stable=True)
        counts = [count * number for number in torch.bincount(numbers, minlength=matrices).tolist()]
        found = self.of_segments(y[order].flatten(0, 1), x[order].flatten(0, 1), counts).view(y.shape)
        return found[torch.argsort(order)]

    def _changed(self, y: Tensor, x: Tensor, slots: Sequence[AdapterSlot]) -> Tensor:
        for slot in slots:
            y = add_features(y, slot.target, self._output(slot, x))
        for slot in slots:
            if slot.adapter.plan.applying.rescales:
                y = scaled_output(y, None, slot, self.stored)
        return y
