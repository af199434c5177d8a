"""Parallel trainings, each in a separate process with its own model.

This module does not depend on what a training is: every process receives a :class:`Work` and opens it.
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
"""Runs a task, reports the fraction done, and returns its result line."""

#: Seconds between two reports of one training.
_PERIOD = 0.1


class Work(Protocol):
    """The work that is sent to every process: small and picklable."""

    def open(self) -> Do:
        """Load model and data; return the function that runs a task."""
        ...


def cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def threads_each(wanted: int | None, jobs: int) -> int:
    """Return the threads of each of ``jobs`` parallel trainings: as many as wanted, or an equal share of all."""
    return wanted or max(1, torch.get_num_threads() // max(1, jobs))


def run_tasks(
    do: Do,
    work: Work,
    tasks: Sequence[Task],
    jobs: int = 1,
    wanted: int | None = None,
    progress: Progress = lambda task, done: None,
) -> Generator[tuple[Task, dict[str, Any]]]:
    """Run all tasks, and yield each with its result line when it is finished.

    Parameters
    ----------
    do : callable
        Runs a task in this process.
    work : Work
        From which other processes open the same callable.
    tasks : sequence of Task
    jobs : int
        Number of parallel tasks; with 1 they run in this process.
    wanted : int, optional
        Threads per training; see :func:`threads_each`.
    progress : callable
        Called with a task and the fraction done.

    Raises
    ------
    TnadaptError
        If a task fails, or a worker dies.
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
    context = multiprocessing.get_context("spawn")  # fork is unsafe with torch's threads
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
            # Finished results are yielded before a failure is raised, so that none is lost; else in the order of tasks.
            for future in sorted(filter(done.__contains__, waiting), key=lambda one: one.exception() is not None):
                record = future.result()
                yield waiting.pop(future), record
    except BrokenProcessPool:
        # Tasks start in order, so exactly these were running.
        names = "; ".join(task.method.name for task in list(waiting.values())[:jobs])
        raise TnadaptError(
            f"a worker died while this was trained: {names}; if memory was short, use --jobs 1; in a script, run the "
            "study under if __name__ == '__main__'. Finished trainings are kept: run the same command again to continue"
        ) from None
    finally:
        # Without this the executor would wait for running trainings, and for interpreters that take seconds to unload
        # torch.
        stop.send_bytes(b"stop")
        pool.shutdown(cancel_futures=True)


# -- In a worker -------------------------------------------------------------------------------


class _Worker:
    """The state that a worker process keeps between trainings: mainly its model and data."""

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
    # Ctrl-C is handled by the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_when_told, args=(stopped,), daemon=True).start()
    torch.set_num_threads(share)
    _worker = _Worker(work, told)


def _train(place: int, task: Task) -> dict[str, Any]:
    try:
        return _worker.train(place, task)
    # As text: not every exception survives pickling, and one that fails to unpickle breaks the executor.
    except TnadaptError as error:
        raise TnadaptError(str(error)) from None
    except Exception:
        raise RuntimeError(f"a training failed ({task.method.name}):\n{traceback.format_exc()}") from None


def _end_when_told(stopped: Connection) -> None:
    """End this process, even during a training, when the parent says so or has died."""
    parent = multiprocessing.parent_process()
    wait([stopped, *([] if parent is None else [parent.sentinel])])
    os._exit(1)
