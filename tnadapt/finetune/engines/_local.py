"""The local engine: tasks in parallel processes of this machine.

Each of the parallel tasks has a :class:`~concurrent.futures.ProcessPoolExecutor` of one worker. An executor breaks when
one of its workers dies, and loses the work of all others. With joblib and loky, whose executors do the same, one
dead worker would end the trainings of all.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from ._engine import Died, Ended, Engine, Failed, Started, TaskCall, interrupts_held, run_call


class LocalEngine(Engine):
    """Processes of this machine; a single job runs in this process itself.

    So does a single task, unless jobs were asked for. When the same command is run again, the task that is left may be
    the one that kills its process, for example for lack of memory.
    """

    name = "local"

    def __init__(self, jobs: int | None = None, options: Mapping[str, str] | None = None, light: bool = False) -> None:
        super().__init__(jobs or (_cores() if jobs == 0 and light else 1), options, light)
        self._asked = bool(jobs)

    def threads(self, wanted: int | None, tasks: int) -> int:
        """Return as many as wanted, or an equal share of all."""
        import torch

        return wanted or max(1, torch.get_num_threads() // max(1, min(self.jobs, tasks)))

    def here(self, tasks: int) -> bool:
        """Whether only one task runs at a time, in this process."""
        return self.jobs < 2 or (tasks < 2 and not self._asked)

    def device(self, given: str | None) -> None:
        """Return None: the workers have this machine's devices."""
        return

    def start(self, folder: Path, threads: int) -> Started:
        """Start no process yet: each starts with the first task that needs it."""
        return _Processes()

    def advice(self, folder: Path) -> str:
        """Return what usually kills processes of one machine."""
        return "if memory was short, use --jobs 1; in a script, run the study under if __name__ == '__main__'"


def _cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


class _Processes(Started):
    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")  # fork is unsafe with torch's threads
        self.workers: set[BaseProcess] = set()
        self.idle: list[futures.ProcessPoolExecutor] = []
        self.busy: dict[futures.Future[Ended], tuple[str, futures.ProcessPoolExecutor]] = {}

    def submit(self, calls: Sequence[TaskCall]) -> None:
        for call in calls:
            pool = self.idle.pop() if self.idle else futures.ProcessPoolExecutor(1, self.context, _begin)
            others = set(multiprocessing.active_children())
            with interrupts_held():
                self.busy[pool.submit(run_call, call)] = (call.task.key, pool)
                self.workers |= set(multiprocessing.active_children()) - others

    def wait(self, seconds: float) -> Iterator[tuple[str, Ended]]:
        done, _ = futures.wait(self.busy, timeout=seconds, return_when=futures.FIRST_COMPLETED)
        for future in done:
            key, pool = self.busy.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                pool.shutdown(wait=False)
                yield key, Died()
            else:
                self.idle.append(pool)
                yield key, future.result() if error is None else Failed(f"{type(error).__name__}: {error}", False)

    def close(self) -> None:
        # Otherwise the executors would wait for running tasks, and for interpreters that take seconds to import torch
        # or to unload it. Finished results are already written.
        for worker in self.workers:
            worker.kill()
        for pool in [*self.idle, *(pool for _, pool in self.busy.values())]:
            pool.shutdown(cancel_futures=True)


# -- In a worker -------------------------------------------------------------------------------


def _begin() -> None:
    # Ctrl-C is handled by the parent, which then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process, even during a task, once the parent has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
