"""The one place that starts trainings: tnadapt's task runner, and the work that is sent to its workers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from tnadapt.errors import TnadaptError
from tnadapt.finetune import Engine, run_tasks
from tnadapt.finetune.engines import Do
from tnadapt.finetune.together import Together, doing, grouped, lines_of, tasks_of

from . import store, tasks
from .grid import Trial


@dataclasses.dataclass(frozen=True)
class Trainings:
    """The work that is sent to every process: small, and the same for all trainings of a task."""

    task: str
    scale: str
    cache: Path
    device: str

    def open(self) -> Do:
        """Fetch or load model and data; return the function that runs a training."""
        return self.of(tasks.find(self.task).open(self.scale, self.cache, self.device))

    def of(self, bench: tasks.Bench) -> Do:
        """Return the function that runs a training on an opened bench."""

        def train_all(trials: Sequence[Trial], progress: Callable[[float], None]) -> list[dict[str, Any]]:
            if len(trials) == 1:
                measured = [one(trials[0], progress)]
            else:
                pairs = [(trial.seed, trial.rate) for trial in trials]
                measured = cast(Any, bench).train_together(trials[0].setting, pairs, progress)
            origin = store.origin(self.device)
            return [{**line_of(trial, found), **origin} for trial, found in zip(trials, measured, strict=True)]

        def one(trial: Trial, progress: Callable[[float], None]) -> dict[str, Any]:
            try:
                return bench.train(trial.setting, trial.seed, trial.rate, progress)
            except Exception as error:  # of a library that a method belongs to; it must not end all other trainings
                said = str(error) if isinstance(error, TnadaptError) else f"{type(error).__name__}: {error}"
                if not _cuda_works():
                    raise TnadaptError(
                        f"{trial.name}, rate {trial.rate:g}, seed {trial.seed}: {said.splitlines()[0]}; nothing else "
                        "can run on the GPU in this process. Run the same command again to continue; if it fails "
                        "there again, leave the method out with --methods"
                    ) from error
                return failed(said)

        return doing(train_all, (Exception,))  # of several that fail, each fails alone, or does not


def _cuda_works() -> bool:
    """Whether this process can use CUDA still: after some errors, such as a failed assertion, every call fails.

    Each of the following trainings would then seem to have failed, too.
    """
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
    return True


def failed(why: str) -> dict[str, Any]:
    """Return what is measured of a training that raised an error."""
    return {
        "failed": why[:500], "kept": 0, "diverged": True, "validation": None, "validation_loss": None, "test": None,
        "seconds": 0.0,
    }  # fmt: skip


def line_of(trial: Trial, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the result line of a training."""
    one, method = trial.setting, trial.method
    return {
        "key": trial.key, "method": one.method, "title": method.title, "library": method.library, "label": one.label,
        "budget": one.budget, "parameters": one.parameters, "config": one.values, "seed": trial.seed,
        "rate": trial.rate, **measured,
    }  # fmt: skip


def run(
    work: Trainings,
    bench: tasks.Bench,
    trials: Sequence[Trial],
    folder: Path,
    engine: Engine,
    study: str,
    progress: Callable[[Trial, float], None] = lambda trial, done: None,
    known: Collection[str] = (),
    most: int = 1,
) -> Generator[tuple[Trial, dict[str, Any]]]:
    """Run trainings with one thread each, and yield each with its result line when it is finished.

    Up to ``most`` trainings of a setting, 0 for all, are one call, where the bench and the method can train them
    together. One with which a worker always dies, for example for lack of memory, has failed; it must not end all
    others. Of several together, each is run alone then.
    """
    lost: list[tuple[Trial, dict[str, Any]]] = []
    alone: list[Trial] = []

    def lose(call: Trial | Together, why: str) -> None:
        if isinstance(call, Together):
            alone.extend(call.tasks)
        else:
            lost.append((call, {**line_of(call, failed(why)), **store.origin(work.device)}))

    def report(call: Trial | Together, done: float) -> None:
        for trial in tasks_of(call):
            progress(trial, done)

    def alike(trial: Trial) -> Any:
        return trial.setting if hasattr(bench, "train_together") and trial.method.library != "PEFT" else trial

    ended = run_tasks(
        work, grouped(trials, most, alike), folder, engine=engine, threads=1, study=study, progress=report,
        known=known, do=work.of(bench), lost=lose,
    )  # fmt: skip
    with contextlib.closing(ended):  # an exception of the caller must end the workers immediately
        for call, line in ended:
            yield from zip(tasks_of(call), lines_of(call, line), strict=True)
            while lost:
                yield lost.pop()
    yield from lost
    if alone:
        yield from run(work, bench, alone, folder, engine, study, progress, known)
