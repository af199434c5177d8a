"""Trainings side by side, each in a process of its own with its own model.

What a training is, is not known here: a :class:`Work` says it, which every process is sent and opens for itself.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from tnadapt.errors import TnadaptError

from .loop import threads
from .training import Task

__all__ = ["Do", "Work", "cores", "run_tasks", "threads_each"]

Progress = Callable[[Task, float], None]

Do = Callable[[Task, Callable[[float], None]], dict[str, Any]]
"""Does a task, tells the fraction that is done, and returns its line of results."""


class Work(Protocol):
    """What every process is sent: small, and to be pickled."""

    def open(self) -> Do:
        """Load model and data."""
        ...


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def threads_each(wanted: int | None, jobs: int) -> int:
    """How many threads each of so many trainings at once gets: so many as it wants, or an equal share of all."""
    return wanted or max(1, torch.get_num_threads() // max(1, jobs))


def run_tasks(
    do: Do,
    work: Work,
    tasks: Sequence[Task],
    jobs: int = 1,
    wanted: int | None = None,
    progress: Progress = lambda task, done: None,
) -> Generator[tuple[Task, dict[str, Any]]]:
    """Do every task, and yield each with its line of results as it is finished.

    Parameters
    ----------
    do : callable
        Does a task in this process.
    work : Work
        What other processes make the same of.
    tasks : sequence of Task
    jobs : int
        How many at once; with 1 they are done in this process.
    wanted : int, optional
        Threads that a training wants; see :func:`threads_each`.
    progress : callable
        Is told a task and the fraction of it that is done.

    Raises
    ------
    TnadaptError
        If a task cannot be done, or a worker dies.
    """
    jobs = min(jobs, len(tasks))
    share = threads_each(wanted, jobs)
    if jobs < 2:
        for task in tasks:
            with threads(share):
                record = do(task, functools.partial(progress, task))
            yield task, record
        return
    workers = [_Worker(work, share) for _ in range(jobs)]
    try:
        yield from _dispatch(workers, deque(tasks), progress)
    finally:
        for worker in workers:
            worker.stop()


def _dispatch(
    workers: Sequence[_Worker], waiting: deque[Task], progress: Progress
) -> Iterator[tuple[Task, dict[str, Any]]]:
    busy: dict[Connection, _Worker] = {}
    for worker in workers:
        worker.give(waiting.popleft())
        busy[worker.connection] = worker
    while busy:
        for connection in wait(list(busy)):
            worker = busy[connection]  # type: ignore[index]
            what, value = worker.receive()
            if what == "progress":
                progress(worker.task, value)
                continue
            yield worker.task, value
            if waiting:
                worker.give(waiting.popleft())
            else:
                del busy[worker.connection]


class _Worker:
    """A process that trains what it is told to, and ends when the pipe to it does."""

    task: Task

    def __init__(self, work: Work, share: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads along, broken
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, work, share), daemon=True)
        self.process.start()
        other.close()

    def give(self, task: Task) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except OSError:
            self._died()

    def receive(self) -> tuple[str, Any]:
        try:
            what, value = self.connection.recv()
        except (EOFError, OSError):
            self._died()
        if what == "refused":
            raise TnadaptError(value)
        if what == "failed":
            raise RuntimeError(f"a training failed ({self.task.method.name}):\n{value}")
        return what, value

    def _died(self) -> None:
        self.process.join(timeout=5)
        raise TnadaptError(
            f"a worker ended (exit code {self.process.exitcode}) while it trained {self.task.method.name}; if memory "
            "was short, use --jobs 1; in a script of your own, start under if __name__ == '__main__'. What is "
            "finished is kept: the same command goes on from there"
        ) from None

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(timeout=10)


def _work(connection: Connection, work: Work, share: int) -> None:
    # Ctrl-C is for the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    torch.set_num_threads(share)
    try:
        do = work.open()
        while True:
            task = connection.recv()
            connection.send(("done", do(task, _throttled(connection))))
    except (EOFError, BrokenPipeError):
        return
    except TnadaptError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that is killed cannot end this process: it does so itself."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _throttled(connection: Connection) -> Callable[[float], None]:
    last = 0.0

    def report(done: float) -> None:
        nonlocal last
        if time.monotonic() - last > 0.1:
            last = time.monotonic()
            connection.send(("progress", done))

    return report
