"""What an engine defines: where calls run, how many at once, and how each ended."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from tnadapt.errors import TnadaptError, safe_repr

from ._task_call import Ended, TaskCall

__all__ = ["AGAIN", "Engine", "Started"]

#: How to go on after an error of an engine.
AGAIN = "What is finished is kept: run the same command again to continue"


class Started(abc.ABC):
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

    def __enter__(self) -> Started:
        return self

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

    @abc.abstractmethod
    def threads(self, wanted: int | None, tasks: int) -> int:
        """Return torch's threads for each of so many tasks, of which the problem may want a certain number."""

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
        return self.jobs or 1000

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
