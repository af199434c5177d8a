"""What results say: every setting at its default rate and at its best one, and differences paired over seeds."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paper.paired_statistics import interval

from .methods import BASE, CONTROLS, DENSE
from .tasks import QualityTask
from .tuning import held_out, trains

Lines = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One setting at the rate with the most seeds: the default, or in older results the best of the rates tried."""

    method: str
    title: str
    library: str
    label: str
    budget: int
    parameters: int
    kept: int
    rate: float
    #: All rates that were tried, sorted.
    tried: tuple[float, ...]
    #: The number of seeds with three rates or more (all, if there are fewer), by which the best rate was chosen.
    tuned_by: int
    #: The rate that is best on the held-out part, and its mean test score over those seeds; None if it diverged.
    best_rate: float
    best_test: float | None
    #: Scores by seed.
    held_out: Mapping[int, float]
    test: Mapping[int, float]
    #: Whether a seed diverged at the chosen rate; then there are no scores.
    diverged: bool = False
    #: The error that a training at the chosen rate raised; empty if none did.
    failed: str = ""
    #: The settings, as JSON values.
    config: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The title, with the library if it is not tnadapt."""
        return f"{self.title} (PEFT)" if self.library == "PEFT" else self.title

    @property
    def measured(self) -> bool:
        """Whether it has scores."""
        return bool(self.test) and not self.diverged and not self.failed

    @property
    def mean(self) -> float:
        """The mean test score."""
        return statistics.fmean(self.test.values())

    @property
    def spread(self) -> float:
        """The standard deviation of the test score over seeds; 0 for one seed."""
        return statistics.stdev(self.test.values()) if len(self.test) > 1 else 0.0

    @property
    def edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried."""
        return len(self.tried) > 1 and self.best_rate in (self.tried[0], self.tried[-1])


