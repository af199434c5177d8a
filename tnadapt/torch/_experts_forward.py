"""The sum of a parameter that stacks several matrices (experts) and the updates of these matrices.

Written with ordinary operations, the sum would need the stacked updates, the sum in the wider dtype and one node of the
graph for each matrix. :class:`SummedMatrices` writes one matrix after the other into a copy of the parameter, and saves
only the arrays that the updates are computed from. The sum itself is an operand of the module's products, which save
it for their own backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from tnadapt.targets.target import Target

from ._changed_forward import changed_weight, scaled_output
from ._delta import in_dispatch_mode, in_functorch
from ._forward_pass import ColumnDropout, PatchedParameter, delta, delta_source, dropped_inputs
from ._linear import DeltaSource, add_features, fixed_indices, index_tensor, summed
from ._state import AdapterSlot
from ._weights import shows_products

__all__ = [
    "LazyStack",
    "RoutedChanges",
    "SummedMatrices",
    "can_be_lazy",
    "changed_parameter",
    "is_read",
    "parameter_sum",
    "stacked_sum",
    "summed_matrices",
]


# -- The sum of a parameter that stacks several matrices (experts) and the updates of these matrices -------------------

# Written with ordinary operations, the sum would need the stacked updates, the sum in the wider dtype and one node of
# the graph for each matrix. :class:`SummedMatrices` writes one matrix after the other into a copy of the parameter, and
# saves only the arrays that the updates are computed from. The sum itself is an operand of the module's products, which
# save it for their own backward pass.


def summed_matrices(stored: Tensor, slots: Sequence[AdapterSlot], drop: ColumnDropout) -> Tensor:
    """Return a stack of matrices with the updates of some of them, each rounded once to its dtype."""
    slots = sorted(slots, key=lambda slot: cast(int, slot.target.index))
    dropping = any(drop.acts(slot) for slot in slots)
    if dropping or torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode():
        return stacked_sum(stored, [(slot.target, drop(slot, delta(slot))) for slot in slots])
    if not torch.is_grad_enabled():
        return _written(stored, ((slot.target, delta(slot)) for slot in slots))
    sources: list[DeltaSource] = []
    arrays: list[Tensor] = []
    for slot in slots:
        source, own = delta_source(slot)
        sources.append(source)
        arrays += own
    return cast(Tensor, SummedMatrices.apply(stored, tuple(sources), *arrays))  # type: ignore[no-untyped-call]


def stacked_sum(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Compute the same sum by operations on the whole stack: the reference, and the form for compilers."""
    kind = torch.promote_types(stored.dtype, changes[0][1].dtype)
    by_index: dict[int, Tensor] = {}
    for target, change in changes:
        assert target.index is not None
        matrix = by_index.get(target.index)
        matrix = stored[target.index].to(kind) if matrix is None else matrix
        change = change.to(stored.device, kind)
        if target.rows is not None:
            whole = torch.zeros(target.out, target.shape[1], dtype=kind, device=stored.device)
            places = index_tensor(target, stored.device)
            change = whole.index_copy(0, places, change)
        by_index[target.index] = matrix + (change.mT if target.transposed else change)
    numbers = fixed_indices(tuple(by_index), stored.device)
    return stored.index_copy(0, numbers, torch.stack(list(by_index.values())).to(stored.dtype))


class SummedMatrices(torch.autograd.Function):
    """The sum as one autograd node; backward recomputes what the gradient of each update needs."""

    @staticmethod
    def forward(ctx: Any, stored: Tensor, sources: Sequence[DeltaSource], *arrays: Tensor) -> Tensor:
        ctx.sources, ctx.kind = sources, stored.dtype
        ctx.save_for_backward(*arrays)
        return _written(stored, _changes(sources, arrays))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arrays, (moved,) = ctx.saved_tensors, grads
        found: list[Tensor | None] = [moved if ctx.needs_input_grad[0] else None, None]
        start = 0
        for source in ctx.sources:
            own = arrays[start : start + source.number]
            needed = ctx.needs_input_grad[2 + start : 2 + start + source.number]
            found += _pulled(source, own, needed, source.target.select(moved))
            start += source.number
        return tuple(found)


