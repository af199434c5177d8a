"""One member of a population for each row of a batch: the arrays of the members in it, and their updates, batched.

All members of a population have one plan, so that one computation serves them all: of arrays with a leading axis, by
``torch.vmap``. What is low-rank becomes two batched products whatever the members are; where ΔW has to be formed, it is
formed once for each member in the batch, and again in backward instead of being saved. The plain form, which is the
reference, is one member after the other: :func:`tnadapt.torch._rows.run_by_rows` takes it where layers are not linear,
or where a member has so many rows that its W' is better formed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.algebra.applying import Applying, norms
from tnadapt.algebra.factoring import Factoring, factoring
from tnadapt.backends import load_backend

from . import _delta, _forms, _forward_pass
from ._delta import Function, recomputed
from ._forward_patch import ACTIVATIONS
from ._state import AdapterSlot, AdapterState, Members, RowAssignment, Selection, mixing_weight, sparse_gradients
from ._strategy_choice import MACHINES, costs

_calls = itertools.count(1)


class _Selected(NamedTuple):
    """The members' part of a parameter, whole and by member."""

    #: The pass, or the layer outside of one, that selected it.
    call: tuple[str, int]
    parameter: Tensor
    #: The parameter's version, dtype and device, and the modes that the gradient depends on.
    state: tuple[int, torch.dtype, torch.device, bool, bool, bool]
    several: Tensor
    parts: tuple[Tensor, ...]


class MemberRows(RowAssignment):
    """A member of a population, or none, for each row of a batch.

    Parameters
    ----------
    whole : AdapterState
        The population.
    numbers : sequence of int or None
        The member of each row.
    others : iterable of AdapterState
        Other adapters on the model, which do not act on the rows.

    Attributes
    ----------
    members : list of int
        The distinct members, in the order of their first rows.
    rows : dict of (int or None) to list of int
        The rows of each.
    """

    call, entry = "members()", "member"

    def __init__(self, whole: AdapterState, numbers: Sequence[int | None], others: Iterable[AdapterState] = ()) -> None:
        self.whole, self.names, self.governed = whole, tuple(map(str, numbers)), frozenset([whole, *others])
        self._indices = {}
        self.rows: dict[int | None, list[int]] = {}
        for row, number in enumerate(numbers):
            self.rows.setdefault(number, []).append(row)
        self.members = [number for number in self.rows if number is not None]
        self._places = {number: place for place, number in enumerate(self.members)}
        self._arrays: dict[str, _Selected] = {}
        self._made: tuple[list[Tensor], dict[str, Tensor]] | None = None
        self._call = "call", 0

    @functools.cached_property
    def groups(self) -> dict[AdapterState | None, list[int]]:  # type: ignore[override]
        members = cast(Members, self.whole.members)
        return {
            None if number is None else members.state(self.whole, number): rows for number, rows in self.rows.items()
        }

    def names_adapter(self, state: AdapterState) -> bool:
        return state is self.whole

    def weight(self, state: AdapterState) -> float:
        return (self.whole.weight or 1.0) if state.whole is self.whole else 0.0

    def begin_layer(self) -> None:
        """Record that a layer runs; what it selects serves all layers of its pass, or of the backward pass."""
        passing = self.whole.cache.passing.number
        task = _delta.backward_number()
        self._call = ("pass", passing) if passing else ("backward", task) if task != -1 else ("call", next(_calls))

    def selected(self, name: str) -> Tensor:
        """Return the members' part of a parameter, with a leading axis in the order of ``members``."""
        return self._selected(name).several

    def array(self, name: str, number: int) -> Tensor:
        """Return an array of one of the members."""
        return self._selected(name).parts[self._places[number]]

    def _selected(self, name: str) -> _Selected:
        parameter = cast(Tensor, self.whole.owner._parameters[self.whole.parameter_names[name]])
        trained = torch.is_grad_enabled() and parameter.requires_grad
        sparse = trained and sparse_gradients(self.whole, parameter)
        place = _delta.version(parameter), parameter.dtype, parameter.device
        state = *place, trained, sparse, torch.is_inference_mode_enabled()
        known = self._arrays.get(name)
        if known is not None and (known.parameter is not parameter or known.state != state):
            known = None
        if known is not None and known.call == self._call:
            return known
        index = self.index(self.members, parameter.device)
        if known is not None and self._is_current(known, index):
            return known
        function = Selection(index, parameter, sparse)
        several = recomputed(function, parameter) if trained else function(parameter)
        self._arrays[name] = known = _Selected(self._call, parameter, state, several, several.unbind(0))
        return known

    def _is_current(self, selection: _Selected, index: Tensor) -> bool:
        """Return whether what another call selected is still what the parameter has, where finding out pays."""
        # In passes, arrays are selected again, as most are those of one layer. What θ makes is computed once for all.
        if self._call[0] == "backward" or (self._call[0] == "pass" and self.whole.made is None):
            return False
        # By content, as in the caches of updates; on a device, reading it would wait.
        if not _delta.on_host(selection.parameter) or _delta.traced():
            return False
        with torch.no_grad():
            return torch.equal(selection.parameter.index_select(0, index), selection.several)

    def arrays(self, names: Sequence[str]) -> list[Tensor]:
        """Return arrays of the plan by name, with a leading axis in the order of ``members``."""
        made = self.whole.made
        if made is None:
            return [self.selected(name) for name in names]
        thetas = [self.selected(name) for name in made.theta.shapes]
        if self._made is None or any(old is not new for old, new in zip(self._made[0], thetas, strict=True)):
            self._made = thetas, made.computed(thetas)
        return [self._made[1][name] for name in names]

    @functools.cached_property
    def order(self) -> list[int]:
        """The rows that have a member, those of one member after those of the one before."""
        return [row for number in self.members for row in self.rows[number]]

    @functools.cached_property
    def places(self) -> list[int]:
        """The place among ``members`` of the member of each row in ``order``."""
        return [self._places[number] for number in self.members for _ in self.rows[number]]

    @functools.cached_property
    def count(self) -> int | None:
        """The number of rows of each member; None if they differ."""
        counts = {len(self.rows[number]) for number in self.members}
        return counts.pop() if len(counts) == 1 else None

    def blocks(self, x: Tensor) -> Tensor:
        """Return the rows that have a member, in their order: ``(rows, …)``."""
        if self.order == list(range(len(x))):
            return x
        return x.index_select(0, self.index(self.order, x.device))


