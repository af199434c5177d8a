"""A layer's forward with one adapter, or none, for each row of the batch.

Rows of one adapter form a group. There are three ways to run the groups; the last one is the reference for the others,
and tests compare them.

- *shared*: one product with the base weight for all rows, and for each group what its adapter adds to the output.
  Low-rank updates of equal shapes are two grouped products for all groups together (:mod:`._grouped_products`). For
  updates that factor or are added to the output, and for those that are added to the weight where a group has so few
  tokens that a second product costs less than forming the sum.
- *by group*: the layer's forward on the rows of each group.
- *selected*: the forward on the whole batch for each distinct adapter, of which its own rows are kept. For modules that
  read a child's weight and have several tensors as inputs, such as masks, in which rows cannot be told apart.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tnadapt.errors import TargetError

from ._dropout import drops_input
from ._grouped_products import add_changes
from ._parameter_sums import is_read
from ._patched_parameter import PatchedParameter
from ._row_assignment import RowAssignment, assignment_of
from ._state import AdapterSlot, AdapterState, RowRunner
from ._step_cost import MACHINES

__all__ = ["check_usable", "row_runner"]

Placed = tuple[PatchedParameter, AdapterSlot]
#: The rows of a group, and the slots that act on them.
Group = tuple[Sequence[int], Sequence[Placed]]


class RowPatch(Protocol):
    """The interface of a forward patch that is needed here."""

    host: nn.Module
    is_plain: bool
    looks_up: bool
    weights: list[PatchedParameter]

    def acting(self, alone: bool = True) -> list[Placed]:
        """Return the slots of active adapters."""

    def run(self, acting: Sequence[Placed], args: Any, kwargs: Any, drop: bool = True) -> Any:
        """Run the forward with these slots."""

    def output(self, slot: AdapterSlot, x: Tensor) -> Tensor:
        """Return what a slot adds to the output."""

    def rescaled(self, y: Tensor, added: list[AdapterSlot]) -> Tensor:
        """Return the output with the features scaled that a magnitude scales."""


def check_usable(state: AdapterState, named: bool) -> None:
    """Raise a TargetError if an adapter is merged, or disabled although rows name it."""
    if state.merged is not None:
        raise TargetError(
            f"adapter {state.name!r} is merged into the base, and so into every row: unmerge() it before rows()"
        )
    if named and not state.enabled:
        raise TargetError(f"adapter {state.name!r} is disabled, and rows() names it: leave disabled() first")


_runner: RowRunner | None = None


def row_runner() -> RowRunner:
    """Return :func:`run_by_rows` as a function that compilers call outside their programs.

    It is made when rows are first used: importing torch's compiler takes a second.
    """
    global _runner  # Dynamo warns of functools.cache
    if _runner is None:
        _runner = torch.compiler.disable(run_by_rows, reason="tnadapt.torch.rows() divides a layer's rows")  # type: ignore[no-untyped-call]
    return _runner


def run_by_rows(patch: RowPatch, args: Any, kwargs: Any) -> Any:
    """Run a patched forward; some thread has rows for one of its adapters, not necessarily this one."""
    slots = [slot for patched in patch.weights for slot in patched.slots]
    assignment = next((found for slot in slots if (found := assignment_of(slot.adapter)) is not None), None)
    if assignment is None:
        return patch.run(patch.acting(), args, kwargs)
    for slot in slots:
        if slot.adapter in assignment.governed:
            slot.adapter.threads.add(threading.get_ident())
            check_usable(slot.adapter, slot.adapter in assignment.groups)
    acting = patch.acting(alone=False)
    always = [placed for placed in acting if placed[1].adapter not in assignment.governed]
    of_adapter: dict[AdapterState | None, list[Placed]] = {}
    for placed in acting:
        of_adapter.setdefault(placed[1].adapter, []).append(placed)
    groups: list[Group] = []
    # Adapters that do not act in this layer leave the base's rows, which are one group.
    rest: list[int] = []
    for state, numbers in assignment.groups.items():
        if state in of_adapter:
            groups.append((numbers, [*of_adapter[state], *always]))
        else:
            rest += numbers
    if rest:
        groups.append((sorted(rest), always))
    if len(groups) == 1:
        if len(assignment.names) > 1:
            _checked(
                patch, assignment, next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            )
        return patch.run(groups[0][1], args, kwargs)
    return _run_groups(patch, assignment, groups, args, kwargs)


def _run_groups(patch: RowPatch, assignment: RowAssignment, groups: list[Group], args: Any, kwargs: Any) -> Any:
    tensors = _tensors(patch, args, kwargs)
    x = _checked(patch, assignment, next(iter(tensors), None))
    if len(tensors) > 1:
        return selected(patch, assignment, groups, len(x), args, kwargs)
    if len(args) == 1 and not kwargs and _is_linear(patch):
        tokens = math.prod(x.shape[:-1]) // len(assignment.names)
        if all(_is_light(patch, group, tokens, x) for group in groups):
            return shared(patch, assignment, groups, x)
    return by_group(patch, assignment, groups, x, args, kwargs)


# -- Ways ------------------------------------------------------------------------------------------------------


def shared(patch: RowPatch, assignment: RowAssignment, groups: list[Group], x: Tensor) -> Tensor:
    """Run one product with the base weight, and add what each group's adapter adds."""
    always = [placed for placed in groups[0][1] if placed[1].adapter not in assignment.governed]
    y = patch.run(always, (x,), {})
    own = [(rows, [slot for _, slot in slots if slot.adapter in assignment.governed]) for rows, slots in groups]
    number = len(assignment.names)
    # Rows of one name are consecutive.
    blocks, wide = x.reshape(number, -1, x.shape[-1]), y.reshape(number, -1, y.shape[-1])
    fresh = patch.is_plain and not torch.is_grad_enabled()
    wide = add_changes(patch.output, assignment, own, blocks, wide, fresh)
    for rows, slots in own:
        if any(slot.adapter.plan.applying.rescales for slot in slots):
            index = assignment.index(rows, x.device)
            wide = wide.index_copy(0, index, patch.rescaled(wide.index_select(0, index), slots))
    return wide.reshape(y.shape)


