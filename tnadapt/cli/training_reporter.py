"""Progress of a study in the terminal: a bar, or in a log a line for each finished training."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tnadapt.errors import pluralize
from tnadapt.finetune import BarReporter, Reporter, Task
from tnadapt.report import ProgressBar, about

from .terminal import echo


class _LineReporter(BarReporter):
    """Print how many trainings there are and how long they take, and a line when something is finished."""

    def __init__(self) -> None:
        super().__init__(ProgressBar())
        self.prepared = False

    def preparing(self, what: str, done: float) -> None:
        if not self.prepared:
            echo(what, err=True)
        self.prepared = True

    def begins(self, tasks: int, finished: int) -> None:
        super().begins(tasks, finished)
        if finished:
            echo(f"{finished} of {tasks} trainings were finished before", err=True)
        else:
            echo(pluralize(tasks, "training"), err=True)

    def estimated(self, seconds: float) -> None:
        super().estimated(seconds)
        echo(f"{about(seconds)} for {'the rest' if self.before else 'all of them'}", err=True)

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        super().finished(task, record)
        echo(f"[{self.ended}/{self.tasks}] {task.name}: {_outcome(record)}", err=True)


def _outcome(record: Mapping[str, Any]) -> str:
    if record["diverged"]:
        return "diverged"
    if "metric" in record:
        shown = f"{record['validation']:.1%}" if record.get("percent") else f"{record['validation']:.4g}"
        told = f"{record['metric']} {shown}"
    else:
        told = f"{record['validation']:.1%}" if "validation" in record else f"loss {record['validation_loss']:.4f}"
    return f"validation {told}, {record['seconds']:.1f} s"


@contextlib.contextmanager
def reporter() -> Iterator[Reporter]:
    """Yield what shows the trainings of a study: a bar on a terminal, and a line for each finished one elsewhere."""
    if sys.stderr.isatty():
        with ProgressBar() as bar:
            yield BarReporter(bar)
    else:
        yield _LineReporter()
