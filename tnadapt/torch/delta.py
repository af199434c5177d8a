"""ΔW with autograd: computed once for all layers that share it, and again in backward rather than kept.

Where slices are cheap (:class:`Slice`), each layer makes its own, while training. Where they are not, as behind F, a
group's update is made whole for many layers. Its graph is one node, :class:`Update`, that keeps the small arrays and
nothing else: gone through a second time (gradient accumulation without an optimiser step, reentrant checkpointing) it
finds all it needs, and a checkpointed region that meets it saves no tensor on its account.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..backends import load_backend
from ..superlora import SuperLoRA

__all__ = ["Slice", "Update", "Updates", "pieces", "vector"]


class Update(torch.autograd.Function):
    """What a function makes of a plan's arrays; backward makes it again and differentiates that."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Callable[..., Tensor], *arrays: Tensor) -> Tensor:
        return made(*arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.made, *ctx.arrays = inputs
        # Not by save_for_backward: what that keeps is dropped after the first backward.
        ctx.versions = [_version(array) for array in ctx.arrays]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if [_version(array) for array in ctx.arrays] != ctx.versions:
            raise RuntimeError(
                "an array of the adapter was changed in place between the forward pass and this backward pass, which "
                "needs the values it had: call optimizer.step() after the last backward() of a step"
            )
        wanted = [index for index, _ in enumerate(ctx.arrays) if ctx.needs_input_grad[1 + index]]

        def made(*moved: Tensor) -> Tensor:
            arrays = list(ctx.arrays)
            for index, array in zip(wanted, moved, strict=True):
                arrays[index] = array
            return cast(Tensor, ctx.made(*arrays))

        # Of torch.func, as a backward pass may be batched or differentiated itself.
        pull: Callable[[Tensor], tuple[Tensor, ...]] = torch.func.vjp(made, *(ctx.arrays[i] for i in wanted))[1]
        parts = pull(grads[0])
        result: list[Tensor | None] = [None] * (1 + len(ctx.arrays))
        for index, part in zip(wanted, parts, strict=True):
            result[1 + index] = part
        return tuple(result)


class Whole:
    """The long vector of a plan as a function of its arrays, in order."""

    def __init__(self, plan: SuperLoRA, names: Sequence[str]) -> None:
        self.plan, self.names = plan, tuple(names)

    def __repr__(self) -> str:
        # A trace has it in its graph, and compares two of them: no address.
        return f"Whole({self.plan!r})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        return cast(Tensor, self.plan.vector(dict(zip(self.names, arrays, strict=True))))


class Slice:
    """The update of one weight as a function of the arrays of its groups, in order.

    Attributes
    ----------
    names : tuple of str
        These arrays' names in the plan.
    """

    def __init__(self, plan: SuperLoRA, index: int) -> None:
        self._shape = plan.shapes[index]
        self._pieces = plan.layout.of_weight(index)
        self._groups = {piece.group: plan.groups[piece.group] for piece in self._pieces}
        self.names = tuple(full for group in self._groups.values() for full in group.names.values())

    def __repr__(self) -> str:
        return f"Slice(shape={self._shape}, pieces={self._pieces})"

    def __call__(self, *arrays: Tensor) -> Tensor:
        # The plan has checked the arrays' shapes when they were made; a check at each layer would cost as much as this.
        backend, params = load_backend("torch"), dict(zip(self.names, arrays, strict=True))
        found = [
            self._groups[piece.group].update(backend, params, piece.group_start, piece.group_start + piece.length)
            for piece in self._pieces
        ]
        return cast(Tensor, backend.reshape(backend.concat(found), self._shape))

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


def _version(array: Tensor) -> int:
    return -1 if array.is_inference() else array._version


def vector(plan: SuperLoRA, arrays: Mapping[str, Tensor]) -> Tensor:
    """The long vector, differentiable; in a compiled program by plain operations, which the compiler plans itself."""
    if torch.compiler.is_compiling():
        return cast(Tensor, plan.vector(arrays))
    return cast(Tensor, Update.apply(Whole(plan, tuple(arrays)), *arrays.values()))  # type: ignore[no-untyped-call]


def pieces(plan: SuperLoRA, vec: Tensor) -> list[Tensor]:
    """The update of every weight, ``(rows, cols)``, as views of the long vector in the order of the weights."""
    sizes = [rows * cols for rows, cols in plan.shapes]
    # One split, not many slices: its backward writes the whole gradient once.
    return [part.view(shape) for part, shape in zip(torch.split(vec, sizes), plan.shapes, strict=True)]


class Updates:
    """The updates of one plan, kept as long as the arrays they came from have not changed.

    Parameters
    ----------
    plan : SuperLoRA
        What is computed.

    Notes
    -----
    Inside one forward pass of the whole model (:meth:`begin` to :meth:`end`) they are made once and handed out as
    they are. Elsewhere (a part of the model called by itself, a checkpointed part run again in backward) they are
    compared, by content, with what they were made from: a version counter would miss ``param.data.copy_()``, with
    which averaged weights are commonly swapped in.
    """

    def __init__(self, plan: SuperLoRA) -> None:
        self.plan = plan
        self._slices: dict[int, Slice | None] = {}
        self._now: list[Tensor] | None = None
        #: What they were made from, how often that had been written to, and whether with gradients.
        self._from: tuple[list[Tensor], int, bool] = [], 0, True
        self._kept: dict[tuple[bool, bool], _Kept] = {}
        #: Whether a forward pass of the whole model is under way that began with gradients.
        self.began_with_gradients = False

    def slice(self, index: int) -> Slice | None:
        """What makes the update of one weight by itself, where that is no dearer than the whole (while training)."""
        if index not in self._slices:
            self._slices[index] = Slice.of(self.plan, index)
        return self._slices[index]

    def begin(self, arrays: Mapping[str, Tensor], whole: bool = True) -> None:
        """A forward pass of the whole model starts; one with gradients needs the whole vector, or slices alone."""
        self.began_with_gradients = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            self._now = pieces(self.plan, vector(self.plan, arrays))
            self._from = [], 0, torch.is_grad_enabled()
            return
        given = list(arrays.values())
        self._from = given, sum(map(_version, given)), torch.is_grad_enabled()
        if torch.is_grad_enabled():
            # A step of training: what was kept for evaluation is of arrays that have moved since.
            self._kept.clear()
            self._now = self._made(arrays) if whole else None
        else:
            self._now = self._same(arrays) or self._made(arrays)

    def end(self) -> None:
        """It is over, or failed."""
        self._now = None
        self.began_with_gradients = False

    def get(self, arrays: Callable[[], Mapping[str, Tensor]], index: int) -> Tensor:
        """The update of one weight; ``arrays`` is called where those of the pass will not do."""
        now = self._ready()
        if now is not None:
            return now[index]
        return self._elsewhere(arrays(), index)

    def _ready(self) -> list[Tensor] | None:
        """The updates of the pass that is under way, if they are still true and have the graph that is wanted."""
        if self._now is None or torch.compiler.is_compiling():
            return self._now
        given, version, graph = self._from
        if torch.is_grad_enabled() and not graph:
            return None  # the model itself turns gradients on, as guided sampling does
        # A pass that the keyboard interrupted has not been ended: torch calls no hook then.
        return self._now if sum(map(_version, given)) == version else None

    def _elsewhere(self, arrays: Mapping[str, Tensor], index: int) -> Tensor:
        if torch.compiler.is_compiling():
            return self.plan.delta(arrays, index)  # type: ignore[no-any-return]
        return (self._same(arrays) or self._made(arrays))[index]

    def forget(self) -> None:
        """Drop what is kept."""
        self._kept.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> Updates:
        return Updates(self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return Updates, (self.plan,)

    def _made(self, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        # The old ones go before the new ones come.
        self._kept.pop(_mode(), None)
        made = self._formed(arrays)
        given = list(arrays.values())
        with torch.no_grad():
            copies = [array.detach().clone() for array in given]
        self._kept[_mode()] = _Kept(given, _state(given), copies, made)
        return made

    def _formed(self, arrays: Mapping[str, Tensor]) -> list[Tensor]:
        slices = [self.slice(index) for index in range(len(self.plan.shapes))]
        if torch.is_grad_enabled() or not all(slices):
            return pieces(self.plan, vector(self.plan, arrays))
        # As a training pass makes them, to the bit.
        return [made(*(arrays[name] for name in made.names)) for made in slices if made is not None]

    def _same(self, arrays: Mapping[str, Tensor]) -> list[Tensor] | None:
        """What is kept for this grad mode, if it was made from these very arrays, as they still are."""
        kept = self._kept.get(_mode())
        if kept is None or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # a trace keeps it for good
            return None
        given = list(arrays.values())
        # Another object would be another leaf: its gradient must not go to the old one.
        if any(a is not b for a, b in zip(given, kept.given, strict=True)) or _state(given) != kept.state:
            return None
        if not all(torch.equal(a, b) for a, b in zip(given, kept.copies, strict=True)):
            return None
        return kept.made


class _Kept(NamedTuple):
    given: list[Tensor]
    state: list[Hashable]
    copies: list[Tensor]
    made: list[Tensor]


def _state(arrays: Sequence[Tensor]) -> list[Hashable]:
    return [(array.device, array.dtype, array.requires_grad, _version(array)) for array in arrays]


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
