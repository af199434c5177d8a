"""Tasks that do what their names say, and a program that runs them: ``python -m tests.finetune.played_tasks``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tnadapt.errors import TnadaptError
from tnadapt.finetune import run_tasks
from tnadapt.finetune.engines import Do

ROOT = Path(__file__).parents[2]


class UnpicklableError(Exception):
    """An exception that cannot be rebuilt from its pickled arguments."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


@dataclasses.dataclass(frozen=True)
class Act:
    """A task of any kind: it has a key, and nothing of adapters."""

    does: str
    number: int = 0

    @property
    def key(self) -> str:
        return f"{self.does}/{self.number}"


@dataclasses.dataclass(frozen=True)
class Play:
    """Work that records which processes open it, and which tasks they begin."""

    folder: Path

    def open(self) -> Do:
        self.note("process", str(os.getpid()))
        return self.do

    def note(self, kind: str, content: str) -> None:
        path = self.folder / f"{kind}-{uuid.uuid4().hex}"
        path.with_suffix(".new").write_text(content)
        path.with_suffix(".new").rename(path)

    def noted(self, kind: str) -> list[str]:
        return sorted(path.read_text() for path in self.folder.glob(f"{kind}-*") if not path.suffix)

    def do(self, task: Act, report: Callable[[float], None]) -> dict[str, Any]:
        before = self.noted("begun").count(task.key)
        self.note("begun", task.key)
        report(0.5)
        match task.does:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed-once" if not before:
                os.kill(os.getpid(), signal.SIGKILL)
            case "raises":
                raise UnpicklableError("no ", "luck")
            case "refuses":
                raise TnadaptError("not like this")
            case "waits":  # until a test allows it
                while not (self.folder / "go").exists():
                    time.sleep(0.02)
            case "long":
                time.sleep(600)
            case "naps":
                time.sleep(10)
            case "clings":  # at its time limit, as a task does that keeps the errors of a library
                with contextlib.suppress(Exception):
                    os.kill(os.getpid(), signal.SIGUSR2)
                    time.sleep(600)
        return {"does": task.does, "pair": (1, 2), "threads": torch.get_num_threads(), "process": os.getpid()}


def acts(*names: str) -> list[Act]:
    return [Act(name, number) for number, name in enumerate(names)]


def program(folder: Path, engine: str, *names: str, jobs: int = 2, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that runs tasks, and prints a JSON line for each that is finished."""
    module = "tests.finetune.played_tasks"
    return [sys.executable, "-W", "error", "-m", module, str(folder), engine, str(jobs), json.dumps(options), *names]


@contextlib.contextmanager
def start(*arguments: Any, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """Start the program in a process group of its own, which a test that fails ends."""
    with subprocess.Popen(
        program(*arguments, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise


def run(*arguments: Any, **more: Any) -> subprocess.CompletedProcess[str]:
    with start(*arguments, **more) as process:
        out, told = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, told)


def lines(text: str) -> list[dict[str, Any]]:
    """Return what the program printed."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def main() -> None:
    """Run the tasks that the program's own file lacks, as any program should."""
    folder, engine, jobs, options, *names = sys.argv[1:]
    own = Path(folder) / "own.jsonl"
    there = [json.loads(line)["key"] for line in own.read_text().splitlines()] if own.exists() else []
    progress: dict[str, float] = {}
    results = run_tasks(
        Play(Path(folder)), [task for task in acts(*names) if task.key not in there], folder, engine=engine,
        jobs=int(jobs), threads=3, known=there, options=dict(option.split("=", 1) for option in json.loads(options)),
        progress=lambda task, done: progress.update({task.key: done}),
    )  # fmt: skip
    with own.open("a") as file:
        for task, line in results:
            text = json.dumps({"key": task.key, **line, "progress": progress.get(task.key)})
            print(text, file=file, flush=True)
            print(text, flush=True)


if __name__ == "__main__":
    main()
