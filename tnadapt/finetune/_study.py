"""A study: all trainings of a comparison, planned, run or found in earlier results, and reported."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gc
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tnadapt import torch as tnt
from tnadapt.algebra import presets
from tnadapt.algebra.units import RATE
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer, wrong_argument
from tnadapt.checkpoints.adapter_format import load_single
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import ConfigError, FileError, TnadaptError
from tnadapt.report import ProgressBar, about, time_left

from ._pretrained import open_problem
from ._specification import Spec
from .engines import Do, Engine, discard, open_engine, run_tasks, threads
from .grid import BASE, HEAD, Chooser, Method, Task
from .loop import evaluate, steps_of
from .pareto_report import Control, Point, best_point, better_rate, control_of, points_of, trained_on
from .problem import Problem, base_digest, samples_digest
from .results import Results, check_out
from .together import Together, doing, grouped, lines_of, tasks_of
from .training import Training, checked_rates, clear_logs, log_folder, seconds_of, train_together

# -- The check of a saved adapter --------------------------------------------------------------------------------------


class Proof(NamedTuple):
    """The result of :func:`prove`.

    Attributes
    ----------
    samples : int
        Number of test samples.
    loaded_same : bool
        Whether the adapter, loaded from its file on a fresh base, predicts the same as the trained one.
    merged_different : int
        Number of samples for which the merged model predicts something else than the loaded one.
    largest : float
        The largest difference in a logit between the two; of language models, in the loss of a token.
    """

    samples: int
    loaded_same: bool
    merged_different: int
    largest: float

    @property
    def holds(self) -> bool:
        """Whether all predictions are the same."""
        return self.loaded_same and not self.merged_different


def prove(problem: Problem, record: Mapping[str, Any], path: Path, training: Training) -> Proof:
    """Load an adapter on a fresh base and predict the test samples, then merge it and predict them again.

    Parameters
    ----------
    problem : Problem
    record : mapping
        The result line of the training that produced it.
    path : Path
        The adapter's file.
    training : Training
        Only its ``device`` and ``batch`` are used.

    Returns
    -------
    Proof

    Raises
    ------
    FileError
        If the file is damaged or does not fit the base.
    """
    where = torch.device(training.device)
    # A different seed, which proves that the head comes from the file.
    model = problem.build(record["seed"] + 1).to(where)
    adapter = tnt.load(model, path)
    part = problem.parts["test"]
    loaded = evaluate(model, problem.logits, problem.task, part, where, training.batch)
    adapter.merge()
    merged = evaluate(model, problem.logits, problem.task, part, where, training.batch)
    return Proof(
        len(part.labels),
        problem.task.digest(loaded) == record["predictions"],
        problem.task.different(loaded, merged),
        problem.task.largest_gap(loaded, merged),
    )


# -- The study ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Trainings:
    """The :class:`~tnadapt.finetune.engines.Work` of a study, which is sent to workers."""

    spec: Spec
    training: Training
    adapters: Path

    def open(self) -> Do:
        return self.of(open_problem(self.spec))

    def of(self, problem: Problem) -> Do:
        return doing(lambda tasks, progress: train_together(problem, tasks, self.training, self.adapters, progress))


class _Proofs(_Trainings):
    """The work of checking a saved adapter on the training's device."""

    def of(self, problem: Problem) -> Do:
        return lambda task, progress: prove(problem, task.record, task.path, self.training)._asdict()


@dataclasses.dataclass(frozen=True)
class _Saved:
    """A saved adapter, with the result line of its training."""

    record: Mapping[str, Any]
    path: Path

    @property
    def key(self) -> str:
        return f"proof of {self.record['key']}"

    name = key  # in messages


class Reporter:
    """Receives the progress of a study and ignores it; override the methods to show it."""

    def preparing(self, what: str, done: float) -> None:
        """Report the fraction done of pretraining the base."""

    def begins(self, tasks: int, finished: int) -> None:
        """Report the total number of trainings and the number already finished."""

    def estimated(self, seconds: float) -> None:
        """Report about how many seconds the trainings take that are not finished, before they start on this machine."""

    def training(self, task: Task, done: float) -> None:
        """Report the fraction done of a training."""

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        """Report a finished training and its result line."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a study.

    Attributes
    ----------
    points : list of Point
    best : Point, optional
        The adapter with the best validation score; None if only the head was trained.
    adapter : Path, optional
        Its file.
    proof : Proof, optional
        The check that the file, loaded and merged, predicts the same.
    picture : Path, optional
        None if matplotlib is not installed.
    trained, reused : int
        Number of trainings run now, and found in earlier results.
    control : Control, optional
        The best adapter against the head alone, or the untrained base.
    """

    points: list[Point]
    best: Point | None
    adapter: Path | None
    proof: Proof | None
    picture: Path | None
    trained: int
    reused: int
    control: Control | None = None


