"""``rows``: one adapter, or none, for each row of a batch, and how a layer's forward runs the groups of rows."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.target import Target

from ._forms import add_features
from ._forward_pass import drops_input, factors
from ._forward_patch import ForwardPatch, is_read
from ._members import MemberRows, factors_of
from ._members import changes as member_changes
from ._members import quotients as member_quotients
from ._quantized import is_embedding
from ._registry import attached, overlapping, trim_idle
from ._state import (
    AdapterSlot,
    AdapterState,
    Members,
    MemberState,
    RowAssignment,
    RowRunner,
    assignment_of,
    entered,
    mixing_weight,
)
from ._strategy_choice import MACHINES
from ._weights import sees_tokens_in_order

# -- Additions of adapters to the outputs of groups of rows: low-rank updates by grouped products ----------------------

# The plain form is a loop over groups: :func:`looped`. If each group's adapter has one low-rank matrix for the same
# target, and all have the same shape, the factors are stacked, and two batched products serve all groups.


#: The rows of a group, and the slots that act on them.
Group = tuple[Sequence[int], Sequence[AdapterSlot]]
Output = Callable[[AdapterSlot, Tensor], Tensor]
#: Rows and the additions to them, by the features to which they are added.
Changes = dict[Target, list[tuple[Sequence[int], Tensor]]]


def computed_changes(output: Output, assignment: RowAssignment, groups: Sequence[Group], x: Tensor) -> Changes:
    """Compute the changes of all groups; x is ``(names, rows of each, features)``."""
    acting = [(rows, slots) for rows, slots in groups if slots]
    changes = grouped(assignment, acting, x)
    return looped(output, assignment, acting, x) if changes is None else changes


def add_changes(assignment: RowAssignment, changes: Changes, y: Tensor) -> Tensor:
    """Return y, ``(names, rows of each, features)``, plus changes."""
    for target, several in changes.items():
        order = [row for numbers, _ in several for row in numbers]
        change = torch.cat([part for _, part in several]) if len(several) > 1 else several[0][1]
        if order == list(range(len(y))):
            y = add_features(y, target, change)
            continue
        rows = assignment.index(order, y.device)
        if target.rows is None:
            y = y.index_add(0, rows, change.to(y.dtype))
        else:
            y = y.index_copy(0, rows, add_features(y.index_select(0, rows), target, change))
    return y


def looped(output: Output, assignment: RowAssignment, groups: Sequence[Group], x: Tensor) -> Changes:
    """Compute each group's changes alone."""
    changes: Changes = {}
    for rows, slots in groups:
        part = x.index_select(0, assignment.index(rows, x.device))
        for slot in slots:
            changes.setdefault(slot.target, []).append((rows, output(slot, part)))
    return changes


def grouped(assignment: RowAssignment, groups: Sequence[Group], x: Tensor) -> Changes | None:
    """Compute the changes of all groups by batched products; None where these do not apply."""
    first = groups[0][1]
    if len(groups) == 1 or not _are_alike(groups):
        return None
    order = [row for rows, _ in groups for row in rows]
    counts = {len(rows) for rows, _ in groups}
    if len(counts) > 1:
        numbers = [place for place, (rows, _) in enumerate(groups) for _ in rows]
    changes: Changes = {}
    blocks = x if order == list(range(len(x))) else x.index_select(0, assignment.index(order, x.device))
    for place, slot in enumerate(first):
        several = [factors(slots[place]) for _, slots in groups]
        pairs = [factored.terms[0][0] for factored in several]
        layouts = {(pair.right is None, pair.left.shape, pair.left.dtype, pair.left.device) for pair in pairs}
        if len(layouts) > 1 or pairs[0].right is None or pairs[0].left.device != x.device:
            return None
        scales = [
            factored.scale * mixing_weight(slots[place].adapter)
            for factored, (_, slots) in zip(several, groups, strict=True)
        ]
        # Different scales multiply the factors one by one: a tensor of scales would be copied to the device.
        lefts = [pair.left for pair in pairs]
        if len(set(scales)) > 1:
            lefts = [left * scale for left, scale in zip(lefts, scales, strict=True)]
            scales = [1.0]
        left, right = torch.stack(lefts), torch.stack([cast(Tensor, pair.right) for pair in pairs])
        left = left if scales[0] == 1.0 else left * scales[0]
        inputs = blocks if torch.is_autocast_enabled(x.device.type) else blocks.to(left.dtype)
        if len(counts) > 1:
            # A copy of the factors for each row: narrow matrices, and fewer calls than groups.
            index = assignment.index(numbers, x.device)
            left, right = left.index_select(0, index), right.index_select(0, index)
        else:
            inputs = inputs.reshape(len(groups), -1, inputs.shape[-1])
        product = torch.bmm(torch.bmm(inputs, right), left.mT).reshape(*blocks.shape[:-1], left.shape[1])
        changes[slot.target] = [(order, product)]
    return changes


