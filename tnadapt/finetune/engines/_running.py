"""Run tasks on an engine: finished results are kept, and tasks of workers that died are retried; engines by name."""

from __future__ import annotations

import collections
import functools
import os
import uuid
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tnadapt.argument_checks import checks_arguments, integer, wrong_argument
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import ConfigError, TnadaptError, safe_repr
from tnadapt.plugins import Registry, failed_plugins

from . import _engine
from ._engine import AGAIN, Died, Do, Engine, Failed, Finished, Keyed, RunFolder, TaskCall, Work, as_json, name_of
from ._local import LocalEngine
from ._ray import RayEngine
from ._slurm import SlurmEngine

# -- The engines by name -----------------------------------------------------------------------------------------------


ENGINES: Registry[Engine] = Registry(
    "engine",
    Engine,  # type: ignore[type-abstract]  # only to check the classes of plug-ins
    {engine.name: engine for engine in (LocalEngine, RayEngine, SlurmEngine)},
)


def register_engine(cls: type[Engine]) -> None:
    """Make an engine known by its ``name``, for ``--engine`` and :func:`open_engine`.

    Parameters
    ----------
    cls : type
        A subclass of :class:`tnadapt.finetune.Engine`.

    Raises
    ------
    ConfigError
        If its name is built in, registered by another module or of another form, or the class is not such a subclass.

    Examples
    --------
    >>> from tnadapt.finetune.engines import Engine
    >>> class Kubernetes(Engine):
    ...     name = "kubernetes"
    ...     known = {"namespace": "of the jobs"}
    ...
    ...     def start(self, folder, threads):
    ...         raise NotImplementedError("return an object that submits jobs and says which have ended")
    ...
    ...     def advice(self, folder):
    ...         return "see kubectl describe job"
    >>> register_engine(Kubernetes)
    >>> open_engine("kubernetes", jobs=8, options={"namespace": "lab"}).capacity
    8
    """
    ENGINES.register(getattr(cls, "name", ""), cls)


@checks_arguments
def open_engine(
    name: str, jobs: int | None = None, options: Mapping[str, str] | None = None, light: bool = False
) -> Engine:
    """Return an engine by name.

    Parameters
    ----------
    name : str
        ``local``: processes of this machine. ``ray``: a Ray cluster; the one that there is, else one that is started on
        this machine. ``slurm``: jobs of Slurm, through submitit.
    jobs : int, optional
        The largest number of parallel tasks; 0 for as many as can run: on this machine one, or one per core
        if the tasks are light. By default 1 on this machine, and 0 on a cluster.
    options : mapping of str to str, optional
        Settings of the engine: see :func:`engine_options`.
    light : bool
        Whether a task needs no more than one core.

    Raises
    ------
    TnadaptError
        If there is no such engine or option, or its library is not installed.

    Examples
    --------
    >>> open_engine("local", jobs=2).capacity
    2
    >>> open_engine("loca")
    Traceback (most recent call last):
    tnadapt.errors.TnadaptError: no engine 'loca'; expected one of local, ray, slurm
    """
    return _engine_class(name)(jobs, options, light)


def _engine_class(name: str) -> type[Engine]:
    if not ENGINES.knows(name):
        raise TnadaptError(f"no engine {safe_repr(name)}; expected one of {', '.join(ENGINES)}{failed_plugins()}")
    return ENGINES[name]


def engine_options(name: str) -> Mapping[str, str]:
    """Return the options of an engine, and what they mean.

    Examples
    --------
    >>> engine_options("ray")["gpus"]
    'of each task, such as 1 or 0.25'
    """
    return _engine_class(name).known


# -- Running tasks -----------------------------------------------------------------------------------------------------


#: How often a task is started if its workers die.
ATTEMPTS = 3

#: Maximum number of tasks that a message names.
NAMED = 3

T = TypeVar("T", bound=Keyed)