#: Timing single methods ends after so many seconds, or after this share of what the timed ones will take.
_TIMING, _TIMING_SHARE = 2.0, 0.02


class Study:
    """A comparison of methods on one problem, in one folder.

    Parameters
    ----------
    spec : Spec
        The model and the data.
    choice : Choice, or an object with its ``methods``
        The methods to compare.
    training : Training
        The settings of each training.
    rates : sequence of float, optional
        Learning rates; every method is trained with all of them. By default the one that suits the base:
        :func:`tnadapt.learning_rate` of the targets.
    seeds : int
        Number of seeds, 0 to ``seeds - 1``, for every method and rate.
    reporter : Reporter, optional
    tuned_by : int, optional
        The number of seeds with which every rate is tried; the other seeds use only the best rate. All by default.

    Attributes
    ----------
    problem : Problem
    targets : list of Target
        The weights that are adapted.
    methods : list of Method

    Raises
    ------
    TnadaptError
        If the problem cannot be opened, there are no targets, or a method does not fit them.
    """

    @checks_arguments
    def __init__(
        self,
        spec: Spec,
        choice: Chooser,
        training: Training,
        rates: Sequence[float] | None = None,
        seeds: int = 1,
        reporter: Reporter | None = None,
        tuned_by: int | None = None,
    ) -> None:
        if rates is not None:
            checked_rates(rates)
        if not callable(getattr(choice, "methods", None)):
            raise wrong_argument("choice", "a Choice, or an object with methods()", choice)
        self.tuned_by = tuned_by
        self.spec = spec
        self.seeds = range(integer("seeds", seeds, 0, 1 << 20, ConfigError))
        self.reporter = Reporter() if reporter is None else reporter
        self.problem: Problem = open_problem(spec, self.reporter.preparing)
        self.training = _with_enough_steps(training, len(self.problem.parts["training"].labels))
        # Everything is checked on a sketch, before a base is pretrained.
        model = self.problem.sketch() if self.problem.sketch else self.problem.build(0)
        if self.problem.sketch is None:
            self._base_digest = base_digest(model, self.problem.drawn)
        self.targets = tnt.find_targets(model, training.selection)
        self.layers = [target.layer for target in self.targets]
        self.shapes = [target.shape for target in self.targets]
        self.roles = [target.role for target in self.targets]
        self.methods = self._chosen(choice)
        suited = self._suited_rate(model, needed=rates is None)
        self.rates = [suited] if rates is None else sorted(set(rates))
        if self.problem.keep_trainable and training.optimiser == "adamw" and training.head_rate is None:
            factor = RATE / suited if training.head_factor is None else training.head_factor
            self.training = dataclasses.replace(self.training, head_factor=factor)
        tuning = self.seeds[:tuned_by]
        self.tasks = [
            Task(method, seed, rate) for seed in tuning for method in self.methods for rate in self._rates(method)
        ]

    def _suited_rate(self, model: torch.nn.Module, needed: bool) -> float:
        """Return the learning rate that suits the base, of which the model, a copy, gets an adapter."""
        if needed and (self.training.optimiser != "adamw" or any(map(_trains_arrays, self.methods))):
            raise TnadaptError(
                "no learning rate was given (--lr, rates=), and the default is for AdamW and configs with rate='adam', "
                "as presets have"
            )
        if self.problem.rate is not None:
            return self.problem.rate
        try:
            return tnt.attach(model, presets.lora(1), self.training.selection).learning_rate()
        except TnadaptError as error:
            if needed:
                raise TnadaptError(f"no learning rate was given (--lr, rates=): {error}") from None
            return RATE

    def _rates(self, method: Method) -> list[float]:
        """Return the rates to train with, which is a single unused one for the untrained base."""
        return self.rates[:1] if method.family == BASE else self.rates

    def _chosen(self, choice: Chooser) -> list[Method]:
        methods = choice.methods(self.shapes, len(set(self.layers)))
        if not (self.problem.task.needs_head or self.problem.keep_trainable):
            methods = [Method(BASE, "", None) if method.family == HEAD else method for method in methods]
        for method in methods:
            if method.config is not None:
                try:
                    UpdatePlan(method.config, self.shapes, self.layers, self.roles)
                except TnadaptError as error:
                    raise TnadaptError(f"{method.name} does not fit the targets: {error}") from None
        # Methods with equal configs but different names share one training.
        return list({Task(method, 0, 1.0).key: method for method in reversed(methods)}.values())[::-1]

    @functools.cached_property
    def _base_digest(self) -> str:
        return base_digest(self.problem.build(0), self.problem.drawn)

    @functools.cached_property
    def _data_digest(self) -> str:
        return samples_digest(self.problem.parts)

    @property
    def steps(self) -> int:
        """Number of steps of each training."""
        return steps_of(self.problem.parts["training"], self.training.epochs, self.training.batch, self.training.steps)

    def parameters(self, method: Method) -> int:
        """Return the number of parameters of a method's adapter on these targets."""
        if method.config is None:
            return 0
        return UpdatePlan(method.config, self.shapes, self.layers, self.roles).num_parameters

    def settings(self) -> dict[str, Any]:
        """Return everything that the outcome of a training depends on, except method, seed and rate.

        Raises
        ------
        FileError
            If the base had to be pretrained to compute its digest, and the cache cannot be written.
        """
        return {**self.outline(), "base_digest": self._base_digest}

    def outline(self) -> dict[str, Any]:
        """Return the settings that are known without the base: all but its digest."""
        return {
            "problem": self.problem.name,
            "classes": list(self.problem.classes),
            "samples": {name: len(part.labels) for name, part in self.problem.parts.items()},
            "keep": list(self.problem.keep_trainable),
            "targets_found": [target.to_list() for target in self.targets],
            "image_size": self.spec.image_size,
            "max_length": self.spec.max_length,
            **self.problem.task.settings(),
            "data_digest": self._data_digest,
            **self.training.settings(),
        }

    @checks_arguments
    def run(
        self,
        out: Path,
        jobs: int | None = None,
        fresh: bool = False,
        engine: str | Engine = "local",
        options: Mapping[str, str] | None = None,
        together: int | None = None,
    ) -> Outcome:
        """Run the trainings that are not finished yet, and report on all.

        Parameters
        ----------
        out : Path
            The folder for ``results.jsonl``, ``pareto.png``, ``best.safetensors`` and the adapters; created if needed.
        jobs : int, optional
            Number of parallel trainings; several run in separate processes (a script then needs
            ``if __name__ == "__main__"``). 0 means one per core if a training needs one thread, else 1; on a cluster,
            as many as it can run. By default 1 on this machine, and 0 on a cluster.
        fresh : bool
            Discard the results of an earlier run in that folder.
        engine : str or Engine
            Where parallel trainings run: see :func:`~tnadapt.finetune.run_tasks`.
        options : mapping of str to str, optional
            Settings of the engine.
        together : int, optional
            The largest number of trainings of one setting, at several rates and seeds, that are members of one run;
            0 for all, halved while a GPU's memory does not hold them. Each gets what it gets alone, up to rounding;
            where members would not, as with dropout, they are trained one after another. By default 0 on a GPU and
            1 on a CPU; always 1 if trainings are reported.

        Returns
        -------
        Outcome

        Raises
        ------
        FileError
            If the folder cannot be used: see :class:`~tnadapt.finetune.results.Results`.
        TnadaptError
            If the engine cannot be used, or a training failed.
        """
        if not isinstance(engine, Engine):
            engine = open_engine(engine, jobs, options, self.problem.threads == 1 and self.training.device == "cpu")
        if self.training.report_to != "none":
            together = 1
        usual = 0 if torch.device(self.training.device).type == "cuda" else 1
        most = integer("together", usual if together is None else together, 0, 1 << 20, ConfigError)
        check_out(out)
        adapters = out / "adapters"
        with Results(out / "results.jsonl", self.settings(), fresh) as results:
            for name in results.dropped:
                with contextlib.suppress(OSError):
                    (adapters / name).unlink()
                clear_logs(log_folder(adapters, name))
            if fresh:
                discard(out)
            before = len(results.records)
            finished = sum(task.key in results.records for task in self.tasks)
            rest = self.seeds[self.tuned_by :] if self.tuned_by else ()
            self.reporter.begins(len(self.tasks) + len(rest) * len(self.methods), finished)
            self._estimate([task for task in self.tasks if task.key not in results.records], len(rest), engine)
            self._train_missing(self.tasks, results, adapters, engine, most)
            metric = self.problem.task.metric
            tuned = {
                method: better_rate(results.records, method, self.rates, self.seeds[: self.tuned_by], metric)
                for method in self.methods
            }
            others = [Task(method, seed, rate) for seed in rest for method, rate in tuned.items() if rate is not None]
            self._train_missing(others, results, adapters, engine, most)
            trained = len(results.records) - before
            points = points_of(results.records, self.methods, self.rates, self.seeds, self.tuned_by, metric)
            best = best_point(points)
            control = control_of(points, best)
            adapter, proof = self._saved(best, results, adapters, engine, most) if best else (None, None)
        picture = self._draw(points, out / "pareto.png")
        reused = len(self.tasks) + len(others) - trained
        return Outcome(points, best, adapter, proof, picture, trained, reused, control)

    def _estimate(self, missing: Sequence[Task], later: int, engine: Engine) -> None:
        """Time two steps of some methods, and report how long these tasks and those of later seeds take."""
        if not missing or engine.device(None) is not None:  # else the workers are machines of another speed
            return
        jobs = max(1, min(engine.jobs, len(missing)))
        counts = collections.Counter(task.method for task in missing)
        timed: dict[Method, float] = {}
        began = math.inf
        with threads(engine.threads(self.problem.threads, jobs)):
            for method in counts:
                if time.monotonic() - began > max(_TIMING, _TIMING_SHARE * sum(timed.values())):
                    break
                try:
                    timed[method] = seconds_of(self.problem, Task(method, 0, self.rates[0]), self.training)
                except Exception:  # its training reports the error, with the results of others saved
                    break
                began = min(began, time.monotonic())  # the first one also loads what all need
        gc.collect()  # models are in cycles of references
        torch.cuda.empty_cache()  # the memory is for the workers
        if not timed:
            return
        usual = statistics.fmean(timed.values())
        total = sum(timed.get(method, usual) * (count + later) for method, count in counts.items())
        self.reporter.estimated(total / jobs)

    def _train_missing(
        self, tasks: Sequence[Task], results: Results, adapters: Path, engine: Engine, most: int
    ) -> None:
        missing = [task for task in tasks if task.key not in results.records]
        if missing:
            results.begin_session(engine=engine.name, jobs=engine.jobs, device=self.training.device)
        # Even if none is missing: a killed program may have left files of its workers.
        self._train(_calls(missing, most), results, adapters, engine)

    def _train(self, calls: Sequence[Task | Together], results: Results, adapters: Path, engine: Engine) -> None:
        def report(call: Task | Together, done: float) -> None:
            for task in tasks_of(call):
                self.reporter.training(task, done)

        work = _Trainings(self.spec, self.training, adapters)
        ended = run_tasks(
            work, calls, adapters.parent, engine=engine, threads=self.problem.threads, study=results.digest,
            known=results.records.keys(), progress=report, do=work.of(self.problem),
        )  # fmt: skip
        with contextlib.closing(ended):  # on an exception here, the workers must end immediately
            for call, line in ended:
                for task, record in zip(tasks_of(call), lines_of(call, line), strict=True):
                    results.add(record)
                    self.reporter.finished(task, record)

    def _saved(self, best: Point, results: Results, adapters: Path, engine: Engine, most: int) -> tuple[Path, Proof]:
        # The seed with the best validation score.
        quality = best.metric.quality
        record = max(best.records, key=lambda line: (quality(line["validation"]), -line["seed"]))
        task = Task(best.method, record["seed"], best.rate)
        calls, trained = len(_calls(self.tasks, most)), adapters / task.file_name()
        try:
            load_single(trained, check_draws=False)
        except FileError:  # it is missing or damaged
            self.reporter.begins(1, 0)
            self._train([task], results, adapters, engine)
            record, calls = results.records[task.key], 1
        path = adapters.parent / "best.safetensors"
        replace_file(str(path), trained.read_bytes())
        work = _Proofs(self.spec, self.training, adapters)
        # The same number of threads as in training: another number would change the order of sums, and so the rounding.
        share = engine.threads(self.problem.threads, calls)
        ((_, line),) = run_tasks(
            work, [_Saved(record, path)], path.parent, engine=engine, threads=share, study=results.digest,
            do=work.of(self.problem),
        )  # fmt: skip
        return path, Proof(**line)

    def _draw(self, points: Sequence[Point], path: Path) -> Path | None:
        from tnadapt.plot import Axis, Mark, pareto

        metric = self.problem.task.metric
        axis = Axis(f"test {metric.unit}", metric.percent, metric.lower)
        marks = [
            Mark(point.method.family, point.method.label, point.parameters, point.test, point.front) for point in points
        ]
        samples = [len(part.labels) for part in self.problem.parts.values()]
        title = f"Adapting {len(self.targets)} weights to {self.problem.name}"
        note = trained_on(samples, len(self.seeds), len(self.rates))
        with contextlib.suppress(ImportError):
            pareto(marks, path, title=title, note=note, axis=axis)
            return path
        return None