def by_group(patch: RowPatch, assignment: RowAssignment, groups: list[Group], x: Tensor, args: Any, kwargs: Any) -> Any:
    """Run the forward on the rows of each group."""
    number = len(assignment.names)
    blocks = x.reshape(number, -1, *x.shape[1:])
    outputs, order = [], list[int]()
    for rows, slots in groups:
        part = blocks.index_select(0, assignment.index(rows, x.device)).reshape(-1, *x.shape[1:])
        outputs.append(patch.run(slots, _exchanged(part, args), _exchanged(part, kwargs)))
        order += rows
    back = sorted(range(number), key=order.__getitem__)

    def joined(*parts: Tensor) -> Tensor:
        _check_output(patch, parts, [len(rows) * blocks.shape[1] for rows, _ in groups])
        several = [part.reshape(len(rows), -1, *part.shape[1:]) for part, (rows, _) in zip(parts, groups, strict=True)]
        found = torch.cat(several).index_select(0, assignment.index(back, parts[0].device))
        return found.reshape(-1, *found.shape[2:])

    return _zipped(patch, joined, outputs)


def selected(
    patch: RowPatch, assignment: RowAssignment, groups: list[Group], length: int, args: Any, kwargs: Any
) -> Any:
    """Run the forward on the whole batch for each group, and keep the group's rows."""
    outputs = [patch.run(slots, args, kwargs) for _, slots in groups]
    number = len(assignment.names)

    def joined(*parts: Tensor) -> Tensor:
        _check_output(patch, parts, [length] * len(parts))
        several = [part.reshape(number, -1, *part.shape[1:]) for part in parts]
        found = several[0]
        for (rows, _), part in zip(groups[1:], several[1:], strict=True):
            index = assignment.index(rows, part.device)
            found = found.index_copy(0, index, part.index_select(0, index))
        return found.reshape(parts[0].shape)

    return _zipped(patch, joined, outputs)


def _is_linear(patch: RowPatch) -> bool:
    """Return whether all updates can be added to the output of the host, from its input."""
    if patch.looks_up:
        return False  # indices are not multiplied
    slots = [slot for patched in patch.weights for slot in patched.slots]
    return not any(is_read(slot) for slot in slots) or (patch.is_plain and isinstance(patch.host, nn.Linear))