def _changes(sources: Sequence[DeltaSource], arrays: Sequence[Tensor]) -> Iterator[tuple[Target, Tensor]]:
    start = 0
    for source in sources:
        own = arrays[start : start + source.number]
        change = own[0] if source.made is None else source.made(*own)
        yield source.target, change if source.weight == 1.0 else change * source.weight
        start += source.number


def _written(stored: Tensor, changes: Iterable[tuple[Target, Tensor]]) -> Tensor:
    """Return a copy of the stack with one matrix after the other changed; changes of one matrix follow each other."""
    total = stored.detach().clone(memory_format=torch.contiguous_format)
    for index, own in itertools.groupby(changes, lambda change: change[0].index):
        assert index is not None
        matrix = stored.detach()[index]
        for target, change in own:
            matrix = _wide_sum(matrix, target.of_matrix(), change)
        total[index] = matrix  # rounded here
    return total


def _wide_sum(matrix: Tensor, target: Target, change: Tensor) -> Tensor:
    kind = torch.promote_types(matrix.dtype, change.dtype)
    change = change.to(matrix.device, kind)
    if target.rows is None:
        return matrix.to(kind) + (change.T if target.transposed else change)
    total = matrix.to(kind, copy=True)
    target.write(total, target.select(total) + change)
    return total


def _pulled(
    source: DeltaSource, arrays: Sequence[Tensor], needed: Sequence[bool], moved: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the arrays of one update, given that of the update."""
    found: list[Tensor | None] = [None] * len(arrays)
    wanted = [place for place, need in enumerate(needed) if need]
    if not wanted:
        return found
    moved = moved.to(arrays[0].device, arrays[0].dtype)
    moved = moved if source.weight == 1.0 else moved * source.weight
    parts = [moved] if source.made is None else source.made.vjp(arrays, wanted, moved)
    for place, part in zip(wanted, parts, strict=True):
        found[place] = part
    return found


# -- What the updates of experts add to the products of the tokens that are routed to them -----------------------------

# The strategies "factored" and "additive" for one of the matrices that a parameter stacks: as in a linear layer, the
# update is added to the output of the product with W. Only experts that have tokens compute anything.


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


# -- A parameter that stacks the matrices of experts, with updates that products apply without forming the sum ---------

# A module of experts multiplies by its parameters itself, each module in its own way: expert by expert (``linear(x,
# self.up_proj[i])``), sorted tokens by all experts (``grouped_mm``), or token by token (``bmm`` with
# ``self.up_proj[ids]``). :class:`LazyStack` stands in the place of such a parameter while the module's forward runs,
# and sees each function of torch that it is given to (``__torch_function__``). Selecting matrices and transposing gives
# another lazy stack. A product is the product with W, to which the updates of the experts in it are added
# (:class:`~tnadapt.torch._experts_forward.RoutedChanges`). For every other function it is the changed weight, computed
# then: a module that does something unknown gets the result of the strategy "weight", and its cost.
#
# It holds no numbers. Code that avoids ``__torch_function__``, as a kernel that takes the address of its argument,
# fails and does not read W by mistake.


#: A tensor of matrix numbers, one number, or None for all matrices.
Picked = Tensor | int | None


def can_be_lazy(stored: Tensor) -> bool:
    """Return whether products may depend on the numbers of tokens of each expert, which are read from the device.

    Not in a trace, which must hold for all inputs, nor in a captured graph, nor without numbers.
    """
    if torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode() or stored.is_meta:
        return False
    return not (stored.is_cuda and torch.cuda.is_current_stream_capturing())


class LazyStack(Tensor):
    """The changed matrices of experts, all or some of them, as an operand of products.

    Parameters
    ----------
    changes : RoutedChanges
    base : Tensor, optional
        The matrices without the changes, as they are presented here.
    picked : int or Tensor of int, optional
        Which of them.
    flipped : bool
        Whether they are presented as the transposes of what is stored.
    """

    changes: RoutedChanges
    base: Tensor
    picked: Picked
    flipped: bool

    @staticmethod
    def __new__(
        cls, changes: RoutedChanges, base: Tensor | None = None, picked: Picked = None, flipped: bool = False
    ) -> LazyStack:
        """Return a tensor without storage."""
        base = changes.base if base is None else base
        made: Any = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        made.changes, made.base, made.picked, made.flipped = changes, base, picked, flipped
        return cast(LazyStack, made)

    @property
    def takes_rows(self) -> bool:
        """Whether a row of x is multiplied from the left, ``x @ matrix``: the matrices are presented as (in, out)."""
        return self.changes.transposed != self.flipped

    def formed(self) -> Tensor:
        """Return the changed matrices as an ordinary tensor."""
        total = self.changes.total()
        total = total if self.picked is None else total[self.picked]
        return total.mT if self.flipped else total

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply a function of torch: as a product where it is one, else to the changed weight."""
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func) or _RULES.get(str(func))
        known = rule is not None and kwargs.keys() <= _KEYWORDS.get(rule, set())
        found = rule(func, *args, **kwargs) if rule is not None and known else None
        return func(*_formed(args), **_formed(kwargs)) if found is None else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise: nothing below torch's functions may take it for the weight."""
        raise RuntimeError(
            f"{func} reached the matrices of experts past torch's functions, so that their updates cannot be applied: "
            "attach the adapter with strategy='weight'"
        )