# -- The updates of all members in a batch -----------------------------------------------------------------------------


#: Elements of the updates that are formed at a time, by type of the device; on the CPU, what its caches hold.
_AT_ONCE = {"cpu": 1 << 19}
_AT_ONCE_ELSEWHERE = 1 << 24


class _FormedProduct(Function):
    """``x ΔWᵀ`` of each member as a function of x and of the arrays, from which backward computes ΔW again.

    Where ΔW is a run of elements of a matrix product, ΔW and its gradient are computed in one buffer.

    Parameters
    ----------
    source : Slice
    device : str
        Type of the device, whose autocast backward repeats.
    """

    def __init__(self, source: _delta.Slice, device: str) -> None:
        self.source = source
        self._autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self._at_once = max(1, _AT_ONCE.get(device, _AT_ONCE_ELSEWHERE) // source.size)

    def __call__(self, x: Tensor, *arrays: Tensor) -> Tensor:
        first = None if _delta.traced() else self._first(x, arrays)
        if first is None:
            return torch.cat([self._product(*part) for part in self._parts(x, *arrays)])
        output = x.new_empty((*x.shape[:2], self.source.shape[0]))
        for members, _, update in self._formed(*torch.vmap(self._factors)(*arrays), first):
            torch.bmm(x[members], update.mT, out=output[members])
        return output

    def _product(self, x: Tensor, *arrays: Tensor) -> Tensor:
        product: Tensor = torch.vmap(self._one)(x, *arrays)
        return product

    def _one(self, x: Tensor, *arrays: Tensor) -> Tensor:
        return functional.linear(x, self.source(*arrays))

    def _parts(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield the tensors of as many members as are computed at a time."""
        return zip(*(torch.split(tensor, self._at_once) for tensor in tensors), strict=True)

    def _first(self, x: Tensor, arrays: Sequence[Tensor]) -> int | None:
        """Return where in the product of two factors ΔW begins; None where ΔW is no run of elements of one."""
        if self._autocast[2] or x.dtype != arrays[0].dtype:
            return None
        product = self.source.product(*(array[0] for array in arrays))
        return product.first if type(product) is _delta.Product else None

    def _factors(self, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        product = cast(_delta.Product, self.source.product(*arrays))
        return product.left, product.right

    def _formed(self, left: Tensor, right: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some members after others, with their products, and the updates in these; all are in one buffer."""
        buffer = left.new_empty((min(len(left), self._at_once), left.shape[1], right.shape[2]))
        for start in range(0, len(left), len(buffer)):
            members = slice(start, min(start + len(buffer), len(left)))
            product = buffer[: members.stop - start]
            torch.bmm(left[members], right[members], out=product)
            update = product.flatten(1)[:, first : first + self.source.size]
            yield members, product, update.view(-1, *self.source.shape)

    def vjp(self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted inputs, given that of the output."""
        if _delta.reuses_buffers(gradient) and not torch.compiler.is_compiling():
            first = self._first(inputs[0], inputs[1:])
            if first is not None:
                return self._vjp_in_place(inputs, wanted, gradient, first)
        device, dtype, enabled = self._autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            parts = [
                _delta.plain_vjp(self._product, part, wanted, of_part)
                for *part, of_part in self._parts(*inputs, gradient)
            ]
        return [torch.cat(several) for several in zip(*parts, strict=True)]

    def _vjp_in_place(
        self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor, first: int
    ) -> Sequence[Tensor]:
        """Compute the gradient of each ΔW in the place of ΔW."""
        x, of_x = inputs[0], torch.empty_like(inputs[0])
        arrays, leaves = _delta.leaves_of(inputs[1:], [index - 1 for index in wanted if index])
        with torch.enable_grad():
            factors = torch.vmap(self._factors)(*arrays)
        left, right = (factor.detach() for factor in factors)
        of_left, of_right = torch.empty_like(left), torch.empty_like(right)
        for members, product, update in self._formed(left, right, first):
            torch.bmm(gradient[members], update, out=of_x[members])
            torch.bmm(gradient[members].mT, x[members], out=update)
            flat = product.flatten(1)
            flat[:, :first] = 0.0
            flat[:, first + self.source.size :] = 0.0
            torch.bmm(left[members].mT, product, out=of_right[members])
            # In this form the long sides of both operands are contiguous: it takes a quarter of the time.
            of_left[members] = torch.bmm(right[members], product.mT).mT
        pairs = [pair for pair in zip(factors, (of_left, of_right), strict=True) if pair[0].requires_grad]
        outputs, gradients = [factor for factor, _ in pairs], [of for _, of in pairs]
        of_arrays = torch.autograd.grad(outputs, leaves, gradients) if pairs else ()
        return [*([of_x] if 0 in wanted else []), *of_arrays]


def factors_of(slot: AdapterSlot, tokens: int, device: torch.device) -> Factoring | None:
    """Return how members multiply by factors, each by rows of x of a number; None where ΔW is better formed."""
    if slot.factoring is not None or not slot.adapter.plan.applying.takes_factors:
        return slot.factoring
    plan, factorings = slot.adapter.plan.arrays_plan, cast(Members, slot.adapter.members).factorings
    # Decided for powers of two, so that there are few decisions, and none depends on the batches before.
    key = slot.index, max(tokens - 1, 0).bit_length(), device.type
    if key not in factorings:
        how = factoring(plan, slot.index)
        if how is not None:
            work = costs(plan, slot.index, how, 1 << key[1], slot.adapter.plan.applying)
            machine = MACHINES.get(device.type, MACHINES["cpu"])
            how = how if work["factored"].seconds(machine) < work["additive"].seconds(machine) else None
        factorings[key] = how
    return factorings[key]


def changes(assignment: MemberRows, slot: AdapterSlot, x: Tensor) -> Tensor | None:
    """Return what a slot of all members adds to the outputs of their rows; None where members are better one by one.

    Parameters
    ----------
    assignment : MemberRows
    slot : AdapterSlot
        Of the population.
    x : Tensor, shape (rows, tokens, in)

    Returns
    -------
    Tensor, shape (rows with a member, tokens, out), or None
        In ``assignment.order``.
    """
    state, inputs = slot.adapter, assignment.blocks(x)
    how = factors_of(slot, inputs.shape[1] * (assignment.count or 1), x.device)
    source = state.cache.slice(slot.index) if how is None else None
    if how is None and (source is None or assignment.count is None or not state.plan.applying.takes_factors):
        return None
    if state.plan.applying.rescales and (how is None or not how.is_plain or how.sizes[0].width is None):
        return None
    arrays = assignment.arrays(how.names if how is not None else cast(Any, source).names)
    if not torch.is_autocast_enabled(x.device.type):
        inputs = inputs.to(arrays[0].dtype)
    if assignment.count is None:
        # A copy of the arrays for each row: those of factors are small.
        index = assignment.index(assignment.places, arrays[0].device)
        arrays = [array.index_select(0, index) for array in arrays]
    else:
        inputs = inputs.reshape(len(assignment.members), -1, inputs.shape[-1])
    if how is not None:
        activation = None if state.activation is None else ACTIVATIONS[state.activation]
        change = torch.vmap(functools.partial(_factored, how, activation))(inputs, *arrays)
    else:
        function = _FormedProduct(cast(_delta.Slice, source), x.device.type)
        change = recomputed(function, inputs, *arrays) if torch.is_grad_enabled() else function(inputs, *arrays)
    return _forward_pass.scaled(state, change.reshape(len(assignment.order), x.shape[1], change.shape[-1]))


def _factored(how: Factoring, activation: Any, x: Tensor, *arrays: Tensor) -> Tensor:
    named: Mapping[str, Tensor] = dict(zip(how.names, arrays, strict=True))
    if how.group.multiplied and how.whole_arrays is not None and activation is None:
        return cast(Tensor, how.times(load_backend("torch"), x.to(arrays[0].dtype), named))  # autocast or not
    return _forms.product(x, how(load_backend("torch"), named), activation)


# -- Magnitudes: the quotients m / ‖W + ΔW‖ of all members in a batch --------------------------------------------------

# ``‖W + s L Rᵀ‖²`` is ``‖W‖²`` plus the sum over the columns of ``s (2 W R + s L RᵀR) ∘ L``, so that no member's ΔW is
# formed. The norm of W is computed as for one adapter, and the rest is exactly 0 at the start; later it has the
# precision of a product.


class _Quotients(Function):
    """The quotients of one weight, ``(members, rows)``, as a function of factors of updates and of magnitudes."""

    def __init__(self, applying: Applying, weight: Callable[[], Tensor], scale: float, detach: bool) -> None:
        self.applying, self.weight, self.scale, self.detach = applying, weight, scale, detach

    def __call__(self, left: Tensor, right: Tensor, magnitude: Tensor) -> Tensor:
        weight, backend = self.weight().to(left.device), load_backend("torch")
        if self.detach:
            weight, left, right = weight.detach(), left.detach(), right.detach()
        wide = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
        left, right = left.to(wide), right.to(wide)
        with torch.autocast(left.device.type, enabled=False):
            # One product for all members, forward and backward.
            product = torch.mm(weight.to(wide), right.transpose(0, 1).flatten(1))
            inner = 2.0 * product.view(len(weight), *right.shape[::2]).transpose(0, 1)
            inner = inner + self.scale * (left @ (right.mT @ right))
            squares = norms(backend, weight, 1).square() + self.scale * (inner * left).sum(2).double()
        zero = squares <= 0.0  # where the root has no derivative
        norm = torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())
        quotient, _ = self.applying.divided(backend, magnitude, norm, str(wide).removeprefix("torch."))
        return cast(Tensor, quotient)

    def vjp(self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted inputs, given that of the quotients."""
        return _delta.plain_vjp(self, inputs, wanted, gradient)


def quotients(
    assignment: MemberRows, tokens: int, device: torch.device, slot: AdapterSlot, stored: Tensor | None
) -> Tensor:
    """Return q of one weight for each row that has a member, where :func:`changes` has returned what it adds.

    Parameters
    ----------
    assignment : MemberRows
    tokens : int
        Of each member.
    device : device
        That of the input.
    slot : AdapterSlot
        Of the population.
    stored : Tensor or None
        The base weight as the module has it; None if it is quantized.

    Returns
    -------
    Tensor, shape (rows with a member, 1, rows of the weight)
        In ``assignment.order``.
    """
    state, how = slot.adapter, cast(Factoring, factors_of(slot, tokens, device))
    left, right = torch.vmap(functools.partial(_pair, how))(*assignment.arrays(how.names))
    (name,) = state.plan.weight_param_names[slot.index]
    weight, scale = functools.partial(_forward_pass.base_rows, slot, stored), mixing_weight(state) * how.network.scale
    function = _Quotients(state.plan.applying, weight, scale, state.detach_norm)
    inputs = left, right, assignment.selected(name)
    # The node passes no gradient to the weight.
    plain = _delta.traced() or not torch.is_grad_enabled() or (stored is not None and stored.requires_grad)
    quotient = function(*inputs) if plain else recomputed(function, *inputs)
    return quotient.index_select(0, assignment.index(assignment.places, quotient.device)).unsqueeze(1)


def _pair(how: Factoring, *arrays: Tensor) -> tuple[Tensor, Tensor]:
    ((matrix,),) = how(load_backend("torch"), dict(zip(how.names, arrays, strict=True))).terms
    return matrix.left, cast(Tensor, matrix.right)
