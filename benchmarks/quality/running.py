"""A run: what is due is trained, in rounds, until nothing is."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.errors import FileError
from tnadapt.finetune import Engine

from . import engine as engines
from . import store
from .grid import Trial
from .methods import Setting
from .tasks import QualityTask
from .tuning import Plan, due


class Listener:
    """Receives the progress of a run and ignores it; override the methods to show it."""

    def round(self, task: QualityTask, trials: int) -> None:
        """Report the number of trainings that can be run now; what they find may make others due."""

    def training(self, trial: Trial, done: float) -> None:
        """Report the fraction done of a training."""

    def finished(self, trial: Trial, line: Mapping[str, Any]) -> None:
        """Report a finished training."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how trainings run."""

    #: The folder of the results files.
    out: Path
    #: Folder for models and data.
    cache: Path
    engine: Engine
    device: str = "cpu"
    shard: tuple[int, int] = (1, 1)
    #: Whether trainings that failed with an error are tried again.
    retry: bool = False
    #: The largest number of trainings of a setting that are members of one run; 0 for all.
    together: int = 1

    def task(self, task: QualityTask, scale: str, settings: Sequence[Setting], plan: Plan, listener: Listener) -> int:
        """Run the trainings of a task that are not finished yet, and return their number.

        Results of all shards in the folder count as finished; new ones are written to this shard's file.
        """
        # On a cluster, this process trains nothing and needs no GPU; settings do not depend on the device.
        bench = task.open(scale, self.cache, self.device if self.engine.name == "local" else "cpu")
        study = json.loads(json.dumps(bench.settings()))
        known = store.read(self.out, task.name, scale)
        if known is not None and known.study != study:
            differing = sorted(name for name in {*study, *known.study} if study.get(name) != known.study.get(name))
            raise FileError(
                f"{self.out} has results of {task.name} with other {', '.join(differing)}; give another one with --out"
            )
        if known is not None:
            self._check_budgets(settings, known)
        folder = self.out / "running" / store.path_of(self.out, task.name, scale, self.shard).stem
        count = 0
        with store.open_results(self.out, task.name, scale, self.shard, study) as results:
            records: dict[str, Any] = {} if known is None else dict(known.records)
            if self.retry:
                records = {key: line for key, line in records.items() if "failed" not in line}
            work = engines.Trainings(task.name, scale, self.cache, self.device)

            def trained(trials: Sequence[Trial]) -> Generator[tuple[Trial, dict[str, Any]]]:
                digest, told = results.digest, listener.training
                return engines.run(
                    work, bench, trials, folder, self.engine, digest, told, records.keys(), self.together
                )

            while trials := due(task, scale, settings, records, plan):
                if not count:
                    results.begin_session(
                        engine=self.engine.name, jobs=self.engine.jobs, device=self.device, **store.versions()
                    )
                listener.round(task, len(trials))
                with contextlib.closing(trained(trials)) as done:  # an exception here must end the workers immediately
                    for trial, line in done:
                        results.add(line)
                        records[line["key"]] = line
                        count += 1
                        listener.finished(trial, line)
            # Deletes what workers of a killed run wrote and the file has; nothing is trained.
            collections.deque(trained([]), maxlen=0)
        with contextlib.suppress(OSError):  # unless they are empty: other trainings may be asked for later
            folder.rmdir()
            folder.parent.rmdir()
        return count

    def _check_budgets(self, settings: Sequence[Setting], known: store.TaskResults) -> None:
        """Refuse a setting that has results at another budget: nothing would be trained, and tables would lack it."""
        budgets = {(line["method"], _text(line["config"])): line["budget"] for line in known.records.values()}
        for one in settings:
            other = budgets.get((one.method, _text(one.values)), one.budget)
            if other != one.budget:
                raise FileError(
                    f"{self.out} has results of {one.name} at a budget of {other:,} parameters; it would be the "
                    f"largest setting at {one.budget:,}, too: give --budgets that differ more, or another --out"
                )


def _text(config: Any) -> str:
    return json.dumps(config, sort_keys=True)