def _with_enough_steps(training: Training, samples: int) -> Training:
    """Return the settings with the epochs that take ``least_steps`` steps on so many samples."""
    if not training.least_steps or training.steps is not None:
        return training
    epochs = math.ceil(training.least_steps / math.ceil(samples / training.batch))
    return dataclasses.replace(training, epochs=max(training.epochs, epochs))


def _trains_arrays(method: Method) -> bool:
    """Return whether a method trains its arrays themselves, which have no common rate."""
    return method.config is not None and method.config.rate == "sgd"


def _calls(tasks: Sequence[Task], most: int) -> list[Task | Together]:
    """Return what engines run: the trainings of one setting together, at most so many."""
    return grouped(tasks, most, lambda task: Task(task.method, 0, 1.0).key)


# -- Progress bar of the trainings -------------------------------------------------------------------------------------


class BarReporter(Reporter):
    """Shows the progress of a study in a bar, for notebooks: ``Study(…, reporter=BarReporter(bar))``.

    Parameters
    ----------
    bar : ProgressBar

    Examples
    --------
    >>> import tnadapt as tna
    >>> with tna.ProgressBar("digits") as bar:
    ...     reporter = BarReporter(bar)
    ...     reporter.begins(tasks=6, finished=3)
    ...     bar.words
    '3 of 6 trainings'
    """

    def __init__(self, bar: ProgressBar) -> None:
        self.bar = bar
        self.tasks = self.ended = self.before = 0
        self.running: dict[str, float] = {}
        self.start = self.expected = 0.0

    def preparing(self, what: str, done: float) -> None:
        """Show the fraction done of pretraining the base."""
        self.bar.update(done, what)

    def begins(self, tasks: int, finished: int) -> None:
        """Show how many trainings were finished before."""
        self.tasks, self.ended, self.before = tasks, finished, finished
        self.expected = 0.0
        self._start()

    def estimated(self, seconds: float) -> None:
        """Show how long the trainings take, until a tenth of them tells."""
        self.expected = seconds
        self._start()

    def _start(self) -> None:
        self.start = time.monotonic()
        self._show("")

    def training(self, task: Task, done: float) -> None:
        """Show the trainings that run."""
        self.running[task.key] = done
        self._show(task.name)

    def finished(self, task: Task, record: Mapping[str, Any]) -> None:
        """Show one training more."""
        self.running.pop(task.key, None)
        self.ended += 1
        self._show(task.name)

    def left(self) -> str:
        """Return how long the trainings that are left take, at the speed so far: ``"about 12 minutes"``."""
        done = self.ended + sum(self.running.values()) - self.before
        share = min(1.0, done / max(1, self.tasks - self.before))
        if self.expected and share < 0.1:
            return about(self.expected * (1 - share))
        return time_left(time.monotonic() - self.start, share)

    def _show(self, name: str) -> None:
        words = ", ".join(filter(None, (f"{self.ended} of {self.tasks} trainings", self.left())))
        done = (self.ended + sum(self.running.values())) / max(1, self.tasks)
        self.bar.update(min(1.0, done), f"{words}: {name}" if name else words)
