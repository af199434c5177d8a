"""Updates that are kept from one forward pass to the next, as long as they are true."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..superlora import SuperLoRA
from .delta import Slice, pieces, vector, version

__all__ = ["Updates"]


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
        self._from = given, sum(map(version, given)), torch.is_grad_enabled()
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
        given, written, graph = self._from
        if torch.is_grad_enabled() and not graph:
            return None  # the model itself turns gradients on, as guided sampling does
        # A pass that the keyboard interrupted has not been ended: torch calls no hook then.
        return self._now if sum(map(version, given)) == written else None

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
    return [(array.device, array.dtype, array.requires_grad, version(array)) for array in arrays]


def _mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