def _are_alike(groups: Sequence[Group]) -> bool:
    """Return whether all groups update the same features, each by one low-rank matrix."""
    targets = [slot.target for slot in groups[0][1]]
    if any([slot.target for slot in slots] != targets for _, slots in groups):
        return False
    several = [slot for _, slots in groups for slot in slots]
    if any(slot.strategy != "factored" or slot.adapter.activation is not None for slot in several):
        return False
    return all(slot.factoring is not None and slot.factoring.is_plain for slot in several)


# -- A layer's forward with one adapter, or none, for each row ---------------------------------------------------------

# Rows of one adapter form a group. There are two ways to run the groups; the second is the reference for the first, and
# tests compare them.
#
# - *shared*: one product with the base weight for all rows, and for each group what its adapter adds to the output.
#   Low-rank updates of equal shapes are two grouped products for all groups together (:func:`grouped`). For
#   updates that factor or are added to the output, and for those that are added to the weight where a group has so few
#   tokens that a second product costs less than forming the sum.
# - *divided*: the layer's forward on the rows of each group. Where a module reads a child's weight and has several
#   tensors as inputs, such as masks, in which rows cannot be told apart, on the whole batch for each group.


def check_usable(state: AdapterState, named: bool, call: str = "rows()") -> None:
    """Raise a TargetError if an adapter is merged, or disabled although rows name it."""
    if state.merged is not None:
        raise TargetError(
            f"adapter {state.name!r} is merged into the base, and so into every row: unmerge() it before {call}"
        )
    if named and not state.enabled:
        raise TargetError(f"adapter {state.name!r} is disabled, and {call} names it: leave disabled() first")


_runner: RowRunner | None = None


def row_runner() -> RowRunner:
    """Return :func:`run_by_rows` as a function that compilers call outside their programs.

    It is made when rows are first used: importing torch's compiler takes a second.
    """
    global _runner  # Dynamo warns about functools.cache
    if _runner is None:
        _runner = torch.compiler.disable(run_by_rows, reason="tnadapt.torch.rows() divides a layer's rows")  # type: ignore[no-untyped-call]
    return _runner


def run_by_rows(patch: ForwardPatch, args: Any, kwargs: Any) -> Any:
    """Run a patched forward; some thread has rows for one of its adapters, not necessarily this one."""
    slots = [slot for patched in patch.weights for slot in patched.slots]
    assignment = next((candidate for slot in slots if (candidate := assignment_of(slot.adapter)) is not None), None)
    if assignment is None:
        return patch.run(patch.acting(), args, kwargs)
    for slot in slots:
        if slot.adapter.whole in assignment.governed:
            slot.adapter.threads.add(threading.get_ident())
            check_usable(slot.adapter, assignment.names_adapter(slot.adapter), assignment.call)
    acting = patch.acting(alone=False)
    always = [slot for slot in acting if slot.adapter.whole not in assignment.governed]
    if isinstance(assignment, MemberRows):
        y = _of_members(patch, assignment, [slot for slot in acting if slot not in always], always, args, kwargs)
        if y is not None:
            return y
    groups = _groups(assignment, acting, always)
    if len(groups) == 1:
        if len(assignment.names) > 1:
            x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            _checked(patch, assignment, x)
        return patch.run(groups[0][1], args, kwargs)
    tensors = _tensors(patch, assignment.call, args, kwargs)
    x = _checked(patch, assignment, next(iter(tensors), None))
    whole = len(tensors) > 1
    if not whole and len(args) == 1 and not kwargs and _is_linear(patch):
        tokens = math.prod(x.shape[:-1]) // len(assignment.names)
        if all(_is_light(patch, group, tokens, x) for group in groups):
            return shared(patch, assignment, groups, x)
    return divided(patch, assignment, groups, x, args, kwargs, whole)