@dataclasses.dataclass(frozen=True)
class Difference:
    """A mean difference over the seeds that two settings share, and its 95 % interval of Student's t."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def outcomes_of(task: QualityTask, lines: Iterable[Mapping[str, Any]], every: bool = False) -> list[Outcome]:
    """Return an outcome for each setting in some result lines, in the order in which they first appear.

    Settings without the largest number of seeds are unfinished, and only there if ``every`` is true. What trains
    nothing has its one score with every seed.
    """
    settings: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for line in lines:
        settings.setdefault(setting_of(line), []).append(line)
    outcomes = [_outcome(task, trainings) for trainings in settings.values()]
    seeds = max((outcome.test.keys() for outcome in outcomes), key=len, default=dict[int, float]().keys())
    outcomes = [_with_seeds(outcome, seeds) if untrained(task, outcome) else outcome for outcome in outcomes]
    return [one for one in outcomes if every or not one.measured or len(one.test) == len(seeds)]


def untrained(task: QualityTask, outcome: Outcome) -> bool:
    """Return whether nothing was trained."""
    return outcome.library == "control" and not trains(task, outcome.method)


def _with_seeds(outcome: Outcome, seeds: Iterable[int]) -> Outcome:
    held_out, test = (next(iter(scores.values()), None) for scores in (outcome.held_out, outcome.test))
    if held_out is None or test is None:
        return outcome
    return dataclasses.replace(
        outcome, held_out=dict.fromkeys(sorted(seeds), held_out), test=dict.fromkeys(sorted(seeds), test)
    )


def setting_of(line: Mapping[str, Any]) -> tuple[str, str]:
    """Return the method and the settings of a result line, the same for all of its rates and seeds."""
    return line["method"], json.dumps(line["config"], sort_keys=True)


def _outcome(task: QualityTask, lines: Lines) -> Outcome:
    by_rate: dict[float, dict[int, Mapping[str, Any]]] = {}
    for line in lines:
        by_rate.setdefault(line["rate"], {})[line["seed"]] = line
    chosen, tuned_by = _chosen(task, by_rate)
    own = by_rate[chosen]
    best_rate, best_test = _best(task, by_rate, tuned_by)
    failed = next((line["failed"] for line in own.values() if "failed" in line), "")
    diverged = any(line["diverged"] or line["validation"] is None or line["test"] is None for line in own.values())
    first = lines[0]
    scores = {} if diverged or failed else own
    return Outcome(
        first["method"], first["title"], first["library"], first["label"], first["budget"], first["parameters"],
        max(line["kept"] for line in lines), chosen, tuple(sorted(by_rate)), tuned_by, best_rate, best_test,
        {seed: line["validation"] for seed, line in sorted(scores.items())},
        {seed: line["test"] for seed, line in sorted(scores.items())}, diverged, failed, first["config"],
    )  # fmt: skip


def _chosen(task: QualityTask, by_rate: Mapping[float, Mapping[int, Mapping[str, Any]]]) -> tuple[float, int]:
    """Return the rate that was chosen, and by how many seeds; the lines of a rate are by seed.

    An earlier run in the same folder, with fewer seeds or other rates, may have left rates with fewer seeds, and
    another choice. So not all rates count: the chosen one has the most seeds, since only it is trained with all of
    them. Every plan tries at least three rates with the tuning seeds; thus the three with the most seeds have these.
    """
    counts = sorted((len(own) for own in by_rate.values()), reverse=True)
    complete = sorted(rate for rate, own in by_rate.items() if len(own) == counts[0])
    shared = sorted(set.intersection(*(set(by_rate[rate]) for rate in complete)))
    tuned_by = counts[min(2, len(counts) - 1)]
    tuning = shared[:tuned_by]
    return max(complete, key=lambda rate: held_out(task, [by_rate[rate][seed] for seed in tuning])), tuned_by


def _best(
    task: QualityTask, by_rate: Mapping[float, Mapping[int, Mapping[str, Any]]], tuned_by: int
) -> tuple[float, float | None]:
    """Return the best rate by the seeds with which rates were tried, and its mean test score."""
    seeds = sorted(max(by_rate.values(), key=len))[:tuned_by]
    tried = {
        rate: [lines[seed] for seed in seeds]
        for rate, lines in sorted(by_rate.items())
        if all(seed in lines for seed in seeds)
    }
    rate = max(tried, key=lambda rate: held_out(task, tried[rate]))
    tests = [line["test"] for line in tried[rate]]
    return rate, None if None in tests or not held_out(task, tried[rate])[0] else statistics.fmean(tests)


def difference(task: QualityTask, one: Outcome, other: Outcome) -> Difference | None:
    """Return how much better one setting's test score is than another's; None if they share no seed.

    With each seed, all settings have the same new head and the same order of samples, so differences are paired.
    """
    seeds = sorted(one.test.keys() & other.test.keys())
    if not seeds:
        return None
    gains = [task.quality(one.test[seed]) - task.quality(other.test[seed]) for seed in seeds]
    return Difference(*interval(gains), len(seeds))


def at_budget(outcomes: Sequence[Outcome], budget: int) -> list[Outcome]:
    """Return the measured outcomes at a budget."""
    return [one for one in outcomes if one.budget == budget and one.library != "control" and one.measured]


def leader_of(task: QualityTask, outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the setting with the best mean score on the held-out part; test scores play no role."""
    if not outcomes:
        return None
    return max(outcomes, key=lambda one: statistics.fmean(map(task.held_out_quality, one.held_out.values())))


def improves(task: QualityTask, one: Outcome, control: Outcome | None) -> bool:
    """Return whether a setting is decided to be better than a control; True if that was not measured."""
    gain = None if control is None else difference(task, one, control)
    return gain is None or (gain.decided and gain.mean > 0.0)


