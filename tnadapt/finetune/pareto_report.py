"""Evaluation of a study: each method at its best rate, the Pareto front, the table, and a control without adapters."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments

from ._learning_task import ACCURACY, Metric
from .data import PARTS
from .grid import BASE, HEAD, Method, Task
from .results import read_lines
from .tasks import TASKS

# -- Points, the Pareto front, and the table ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """One method at the rate with the best validation score.

    Attributes
    ----------
    method : Method
    parameters : int
        Number of parameters of the adapter, without kept parameters.
    kept : int
        Number of parameters that are trained in addition: the head.
    rate : float
    validation, test : tuple of float
        Scores, one per seed.
    seconds : float
        Mean duration of a training.
    records : tuple of mapping
        The result lines, one per seed.
    front : bool
        Whether no other point has at most as many parameters and a better test score.
    metric : Metric
        What the scores are.
    """

    method: Method
    parameters: int
    kept: int
    rate: float
    validation: tuple[float, ...]
    test: tuple[float, ...]
    seconds: float
    records: tuple[Mapping[str, Any], ...] = dataclasses.field(repr=False)
    front: bool = False
    metric: Metric = ACCURACY

    @property
    def score(self) -> float:
        """The mean test score over seeds."""
        return statistics.fmean(self.test)

    @property
    def diverged(self) -> bool:
        """Whether the training diverged with some seed; then it did so at every rate."""
        return any(record["diverged"] for record in self.records)

    @property
    def spread(self) -> float:
        """The standard deviation of the test score over seeds; 0 for one seed."""
        return statistics.stdev(self.test) if len(self.test) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the point as JSON values."""
        return {
            "family": self.method.family,
            "label": self.method.label,
            "config": None if self.method.config is None else self.method.config.to_dict(),
            "parameters": self.parameters,
            "kept": self.kept,
            "rate": self.rate,
            "validation": list(self.validation),
            "test": list(self.test),
            "seconds": round(self.seconds, 2),
            "front": self.front,
        }


def points_of(
    records: Mapping[str, Mapping[str, Any]],
    methods: Sequence[Method],
    rates: Sequence[float],
    seeds: Sequence[int],
    tuned_by: int | None = None,
    metric: Metric = ACCURACY,
) -> list[Point]:
    """Return one point per method, at the rate with the best mean validation score; ties go to the lower loss.

    Rates at which a seed diverged rank after all others.

    Parameters
    ----------
    records : mapping of str to mapping
        Result lines by key.
    methods, rates, seeds : sequence
        Only combinations with results for all seeds are considered.
    tuned_by : int, optional
        The number of seeds by which the rate is chosen; all by default.
    metric : Metric
        What the scores are.

    Returns
    -------
    list of Point
        With the front marked.
    """
    points = []
    for method in methods:
        rate = better_rate(records, method, rates, seeds[:tuned_by], metric)
        if rate is not None and (chosen := _complete(records, method, rate, seeds)):
            validation, test = (tuple(_score(line, part, metric) for line in chosen) for part in ("validation", "test"))
            seconds, first = statistics.fmean(line["seconds"] for line in chosen), chosen[0]
            points.append(Point(
                method, first["parameters"], first["kept"], rate, validation, test, seconds, tuple(chosen),
                metric=metric,
            ))  # fmt: skip
    front = set(pareto_front([(p.parameters, -math.inf if p.diverged else metric.quality(p.score)) for p in points]))
    return [dataclasses.replace(point, front=index in front) for index, point in enumerate(points)]


def better_rate(
    records: Mapping[str, Mapping[str, Any]],
    method: Method,
    rates: Sequence[float],
    seeds: Sequence[int],
    metric: Metric = ACCURACY,
) -> float | None:
    """Return the best of the rates with results for all these seeds, or None."""
    tried = [(rate, lines) for rate in rates if (lines := _complete(records, method, rate, seeds))]
    return max(tried, key=lambda pair: _quality(pair[1], metric))[0] if tried else None


def _complete(
    records: Mapping[str, Mapping[str, Any]], method: Method, rate: float, seeds: Sequence[int]
) -> list[Mapping[str, Any]]:
    """Return the result lines of these trainings; empty if any is missing."""
    lines = [records.get(Task(method, seed, rate).key) for seed in seeds]
    return [line for line in lines if line is not None] if None not in lines else []


def points_in(path: str | os.PathLike[str], rates: Sequence[float] = ()) -> list[Point]:
    """Return the points of a results file, for all its methods, rates and seeds.

    Parameters
    ----------
    path : path-like
        A ``results.jsonl``.
    rates : sequence of float
        If given, consider only these.

    Returns
    -------
    list of Point
        As from :func:`points_of`.

    Raises
    ------
    OSError, ValueError
        If it cannot be read, or is not a results file.
    """
    lines = read_lines(path)
    records = {line["key"]: line for line in lines if "key" in line}
    task = next((line["study"].get("task") for line in lines if "study" in line), None)
    methods = dict.fromkeys(map(method_in, records.values()))
    every, seeds = (sorted({line[name] for line in records.values()}) for name in ("rate", "seed"))
    rates = rates or every
    # The rate was chosen by the leading seeds that have results for every rate.
    whole = [all(_complete(records, method, rate, [seed]) for method in methods for rate in rates) for seed in seeds]
    tuned_by = whole.index(False) if False in whole else len(whole)
    metric = TASKS.find(task["name"]).metric if task else ACCURACY
    return points_of(records, list(methods), rates, seeds, max(1, tuned_by), metric)