def _groups(assignment: RowAssignment, acting: Sequence[AdapterSlot], always: Sequence[AdapterSlot]) -> list[Group]:
    """Return the rows of each adapter or member with its slots, and those of the base."""
    of_adapter: dict[AdapterState | None, list[AdapterSlot]] = {}
    for slot in acting:
        of_adapter.setdefault(slot.adapter, []).append(slot)
    groups: list[Group] = []
    # Rows of adapters that do not act in this layer are base rows, which form one group.
    rest: list[int] = []
    for state, numbers in assignment.groups.items():
        slots = None if state is None else of_adapter.get(state.whole)
        if slots is None:
            rest += numbers
        elif isinstance(state, MemberState):
            groups.append((numbers, [*map(state.slot, slots), *always]))
        else:
            groups.append((numbers, [*slots, *always]))
    if rest:
        groups.append((sorted(rest), list(always)))
    return groups


# -- Ways ------------------------------------------------------------------------------------------------------


def _of_members(
    patch: ForwardPatch,
    assignment: MemberRows,
    slots: Sequence[AdapterSlot],
    always: list[AdapterSlot],
    args: Any,
    kwargs: Any,
) -> Tensor | None:
    """Run one product with the base weight, and add what all members add; None where they are better divided."""
    assignment.begin_layer()
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not slots or not assignment.members:
        return None
    if not _is_linear(patch) or any(drops_input(slot, patch.host) for slot in slots):
        return None
    x = _checked(patch, assignment, args[0])
    blocks = x.reshape(len(assignment.names), -1, x.shape[-1])
    tokens = blocks.shape[1] * (assignment.count or 1)
    if not all(
        factors_of(slot, tokens, x.device) is not None or _is_light(patch, ([0], [slot]), tokens, x) for slot in slots
    ):
        return None
    changes: Changes = {}
    for slot in slots:
        change = member_changes(assignment, slot, blocks)
        if change is None:
            return None
        changes.setdefault(slot.target, []).append((assignment.order, change))
    y = patch.run(always, (x,), {})
    wide = add_changes(assignment, changes, y.reshape(len(assignment.names), -1, y.shape[-1]))
    if any(slot.adapter.plan.applying.rescales for slot in slots):
        index = assignment.index(assignment.order, x.device)
        quotient = functools.partial(member_quotients, assignment, tokens, x.device)
        scaled = patch.rescaled(wide.index_select(0, index), slots, quotient=quotient)
        wide = wide.index_copy(0, index, scaled)
    return wide.reshape(y.shape)


def shared(patch: ForwardPatch, assignment: RowAssignment, groups: list[Group], x: Tensor) -> Tensor:
    """Run one product with the base weight, and add what each group's adapter adds."""
    always = [slot for slot in groups[0][1] if slot.adapter.whole not in assignment.governed]
    y = patch.run(always, (x,), {})
    governed = [(rows, [slot for slot in slots if slot.adapter.whole in assignment.governed]) for rows, slots in groups]
    number = len(assignment.names)
    # Rows of one name are consecutive.
    blocks, wide = x.reshape(number, -1, x.shape[-1]), y.reshape(number, -1, y.shape[-1])
    wide = add_changes(assignment, computed_changes(patch.output, assignment, governed, blocks), wide)
    for rows, slots in governed:
        if any(slot.adapter.plan.applying.rescales for slot in slots):
            index = assignment.index(rows, x.device)
            wide = wide.index_copy(0, index, patch.rescaled(wide.index_select(0, index), slots))
    return wide.reshape(y.shape)