def _is_light(patch: RowPatch, group: Group, tokens: int, x: Tensor) -> bool:
    """Return whether a group's update is better added to the output."""
    rows, slots = group
    machine = MACHINES.get(x.device.type, MACHINES["cpu"])
    for patched, slot in slots:
        if drops_input(slot, patch.host):
            return False
        if slot.strategy != "weight":
            continue
        # A second product, for each element of the weight, against reading W and ΔW, writing the sum and reading it.
        product, summing = 2.0 * tokens * len(rows) / machine.operations, 16.0 / machine.bytes
        if not patched.sums or product > summing:
            return False
    return True


# -- Rows ------------------------------------------------------------------------------------------------------


def _checked(patch: RowPatch, assignment: RowAssignment, x: Tensor | None) -> Tensor:
    """Return the input if its first dimension consists of the rows, or raise a TargetError."""
    wanted = len(assignment.names)
    if x is None or x.ndim < 2 or x.is_nested:
        got = "no tensor" if x is None else "a nested tensor" if x.is_nested else f"an input of shape {tuple(x.shape)}"
        raise TargetError(f"rows() needs layers whose input has rows, and {_name(patch)} got {got}")
    length = x.shape[0]
    if length % wanted:
        raise TargetError(
            f"rows() has {wanted} names, and {_name(patch)} got an input of shape {tuple(x.shape)}: its first "
            f"dimension must be {wanted}, or a multiple of it, in which each name stands for consecutive rows"
        )
    if x.ndim > 2 and length != wanted and x.shape[1] == wanted > 1:
        raise TargetError(
            f"rows() has {wanted} names, and {_name(patch)} got an input of shape {tuple(x.shape)}, whose first or "
            f"second dimension could be the batch: if it is the first, give a name for each of its {length} rows"
        )
    return x


def _name(patch: RowPatch) -> str:
    # Adapters may be attached to the model and to a module in it: the longest path is that of the model.
    slot = max(patch.weights[0].slots, key=lambda slot: len(slot.target.name))
    return slot.target.module if slot.owner is patch.host else f"{type(patch.host).__name__}, around {slot.target.name}"


# -- Inputs and outputs ----------------------------------------------------------------------------------------

_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _tensors(patch: RowPatch, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the distinct tensors among arguments, in order."""
    found: dict[int, Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found[id(value)] = value
        elif isinstance(value, (tuple, list)):
            for one in value:
                look(one)
        elif isinstance(value, Mapping):
            for one in value.values():
                look(one)
        elif not isinstance(value, _SIMPLE):
            raise TargetError(
                f"{_name(patch)} got a {type(value).__name__}, which may keep state between calls, and rows() would "
                "call it once for each adapter: run the rows of each adapter on their own, after activate()"
            )

    look((args, kwargs))
    return list(found.values())


def _exchanged(part: Tensor, value: Any) -> Any:
    """Return arguments with another tensor in the place of their only one."""
    if isinstance(value, Tensor):
        return part
    if isinstance(value, (tuple, list)):
        return type(value)([_exchanged(part, one) for one in value])
    return {key: _exchanged(part, one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _zipped(patch: RowPatch, joined: Callable[..., Tensor], outputs: Sequence[Any]) -> Any:
    """Join the outputs of all groups, tensor by tensor."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return joined(*outputs)
    if type(first) in (tuple, list):
        return type(first)([_zipped(patch, joined, several) for several in zip(*outputs, strict=True)])
    if first is None:
        return None
    raise TargetError(f"rows() cannot divide the output of {_name(patch)}, a {type(first).__name__}")


def _check_output(patch: RowPatch, parts: Sequence[Tensor], sizes: Sequence[int]) -> None:
    for part, size in zip(parts, sizes, strict=True):
        if part.ndim == 0 or part.shape[0] != size:
            raise TargetError(
                f"rows() cannot divide the output of {_name(patch)}: of {size} rows it made a tensor of shape "
                f"{tuple(part.shape)}"
            )
