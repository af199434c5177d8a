"""The worker's side: one call runs one task, writes its line to the worker's own file, and returns it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import time
import traceback
import uuid
from pathlib import Path
from typing import Any

from tnadapt.checkpoints.atomic_files import sync_folder
from tnadapt.errors import TnadaptError
from tnadapt.finetune._line_files import append_line
from tnadapt.finetune._torch_threads import threads

from ._work import Do, Keyed, Work

__all__ = [
    "Died",
    "Ended",
    "Failed",
    "Finished",
    "TaskCall",
    "as_json",
    "new_worker_file",
    "progress_file",
    "run_call",
    "worker_files",
]

#: Seconds between two reports of one task.
PERIOD = 0.25


@dataclasses.dataclass(frozen=True)
class Finished:
    """A task that is finished, with its result line."""

    line: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A task that raised an error, which another attempt would raise again.

    Attributes
    ----------
    message : str
        As text: not every exception survives pickling.
    expected : bool
        Whether it is a TnadaptError; otherwise the message is a traceback.
    """

    message: str
    expected: bool


@dataclasses.dataclass(frozen=True)
class Died:
    """A task whose process died, or whose machine was lost.

    Attributes
    ----------
    reason : str
        What the engine knows about it; may be empty.
    """

    reason: str = ""


Ended = Finished | Failed | Died


@dataclasses.dataclass(frozen=True)
class TaskCall:
    """One task with everything that a worker needs to run it.

    Attributes
    ----------
    folder : Path
        The folder of the run, absolute: see :class:`~tnadapt.finetune.engines._run_folder.RunFolder`.
    where : str
        The working directory of the program, from which the paths in the work start.
    work : Work
    task : Keyed
    threads : int
        For torch.
    run : str
        What no other call of ``run_tasks`` has, though it may use the same folder.
    """

    folder: Path
    where: str
    work: Work
    task: Keyed
    threads: int
    run: str


def run_call(call: TaskCall) -> Ended:
    """Run a task in this process; return how it ended, whatever it raised."""
    try:
        worker = _worker_of(_Opened(call.run, call))
        with threads(call.threads):
            return Finished(worker.run(call.task))
    except TnadaptError as error:
        return Failed(str(error), True)
    except Exception:
        return Failed(traceback.format_exc(), False)


def as_json(line: dict[str, Any]) -> dict[str, Any]:
    """Return a result line as it is read back from a file: the same whether or not it has been in one."""
    found: dict[str, Any] = json.loads(json.dumps(line))
    return found


def worker_files(folder: Path) -> list[Path]:
    """Return the results files of all workers of a run."""
    return sorted(folder.glob("worker-*.jsonl"))


def new_worker_file(folder: Path) -> Path:
    """Return a path for another results file, without names of hosts or users."""
    return folder / f"worker-{uuid.uuid4().hex}.jsonl"


def progress_file(folder: Path, task: Keyed) -> Path:
    """Return the file with the fraction done of a task."""
    return folder / f"progress-{hashlib.sha256(task.key.encode()).hexdigest()[:16]}"  # a key may be any text


@dataclasses.dataclass(frozen=True)
class _Opened:
    """The first call of a run in this process; all calls of a run are equal."""

    run: str
    call: TaskCall = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=1)  # a process that serves another run needs this one's model and data no longer
def _worker_of(opened: _Opened) -> _Worker:
    return _Worker(opened.call)


class _Worker:
    """What a process keeps between tasks: mainly the model and data; and its results file."""

    def __init__(self, call: TaskCall) -> None:
        self.folder = call.folder
        self.path = new_worker_file(call.folder)
        if not self.folder.is_dir():
            raise TnadaptError(
                f"{self.folder} is not there: either this run was discarded, or this machine does not share the "
                "output folder with the one that started the run"
            )
        with contextlib.suppress(OSError):  # absolute paths need no such folder
            os.chdir(call.where)
        with threads(call.threads):
            self.do: Do = call.work.open()

    def run(self, task: Keyed) -> dict[str, Any]:
        line = as_json(self.do(task, _ProgressFile(progress_file(self.folder, task))))
        new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            append_line(file, {"key": task.key, "line": line})
        if new:
            sync_folder(str(self.folder))
        return line


class _ProgressFile:
    """Writes the fraction done to a small file, so often that the cost does not matter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = float("-inf")

    def __call__(self, done: float) -> None:
        if time.monotonic() - self.last > PERIOD:
            self.last = time.monotonic()
            try:
                self.path.write_text(f"{done:.4f}\n", encoding="ascii")
            except OSError:
                return  # progress is not worth an error
