"""The driver's side of a run's files: lines of workers that no one has read yet, and the progress of all."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any, TypeVar

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import FileError
from tnadapt.finetune._line_files import append_line, undamaged_lines

from ._task_call import new_worker_file, progress_file, worker_files
from ._work import Keyed

__all__ = ["NOTES", "RunFolder", "discard"]

#: The name of the file, in its own folder, in which an engine notes the keys of jobs that outlive the program.
NOTES = "jobs.jsonl"

# Reading progress may take this fraction of the driver's time, however slow the file system is.
_SHARE = 0.05

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
        found = _current(self.folder)
        if found is not None and found["study"] != study:
            discard(self.folder)
            found = None
        self.path = self.folder / "workers" / (uuid.uuid4().hex if found is None else found["run"])
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
        self._next_look = now + (now - began) / _SHARE

    def report_one(self, task: T, progress: Callable[[T, float], None]) -> None:
        """Report the progress of one task, if there is any."""
        try:
            done = float(progress_file(self.path, task).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not begun, or being written
            return
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
        read = {path: found for path in worker_files(self.path) if (found := _lines_of(path))}
        left = {key: line for found in read.values() for key, line in found.items() if key not in keys}
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
    """Return the keys of tasks that engines have started as jobs which outlive the program."""
    notes = (one for path in folder.glob(f"*/{NOTES}") for one in undamaged_lines(path))
    return {one["key"] for one in notes if isinstance(one.get("key"), str)}


def _lines_of(path: Path) -> dict[str, dict[str, Any]]:
    """Return the lines of a worker, by key."""
    return {
        one["key"]: one["line"]
        for one in undamaged_lines(path)
        if isinstance(one.get("key"), str) and isinstance(one.get("line"), dict)
    }


def _current(folder: Path) -> dict[str, str] | None:
    """Return the run that was not finished, if there is one."""
    try:
        found = json.loads((folder / "workers" / "current.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not all(isinstance(found.get(name), str) for name in ("study", "run")):
        return None
    # Only a name that this module has given: the folder will be deleted.
    run = found["run"]
    return found if len(run) == 32 and set(run) <= set("0123456789abcdef") else None


def discard(folder: Path) -> None:
    """Delete the lines of workers that were not merged, such as those of an earlier study in the same folder.

    Workers that still run for it add nothing to the results.
    """
    found = _current(folder)
    if found is not None:
        shutil.rmtree(folder / "workers" / found["run"], ignore_errors=True)
        with contextlib.suppress(OSError):
            (folder / "workers" / "current.json").unlink()
        with contextlib.suppress(OSError):
            (folder / "workers").rmdir()  # fails unless it is empty
