"""Which adapter acts on which rows of a batch, in this thread, and the mixing weight that an adapter has there.

The assignment is a context variable and not an attribute of the model: threads with different rows do not see each
other's. ``AdapterState.by_rows`` only tells that some thread has one, so that passes without rows do not look it up,
and that a compiled program, which guards on it, is traced again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from ._state import AdapterState, RowRunner

__all__ = ["RowAssignment", "assignment_of", "entered", "mixing_weight"]


class RowAssignment:
    """An adapter, or none, for each row of a batch.

    Parameters
    ----------
    states : sequence of AdapterState or None
        One entry for each row.
    governed : iterable of AdapterState
        The adapters on the model. Those that no row has do not act.
    weights : mapping of AdapterState to float
        Mixing weights to use instead of the adapters' own.

    Attributes
    ----------
    names : tuple of str or None
    groups : dict of (AdapterState or None) to list of int
        The rows of each distinct adapter, in ascending order.
    """

    def __init__(
        self,
        states: Sequence[AdapterState | None],
        governed: Iterable[AdapterState],
        weights: Mapping[AdapterState, float] | None = None,
    ) -> None:
        self.names = tuple(None if state is None else state.name for state in states)
        self.governed = frozenset(governed)
        self.groups: dict[AdapterState | None, list[int]] = {}
        for row, state in enumerate(states):
            self.groups.setdefault(state, []).append(row)
        self._weights = dict(weights or {})
        self._indices: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def weight(self, state: AdapterState) -> float:
        """Return an adapter's mixing weight: its own, or 1 if it is inactive and named; 0 if no row has it."""
        if state not in self.groups:
            return 0.0
        return self._weights.get(state, state.weight) or 1.0

    def index(self, rows: Sequence[int], device: torch.device) -> Tensor:
        """Return row numbers as a tensor, which all layers share."""
        key = tuple(rows), device
        if key not in self._indices:
            with torch.inference_mode(False):  # a tensor made in inference mode could not be saved for backward
                self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]


#: The assignments of the thread's open ``with rows(...)``, the innermost last.
_OPEN: ContextVar[tuple[RowAssignment, ...]] = ContextVar("tnadapt_rows", default=())
_LOCK = threading.Lock()


def assignment_of(state: AdapterState) -> RowAssignment | None:
    """Return this thread's assignment that an adapter is subject to."""
    if not state.by_rows:
        return None
    return next((one for one in reversed(_OPEN.get()) if state in one.governed), None)


def mixing_weight(state: AdapterState) -> float:
    """Return the factor of an adapter's update in this thread."""
    found = assignment_of(state) if state.by_rows else None
    return state.weight if found is None else found.weight(state)


@contextlib.contextmanager
def entered(assignment: RowAssignment, runner: RowRunner) -> Iterator[None]:
    """Make the assignment that of this thread inside ``with``; ``runner`` runs the forwards of its adapters' layers."""
    _count(assignment, 1, runner)
    token = _OPEN.set((*_OPEN.get(), assignment))
    try:
        yield
    finally:
        _OPEN.reset(token)
        _count(assignment, -1, runner)


def _count(assignment: RowAssignment, change: int, runner: RowRunner) -> None:
    with _LOCK:
        for state in assignment.governed:
            state.row_passes += change
            state.row_runner = runner
            state.by_rows = state.row_passes > 0
