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
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from multiprocessing.queues import SimpleQueue
from typing import Any, Protocol

import torch

from tnadapt.errors import TnadaptError

from .loop import threads
from .training import Task

__all__ = ["Do", "Work", "cores", "run_tasks", "threads_each"]

Progress = Callable[[Task, float], None]

Do = Callable[[Task, Callable[[float], None]], dict[str, Any]]
"""Does a task, tells the fraction that is done, and returns its line of results."""

#: Seconds between two reports of one training.
_PERIOD = 0.1


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
    yield from _side_by_side(work, tasks, jobs, share, progress)


def _side_by_side(
    work: Work, tasks: Sequence[Task], jobs: int, share: int, progress: Progress
) -> Generator[tuple[Task, dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")  # a fork would take torch's threads along, broken
    told: SimpleQueue[tuple[int, float]] = context.SimpleQueue()
    stopped, stop = context.Pipe(duplex=False)
    pool = futures.ProcessPoolExecutor(jobs, context, _begin, (work, share, told, stopped))
    waiting: dict[futures.Future[dict[str, Any]], Task] = {}
    try:
        for place, task in enumerate(tasks):
            waiting[pool.submit(_train, place, task)] = task
        while waiting:
            done, _ = futures.wait(waiting, timeout=_PERIOD, return_when=futures.FIRST_COMPLETED)
            while not told.empty():
                place, fraction = told.get()
                progress(tasks[place], fraction)
            # What is finished comes first, so that a failure loses none of it; else in the order of the tasks.
            for future in sorted(filter(done.__contains__, waiting), key=lambda one: one.exception() is not None):
                record = future.result()
                yield waiting.pop(future), record
    except BrokenProcessPool:
        # They are taken in order: these, and no others, were running.
        names = "; ".join(task.method.name for task in list(waiting.values())[:jobs])
        raise TnadaptError(
            f"a worker ended by itself while this was trained: {names}; if memory was short, use --jobs 1; in a script "
            "of your own, start under if __name__ == '__main__'. What is finished is kept: the same command goes on "
            "from there"
        ) from None
    finally:
        # The executor would wait for trainings that run, and for interpreters that take seconds to clear torch away.
        stop.send_bytes(b"stop")
        pool.shutdown(cancel_futures=True)


# -- In a worker -------------------------------------------------------------------------------


class _Worker:
    """What a worker process keeps from one training to the next: its model and data above all."""

    def __init__(self, work: Work, told: SimpleQueue[tuple[int, float]]) -> None:
        self.told = told
        self.do = functools.cache(work.open)

    def train(self, place: int, task: Task) -> dict[str, Any]:
        last = 0.0

        def report(done: float) -> None:
            nonlocal last
            if time.monotonic() - last > _PERIOD:
                last = time.monotonic()
                self.told.put((place, done))

        return self.do()(task, report)


_worker: _Worker


def _begin(work: Work, share: int, told: SimpleQueue[tuple[int, float]], stopped: Connection) -> None:
    global _worker
    # Ctrl-C is for the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when_told, args=(stopped,), daemon=True).start()
    torch.set_num_threads(share)
    _worker = _Worker(work, told)


def _train(place: int, task: Task) -> dict[str, Any]:
    try:
        return _worker.train(place, task)
    # As text: not every exception can be pickled and be the same again, and one that cannot breaks the executor.
    except TnadaptError as error:
        raise TnadaptError(str(error)) from None
    except Exception:
        raise RuntimeError(f"a training failed ({task.method.name}):\n{traceback.format_exc()}") from None


def _end_when_told(stopped: Connection) -> None:
    """End this process in the middle of a training: the parent says so, or is gone, killed even."""
    parent = multiprocessing.parent_process()
    wait([stopped, *([] if parent is None else [parent.sentinel])])
    os._exit(1)