def _formed(values: Any) -> Any:
    return tree_map(lambda value: value.formed() if isinstance(value, LazyStack) else value, values)


# -- Selecting and transposing -----------------------------------------------------------------------------------


def _item(func: Any, stack: Any, index: Any) -> Tensor | None:
    """Return one matrix, or those of a list of numbers."""
    if not isinstance(stack, LazyStack) or stack.picked is not None:
        return None
    changes, whole = stack.changes, isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if whole and index.ndim == 1:
        return LazyStack(changes, stack.base[index], index, stack.flipped)
    if not (whole and index.ndim == 0) and type(index) is not int:
        return None
    number = int(index)
    base = stack.base[number]
    number %= changes.stored.shape[0]
    return LazyStack(changes, base, number, stack.flipped) if number in changes.by_index else base


def _transposed(func: Any, stack: Any, *dims: Any, **named: Any) -> Tensor | None:
    """Return the stack with its last two axes exchanged."""
    dims = (*dims, *named.values())
    if not isinstance(stack, LazyStack) or {dim % stack.ndim for dim in dims} != {stack.ndim - 2, stack.ndim - 1}:
        return None
    return LazyStack(stack.changes, stack.base.mT, stack.picked, not stack.flipped)


def _as_mt(func: Any, stack: Any) -> Tensor | None:
    return _transposed(func, stack, -2, -1)


def _as_t(func: Any, stack: Any) -> Tensor | None:
    return _transposed(func, stack, -2, -1) if stack.ndim == 2 else None


# -- Products ----------------------------------------------------------------------------------------------------