def control_of(task: QualityTask, outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the control with the best held-out score."""
    names = [control.name for control in CONTROLS]
    return leader_of(task, [outcome for outcome in outcomes if outcome.method in names and outcome.measured])


def tells(task: QualityTask, outcomes: Sequence[Outcome]) -> bool:
    """Return whether dense updates gain at least three standard errors over the best control."""
    control, dense = control_of(task, outcomes), dense_of(outcomes)
    if control is None or dense is None:
        return False
    gains = [task.quality(dense.test[seed]) - task.quality(control.test[seed]) for seed in dense.test]
    return statistics.fmean(gains) >= 3.0 * statistics.stdev(gains) / math.sqrt(len(gains)) if gains[1:] else False


def dense_of(outcomes: Sequence[Outcome]) -> Outcome | None:
    """Return the control with dense updates."""
    return next((one for one in outcomes if one.method == DENSE.name and one.measured), None)


def share(task: QualityTask, one: Outcome, outcomes: Sequence[Outcome], held_out: bool = False) -> float | None:
    """Return a setting's gain over the best control, divided by that of dense updates; None if that is not positive."""
    control, dense = control_of(task, outcomes), dense_of(outcomes)
    if control is None or dense is None:
        return None

    def quality(of: Outcome) -> float:
        if held_out:
            return statistics.fmean(map(task.held_out_quality, of.held_out.values()))
        return statistics.fmean(map(task.quality, of.test.values()))

    whole = quality(dense) - quality(control)
    return (quality(one) - quality(control)) / whole if whole > 0 else None


def half_learned(task: QualityTask, outcomes: Sequence[Outcome]) -> float | None:
    """Return the number of parameters at which tnadapt's best methods reach half the gain of dense updates.

    The best ones at each budget by held-out score, joined by straight lines in the logarithm of their numbers. None if
    none reaches half of it; the smallest number if all do.
    """
    ours = [outcome for outcome in outcomes if outcome.library == "tnadapt"]
    before: tuple[float, float] | None = None
    for budget in sorted({outcome.budget for outcome in ours}):
        best = leader_of(task, at_budget(ours, budget))
        reached = None if best is None else share(task, best, outcomes)
        if best is None or reached is None:
            continue
        if reached >= 0.5:
            if before is None:
                return float(best.parameters)
            part = (0.5 - before[1]) / (reached - before[1])
            return float(before[0] * (best.parameters / before[0]) ** part)
        before = best.parameters, reached
    return None


def added_by_search(task: QualityTask, outcomes: Sequence[Outcome]) -> float | None:
    """Return what the best rate that was tried adds to the default one, in gains of dense updates.

    The median of tnadapt's methods, by the seeds with which rates were tried, on test samples. None if no method has
    its default rate, or dense updates gain nothing.
    """
    control, dense = control_of(task, outcomes), dense_of(outcomes)
    if control is None or dense is None:
        return None
    whole = task.quality(dense.mean) - task.quality(control.mean)
    added = [
        task.quality(one.best_test) - statistics.fmean(task.quality(one.test[seed]) for seed in seeds)
        for one in outcomes
        if one.library == "tnadapt" and one.measured and one.best_test is not None and len(one.tried) > 1
        for seeds in [sorted(one.test)[: one.tuned_by]]
    ]
    return statistics.median(added) / whole if added and whole > 0 else None


def worse_than_base(task: QualityTask, outcomes: Sequence[Outcome]) -> tuple[int, int] | None:
    """Return how many of tnadapt's settings are worse than the base with some seed, and how many there are.

    All are at their default rates. Settings that diverged count as worse. None if the base was not measured.
    """
    base = next((one for one in outcomes if one.method == BASE.name and one.measured), None)
    if base is None:
        return None
    ours = [one for one in outcomes if one.library == "tnadapt"]
    worse = [
        one
        for one in ours
        if not one.measured
        or any(task.quality(score) < task.quality(base.test.get(seed, base.mean)) for seed, score in one.test.items())
    ]
    return len(worse), len(ours)


def spread_of_methods(task: QualityTask, outcomes: Sequence[Outcome], budget: int) -> tuple[float, float] | None:
    """Return the shares of the gain that the median and the best of tnadapt's methods reach at a budget."""
    here = [outcome for outcome in at_budget(outcomes, budget) if outcome.library == "tnadapt"]
    shares = [reached for outcome in here if (reached := share(task, outcome, outcomes)) is not None]
    return (statistics.median(shares), max(shares)) if len(shares) > 1 else None
