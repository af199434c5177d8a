"""What is kept of the rows of a floating-point weight while an update is merged into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError
from tnadapt.targets.target import Target

from ._state import AdapterState

__all__ = ["MergedRows", "changed_since", "checksum", "write"]


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
        # Rows that already have their original values come from an unmerge() that was interrupted.
        if checksum(target.select(weight)) not in (self.checksum, checksum(self.before)):
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
    """Return a checksum of the bits: the sum, and the sum weighted by position, of the elements as integers."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.contiguous().view(kind).reshape(-1).to(torch.int64)
    place = torch.arange(1, bits.numel() + 1, device=bits.device)
    return hash((int(bits.sum()), int((bits * place).sum())))


def _weight(target: Target, owner: nn.Module) -> Tensor:
    held: Any = owner._parameters[target.parameter]
    found: Tensor = held.detach()
    return found
