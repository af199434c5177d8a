"""A cache of updates: reused across layers and forward passes while the arrays behind them are unchanged."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._guards import TracingContext

from tnadapt.algebra.composite import CompositePlan
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends.constant_result import constant_result

from ._array_snapshot import Snapshot, on_host
from ._delta import DeltaFunction, Slice, Whole, pieces, vector, version
from ._interception import in_dispatch_mode, in_functorch

__all__ = ["CacheEntry", "DeltaCache", "array_state", "can_cache", "held_bytes", "numbered_cache", "trace_number"]

#: Gives the current arrays of an adapter by name.
Lookup = Callable[[Sequence[str]], list[Tensor]]


_numbers = itertools.count()
_caches: weakref.WeakValueDictionary[int, DeltaCache] = weakref.WeakValueDictionary()


def numbered_cache(number: int) -> DeltaCache:
    """Return the cache with that number."""
    return _caches[number]


class DeltaCache:
    """The updates of one plan, cached and checked against the current arrays at every use.

    Parameters
    ----------
    plan : SuperLoRA

    Notes
    -----
    The cache does not depend on a "forward pass is running" flag: an interrupted pass never reports its end (torch runs
    no hook on KeyboardInterrupt), and other threads may be in other passes. Instead the invariant is per entry: an
    entry is immutable, holds snapshots of the arrays it was computed from, and is used only after a comparison with
    these. It covers only the arrays of the requested weight, so its cost does not grow with the number of weights.

    On the CPU the comparison is by content, and costs microseconds. On a GPU that would wait for the device. There it
    is by memory and version counter (:class:`~tnadapt.torch._array_snapshot.Snapshot`), which do not see all writes.
    Updates that a layer can compute alone are therefore not cached there but computed in each call, as in training.
    Steps of fused optimizers change no version counter: entries end when gradients are computed, and none is used while
    arrays have gradients.

    Entries are keyed by (gradients enabled, inference mode, weight; or -1, -2 … for all of a part). Entries with
    gradients hold the graph as well: they are valid only for the same parameter objects with unchanged
    ``requires_grad`` and version counters, because the graph leads to these objects and its backward pass refuses
    arrays that were written to.
    """

    def __init__(self, plan: SuperLoRA) -> None:
        self.plan = plan
        #: By which an operator of a compiled program, which takes tensors and numbers only, finds this object.
        self.number = next(_numbers)
        _caches[self.number] = self
        # Filled completely here: a list that grows later would trigger recompilation of compiled programs.
        self._slices = [Slice(plan, index) for index in range(len(plan.shapes))]
        self._alone = [Slice.of(plan, index) is not None for index in range(len(plan.shapes))]
        #: Whether the arrays of a weight are as large as its update, as dense ones: comparing them costs more than it.
        self._large = [
            alone and sum(math.prod(plan.param_shapes[name]) for name in own.names) >= own.size
            for own, alone in zip(self._slices, self._alone, strict=True)
        ]
        #: Parts of the plan whose updates are computed at once, and the part of each weight.
        self._parts = _parts(plan)
        self._part = [part for part in self._parts for _ in part.plan.shapes]
        self._entries: dict[tuple[bool, bool, int], CacheEntry] = {}
        #: The latest snapshot of each array, which entries share.
        self._snapshots: dict[tuple[str, bool], Snapshot] = {}
        #: The current compiler trace or forward pass, and the updates of each part that it has computed for all its
        #: layers, where these are not cached.
        self._traced: tuple[Hashable, dict[int, list[Tensor]]] | None = None
        #: Number of the current forward pass of the whole model; 0 outside of one.
        self._pass = 0
        #: Whether the last forward pass of the whole model began with gradients.
        self.began_with_gradients = False

    def names(self, index: int) -> Sequence[str]:
        """Return the names of all arrays that are read for the update of one weight."""
        return self._slices[index].names if self._alone[index] else self._part[index].names

    def slice(self, index: int) -> Slice | None:
        """Return the slice that computes one weight's update alone; None where computing all costs less."""
        return self._slices[index] if self._alone[index] else None

    def begin(self) -> None:
        """Record that a forward pass of the whole model starts."""
        self.began_with_gradients = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self._pass = time.perf_counter_ns()
        if self.began_with_gradients:
            # In training the arrays have changed since: cached updates would only take memory. A compiled program does
            # this, too, each time it runs: nothing else tells of the step of a fused optimizer that follows.
            self.forget()

    def end(self) -> None:
        """Record that the pass has returned or failed; not called if it was interrupted."""
        self._traced, self._pass = None, 0
        self.began_with_gradients = False

    def forget(self) -> None:
        """Empty the cache."""
        # New dictionaries instead of clear(): other threads may be reading the old ones.
        self._entries, self._snapshots = {}, {}

    def held(self) -> int:
        """Return the bytes that it keeps."""
        tensors = [snapshot.array for snapshot in self._snapshots.values() if snapshot.version is None]
        for entry in self._entries.values():
            tensors += [*entry.made.values(), *entry.rounded.values()]
        return held_bytes(tensors)

    def get(self, lookup: Lookup, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the update of one weight for the current arrays; where it is cached, in ``dtype`` if one is given."""
        if torch.compiler.is_compiling():
            return self._compiled(lookup, index)
        own, alone = self._slices[index], self._alone[index]
        # Look up once: everything below refers to these tensors, even if another thread replaces them meanwhile.
        given = lookup(own.names)
        # With gradients, an update that is computed alone gets a separate graph in each call.
        if self._large[index] or (alone and torch.is_grad_enabled()) or not can_cache(given, alone):
            if not alone and reuses_in_pass(given):
                modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                made = self._once((self._pass, *modes) if self._pass else None, lookup, index)
            else:
                made = cast(Tensor, DeltaFunction.apply(own, *given))  # type: ignore[no-untyped-call]
            return made
        # An update with a graph cannot replace one without (outputs would require gradients, and the graph would stay
        # alive), nor can an inference tensor replace an ordinary one.
        part = self._part[index]
        key = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), index if alone else part.key
        # No lock is needed: entries are immutable, and reading or replacing one is a single dictionary operation. Two
        # threads that both find none compute it twice, with equal results.
        entry = self._entries.get(key)
        if entry is not None and entry.is_of(own.names, given):
            return entry.update(index, dtype)
        # Drop the stale entry before computing the new one, to keep peak memory down.
        entry = None
        self._entries.pop(key, None)
        new = self._entry(index, given) if alone else self._whole(lookup, part)
        # A graph belongs to the arrays themselves, which another thread may have changed since they were copied. Such
        # an entry is returned to this caller but not cached.
        if new.leaves is None or new.is_of(own.names, given):
            self._entries[key] = new
        return new.update(index, dtype)

    def _entry(self, index: int, given: Sequence[Tensor]) -> CacheEntry:
        """Compute the entry of one weight alone, without gradients."""
        own = self._slices[index]
        copies = self._snapshots_of(own.names, given)
        return CacheEntry(copies, {index: own(*(copy.array for copy in copies.values()))})

    def _whole(self, lookup: Lookup, part: CachedPart) -> CacheEntry:
        """Compute the entry of all weights of a part; with gradients, as one graph that all layers share."""
        names = part.names
        given = lookup(names)
        # State before copies: a write in between makes the copies newer than the state, which invalidates the entry.
        state = array_state(given) if torch.is_grad_enabled() else None
        copies = self._snapshots_of(names, given)
        if state is None:
            # Computed from the copies, so that the entry is consistent whatever is written to the arrays meanwhile.
            # (Where these are no copies, their version tells of a write, and the entry is not used again.)
            made = pieces(part.plan, Whole(part.plan, part.own)(*(copy.array for copy in copies.values())))
            return CacheEntry(copies, dict(enumerate(made, part.first)))
        # Gradients that reach the updates end the cached ones, whose memory the backward pass through F then reuses.
        made = part.updates(given, self.forget)
        leaves = dict(zip(names, zip(given, state, strict=True), strict=True))
        return CacheEntry(copies, dict(enumerate(made, part.first)), leaves, sum(map(version, given)))

    def _snapshots_of(self, names: Sequence[str], given: Sequence[Tensor]) -> dict[str, Snapshot]:
        """Return snapshots of arrays, reusing existing ones that are equal.

        Entries of several weights, with and without gradients, refer to the same arrays and would otherwise hold one
        copy each. A copy is never written to; an array that has changed gets a new one.
        """
        found = {}
        for name, array in zip(names, given, strict=True):
            key = name, torch.is_inference_mode_enabled()
            snapshot = self._snapshots.get(key)
            if snapshot is None or not snapshot.is_of(array):
                snapshot = self._snapshots[key] = Snapshot.of(array)
            found[name] = snapshot
        return found

    def _compiled(self, lookup: Lookup, index: int) -> Tensor:
        """Compute the update by ordinary operations, for the compiler to fuse.

        A compiled program must not contain a cached tensor as a constant, nor guard on the contents of arrays. So the
        computation of an update is part of the program, once for all layers of one trace.
        """
        if self._alone[index]:
            own = self._slices[index]
            return own(*lookup(own.names))
        return self._once(trace_number() or None, lookup, index)

    def _once(self, key: Hashable | None, lookup: Lookup, index: int) -> Tensor:
        """Compute the updates of a part once for all layers of the trace or pass with this key; None: at each call."""
        # Between two programs of one pass, and after an interrupted pass, _traced may hold tensors of another trace.
        # They must not be reused: a program cannot check whether the arrays have changed since.
        if self._traced is None or self._traced[0] != key or key is None:
            self._traced = key, {}
        part, made = self._part[index], self._traced[1]
        if part.key not in made:
            made[part.key] = part.updates(lookup(part.names))
        return made[part.key][index - part.first]

    def __deepcopy__(self, memo: dict[int, Any]) -> DeltaCache:
        return DeltaCache(self.plan)

    def __reduce__(self) -> tuple[Any, ...]:
        return DeltaCache, (self.plan,)


@dataclasses.dataclass(frozen=True, eq=False)
class CachedPart:
    """A part of a plan whose updates are computed at once: all of it, or those of one of its configs.

    Attributes
    ----------
    plan : SuperLoRA
        Of this part alone.
    own, names : list of str
        Names of its arrays there, and in the whole plan.
    first : int
        The number of its first weight in the whole plan.
    key : int
    """

    plan: SuperLoRA
    own: list[str]
    names: list[str]
    first: int
    key: int

    def updates(self, arrays: Sequence[Tensor], on_backward: Callable[[], None] | None = None) -> list[Tensor]:
        """Compute the updates of its weights, differentiable; ``on_backward`` is called when gradients are."""
        return pieces(self.plan, vector(self.plan, dict(zip(self.own, arrays, strict=True)), on_backward))


def _parts(plan: SuperLoRA) -> list[CachedPart]:
    if not isinstance(plan, CompositePlan):
        names = list(plan.param_shapes)
        return [CachedPart(plan, names, names, 0, -1)]
    return [
        CachedPart(part, list(names), list(names.values()), first, -1 - place)
        for place, (part, names, first) in enumerate(plan.alone)
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class CacheEntry:
    """Updates, and the arrays they were computed from.

    Attributes
    ----------
    copies : dict of str to Snapshot
        The arrays as they were.
    made : dict of int to Tensor
        The updates by index of the weight.
    leaves : dict of str to (Tensor, hashable), optional
        Where the updates have a graph, the arrays themselves with their states: gradients go to these objects.
    written : int
        Sum of the version counters of the leaves.
    rounded : dict of (int, dtype) to Tensor
        Updates in other dtypes, added as they are asked for; only where there is no graph.
    """

    copies: dict[str, Snapshot]
    made: dict[int, Tensor]
    leaves: dict[str, tuple[Tensor, Hashable]] | None = None
    written: int = 0
    rounded: dict[tuple[int, torch.dtype], Tensor] = dataclasses.field(default_factory=dict)

    def update(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the update of one weight, in a dtype if one is given."""
        made = self.made[index]
        if dtype is None or dtype == made.dtype:
            return made
        if self.leaves is not None:
            return made.to(dtype)
        found = self.rounded.get((index, dtype))
        if found is None:
            found = self.rounded[index, dtype] = made.to(dtype)
        return found

    def is_of(self, names: Sequence[str], given: Sequence[Tensor]) -> bool:
        """Return whether the arrays of these names that it was computed from equal the given ones."""
        if self.leaves is not None:
            states = array_state(given)
            for name, array, state in zip(names, given, states, strict=True):
                leaf, before = self.leaves[name]
                if leaf is not array or before != state:
                    return False
            # One graph covers all arrays, and its backward pass refuses if any of them was written to since.
            if sum([version(leaf) for leaf, _ in self.leaves.values()]) != self.written:
                return False
        copies = self.copies
        for name, array in zip(names, given, strict=True):  # noqa: SIM110, a generator takes as long as a comparison
            if not copies[name].is_of(array):
                return False
        return True


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory behind tensors, counted once where several are views of it."""
    return sum({one.data_ptr(): one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def array_state(arrays: Sequence[Tensor]) -> list[Hashable]:
    """Return what tells whether a graph still belongs to arrays: whether they require gradients, and their versions."""
    return [(array.requires_grad, version(array)) for array in arrays]


def can_cache(arrays: Sequence[Tensor], alone: bool) -> bool:
    """Return whether an update of these arrays may be cached."""
    if not on_host(arrays[0]):
        if alone or arrays[0].device.type == "meta" or any(array.is_inference() for array in arrays):
            return False
        if is_captured() or (not torch.is_grad_enabled() and _can_be_stepped(arrays)):
            return False
    # A trace or a captured graph must contain the computation of the update, tensors wrapped by torch.func are valid
    # only inside the transform, and a dispatch mode must see the same operations each time.
    return not (in_dispatch_mode() or in_functorch())


def reuses_in_pass(arrays: Sequence[Tensor]) -> bool:
    """Return whether an update that is not cached is still the same for all layers of a pass.

    So it is in a CUDA graph, which like a compiled program contains the computation, so that a replay uses the current
    arrays; and where an optimizer may take a step before the next pass.
    """
    traced = in_dispatch_mode() or in_functorch()
    return not (traced or on_host(arrays[0]) or arrays[0].device.type == "meta")


def is_captured() -> bool:
    """Return whether operations are recorded in a CUDA graph at this moment."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def _can_be_stepped(arrays: Sequence[Tensor]) -> bool:
    """Return whether arrays have gradients: fused optimizers write to these arrays without changing their versions."""
    return any(array.is_leaf and array.grad is not None for array in arrays)


@constant_result
def trace_number() -> int:
    """Return a number that identifies the current compiler trace; 0 outside a trace."""
    context: Any = TracingContext.try_get()
    return 0 if context is None else context.__dict__.setdefault("tnadapt_number", time.perf_counter_ns())
