"""A parameter of a module, and the slots of the adapters that update it."""

from __future__ import annotations

import dataclasses
from typing import cast

from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._forward_pass import acts
from ._row_features import overlap
from ._state import AdapterSlot, not_a_sum

__all__ = ["PatchedParameter"]


@dataclasses.dataclass(eq=False)
class PatchedParameter:
    """A parameter of a module, and the slots of the adapters that update it.

    Attributes
    ----------
    sums : bool
        Whether all of them add to the weight.
    rivals : list of (AdapterSlot, AdapterSlot)
        Slots with rows in common, the first of which does not add to the weight.
    """

    owner: nn.Module
    parameter: str
    slots: list[AdapterSlot] = dataclasses.field(default_factory=list)
    sums: bool = True
    rivals: list[tuple[AdapterSlot, AdapterSlot]] = dataclasses.field(default_factory=list)

    def put(self, slots: list[AdapterSlot]) -> None:
        """Set the slots."""
        self.slots = slots
        others = [slot for slot in slots if not slot.adapter.plan.applying.additive]
        self.sums = not others
        alone = len({id(slot.adapter) for slot in slots}) < 2  # as with the many experts of one weight
        self.rivals = [
            (one, other)
            for one in ([] if alone else others)
            for other in slots
            if other.adapter is not one.adapter and overlap(one.target, other.target)
        ]

    def check_alone(self) -> None:
        """Raise a TargetError if an adapter acts on the rows of one that is not a sum."""
        for one, other in self.rivals:
            states = one.adapter, other.adapter
            if all(acts(state) or state.merged is not None for state in states):
                raise TargetError(
                    f"adapters {states[0].name!r} and {states[1].name!r} both act on {one.target.name}, and "
                    f"{not_a_sum(*states)}: activate() one of them, or detach the other"
                )

    @property
    def tensor(self) -> Tensor:
        """The base weight as the module has it now."""
        found = self.owner._parameters.get(self.parameter)
        # A parametrized weight is computed and not registered as a parameter.
        return cast(Tensor, getattr(self.owner, self.parameter) if found is None else found)
