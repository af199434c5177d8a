"""What all engines share: tasks and calls, the files of workers, and the interface of an engine."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any, ClassVar, Protocol, TypeVar

from tnadapt.checkpoints.atomic_files import replace_file, sync_folder
from tnadapt.errors import FileError, TnadaptError, safe_repr
from tnadapt.finetune.results import append_line, undamaged_lines

# -- Work and tasks ----------------------------------------------------------------------------------------------------


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


# -- In a worker: one call runs one task, and writes its line to the worker's own file ---------------------------------


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
        The folder of the run, absolute: see :class:`RunFolder`.
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


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Set torch's number of threads inside ``with``. Torch is imported here, after options have been checked."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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


def as_json(line: dict[str, Any]) -> Any:
    """Return a result line as it is read back from a file: the same whether or not it has been in one."""
    return json.loads(json.dumps(line))


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
    """The first call of a run in this process, which is equal to all other calls of the run."""

    run: str
    call: TaskCall = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=1)  # a process that serves another run no longer needs this model and data
def _worker_of(opened: _Opened) -> _Worker:
    return _Worker(opened.call)


class _Worker:
    """The state of a process between tasks, mainly the model and data, and its results file."""

    def __init__(self, call: TaskCall) -> None:
        self.folder, self.path = call.folder, new_worker_file(call.folder)
        if not self.folder.is_dir():
            raise TnadaptError(
                f"{self.folder} is not there: either this run was discarded, or this machine does not share the "
                "output folder with the one that started the run"
            )
        with contextlib.suppress(OSError):  # absolute paths need no such folder
            os.chdir(call.where)
        with threads(call.threads):
            self.do = call.work.open()

    def run(self, task: Keyed) -> dict[str, Any]:
        line: dict[str, Any] = as_json(self.do(task, _progress_writer(progress_file(self.folder, task))))
        new = not self.path.exists()
        with open(self.path, "ab", buffering=0) as file:
            append_line(file, {"key": task.key, "line": line})
        if new:
            sync_folder(str(self.folder))
        return line


def _progress_writer(path: Path) -> Callable[[float], None]:
    """Return a function that writes the fraction done to a small file, so rarely that the cost is negligible."""
    last = float("-inf")

    def write(done: float) -> None:
        nonlocal last
        if time.monotonic() - last > PERIOD:
            last = time.monotonic()
            with contextlib.suppress(OSError):  # a failed progress report is no error
                path.write_text(f"{done:.4f}\n", encoding="ascii")

    return write


# -- In the driver: unread lines of workers, and the progress of all ---------------------------------------------------


#: The name of the file, in its own folder, in which an engine notes the keys of jobs that outlive the program.
NOTES = "jobs.jsonl"

#: Fraction of the driver's time that reading files of workers may take, however slow the file system is.
SHARE = 0.05

T = TypeVar("T", bound=Keyed)


class RunFolder:
    """The folder ``workers/ID`` of a run, in which every worker writes a results file of its own.

    The ID is random, and kept in ``workers/current.json`` until all tasks are finished. So a program that was killed
    finds the lines of its workers again, and workers of a run that was discarded cannot add to another one.

    Parameters
    ----------
    folder : Path
    study : str
        What the lines belong to; those of another study are discarded.
    """

    def __init__(self, folder: Path, study: str) -> None:
        self.folder = folder.resolve()
        self.study = study
        current = _current(self.folder)
        if current is not None and current["study"] != study:
            discard(self.folder)
            current = None
        self.path = self.folder / "workers" / (uuid.uuid4().hex if current is None else current["run"])
        self._next_look = 0.0

    def create(self) -> None:
        """Make the folder, and note it as the current one.

        Raises
        ------
        FileError
            If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"study": self.study, "run": self.path.name})
            replace_file(str(self.path.parent / "current.json"), text.encode())
        except OSError as error:
            raise FileError(f"cannot write to {self.path}: {error.strerror}; give another folder") from None

    def lines(self) -> dict[str, dict[str, Any]]:
        """Return all lines that workers have written, by key."""
        return {key: line for path in worker_files(self.path) for key, line in _lines_of(path).items()}

    def report(self, tasks: Iterable[T], progress: Callable[[T, float], None]) -> None:
        """Report the progress of tasks, unless the last look was so expensive that it is too early for another."""
        began = time.monotonic()
        if began < self._next_look:
            return
        for task in tasks:
            self.report_one(task, progress)
        now = time.monotonic()
        self._next_look = now + (now - began) / SHARE

    def report_one(self, task: T, progress: Callable[[T, float], None]) -> None:
        """Report the progress of one task, if there is any."""
        done = None
        with contextlib.suppress(OSError, ValueError):  # not started, or being written
            done = float(progress_file(self.path, task).read_text(encoding="ascii"))
        if done is not None:
            progress(task, done)

    def clear(self, task: Keyed) -> None:
        """Delete the progress of a task that has ended."""
        with contextlib.suppress(OSError):
            progress_file(self.path, task).unlink()

    def forget(self, keys: Set[str]) -> None:
        """Delete the lines with these keys, which have been written elsewhere; and the folder, if no others are left.

        Others are of tasks of the same study that this program has not asked for yet, or their jobs still run.
        """
        # Jobs that outlive their program may write now, one line to a file of their own. So only files that have a line
        # by now are deleted, and none that is new.
        read = {path: lines for path in worker_files(self.path) if (lines := _lines_of(path))}
        left = {key: line for lines in read.values() for key, line in lines.items() if key not in keys}
        if not left and _noted(self.path) <= keys:
            discard(self.folder)
            return
        if left:
            with open(new_worker_file(self.path), "ab", buffering=0) as file:
                for key, line in left.items():
                    append_line(file, {"key": key, "line": line})
        for path in read:
            path.unlink()


