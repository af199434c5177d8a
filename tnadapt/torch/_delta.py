"""ΔW with autograd: computed once for all layers that share it, and again in backward rather than kept.

Where slices are cheap (:class:`Slice`), each layer makes its own, while training. Where they are not, as behind F, a
group's update is made whole for many layers. Its graph is one node, :class:`DeltaFunction`, that keeps the small arrays
and nothing else: gone through a second time (gradient accumulation without an optimiser step, reentrant checkpointing)
it finds all it needs, and a checkpointed region that meets it saves no tensor on its account.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tnadapt.algebra.group import Group
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend

__all__ = ["DeltaFunction", "Slice", "Whole", "pieces", "vector", "version"]


class DeltaFunction(torch.autograd.Function):
    """What a function makes of a plan's arrays; backward recomputes and differentiates it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Whole | Slice, *arrays: Tensor) -> Tensor:
        return made(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.made, *ctx.arrays = inputs
        # Not by save_for_backward: what that keeps is dropped after the first backward pass, and this node may be gone
        # through several times, as it is shared by layers and by passes. Its check for writes in place is made here.
        ctx.versions = [version(array) for array in ctx.arrays]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if [version(array) for array in ctx.arrays] != ctx.versions:
            raise RuntimeError(
                "an array of the adapter was changed in place between the forward pass and this backward pass, which "
                "needs the values it had: call optimizer.step() after the last backward() of a step"
            )
        wanted = [index for index, _ in enumerate(ctx.arrays) if ctx.needs_input_grad[1 + index]]
        result: list[Tensor | None] = [None] * (1 + len(ctx.arrays))
        for index, part in zip(wanted, ctx.made.vjp(ctx.arrays, wanted, grads[0]), strict=True):
            result[1 + index] = part
        return tuple(result)


def _vjp(
    made: Callable[..., Tensor], arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor
) -> Sequence[Tensor]:
    """Recompute what is made of arrays, and return the gradients of some of them."""

    def of(*moved: Tensor) -> Tensor:
        given = list(arrays)
        for index, array in zip(wanted, moved, strict=True):
            given[index] = array
        return made(*given)

    # By torch.func and not by autograd.grad: a backward pass may be batched or differentiated itself.
    pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(of, *(arrays[index] for index in wanted))[1]
    return pull(gradient)


class Whole:
    """The long vector of a plan as a function of its arrays, in order."""

    def __init__(self, plan: SuperLoRA, names: Sequence[str]) -> None:
        self.plan, self.names = plan, tuple(names)

    def __repr__(self) -> str:
        # A trace has it in its graph, and compares two of them: no address.
        return f"Whole({self.plan!r})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        return cast(Tensor, self.plan.vector(dict(zip(self.names, arrays, strict=True))))

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Gradients of the wanted arrays, from that of the vector."""
        groups = self.plan.groups
        if any(not group.projection.linear or group.projection.kind == "identity" for group in groups):
            return _vjp(self, arrays, wanted, gradient)
        # The adjoint of a linear F needs no output of F: recomputation ends before it.
        backend, found = load_backend("torch"), dict[str, Tensor]()
        named = dict(zip(self.names, arrays, strict=True))
        trained = {self.names[index] for index in wanted}
        starts = [0, *itertools.accumulate(rows * cols for rows, cols in self.plan.shapes)]
        for group in groups:
            own = list(group.names.items())
            places = [place for place, (_, full) in enumerate(own) if full in trained]
            if not places:
                continue
            spans = [(starts[piece.weight] + piece.weight_start, piece.length) for piece in group.pieces]
            after = backend.concat([gradient[start : start + length] for start, length in _joined(spans)])
            before = group.projection.adjoint(after)

            def made(*given: Tensor, group: Group = group) -> Tensor:
                arrays = group.with_frozen(backend, dict(zip(group.names, given, strict=True)))
                return cast(Tensor, group.network.whole(backend, arrays))

            parts = _vjp(made, [named[full] for _, full in own], places, before)
            found.update(zip((own[place][1] for place in places), parts, strict=True))
        return [found[self.names[index]] for index in wanted]


class Slice:
    """The update of one weight as a function of the arrays of its groups, in order.

    Attributes
    ----------
    names : tuple of str
        These arrays' names in the plan.
    shape : (int, int)
    size : int
        Of the update.
    """

    def __init__(self, plan: SuperLoRA, index: int) -> None:
        self.shape = plan.shapes[index]
        self.size = math.prod(self.shape)
        self._pieces = plan.layout.of_weight(index)
        self._groups = {piece.group: plan.groups[piece.group] for piece in self._pieces}
        self.names = tuple(full for group in self._groups.values() for full in group.names.values())

    def __repr__(self) -> str:
        return f"Slice(shape={self.shape}, pieces={self._pieces})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        # The plan has checked the arrays' shapes when they were made; a check at each layer would cost as much as this.
        backend, params = load_backend("torch"), dict(zip(self.names, arrays, strict=True))
        found = [
            self._groups[piece.group].update(backend, params, piece.group_start, piece.group_start + piece.length)
            for piece in self._pieces
        ]
        return cast(Tensor, backend.reshape(backend.concat(found), self.shape))

    def factors(self, *arrays: Tensor) -> tuple[Tensor, Tensor, int] | None:
        """Two matrices and a place in ``vec`` of their product, from where on the update is; None if it is no such."""
        if len(self._pieces) > 1 or arrays[0].dtype not in (torch.float32, torch.float64):
            return None
        (piece,) = self._pieces
        group = self._groups[piece.group]
        backend = load_backend("torch")
        own = group.with_frozen(backend, dict(zip(group.names, arrays, strict=True)))
        start, stop = piece.group_start, piece.group_start + piece.length
        return group.network.slice_factors(backend, own, start, stop)

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Gradients of the wanted arrays, from that of the update."""
        return _vjp(self, arrays, wanted, gradient)

    @classmethod
    def of(cls, plan: SuperLoRA, index: int) -> Slice | None:
        """The slice of one weight, where making it by itself is no dearer than as a part of the whole.

        F mixes all elements of a group. And each slice has a gradient of the size of all the arrays of its groups, so
        that together these must not be larger than the groups.
        """
        if plan.config.projection != "identity":
            return None
        groups = [plan.groups[piece.group] for piece in plan.layout.of_weight(index)]
        many = any(
            len(group.pieces) * group.network.num_parameters > group.size for group in groups if len(group.pieces) > 1
        )
        return None if many else cls(plan, index)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs of ``(start, length)``, those that follow each other as one."""
    found: list[tuple[int, int]] = []
    for start, length in spans:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def version(array: Tensor) -> int:
    """How often it has been written to, where that is counted."""
    return -1 if array.is_inference() else array._version


def vector(plan: SuperLoRA, arrays: Mapping[str, Tensor]) -> Tensor:
    """The long vector, differentiable; in a compiled program by plain operations, which the compiler plans itself."""
    if torch.compiler.is_compiling():
        return cast(Tensor, plan.vector(arrays))
    return cast(Tensor, DeltaFunction.apply(Whole(plan, tuple(arrays)), *arrays.values()))  # type: ignore[no-untyped-call]


def pieces(plan: SuperLoRA, vec: Tensor) -> list[Tensor]:
    """The update of every weight, ``(rows, cols)``, as views of the long vector in the order of the weights."""
    sizes = [rows * cols for rows, cols in plan.shapes]
    # One split, not many slices: its backward writes the whole gradient once.
    return [part.view(shape) for part, shape in zip(torch.split(vec, sizes), plan.shapes, strict=True)]
