"""Updates that are reused between layers and between forward passes while the arrays behind them are unchanged."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._guards import TracingContext

from tnadapt.algebra.superlora import SuperLoRA

from ._delta import DeltaFunction, Slice, Whole, pieces, vector, version
from ._merged_linear import in_dispatch_mode, in_functorch
from ._sharding import is_sharded

__all__ = ["DeltaCache"]

#: Gives the current arrays of an adapter by name.
Lookup = Callable[[Sequence[str]], list[Tensor]]


class DeltaCache:
    """The updates of one plan, cached and checked against the current arrays at every use.

    Parameters
    ----------
    plan : SuperLoRA
        What is computed.

    Notes
    -----
    No state says that "a forward pass is running": an interrupted pass is never reported as finished (torch runs no
    hook on KeyboardInterrupt), and other threads may be in passes of their own. Instead each cache entry is immutable,
    holds a copy of the arrays that it was computed from, and is used only after a comparison with that copy. The
    comparison is by content, because ``param.data.copy_()``, ``param.numpy()[...] = ...`` and writes through DLPack
    change no version counter; it covers only the arrays of the weight at hand, so that its cost does not grow with the
    number of weights.

    On the CPU such a comparison costs microseconds. On a GPU it waits for the device, so that updates that a layer can
    compute by itself are not cached there but computed in each call, as they are in training.
    """

    def __init__(self, plan: SuperLoRA) -> None:
        self.plan = plan
        # Of all weights and at once: a program that is being compiled would notice a list that grows.
        self._slices = [Slice(plan, index) for index in range(len(plan.shapes))]
        self._alone = [Slice.of(plan, index) is not None for index in range(len(plan.shapes))]
        self._entries: dict[tuple[bool, bool, int | None], CacheEntry] = {}
        #: The latest copy of each array, which entries share.
        self._copies: dict[tuple[str, bool], Tensor] = {}
        #: What a compiler's trace has computed for all layers of the trace, and the number of the trace.
        self._traced: tuple[int, list[Tensor]] | None = None
        #: Whether the last forward pass of the whole model began with gradients.
        self.began_with_gradients = False

    def slice(self, index: int) -> Slice | None:
        """What computes the update of one weight by itself, where that costs no more than as part of the whole."""
        return self._slices[index] if self._alone[index] else None

    def begin(self) -> None:
        """A forward pass of the whole model starts."""
        self.began_with_gradients = torch.is_grad_enabled()
        if self.began_with_gradients and not torch.compiler.is_compiling():
            # In training the arrays have moved since: whatever is cached would only take memory.
            self.forget()

    def end(self) -> None:
        """It has returned or failed; not called if it was interrupted."""
        self._traced = None
        self.began_with_gradients = False

    def forget(self) -> None:
        """Empty the cache."""
        # New dictionaries: other threads may be reading the old ones.
        self._entries, self._copies = {}, {}

    def get(self, lookup: Lookup, index: int) -> Tensor:
        """The update of one weight, computed from the arrays as they are now."""
        if torch.compiler.is_compiling():
            return self._compiled(lookup, index)
        own, alone = self._slices[index], self._alone[index]
        # Once: from here on, all is about these very tensors, even if another thread puts others in their places.
        given = lookup(own.names)
        # With gradients, an update that is computed alone is a graph of its own in each call.
        if (alone and torch.is_grad_enabled()) or not _can_cache(given, alone):
            return DeltaFunction.apply(own, *given)  # type: ignore[no-any-return, no-untyped-call]
        # An update with a graph does not stand for one without (outputs would require gradients, and the graph would
        # live on), nor does an inference tensor for an ordinary one.
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), index if alone else None
        # No lock: entries are immutable, and reading or replacing one is a single operation on a dictionary. Two
        # threads that find none both compute it, equally.
        entry = self._entries.get(key)
        if entry is not None and entry.is_of(own.names, given):
            return entry.made[index]
        # Before the new one is computed, for the sake of the peak of memory.
        entry = None
        self._entries.pop(key, None)
        new = self._entry(index, given) if alone else self._whole(lookup)
        # A graph is of the arrays themselves, to which another thread may have written since they were copied.
        if new.leaves is None or new.is_of(own.names, given):
            self._entries[key] = new
        return new.made[index]

    def _entry(self, index: int, given: Sequence[Tensor]) -> CacheEntry:
        """The update of one weight alone, without gradients."""
        own = self._slices[index]
        copies = self._copied(own.names, given)
        return CacheEntry(copies, {index: own(*copies.values())})

    def _whole(self, lookup: Lookup) -> CacheEntry:
        """All updates at once; with gradients, of one graph that all layers share."""
        names = list(self.plan.param_shapes)
        given = lookup(names)
        # In this order: what is written between the two makes the copies newer than the state, and the entry invalid.
        state = _state(given) if torch.is_grad_enabled() else None
        copies = self._copied(names, given)
        if state is None:
            # Of the copies, so that the entry is consistent whatever is written to the arrays meanwhile.
            made = pieces(self.plan, Whole(self.plan, names)(*copies.values()))
            return CacheEntry(copies, dict(enumerate(made)))
        made = pieces(self.plan, vector(self.plan, dict(zip(names, given, strict=True))))
        leaves = dict(zip(names, zip(given, state, strict=True), strict=True))
        return CacheEntry(copies, dict(enumerate(made)), leaves, sum(map(version, given)))

    def _copied(self, names: Sequence[str], given: Sequence[Tensor]) -> dict[str, Tensor]:
        """Copies of arrays: those that there are already, where they are equal.

        Entries of several weights, and with and without gradients, are of the same arrays, and would otherwise hold a
        copy each. A copy is never written to; an array that has changed gets a new one.
        """
        found = {}
        for name, array in zip(names, given, strict=True):
            key = name, torch.is_inference_mode_enabled()
            copy = self._copies.get(key)
            if copy is None or not _equal([array], [copy]):
                with torch.no_grad():
                    copy = self._copies[key] = array.detach().clone()
            found[name] = copy
        return found

    def _compiled(self, lookup: Lookup, index: int) -> Tensor:
        """By plain operations, which the compiler plans itself.

        A compiled program must not contain a cached tensor as a constant, nor guard on the contents of arrays. So an
        update is part of the program, once for all layers of one trace.
        """
        if self._alone[index]:
            own = self._slices[index]
            return own(*lookup(own.names))
        number = _trace_number()
        # Between two programs of one pass, and after an interrupted pass, there may be tensors of another trace here:
        # nothing in a program could tell whether the arrays have changed since.
        if self._traced is None or self._traced[0] != number or number == 0:
            names = list(self.plan.param_shapes)
            self._traced = number, pieces(self.plan, vector(self.plan, dict(zip(names, lookup(names), strict=True))))
        return self._traced[1][index]

    def __deepcopy__(self, memo: dict[int, Any]) -> DeltaCache:
        return DeltaCache(self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return DeltaCache, (self.plan,)


class CacheEntry(NamedTuple):
    """Updates, and what they were computed from.

    Attributes
    ----------
    copies : dict of str to Tensor
        Of the arrays, as they were.
    made : dict of int to Tensor
        The updates by weight.
    leaves : dict of str to (Tensor, hashable), optional
        The arrays themselves and their states, where the updates have a graph: gradients go to these objects.
    written : int
        How often these had been written to, all together.
    """

    copies: dict[str, Tensor]
    made: dict[int, Tensor]
    leaves: dict[str, tuple[Tensor, Hashable]] | None = None
    written: int = 0

    def is_of(self, names: Sequence[str], given: Sequence[Tensor]) -> bool:
        """Whether it was computed from arrays that are equal to these, where they have these names."""
        if self.leaves is not None:
            states = _state(given)
            for name, array, state in zip(names, given, states, strict=True):
                leaf, before = self.leaves[name]
                if leaf is not array or before != state:
                    return False
            # The graph is one for all arrays, and its backward pass refuses any that was written to since.
            if sum([version(leaf) for leaf, _ in self.leaves.values()]) != self.written:
                return False
        return _equal(given, [self.copies[name] for name in names])


def _equal(arrays: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Whether arrays are what they were; on a GPU this waits for the device, once."""
    pairs = list(zip(arrays, copies, strict=True))
    if any(a.device != b.device or a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return False
    if any(is_sharded(a) != is_sharded(b) for a, b in pairs):
        return False  # sharded since, and the two kinds cannot be compared
    if arrays[0].device.type == "cpu":
        return all(torch.equal(a, b) for a, b in pairs)
    with torch.no_grad():
        return bool(torch.stack([(a == b).all() for a, b in pairs]).all())


def _state(arrays: Sequence[Tensor]) -> list[Hashable]:
    return [(array.requires_grad, version(array)) for array in arrays]


def _can_cache(arrays: Sequence[Tensor], alone: bool) -> bool:
    """Whether an update of these arrays may be cached."""
    kind = arrays[0].device.type
    if kind == "meta" or (alone and kind != "cpu"):
        return False
    # A trace or a graph that is captured must contain how the update is computed; what torch.func has wrapped is
    # valid inside of the transformation only; and a dispatch mode must see the same operations each time.
    if in_dispatch_mode() or in_functorch():
        return False
    return kind != "cuda" or not torch.cuda.is_current_stream_capturing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _trace_number() -> int:
    """A number for each trace of a compiler."""
    context: Any = TracingContext.try_get()
    return 0 if context is None else context.__dict__.setdefault("tnadapt_number", time.perf_counter_ns())
