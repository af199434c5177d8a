"""What is run: work that a process opens once, and tasks with keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

__all__ = ["Do", "Keyed", "Work", "name_of"]

Do = Callable[[Any, Callable[[float], None]], dict[str, Any]]
"""Runs a task, reports the fraction done, and returns its result line."""


class Work(Protocol):
    """The work that is sent to every process: small and picklable."""

    def open(self) -> Do:
        """Load model and data; return the function that runs a task."""
        ...


class Keyed(Protocol):
    """A task: picklable, with a key. If it has a ``name``, messages use it."""

    @property
    def key(self) -> str:
        """The key of its result line, unique among the tasks, and the same in every run of the program."""
        ...


def name_of(task: Keyed) -> str:
    """Return what messages call a task."""
    return str(getattr(task, "name", task.key))
