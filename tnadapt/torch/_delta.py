"""ΔW with autograd: computed once for all layers that share it, and recomputed in backward instead of saved.

Where slices are cheap (:class:`Slice`), each layer computes its own during training. Where they are not, as behind F,
the updates of a whole group are computed at once for all its layers. The graph is a single node,
:class:`DeltaFunction`, that keeps only the small arrays. Backward can therefore run through it several times (gradient
accumulation without an optimizer step, reentrant checkpointing), and a checkpointed region saves no tensor for it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tnadapt.algebra.factoring import KroneckerRows
from tnadapt.algebra.group import Group, batches
from tnadapt.algebra.maps.projection import adjoints
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend

__all__ = [
    "DeltaFunction",
    "OuterRows",
    "Slice",
    "Whole",
    "in_dispatch_mode",
    "in_functorch",
    "outer_vjp_once",
    "pieces",
    "vector",
    "version",
]


# -- Whether something intercepts torch's operations: a transform, a trace or a dispatch mode --------------------------


def in_functorch() -> bool:
    """Return whether a torch.func transform is active."""
    active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def in_dispatch_mode() -> bool:
    """Return whether operations are intercepted: by a trace, by forward-mode AD or by a dispatch mode.

    Such a mode may keep results for later, as selective checkpointing does, so no result may be overwritten.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


# -- ΔW with autograd: computed once for all layers that share it, and recomputed in backward instead of saved ---------


class DeltaFunction(torch.autograd.Function):
    """A function of a plan's arrays as one autograd node; backward recomputes and differentiates it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Whole | Slice, *arrays: Tensor) -> Tensor:
        return made(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.made, *ctx.arrays = inputs
        # Not save_for_backward: tensors saved there are freed after the first backward pass, but layers and passes
        # share this node, so backward may run several times. Its check for in-place writes is therefore repeated here.
        ctx.versions = [version(array) for array in ctx.arrays]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if [version(array) for array in ctx.arrays] != ctx.versions:
            raise RuntimeError(
                "an array of the adapter was changed in place between the forward pass and this backward pass, which "
                "needs the original values: call optimizer.step() after the last backward() of a step"
            )
        wanted = [index for index, _ in enumerate(ctx.arrays) if ctx.needs_input_grad[1 + index]]
        result: list[Tensor | None] = [None] * (1 + len(ctx.arrays))
        for index, part in zip(wanted, ctx.made.vjp(ctx.arrays, wanted, grads[0]), strict=True):
            result[1 + index] = part
        return tuple(result)


def _vjp(
    made: Callable[..., Tensor], arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor
) -> Sequence[Tensor]:
    """Recompute a function of arrays and return the gradients of the wanted ones."""

    def of(*moved: Tensor) -> Tensor:
        given = list(arrays)
        for index, array in zip(wanted, moved, strict=True):
            given[index] = array
        return made(*given)

    # torch.func rather than autograd.grad, because a backward pass may itself be batched or differentiated.
    pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(of, *(arrays[index] for index in wanted))[1]
    return pull(gradient)


class Whole:
    """The vector of all updates of a plan as a function of its arrays, in order."""

    def __init__(self, plan: SuperLoRA, names: Sequence[str], on_backward: Callable[[], None] | None = None) -> None:
        self.plan, self.names = plan, tuple(names)
        self.on_backward = on_backward

    def __repr__(self) -> str:
        # Traces contain this text and are compared with each other, so it must not contain an address.
        return f"Whole({self.plan!r})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        return self.plan.vector(dict(zip(self.names, arrays, strict=True)))

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted arrays, given that of the vector; call ``on_backward`` before."""
        if self.on_backward is not None:
            self.on_backward()
        groups = self.plan.groups
        if any(not group.projection.linear or group.projection.map.identity for group in groups):
            return _vjp(self, arrays, wanted, gradient)
        # The adjoint of a linear F needs no output of F, so only the network in front of it is recomputed.
        backend, found = load_backend("torch"), dict[str, Tensor]()
        named = dict(zip(self.names, arrays, strict=True))
        trained = {self.names[index] for index in wanted}
        groups = [group for group in groups if not trained.isdisjoint(group.names.values())]
        for numbers in batches(backend, gradient, [(group, 0, group.size) for group in groups]):
            batch = [groups[number] for number in numbers]
            for group, before in zip(batch, self._before(batch, gradient), strict=True):
                for full, part in _of_network(group, named, trained, before):
                    # Arrays that are tied occur in several groups, or more than once in one.
                    found[full] = found[full] + part if full in found else part
        return [found[self.names[index]] for index in wanted]

    def _before(self, groups: Sequence[Group], gradient: Tensor) -> list[Tensor]:
        """Return the gradients of what groups that share a linear F compute before it."""
        backend = load_backend("torch")
        starts = [0, *itertools.accumulate(rows * cols for rows, cols in self.plan.shapes)]
        after = []
        for group in groups:
            spans = [(starts[piece.weight] + piece.weight_start, piece.length) for piece in group.pieces]
            after.append(backend.concat([gradient[start : start + length] for start, length in _joined(spans)]))
        found = cast("list[Tensor]", adjoints(backend, groups[0].projection, after))
        # Copies: how a product with a matrix rounds depends on its alignment, and pieces of one array have any.
        return found if len(found) == 1 else [one.clone() for one in found]