def divided(
    patch: ForwardPatch, assignment: RowAssignment, groups: list[Group], x: Tensor, args: Any, kwargs: Any, whole: bool
) -> Any:
    """Run the forward once for each group: on its rows, or with ``whole`` on the whole batch, and keep the group's."""
    number = len(assignment.names)
    blocks = x.reshape(number, len(x) // number, *x.shape[1:])
    outputs, order = [], list[int]()
    for rows, slots in groups:
        inputs = args, kwargs
        if not whole:
            part = blocks.index_select(0, assignment.index(rows, x.device)).flatten(0, 1)
            inputs = _exchanged(part, inputs)
        outputs.append(patch.run(slots, *inputs))
        order += rows
    back = sorted(range(number), key=order.__getitem__)

    def joined(*parts: Tensor) -> Tensor:
        several = []
        for part, (rows, _) in zip(parts, groups, strict=True):
            count = number if whole else len(rows)
            size = count * blocks.shape[1]
            if part.ndim == 0 or part.shape[0] != size:
                raise TargetError(
                    f"{assignment.call} cannot divide the output of {_name(patch)}: of {size} rows it made a tensor of "
                    f"shape {tuple(part.shape)}"
                )
            output = part.reshape(count, len(part) // count, *part.shape[1:])
            several.append(output.index_select(0, assignment.index(rows, part.device)) if whole else output)
        batch = torch.cat(several).index_select(0, assignment.index(back, parts[0].device))
        return batch.flatten(0, 1)

    return _zipped(patch, assignment.call, joined, outputs)


def _is_linear(patch: ForwardPatch) -> bool:
    """Return whether all updates can be computed from the host's input and added to its output."""
    if patch.looks_up:
        return False  # indices are not multiplied
    slots = [slot for patched in patch.weights for slot in patched.slots]
    return not any(is_read(slot) for slot in slots) or (patch.is_plain and isinstance(patch.host, nn.Linear))


def _is_light(patch: ForwardPatch, group: Group, tokens: int, x: Tensor) -> bool:
    """Return whether adding a group's update to the output is the cheaper way."""
    rows, slots = group
    machine = MACHINES.get(x.device.type, MACHINES["cpu"])
    for slot in slots:
        if drops_input(slot, patch.host):
            return False
        if slot.strategy != "weight":
            continue
        # Per element of the weight: a second product, against reading W and ΔW, writing the sum and reading it.
        product, summing = 2.0 * tokens * len(rows) / machine.operations, 16.0 / machine.bytes
        if not slot.adapter.plan.applying.additive or product > summing:
            return False
    return True


# -- Rows ------------------------------------------------------------------------------------------------------


def _checked(patch: ForwardPatch, assignment: RowAssignment, x: Tensor | None) -> Tensor:
    """Return the input, or raise a TargetError unless its first dimension consists of the rows."""
    wanted = len(assignment.names)
    if x is None or x.ndim < 2 or x.is_nested:
        got = "no tensor" if x is None else "a nested tensor" if x.is_nested else f"an input of shape {tuple(x.shape)}"
        raise TargetError(f"{assignment.call} needs layers whose input has rows, and {_name(patch)} got {got}")
    length, entry = x.shape[0], assignment.entry
    both = f"{assignment.call} has {wanted} {entry}s, and {_name(patch)} got an input of shape {tuple(x.shape)}"
    if length % wanted:
        raise TargetError(
            f"{both}: its first dimension must be {wanted}, or a multiple of it, in which each {entry} stands for "
            "consecutive rows"
        )
    if x.ndim > 2 and length != wanted and x.shape[1] == wanted > 1:
        raise TargetError(
            f"{both}, whose first or second dimension could be the batch: if it is the first, give a {entry} for each "
            f"of its {length} rows"
        )
    return x


def _name(patch: ForwardPatch) -> str:
    # Adapters may be attached to the model and to a module in it: the longest path is that of the model.
    slot = max(patch.weights[0].slots, key=lambda slot: len(slot.target.name))
    return slot.target.module if slot.owner is patch.host else f"{type(patch.host).__name__}, around {slot.target.name}"


# -- Inputs and outputs ----------------------------------------------------------------------------------------

_SIMPLE = (type(None), bool, int, float, str, torch.dtype, torch.device)


def _tensors(patch: ForwardPatch, call: str, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the distinct tensors among arguments, in order."""
    tensors: dict[int, Tensor] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            tensors[id(value)] = value
        elif isinstance(value, (tuple, list)):
            for item in value:
                look(item)
        elif isinstance(value, Mapping):
            for item in value.values():
                look(item)
        elif not isinstance(value, _SIMPLE):
            raise TargetError(
                f"{_name(patch)} got a {type(value).__name__}, which may keep state between calls, and {call} would "
                "call it once for each adapter: run the rows of each adapter on their own, after activate()"
            )

    look((args, kwargs))
    return list(tensors.values())


def _exchanged(part: Tensor, value: Any) -> Any:
    """Return arguments with their only tensor replaced."""
    if isinstance(value, Tensor):
        return part
    if isinstance(value, (tuple, list)):
        return type(value)([_exchanged(part, item) for item in value])
    return {key: _exchanged(part, item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _zipped(patch: ForwardPatch, call: str, joined: Callable[..., Tensor], outputs: Sequence[Any]) -> Any:
    """Join the outputs of all groups, tensor by tensor."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return joined(*outputs)
    if type(first) in (tuple, list):
        return type(first)([_zipped(patch, call, joined, several) for several in zip(*outputs, strict=True)])
    if first is None:
        return None
    raise TargetError(f"{call} cannot divide the output of {_name(patch)}, a {type(first).__name__}")


# -- The context manager, and its checks -------------------------------------------------------------------------------


#: PEFT's name for no adapter.
BASE = "__base__"


@contextlib.contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Give each row of a batch its own adapter, or none, inside ``with``.

    Parameters
    ----------
    model : Module
        The model that the adapters are attached to, a submodule of it or a wrapper.
    names : sequence of str or None
        An adapter's name for each row, or the name of a member of a population; None, or PEFT's ``"__base__"``, for
        the base alone. If a layer gets more rows, each name stands for the same number of consecutive ones:
        ``generate`` repeats rows like this for beams and return sequences, and so do models that flatten batch and
        tokens into one dimension.

    Raises
    ------
    TargetError
        If there is no adapter of a name, a name has two meanings, one of the adapters is merged, a named one is
        disabled, names are of members of several populations, or of members and of adapters, or rows cannot be told
        apart: the batch is not the first dimension, or the weights are those of experts. In a forward pass: if the
        first dimension of a layer's input is not a multiple of the number of names.
    ConfigError
        If ``names`` is not a sequence of names.

    Notes
    -----
    A row's output is that of the row alone with its adapter activated: with the adapter's mixing weight, or 1 if that
    is 0. Adapters that no row has do not act; one that is attached inside acts on every row. Gradients flow as usual.

    It holds for the thread that enters it (more precisely, for its context), so threads with different rows do not mix;
    a thread that is started inside has to enter it itself. Inside another ``with rows(...)``, the inner one counts.

    Where a pipeline repeats the whole batch, as classifier-free guidance does, give a name for each row of the repeated
    batch: ``[*names, *names]``.

    Examples
    --------
    >>> import torch, tnadapt.torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    >>> for name in "ab":
    ...     adapter = tnadapt.torch.attach(model, "lora", "all-linear", name, rank=2)
    ...     for parameter in adapter.parameters():
    ...         _ = torch.nn.init.normal_(parameter)
    >>> x = torch.randn(3, 5, 8)
    >>> with rows(model, ["b", None, "a"]):
    ...     y = model(x)
    >>> tnadapt.torch.adapters(model)["a"].activate()
    >>> torch.testing.assert_close(y[2:], model(x[2:]))
    """
    assignment = assigned(model, names)
    try:
        with entered(assignment, row_runner()):
            for state in assignment.governed:
                state.idle = None if assignment.names_adapter(state) else state.idle
            yield
    finally:
        trim_idle(assignment.governed)


def assigned(
    model: nn.Module, names: Sequence[str | None], weights: Mapping[AdapterState, float] | None = None
) -> RowAssignment:
    """Return the assignment that :func:`rows` enters, after its checks."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(
            "rows() needs a list with an adapter's name, or None, for each row of the batch; got " + safe_repr(names)
        )
    adapters = attached(model)
    population = _population_of(adapters, names)
    if population is not None:
        others = [state for state in overlapping(model) if state is not population]
        for state in others:
            check_usable(state, False)
        check_rows(population, "rows()")
        assignment = MemberRows(population, _numbers_of(population, names), others)
        assignment.call, assignment.entry = RowAssignment.call, RowAssignment.entry
        return assignment
    states: list[AdapterState | None] = []
    for name in names:
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"an entry of rows() is an adapter's name or None; got {safe_repr(name)}")
        if name in adapters and adapters[name].members is not None:
            raise TargetError(
                f"adapter {name!r} is a population, and an entry of rows() is one adapter: use "
                "`with adapter.members([…])`, with a member for each row"
            )
        if name is None or (name == BASE and name not in adapters):
            states.append(None)
        elif name in adapters:
            states.append(adapters[name])
        else:
            listed = ", ".join(map(repr, adapters)) or "none"
            raise TargetError(f"no adapter {name!r} on this model; there are: {listed}, and None for the base")
    governed = overlapping(model)
    named = {state for state in states if state is not None}
    for state in governed:
        check_usable(state, state in named)
    _check_apart(model, named)
    return RowAssignment(states, governed, weights)


def _population_of(adapters: Mapping[str, AdapterState], names: Sequence[Any]) -> AdapterState | None:
    """Return the population whose members names are; None if none of them is one."""
    population = None
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        having = [state for state in adapters.values() if state.members and state.members.number(name) is not None]
        meanings = [f"a member of population {state.name!r}" for state in having]
        if name in adapters and adapters[name].members is None:
            meanings.append("an adapter")
        elif name == BASE:
            meanings.append("the base, as in PEFT")
        if having and len(meanings) > 1:
            raise TargetError(
                f"rows() names {name!r}, which is {' and '.join(meanings)}: rename one of them, or use "
                "`with adapter.members([…])` of the population that is meant"
            )
        population = population or next(iter(having), None)
    return population


def _numbers_of(population: AdapterState, names: Sequence[Any]) -> list[int | None]:
    """Return the numbers of the members that have the names."""
    members = cast(Members, population.members)
    numbers = [members.number(name) if isinstance(name, str) else None for name in names]
    for name, number in zip(names, numbers, strict=True):
        if number is None and name is not None and name != BASE:
            raise TargetError(
                f"rows() names members of population {population.name!r} and {name!r}, which is none of them: the rows "
                "of a batch have members of one population, or adapters"
            )
    return numbers


def check_rows(population: AdapterState, call: str = "members()") -> None:
    """Raise a TargetError if a population is merged or disabled, or rows cannot be told apart in its layers."""
    check_usable(population, True, call)
    _check_apart(population.model, {population})


def _check_apart(model: nn.Module, named: set[AdapterState]) -> None:
    _check_batch_first(model, named)
    _check_experts(named)
    _check_embeddings(model, named)


def _check_batch_first(model: nn.Module, named: set[AdapterState]) -> None:
    owners = {id(slot.owner): slot.target.name for state in named for slot in state.slots}
    for path, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            # In torch's Transformer layers only the attention has the setting, but the other layers see the same order.
            around = isinstance(module, nn.MultiheadAttention) and path
            outer = model.get_submodule(path.rpartition(".")[0]) if around else module
            inside = next((owners[id(owner)] for owner in outer.modules() if id(owner) in owners), None)
            if inside is not None:
                raise TargetError(
                    f"{path or type(model).__name__} has batch_first=False: the first dimension of its input, which "
                    f"{inside} sees, is not that of the batch's rows. Build the model with batch_first=True, or run "
                    "the rows of each adapter on their own, after activate()"
                )


def _check_experts(named: set[AdapterState]) -> None:
    for state in named:
        for slot in state.slots:
            target = slot.target
            if target.index is None:
                apart = "experts" not in target.module.split(".")
            else:
                apart = sees_tokens_in_order(slot.owner)
            if not apart:
                raise TargetError(
                    f"{target.name} belongs to experts, which see selected tokens of all rows: their rows cannot be "
                    f"told apart. Run the rows of adapter {state.name!r} on their own, after activate()"
                )


# Embeddings that are looked up by each row's own tokens or positions. Others, such as tables of relative positions, get
# indices without rows.
_BY_ROWS = ("embed_positions", "position", "token_type", "wpe", "wte")


def _check_embeddings(model: nn.Module, named: set[AdapterState]) -> None:
    holders: list[Any] = [module for module in model.modules() if hasattr(module, "get_input_embeddings")]
    if not holders:
        return  # not a transformers model, whose embeddings are known
    inputs = set()
    for holder in holders:
        with contextlib.suppress(NotImplementedError, AttributeError):
            inputs.add(id(holder.get_input_embeddings()))
    for state in named:
        for slot in state.slots:
            name = slot.target.module.rpartition(".")[2]
            if is_embedding(slot.owner) and id(slot.owner) not in inputs and not name.startswith(_BY_ROWS):
                raise TargetError(
                    f"{slot.target.name} is not an embedding of tokens or positions, and its indices may have no rows: "
                    f"run the rows of adapter {state.name!r} on their own, after activate()"
                )
