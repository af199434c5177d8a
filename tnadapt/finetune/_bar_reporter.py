"""The trainings of a study in a progress bar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tnadapt.report import ProgressBar

from ._study import Reporter
from .training import Task

__all__ = ["BarReporter"]


class BarReporter(Reporter):
    """Shows the progress of a study in a bar, for notebooks: ``Study(…, reporter=BarReporter(bar))``.

    Parameters
    ----------
    bar : ProgressBar

    Examples
    --------
    >>> import tnadapt as tna
    >>> with tna.ProgressBar("digits") as bar:
    ...     reporter = BarReporter(bar)
    ...     reporter.begins(tasks=6, finished=3)
    ...     bar.words
    '3 of 6 trainings'
    """

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.tasks = self.ended = 0
        self.running: dict[str, float] = {}

    def preparing(self, what: str, done: float) -> None:
        """Show the fraction done of pretraining the base."""
        self.bar.update(done, what)

    def begins(self, tasks: int, finished: int) -> None:
        """Show how many trainings were finished before."""
        self.tasks, self.ended = tasks, finished
        self._show("")

    def training(self, task: Task, done: float) -> None:
        """Show the trainings that run."""
        self.running[task.key] = done
        self._show(task.name)

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        """Show one training more."""
        self.running.pop(task.key, None)
        self.ended += 1
        self._show(task.name)

    def _show(self, name: str) -> None:
        words = f"{self.ended} of {self.tasks} trainings"
        done = (self.ended + sum(self.running.values())) / max(1, self.tasks)
        self.bar.update(min(1.0, done), f"{words}: {name}" if name else words)