def _of_network(
    group: Group, named: Mapping[str, Tensor], trained: Collection[str], gradient: Tensor
) -> list[tuple[str, Tensor]]:
    """Return the gradients of a group's trained arrays, by name, given that of the vector of its network."""
    backend, own = load_backend("torch"), list(group.names.values())
    places = [place for place, full in enumerate(own) if full in trained]

    def made(*given: Tensor) -> Tensor:
        arrays = group.with_frozen(backend, dict(zip(group.names, given, strict=True)))
        return cast(Tensor, group.network.whole(backend, arrays))

    parts = _vjp(made, [named[full] for full in own], places, gradient)
    return [(own[place], part) for place, part in zip(places, parts, strict=True)]


class OuterRows(NamedTuple):
    """An update as a run of the elements of rows that are outer products, cut to ``cols``.

    Attributes
    ----------
    left, right : Tensor, shapes (n, p) and (n, q)
    cols : int
    first : int
        Position in the rows of the first element of the update.
    scale : float
    """

    left: Tensor
    right: Tensor
    cols: int
    first: int
    scale: float


class Slice:
    """The update of one weight as a function of the arrays of its groups, in order.

    Attributes
    ----------
    names : tuple of str
        Names of these arrays in the plan.
    shape : (int, int)
    size : int
        Number of elements of the update.
    """

    def __init__(self, plan: SuperLoRA, index: int) -> None:
        self.shape = plan.shapes[index]
        self.size = math.prod(self.shape)
        self._pieces = plan.layout.of_weight(index)
        self._groups = {piece.group: plan.groups[piece.group] for piece in self._pieces}
        # Once each: arrays may be tied.
        self.names = tuple(dict.fromkeys(full for group in self._groups.values() for full in group.names.values()))

    def __repr__(self) -> str:
        return f"Slice(shape={self.shape}, pieces={self._pieces})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        # Shapes were checked when the arrays were created; a check per layer would cost as much as the update itself.
        backend, params = load_backend("torch"), dict(zip(self.names, arrays, strict=True))
        found = [
            self._groups[piece.group].update(backend, params, piece.group_start, piece.group_start + piece.length)
            for piece in self._pieces
        ]
        return cast(Tensor, backend.reshape(backend.concat(found), self.shape))

    def factors(self, *arrays: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Return (left, right, start): the update is a run of ``vec(left @ right)`` from start. None if it is not."""
        if len(self._pieces) > 1 or arrays[0].dtype not in (torch.float32, torch.float64):
            return None
        (piece,) = self._pieces
        group = self._groups[piece.group]
        if group.subtracts:
            return None  # the difference of two products
        backend = load_backend("torch")
        own = group.arrays(backend, dict(zip(self.names, arrays, strict=True)))
        start, stop = piece.group_start, piece.group_start + piece.length
        return group.network.slice_factors(backend, own, start, stop)

    @functools.cached_property
    def _kronecker_rows(self) -> KroneckerRows | None:
        piece = self._pieces[0]
        group = self._groups[piece.group]
        if len(self._pieces) > 1 or group.subtracts:
            return None
        return KroneckerRows.of(group.network, piece.group_start, piece.group_start + piece.length)

    def outer(self, *arrays: Tensor) -> OuterRows | None:
        """Return two vectors for each row of the network that contains a part of the update; None if there are none."""
        rows = self._kronecker_rows
        if rows is None or arrays[0].dtype not in (torch.float32, torch.float64):
            return None
        (group,) = self._groups.values()
        backend = load_backend("torch")
        own = group.arrays(backend, dict(zip(self.names, arrays, strict=True)))
        return OuterRows(*rows(backend, own), rows.cols, rows.first, group.network.scale)

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted arrays, given that of the update."""
        return _vjp(self, arrays, wanted, gradient)

    @classmethod
    def of(cls, plan: SuperLoRA, index: int) -> Slice | None:
        """Return the slice of one weight, or None where computing it alone costs more than as part of the whole.

        That is so behind F, which mixes all elements of a group. It is also so where a group's gradients would be
        larger than the group: each slice has gradients as large as all arrays of its groups.
        """
        groups = [plan.groups[piece.group] for piece in plan.layout.of_weight(index)]
        if not all(group.projection.map.identity for group in groups):
            return None
        many = any(len(group.pieces) * group.num_parameters > group.size for group in groups if len(group.pieces) > 1)
        return None if many else cls(plan, index)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent runs of ``(start, length)``."""
    found: list[tuple[int, int]] = []
    for start, length in spans:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def version(array: Tensor) -> int:
    """Return torch's in-place version counter; -1 for inference tensors, which have none."""
    return -1 if array.is_inference() else array._version


def vector(plan: SuperLoRA, arrays: Mapping[str, Tensor], on_backward: Callable[[], None] | None = None) -> Tensor:
    """Return the vector of all updates, differentiable; in a compiled program by operations that can be fused."""
    if torch.compiler.is_compiling():
        return plan.vector(arrays)
    return cast(Tensor, DeltaFunction.apply(Whole(plan, tuple(arrays), on_backward), *arrays.values()))  # type: ignore[no-untyped-call]


def pieces(plan: SuperLoRA, vec: Tensor) -> list[Tensor]:
    """Return the update of every weight, ``(rows, cols)``, as views of the vector of all updates, in order."""
    sizes = [rows * cols for rows, cols in plan.shapes]
    # One split rather than many slices: its backward writes the whole gradient once.
    return [part.view(shape) for part, shape in zip(torch.split(vec, sizes), plan.shapes, strict=True)]


# -- The update whose rows are outer products, and its gradients by two sums, in the buffer that holds it --------------


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