def method_in(line: Mapping[str, Any]) -> Method:
    """Return the method of a result line."""
    # Lines of one method differ only in the seed, which Task inserts into the config again.
    config = line["config"] and Config.from_dict(line["config"]).replace(seed=0)
    return Method(line["family"], line["label"], config)


def _score(record: Mapping[str, Any], part: str, metric: Metric) -> float:
    """Return a score, or the worst one if it was not finite."""
    return metric.worst if record[part] is None else float(record[part])


def _quality(records: Sequence[Mapping[str, Any]], metric: Metric) -> tuple[bool, float, float]:
    sound = not any(record["diverged"] for record in records)
    losses = [math.inf if record["validation_loss"] is None else record["validation_loss"] for record in records]
    score = statistics.fmean(_score(record, "validation", metric) for record in records)
    return sound, metric.quality(score), -sum(losses)


@checks_arguments
def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the non-dominated points (cost, quality), by rising cost.

    A point is dominated by one that is better at no higher cost, or as good at lower cost. Of equal points, only the
    first is returned.

    Examples
    --------
    >>> pareto_front([(10, 0.8), (5, 0.8), (1, 0.5), (20, 0.9), (30, 0.9)])
    [2, 1, 3]
    """
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1], i)):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def best_point(points: Sequence[Point]) -> Point | None:
    """Return the adapter with the best validation score, the smaller of equals; test results play no role.

    The references, head alone and dense, and diverged trainings are not considered.
    """
    candidates = [point for point in points if not point.method.reference and not point.diverged]

    def rank(point: Point) -> tuple[float, int]:
        return -point.metric.quality(statistics.fmean(point.validation)), point.parameters

    return min(candidates, key=rank, default=None)


def trained_on(samples: Sequence[int], seeds: int, rates: int, at: str = "each at the best of") -> str:
    """Return the small print below a figure: samples of each part, seeds, rates.

    Parameters
    ----------
    samples : sequence of int
        Numbers of training, validation and test samples.
    seeds, rates : int
        Numbers of seeds and rates.
    at : str
        Says which of several rates is shown; goes before their number.

    Returns
    -------
    str

    Examples
    --------
    >>> trained_on([800, 200, 1000], 3, 4)
    '800 training, 200 validation, 1,000 test samples; 3 seeds; each at the best of 4 rates'
    >>> trained_on([49900, 100, 10000], 1, 1)
    '49,900 training, 100 validation, 10,000 test samples; 1 seed; one rate for all'
    """
    sizes = ", ".join(f"{count:,} {part}" for count, part in zip(samples, PARTS, strict=True))
    last = "one rate for all" if rates == 1 else f"{at} {rates} rates"
    return f"{sizes} samples; {seeds} seed{'s' * (seeds > 1)}; {last}"


def columns(seeds: int) -> list[str]:
    """Return the column titles of :func:`rows_of`."""
    test = "test" if seeds == 1 else "test, mean ± sd"
    return ["", "method", "setting", "parameters", "rate", "validation", test, "s"]


def rows_of(points: Sequence[Point]) -> list[list[str]]:
    """Return the rows of the table: smallest first, the front marked with a dot.

    Returns
    -------
    list of list of str
    """
    return [
        [
            "●" if point.front else "",
            point.method.family,
            point.method.label,
            f"{point.parameters:,}",
            f"{point.rate:g}",
            "diverged" if point.diverged else point.metric.show([statistics.fmean(point.validation)]),
            point.metric.show(point.test),
            f"{point.seconds:.1f}",
        ]
        for point in sorted(points, key=lambda point: (point.parameters, point.score))
    ]


# -- Whether the best adapter is better than the head alone, or than the untrained base --------------------------------


@dataclasses.dataclass(frozen=True)
class Control:
    """A comparison of the best adapter with what needs no adapter.

    Attributes
    ----------
    reference : str
        ``head alone`` or ``untrained base``.
    gain : float
        How much better the best adapter's mean test score is, in the metric; negative if it is worse.
    spread : float
        The larger of the two standard deviations over seeds; 0 for one seed.
    warning : str, optional
        One line, if the gain is not above the spread.
    """

    reference: str
    gain: float
    spread: float
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        return {**dataclasses.asdict(self), "gain": round(self.gain, 6), "spread": round(self.spread, 6)}


def control_of(points: Sequence[Point], best: Point | None) -> Control | None:
    """Return the comparison of the best adapter with the reference; None if one of the two is missing or diverged."""
    reference = next((point for point in points if point.method.family in (HEAD, BASE)), None)
    if best is None or reference is None or reference.diverged:
        return None
    metric, name = best.metric, reference.method.family
    gain = metric.quality(best.score) - metric.quality(reference.score)
    spread = max(best.spread, reference.spread)
    if gain > spread:
        return Control(name, gain, spread, None)
    several = len(best.test) > 1
    warning = (
        f"the {name} reaches {metric.show(reference.test)} ({metric.unit}), the best adapter {metric.show(best.test)}"
        f"{', a difference within the spread over seeds' if several else ''}: the adapter adds nothing measurable"
        f"{'' if several else ' (with one seed; --seeds 3 shows the spread)'}"
    )
    return Control(name, gain, spread, warning)
