"""Trainings in separate processes: the effect on others when one fails, dies or is stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import tnadapt as tna
from tests.support.depth import in_depth
from tnadapt.finetune import Method, Task
from tnadapt.finetune.workers import Do, run_tasks

ROOT = Path(__file__).parents[2]


class UnpicklableError(Exception):
    """An exception that cannot be rebuilt from its pickled arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


@dataclasses.dataclass(frozen=True)
class Play:
    """Work whose tasks do what their names say; every process writes its id to a folder."""

    folder: Path

    def open(self) -> Do:
        (self.folder / str(os.getpid())).touch()
        return self.do

    def do(self, task: Task, report: Callable[[float], None]) -> dict[str, Any]:
        report(0.5)
        match task.method.family:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fails":
                raise UnpicklableError("no ", "luck")
            case "long":
                time.sleep(600)
        return {"process": os.getpid(), "threads": torch.get_num_threads()}


def tasks(*names: str) -> list[Task]:
    return [Task(Method(name, "", tna.presets.lora(1)), seed, 0.1) for seed, name in enumerate(names)]


def run(folder: Path, *names: str, finished: list[str] | None = None) -> None:
    """Run two tasks at once; append the names of finished ones to the list."""
    for task, _ in run_tasks(Play(folder).open(), Play(folder), tasks(*names), 2):
        if finished is not None:
            finished.append(task.method.family)


def gone(folder: Path, seconds: float = 30.0) -> bool:
    """Return whether all other processes end soon."""
    limit = time.monotonic() + seconds
    others = {int(path.name) for path in folder.iterdir()} - {os.getpid()}
    while any(_lives(process) for process in others) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(_lives(process) for process in others)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_of_two_processes_opens_the_work_once_and_does_several(tmp_path: Path) -> None:
    progress: list[tuple[str, float]] = []
    found = list(
        run_tasks(
            Play(tmp_path).open(), Play(tmp_path), tasks(*"abcdef"), 2, wanted=3,
            progress=lambda task, done: progress.append((task.method.family, done)),
        )
    )  # fmt: skip
    assert sorted(task.method.family for task, _ in found) == list("abcdef")
    processes = {record["process"] for _, record in found}
    assert os.getpid() not in processes
    assert len(processes) <= 2
    assert {int(path.name) for path in tmp_path.iterdir()} == {os.getpid(), *processes}
    assert {record["threads"] for _, record in found} == {3}
    assert set(progress) == {(name, 0.5) for name in "abcdef"}
    assert gone(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("killed", tna.TnadaptError, r"a worker died while this was trained: (long; )?killed; .*--jobs 1"),
        ("fails", RuntimeError, r"(?s)a training failed \(fails\):\n.*UnpicklableError: no luck"),
    ],
)
def test_one_that_fails_ends_those_that_run_and_loses_none_that_is_done(
    name: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    finished: list[str] = []
    began = time.monotonic()
    with pytest.raises(error, match=message):
        run(tmp_path, "long", "a", "b", name, "c", finished=finished)
    # The one behind a training that raised may be done before its end is heard of.
    assert finished in (["a", "b"], ["a", "b", "c"])
    assert time.monotonic() - began < 120, "it does not wait for the long one"
    assert gone(tmp_path)


@pytest.mark.slow
def test_who_stops_listening_ends_those_that_run(tmp_path: Path) -> None:
    with contextlib.closing(run_tasks(Play(tmp_path).open(), Play(tmp_path), tasks("a", "long", "long"), 2)) as found:
        assert next(found)[0].method.family == "a"
    assert gone(tmp_path)


SCRIPT = """
import pathlib, sys
from tests.finetune.test_workers import run
{guard}run(pathlib.Path(sys.argv[1]), "long", "long")
"""
GUARD = "if __name__ == '__main__': "


def script(folder: Path, guard: str) -> subprocess.Popen[str]:
    (folder / "script.py").write_text(SCRIPT.format(guard=guard))
    (folder / "processes").mkdir()
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py"), str(folder / "processes")],
        stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("keyboard")
@pytest.mark.parametrize("number", in_depth([signal.SIGKILL, signal.SIGINT], [signal.SIGKILL]))
def test_a_parent_that_is_killed_or_interrupted_leaves_no_worker(number: signal.Signals, tmp_path: Path) -> None:
    with script(tmp_path, GUARD) as process:
        limit = time.monotonic() + 120
        while len(list((tmp_path / "processes").iterdir())) < 3 and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(process.pid, number) if number == signal.SIGKILL else os.killpg(process.pid, number)
        _, told = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert told.splitlines()[-1] == "KeyboardInterrupt"
        # Python forgets that it was interrupted if code is compiled at exit, as torch does where tabulate is installed.
        assert process.returncode in (-signal.SIGINT, 1)
    else:
        assert process.returncode == -number
    assert len(list((tmp_path / "processes").iterdir())) == 3
    assert gone(tmp_path / "processes")


@pytest.mark.slow
def test_a_script_without_a_guard_is_told_of_it(tmp_path: Path) -> None:
    with script(tmp_path, "") as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "run the study under if __name__ == '__main__'" in told.splitlines()[-1]