@checks_arguments
def run_tasks(
    work: Work,
    tasks: Sequence[T],
    folder: str | os.PathLike[str],
    *,
    engine: str | Engine = "local",
    jobs: int | None = None,
    options: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Callable[[T, float], None] = lambda task, done: None,
    study: str = "",
    known: Collection[str] = (),
    do: Do | None = None,
    lost: Callable[[T, str], None] | None = None,
) -> Generator[tuple[T, dict[str, Any]]]:
    """Run tasks on this machine or a cluster, and yield each with its result line when it is finished.

    It knows nothing of adapters. The work is any picklable object whose ``open()`` loads what all tasks need, once per
    process, and returns a function ``do(task, report)``. That runs a task, calls ``report`` with the fraction done as
    often as it likes, and returns the result line: a dict that JSON can hold. A task is any picklable object with a
    ``key``: a string, unique among the tasks and the same in every run of the program. If it has a ``name``, messages
    use it.

    Every worker writes the lines to a file of its own in ``folder / "workers"``, synchronized, before it reports them.
    Write each line to your own file before you ask for the next one. If the program is then killed at any time, call
    this again with the tasks that your file lacks, and with the keys that it holds as ``known``: tasks that workers had
    finished are yielded from the workers' files and are not run again. Lines of any other tasks, and jobs of Slurm that
    run them, are kept until you ask for these. A worker that dies is tried again, twice at most.

    Parameters
    ----------
    work : Work
    tasks : sequence
    folder : path
        Which all workers can write to: on a cluster, on a file system that its machines share. Only one program at a
        time may use it.
    engine : str or Engine
        ``local``, ``ray`` or ``slurm``; see :func:`open_engine`.
    jobs : int, optional
        The largest number of parallel tasks. By default 1 on this machine, where one at a time runs in this process,
        and as many as can run on a cluster. Parallel tasks of a script need ``if __name__ == "__main__"``.
    options : mapping of str to str, optional
        Settings of the engine.
    threads : int, optional
        Torch's threads for each task; by default, an equal share of this machine's, or the engine's option ``cpus``.
    progress : callable
        Called with a task and the fraction done.
    study : str
        Anything that identifies what the lines depend on besides the keys, such as a digest of the settings. Lines that
        workers wrote for another study are discarded.
    known : collection of str
        Keys of tasks whose lines your file holds already; what workers wrote for them is deleted.
    do : callable, optional
        What ``work.open()`` would return, if you have opened it already; used in this process alone.
    lost : callable, optional
        Called with each task whose worker has died three times, and why. By default it is an error, after all others.

    Yields
    ------
    task, dict
        In the order in which they are finished.

    Raises
    ------
    TnadaptError
        If two tasks have the same key; if a task raises one; or, after all other tasks, if a worker has died three
        times with the same task and there is no ``lost``.
    RuntimeError
        If a task raises any other exception, with its traceback. Running tasks are ended.

    Examples
    --------
    >>> import dataclasses, tempfile
    >>> @dataclasses.dataclass(frozen=True)
    ... class Power:
    ...     exponent: int
    ...     def open(self):
    ...         return lambda task, report: {"result": task.base**self.exponent}
    >>> @dataclasses.dataclass(frozen=True)
    ... class Number:
    ...     base: int
    ...     @property
    ...     def key(self):
    ...         return f"base-{self.base}"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for task, line in run_tasks(Power(2), [Number(3), Number(4)], folder):
    ...         print(task.key, line)
    base-3 {'result': 9}
    base-4 {'result': 16}
    """
    if not callable(getattr(work, "open", None)):
        raise wrong_argument("work", "an object with open()", work)
    for task in tasks:
        if not isinstance(getattr(task, "key", None), str):
            raise wrong_argument("tasks", "objects with a string as key", task)
    if threads is not None:
        integer("threads", threads, 1, 1 << 16, ConfigError)
    used = engine if isinstance(engine, Engine) else open_engine(engine, jobs, options)
    keys = collections.Counter(task.key for task in tasks)
    if twice := [key for key, count in keys.items() if count > 1]:
        raise TnadaptError(f"tasks need different keys; {keys[twice[0]]} have the key {safe_repr(twice[0])}")
    place = RunFolder(Path(path_of(folder)), study)
    lines = place.lines()
    for task in tasks:
        if task.key in lines:
            yield task, lines[task.key]
    missing = [task for task in tasks if task.key not in lines]
    share = used.threads(threads, len(missing))
    if missing and used.here(len(missing)):
        yield from _one_by_one(do or work.open(), missing, share, progress)
    elif missing:
        place.create()
        run = uuid.uuid4().hex
        calls = {task.key: TaskCall(place.path, os.getcwd(), work, task, share, run) for task in missing}
        yield from _side_by_side(used, missing, calls, place, progress, lost)
    place.forget(keys.keys() | set(known))


def _one_by_one(
    do: Do, tasks: Sequence[T], share: int, progress: Callable[[T, float], None]
) -> Generator[tuple[T, dict[str, Any]]]:
    for task in tasks:
        with _engine.threads(share):
            line = as_json(do(task, functools.partial(progress, task)))
        yield task, line


def _side_by_side(
    engine: Engine,
    tasks: Sequence[T],
    calls: Mapping[str, TaskCall],
    place: RunFolder,
    progress: Callable[[T, float], None],
    lost: Callable[[T, str], None] | None,
) -> Generator[tuple[T, dict[str, Any]]]:
    waiting = collections.deque(tasks)
    running: dict[str, T] = {}
    attempts: collections.Counter[str] = collections.Counter()
    dead: dict[str, str] = {}
    with engine.start(place.path, next(iter(calls.values())).threads) as started:
        while waiting or running:
            batch = [waiting.popleft() for _ in range(min(len(waiting), engine.capacity - len(running)))]
            if batch:
                running.update({task.key: task for task in batch})
                attempts.update(task.key for task in batch)
                started.submit([calls[task.key] for task in batch])
            failed: list[tuple[T, Failed]] = []
            for key, ended in started.wait(engine.period):
                task = running.pop(key)
                place.report_one(task, progress)
                place.clear(task)
                if isinstance(ended, Died):
                    line = place.lines().get(key)  # it may have died after writing the line
                    if line is not None:
                        ended = Finished(line)
                    elif attempts[key] < ATTEMPTS:
                        waiting.append(task)
                    elif lost is not None:
                        lost(task, f"a worker died {ATTEMPTS} times" + (f": {ended.reason}" if ended.reason else ""))
                    else:
                        dead[name_of(task)] = ended.reason
                if isinstance(ended, Finished):
                    yield task, ended.line
                elif isinstance(ended, Failed):
                    failed.append((task, ended))
            for task, failure in failed:  # after the lines of all other finished tasks, so that none is lost
                if failure.expected:
                    raise TnadaptError(failure.message)
                raise RuntimeError(f"a task failed ({name_of(task)}):\n{failure.message}")
            place.report(running.values(), progress)
    if dead:
        raise TnadaptError(
            f"a worker died {ATTEMPTS} times while it ran {_listed(dead)}; {engine.advice(place.path)}. {AGAIN}"
        )


def _listed(dead: Mapping[str, str]) -> str:
    """Return the names of the first tasks, each with the reason why it ended."""
    told = [f"{name} ({reason})" if reason else name for name, reason in list(dead.items())[:NAMED]]
    return ", ".join(told) + (f" and {len(dead) - NAMED} more" if len(dead) > NAMED else "")
