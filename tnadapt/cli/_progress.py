"""Progress on stderr: bars on a terminal, and a line for each finished training elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tnadapt.errors import escaped

# Rich is imported where something is shown: an error in the options is reported sooner without it.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tnadapt.decomposition import Step
    from tnadapt.finetune import Task

__all__ = ["bytes_bar", "groups_bar", "reporter", "status", "steps_bar"]


@contextlib.contextmanager
def status(what: str) -> Iterator[Callable[[str], None]]:
    """Show what a command does on a terminal, and yield a function that changes it."""
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)) as shown:
        yield lambda text: shown.update(Text(text))


@contextlib.contextmanager
def bytes_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for the bytes done and the total, which draws a bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def steps_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for the steps done and their number, which draws a bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    )  # fmt: skip
    with bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def groups_bar() -> Iterator[Callable[[Step], None]]:
    """Yield a callback for the steps of an extraction, which draws a bar on a terminal and nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[error]}"),
        TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with bars:
        task = bars.add_task("reading", total=None, error="")

        def show(step: Step) -> None:
            error = "" if step.error is None else f"iteration {step.iteration}, error {step.error:.4f}"
            bars.update(
                task, description=f"group {step.group + 1} of {step.groups}", total=step.groups, completed=step.group,
                error=error,
            )  # fmt: skip

        yield show


@contextlib.contextmanager
def reporter() -> Iterator[Any]:
    """Yield a :class:`tnadapt.finetune.Reporter` for stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(console)
        return
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[counted]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
    with bars:
        yield _Bars(bars)


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console
        self.all = self.done = 0
        self.prepared = False

    def _say(self, line: str) -> None:
        self.console.print(escaped(line), soft_wrap=True, highlight=False, markup=False)

    def preparing(self, what: str, done: float) -> None:
        if not self.prepared:
            self._say(what)
        self.prepared = True

    def begins(self, tasks: int, finished: int) -> None:
        self.all, self.done = tasks, finished
        if finished:
            self._say(f"{finished} of {tasks} trainings were finished before")

    def training(self, task: Task, done: float) -> None:
        pass

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        self.done += 1
        self._say(f"[{self.done}/{self.all}] {task.name}: {_outcome(record)}")


class _Bars:
    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.base: TaskID | None = None
        self.whole: TaskID | None = None
        self.now: dict[str, TaskID] = {}
        self.all = self.done = 0

    def preparing(self, what: str, done: float) -> None:
        if self.base is None:
            self.base = self.bars.add_task(escaped(what), total=1.0, counted="")
        self.bars.update(self.base, completed=done, visible=done < 1)

    def begins(self, tasks: int, finished: int) -> None:
        self.all, self.done = tasks, finished
        self.whole = self.bars.add_task("trainings", total=tasks, completed=finished, counted=f"{finished}/{tasks}")

    def training(self, task: Task, done: float) -> None:
        if task.key not in self.now:
            self.now[task.key] = self.bars.add_task(escaped(f"  {task.name}"), total=1.0, counted="")
        self.bars.update(self.now[task.key], completed=done)

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        if task.key in self.now:
            self.bars.remove_task(self.now.pop(task.key))
        self.done += 1
        if self.whole is not None:
            self.bars.update(self.whole, completed=self.done, counted=f"{self.done}/{self.all}")


def _outcome(record: Mapping[str, Any]) -> str:
    if record["diverged"]:
        return "diverged"
    if "metric" in record:
        shown = f"{record['validation']:.1%}" if record.get("percent") else f"{record['validation']:.4g}"
        told = f"{record['metric']} {shown}"
    else:
        told = f"{record['validation']:.1%}" if "validation" in record else f"loss {record['validation_loss']:.4f}"
    return f"validation {told}, {record['seconds']:.1f} s"