def _noted(folder: Path) -> set[str]:
    """Return the keys of tasks that engines have started as jobs that outlive the program."""
    notes = (note for path in folder.glob(f"*/{NOTES}") for note in undamaged_lines(path))
    return {note["key"] for note in notes if isinstance(note.get("key"), str)}


def _lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a worker, by key."""
    return {
        record["key"]: record["line"]
        for record in undamaged_lines(path)
        if isinstance(record.get("key"), str) and isinstance(record.get("line"), dict)
    }


def _current(folder: Path) -> dict[str, str] | None:
    """Return the unfinished run, if there is one."""
    try:
        current = json.loads((folder / "workers" / "current.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(current, dict) or not all(isinstance(current.get(name), str) for name in ("study", "run")):
        return None
    # Accept only names that this module generates: the folder will be deleted.
    run = current["run"]
    return current if len(run) == 32 and set(run) <= set("0123456789abcdef") else None


def discard(folder: Path) -> None:
    """Delete the lines of workers that were not merged, such as those of an earlier study in the same folder.

    Workers that still run for it add nothing to the results.
    """
    current = _current(folder)
    if current is not None:
        shutil.rmtree(folder / "workers" / current["run"], ignore_errors=True)
        with contextlib.suppress(OSError):
            (folder / "workers" / "current.json").unlink()
            (folder / "workers").rmdir()  # fails unless it is empty


# -- The interface of an engine ----------------------------------------------------------------------------------------


#: Advice in errors of an engine: how to continue.
AGAIN = "What is finished is kept: run the same command again to continue"


class Started(contextlib.AbstractContextManager["Started"]):
    """An engine that runs calls, until it is closed."""

    @abc.abstractmethod
    def submit(self, calls: Sequence[TaskCall]) -> None:
        """Run calls, each as soon as the engine can."""

    @abc.abstractmethod
    def wait(self, seconds: float) -> Iterable[tuple[str, Ended]]:
        """Return the keys of tasks that have ended, and how; after so many seconds at the latest.

        Raises
        ------
        TnadaptError
            If the engine has ended, and can run no task any more.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End the calls that still run, and release everything."""

    def __exit__(self, *error: object) -> None:
        self.close()


class Engine(abc.ABC):
    """A way to run tasks in other processes.

    Parameters
    ----------
    jobs : int, optional
        The largest number of tasks at a time; 0 for as many as the engine can run. By default 1 on this machine,
        and 0 on a cluster.
    options : mapping of str to str, optional
        Settings of this engine: see ``known``.
    light : bool
        Whether a task needs no more than one core.

    Attributes
    ----------
    name : str
    known : mapping of str to str
        The options, and what they mean.
    library, extra : str
        What must be installed, and the extra of tnadapt that does it; empty if nothing.
    period : float
        Seconds between two looks at the workers.

    Raises
    ------
    TnadaptError
        If the engine has no such option, or its library is not installed.
    """

    name: ClassVar[str]
    known: ClassVar[Mapping[str, str]] = MappingProxyType({})
    library: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    period: ClassVar[float] = 0.1

    def __init__(self, jobs: int | None = None, options: Mapping[str, str] | None = None, light: bool = False) -> None:
        self.jobs, self.options = jobs or 0, dict(options or {})
        if unknown := sorted(self.options.keys() - self.known.keys()):
            have = f"it has {', '.join(self.known)}" if self.known else "it has none"
            raise TnadaptError(f"engine {self.name} has no option {safe_repr(unknown[0])}; {have}")
        if self.library and importlib.util.find_spec(self.library) is None:
            raise TnadaptError(
                f"engine {self.name} needs {self.library}, which is not installed: pip install 'tnadapt[{self.extra}]'"
            )

    def number(self, option: str, usual: float) -> float:
        """Return an option that is a number.

        Raises
        ------
        TnadaptError
            If it is none, or negative.
        """
        text = self.options.get(option, str(usual))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise TnadaptError(f"option {option} of engine {self.name} must be a number of at least 0; got {text!r}")
        return value

    def threads(self, wanted: int | None, tasks: int) -> int:
        """Return torch's threads for each of so many tasks: as many as the problem wants, else the option ``cpus``."""
        return wanted or max(1, int(self.number("cpus", 1)))

    def here(self, tasks: int) -> bool:
        """Whether so many tasks run one after the other in this process."""
        return False

    def device(self, given: str | None) -> str | None:
        """Return the device of the workers' machines, or None if it is this machine's, where it can be looked for.

        Parameters
        ----------
        given : str, optional
            What the user wants. By default CUDA if the option ``gpus`` is above 0, else the CPU.
        """
        return given or ("cuda" if "gpus" in self.options and self.number("gpus", 0) else "cpu")

    @property
    def capacity(self) -> int:
        """The largest number of calls that are submitted at a time."""
        return self.jobs or 1000  # jobs of an array: Slurm's default MaxArraySize is 1001

    @abc.abstractmethod
    def start(self, folder: Path, threads: int) -> Started:
        """Start running calls.

        Parameters
        ----------
        folder : Path
            The run's folder, where the engine may keep files of its own.
        threads : int
            For each call.
        """

    @abc.abstractmethod
    def advice(self, folder: Path) -> str:
        """Return what to do about workers that die, as part of a sentence."""


# -- Ctrl-C while an engine starts workers or jobs ---------------------------------------------------------------------


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until the block ends. Processes that are started in it ignore Ctrl-C: the engine ends them.

    Notes
    -----
    A signal mask applies to one thread, and child processes inherit it. While the main thread blocks the signal,
    another thread can receive it, and Python still calls the handler in the main thread. So the handler is replaced,
    too, which is only possible in the main thread.
    """
    handler = signal.getsignal(signal.SIGINT)
    replaced = threading.current_thread() is threading.main_thread() and callable(handler)
    came: list[tuple[int, FrameType | None]] = []
    if replaced:
        signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    masks = hasattr(signal, "pthread_sigmask")  # Windows has none
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if replaced:
            signal.signal(signal.SIGINT, handler)
        if came and callable(handler):
            # The signal is not sent again: a handler that counts would take it for a second Ctrl-C.
            handler(*came[0])
