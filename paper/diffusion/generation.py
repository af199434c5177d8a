"""All adaptations of a recipe: the rate is chosen with the first seed, and the other seeds use that rate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.finetune import Engine, Method, Reporter, Task, open_engine, run_tasks
from tnadapt.finetune.engines import Do, discard
from tnadapt.finetune.pareto_report import method_in
from tnadapt.finetune.results import Results, read_lines
from tnadapt.finetune.training import checked_rates

from .bench import FIELDS, Adapting, Bench, Setup
from .loading import open_bench

__all__ = ["PRETRAINED", "Generated", "Generation", "chosen_rate", "generated_in"]

#: The arm of the unchanged base, with which all are compared.
PRETRAINED = "as pretrained"


@dataclasses.dataclass(frozen=True)
class Generated:
    """One setting at the rate that was best with the first seed.

    Attributes
    ----------
    arm, setting : str
    parameters : int
    rate : float
    records : tuple of mapping
        The result lines, one per seed.
    """

    arm: str
    setting: str
    parameters: int
    rate: float
    records: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)

    def values(self, metric: str) -> tuple[float | None, ...]:
        """Return the values of a measure, one per seed; None if the training diverged."""
        return tuple(record["metrics"].get(metric) for record in self.records)


@dataclasses.dataclass(frozen=True)
class _Adaptations:
    """The :class:`~tnadapt.finetune.engines.Work` that is sent to a worker."""

    setup: Setup
    how: Adapting
    out: Path

    def open(self) -> Do:
        return self.of(open_bench(self.setup))

    def of(self, bench: Bench) -> Do:
        return lambda task, progress: bench.adapt(task, self.how, self.out, progress)


class Generation:
    """The adaptations of a recipe, in one folder.

    Parameters
    ----------
    setup : Setup
    how : Adapting
    methods : sequence of Method
        The unchanged base is added in front of them.
    rates : sequence of float
        All are tried with seed 0; the other seeds use the one with the lowest held-out loss. The measures are not used
        to choose anything.
    seeds : int
    reporter : Reporter, optional

    Attributes
    ----------
    bench : Bench

    Raises
    ------
    TnadaptError
        If images or weights are unavailable.
    """

    def __init__(
        self,
        setup: Setup,
        how: Adapting,
        methods: Sequence[Method],
        rates: Sequence[float],
        seeds: int,
        reporter: Reporter | None = None,
    ) -> None:
        checked_rates(rates)
        self.setup, self.how = setup, how
        self.reporter = reporter or Reporter()
        self.rates, self.seeds = sorted(set(rates)), range(seeds)
        self.methods = list({Task(method, 0, 1.0).key: method for method in reversed(methods)}.values())[::-1]
        self.bench = open_bench(setup, self.reporter.preparing)

    def settings(self) -> dict[str, Any]:
        """Return everything that an outcome depends on, except method, seed and rate."""
        how = dataclasses.asdict(self.how)
        how["generated"] = how.pop("samples")
        return {**self.bench.settings(), **how}

    def run(
        self,
        out: Path,
        jobs: int | None = None,
        fresh: bool = False,
        engine: str | Engine = "local",
        options: Mapping[str, str] | None = None,
    ) -> list[Generated]:
        """Run the adaptations that are not finished yet.

        Parameters
        ----------
        out : Path
            The folder for ``results.jsonl``, ``images`` and ``adapters``; created if needed.
        jobs : int, optional
            Number of parallel adaptations; several run in separate processes. 0 means one per core, or on a cluster as
            many as it can run. By default 1 on this machine, and 0 on a cluster.
        fresh : bool
            Discard the results of an earlier run in that folder.
        engine, options
            As in :meth:`tnadapt.finetune.Study.run`.

        Returns
        -------
        list of Generated
            In the order of the methods, the base first.

        Raises
        ------
        FileError
            If the folder cannot be used: see :class:`~tnadapt.finetune.results.Results`.
        """
        if not isinstance(engine, Engine):
            engine = open_engine(engine, jobs, options, light=self.setup.device == "cpu")
        with Results(out / "results.jsonl", self.settings(), fresh, FIELDS) as results:
            if fresh:
                _forget(out, results.dropped)
                discard(out)
            base = Method(PRETRAINED, "", None)
            # The rate makes no difference to the base.
            first = [Task(base, seed, 0.0) for seed in self.seeds]
            first += [Task(method, 0, rate) for method in self.methods for rate in self.rates]
            rest = len(self.methods) * (len(self.seeds) - 1)
            self.reporter.begins(len(first) + rest, sum(task.key in results.records for task in first))
            self._do(first, results, out, engine)
            rates = {method: chosen_rate(results.records, method, self.rates) for method in self.methods}
            others = [Task(method, seed, rates[method]) for seed in self.seeds[1:] for method in self.methods]
            self._do(others, results, out, engine)
            every = {base: 0.0, **rates}
            return [_point(method, rate, self.seeds, results.records) for method, rate in every.items()]

    def _do(self, tasks: Sequence[Task], results: Results, out: Path, engine: Engine) -> None:
        missing = [task for task in tasks if task.key not in results.records]
        if missing:
            results.begin_session(engine=engine.name, jobs=engine.jobs, device=self.setup.device)
        work = _Adaptations(self.setup, self.how, out)
        done = run_tasks(
            work, missing, out, engine=engine, study=results.digest, known=results.records.keys(),
            progress=self.reporter.training, do=work.of(self.bench),
        )  # fmt: skip
        with contextlib.closing(done):  # an exception here must end the workers immediately
            for task, record in done:
                results.add(record)
                self.reporter.finished(task, record)


def _forget(out: Path, adapters: Sequence[str]) -> None:
    """Remove the files of an earlier run: adapters by their names, and images, whose names are keys."""
    left = [*(out / "adapters" / name for name in adapters), *(out / "images").glob("*" + "[0-9a-f]" * 16 + ".npy")]
    for path in left:
        with contextlib.suppress(OSError):
            path.unlink()


def chosen_rate(records: Mapping[str, Mapping[str, Any]], method: Method, rates: Sequence[float]) -> float:
    """Return the rate with the lowest held-out loss, with seed 0; the lowest rate if all diverged."""
    found = {rate: records[Task(method, 0, rate).key]["validation_loss"] for rate in rates}
    there = {rate: loss for rate, loss in found.items() if loss is not None}
    return min(there, key=lambda rate: there[rate]) if there else min(rates)


def generated_in(path: Path) -> list[Generated]:
    """Return every method in a results file that was finished with all of the file's seeds.

    Parameters
    ----------
    path : Path
        A ``results.jsonl``.

    Returns
    -------
    list of Generated
        The base first. Each at the rate that was best with the first seed, among those that all seeds have.

    Raises
    ------
    OSError, ValueError, KeyError
        If it cannot be read, or is not a results file.
    """
    records = {line["key"]: line for line in read_lines(path) if "key" in line}
    methods = dict.fromkeys(method_in(line) for line in records.values())
    seeds = sorted({line["seed"] for line in records.values()})
    found = []
    for method in sorted(methods, key=lambda method: method.config is not None):
        rates = sorted({line["rate"] for line in records.values() if method_in(line) == method})
        whole = [rate for rate in rates if all(Task(method, seed, rate).key in records for seed in seeds)]
        if whole:
            found.append(_point(method, chosen_rate(records, method, whole), seeds, records))
    return found


def _point(method: Method, rate: float, seeds: Sequence[int], records: Mapping[str, Mapping[str, Any]]) -> Generated:
    lines = tuple(records[Task(method, seed, rate).key] for seed in seeds)
    return Generated(method.family, method.label, lines[0]["parameters"], rate, lines)