def _linear(func: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return ``x W'ᵀ + b`` for one matrix."""
    if isinstance(input, LazyStack) or isinstance(bias, LazyStack) or not isinstance(weight.picked, int):
        return None
    if weight.takes_rows:
        return None
    y: Tensor = weight.changes.of_one(functional.linear(input, weight.base), input, weight.picked)
    return y if bias is None else y + bias


def _matmul(func: Any, input: Any, other: Any) -> Tensor | None:
    """Return ``x W'`` for one matrix."""
    if isinstance(input, LazyStack) or not isinstance(other.picked, int) or not other.takes_rows or input.ndim == 0:
        return None
    return cast(Tensor, other.changes.of_one(func(input, other.base), input, other.picked))


def _bmm(func: Any, one: Any, other: Any) -> Tensor | None:
    """Return a product for each of several matrices: all of them, or those of a list of numbers."""
    if isinstance(one, LazyStack):
        if isinstance(other, LazyStack) or one.takes_rows:
            return None
        y = torch.bmm(one.base, other)
        return one.changes.of_batch(y.mT, other.mT, cast(Any, one.picked)).mT
    if not other.takes_rows:
        return None
    return cast(Tensor, other.changes.of_batch(torch.bmm(one, other.base), one, other.picked))


def _grouped(func: Any, one: Any, other: Any, offs: Any = None) -> Tensor | None:
    """Return a product for rows that are sorted by matrix; ``offs`` are the ends of their segments."""
    lazy = isinstance(other, LazyStack) and not isinstance(one, LazyStack)
    if not lazy or offs is None or one.ndim != 2 or other.picked is not None or not other.takes_rows:
        return None
    y = func(one, other.base, offs=offs)
    ends = offs.tolist()
    counts = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    return cast(Tensor, other.changes.of_segments(y, one, counts))


def _existing(*several: tuple[Any, str]) -> list[Any]:
    """Return the functions of these names that this version of torch has."""
    return [getattr(owner, name) for owner, name in several if hasattr(owner, name)]


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.mT.__get__: _as_mt,  # type: ignore[attr-defined]
    Tensor.T.__get__: _as_t,  # type: ignore[attr-defined]
    Tensor.t: _as_t,
    torch.t: _as_t,
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys(_existing((functional, "grouped_mm"), (torch, "_grouped_mm")), _grouped),
    # Of transformers, where torch has no such product.
    "transformers.grouped_mm_fallback": _grouped,
}

#: Their keywords; a call with others, such as ``out``, is no product here.
_KEYWORDS: dict[Any, set[str]] = {
    _linear: {"input", "weight", "bias"},
    _grouped: {"offs"},
    _transposed: {"dim0", "dim1"},
}

#: Functions that depend on a tensor's shape, dtype and place, and not on its numbers.
_ABOUT: set[Any] = {
    *(getattr(Tensor, name) for name in ("size", "dim", "stride", "numel", "__len__", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("element_size", "get_device", "is_contiguous", "is_complex")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse")
    ),
    torch.is_floating_point,
    torch.numel,
}


# -- A module's parameter together with the updates that act on it in a forward pass -----------------------------------


def is_read(slot: AdapterSlot) -> bool:
    """Return whether a slot acts where the module reads the parameter, and not on the module's output."""
    return slot.strategy == "weight" or slot.target.index is not None


def parameter_sum(patched: PatchedParameter, slots: Sequence[AdapterSlot], host: nn.Module) -> Tensor:
    """Return the changed parameter as a tensor."""
    drop = ColumnDropout(host)
    if not patched.sums:
        return changed_weight(patched.tensor, slots, drop)
    if slots[0].target.index is not None:
        return summed_matrices(patched.tensor, slots, drop)
    return summed(patched.tensor, [(slot.target, drop(slot, delta(slot))) for slot in slots])


def changed_parameter(
    patched: PatchedParameter,
    slots: Sequence[AdapterSlot],
    host: nn.Module,
    output: Callable[[AdapterSlot, Tensor], Tensor],
) -> Tensor:
    """Return what stands in the place of a parameter: the sum, or for experts a stack that products add updates to.

    Parameters
    ----------
    patched : PatchedParameter
    slots : sequence of AdapterSlot
        Those that act.
    host : Module
    output : function of (AdapterSlot, Tensor)
        What a slot adds to the output for an input, where its strategy is not "weight".
    """
    added = [slot for slot in slots if slot.strategy != "weight"]
    stored = patched.tensor
    if not added or not can_be_lazy(stored) or not shows_products(patched.owner):
        return parameter_sum(patched, slots, host)
    others = [slot for slot in slots if slot.strategy == "weight"]
    base = parameter_sum(patched, others, host) if others else stored
    return LazyStack(RoutedChanges(stored, base, added, host, output, lambda: parameter_sum(patched, slots, host)))
