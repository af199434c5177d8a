"""Learning rates, the same rule for every method: which trainings are due next, and which rate is the best.

Every setting is trained with all seeds at its method's default rate, which is what a user gets without a search. The
tuning seeds are also trained at a third of it and at three times as much. While the best of those tried is the lowest
or the highest, one more beyond it is tried, a limited number of times on each side. Only scores on the held-out part
decide. A rate at which a training fails with an error counts as one that diverges, unless all fail. What trains
nothing is measured once.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.algebra.units import RATE

from . import methods
from .grid import Trial
from .methods import BASE, Setting
from .tasks import QualityTask

Records = Mapping[str, Mapping[str, Any]]

#: The quotient of two neighboring rates.
FACTOR = 3.0
#: How many rates beyond a third and three times the default may be tried on each side.
BEYOND = 4


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained."""

    #: Seeds 0 to ``seeds - 1``, at the default rate.
    seeds: int = 3
    #: Number of seeds with which other rates are tried; 0 for none.
    tuned_by: int = 1


def default_rate(task: QualityTask, scale: str, setting: Setting) -> float:
    """Return the rate of a setting that nobody tunes; a head alone has that of heads beside adapters."""
    if not trains(task, setting.method):
        return 0.0
    if setting.method == BASE.name:
        return float(task.scaled(scale).get("head_rate", methods.find(BASE.name).rate))
    method = methods.find(setting.method)
    return rounded(method.rate * task.rate / RATE) if method.scaled else method.rate


def due(task: QualityTask, scale: str, settings: Sequence[Setting], records: Records, plan: Plan) -> list[Trial]:
    """Return the trainings that can be run now; an empty list if all are finished."""
    return [trial for setting in settings for trial in _due(task, scale, setting, records, plan)]


def _due(task: QualityTask, scale: str, setting: Setting, records: Records, plan: Plan) -> list[Trial]:
    """Return the trainings of a setting that can be run now."""
    default = default_rate(task, scale, setting)

    def missing(rate: float, seeds: int) -> list[Trial]:
        trials = [Trial(task.name, scale, setting, seed, rate) for seed in range(seeds)]
        return [trial for trial in trials if trial.key not in records]

    if not trains(task, setting.method):
        return missing(default, 1)
    at_default = missing(default, plan.seeds)
    tuned_by = min(plan.tuned_by, plan.seeds)
    if not tuned_by:
        return at_default
    tried = {place: rounded(default * FACTOR**place) for place in (-1, 0, 1)}
    while True:
        trials = [trial for place, rate in tried.items() if place for trial in missing(rate, tuned_by)]
        if trials or at_default:
            return [*at_default, *trials]
        lines = {
            place: [records[Trial(task.name, scale, setting, seed, rate).key] for seed in range(tuned_by)]
            for place, rate in tried.items()
        }
        if all("failed" in line for some in lines.values() for line in some):
            return []
        best = max(sorted(lines), key=lambda place: held_out(task, lines[place]))
        beyond = best + (1 if best == max(tried) else -1)
        if best not in (min(tried), max(tried)) or abs(beyond) > 1 + BEYOND:
            return []
        tried[beyond] = rounded(default * FACTOR**beyond)


def trains(task: QualityTask, method: str) -> bool:
    """Return whether a method trains anything; the base does only with a new head."""
    return task.has_head if method == BASE.name else methods.find(method).trains


def held_out(task: QualityTask, lines: Sequence[Mapping[str, Any]]) -> tuple[bool, float, float]:
    """Return the quality of a rate: whether no seed diverged or failed, mean held-out score, minus mean loss."""
    if not lines or any(line["diverged"] or line["validation"] is None for line in lines):
        return False, -math.inf, -math.inf
    losses = [math.inf if line["validation_loss"] is None else line["validation_loss"] for line in lines]
    score = statistics.fmean(task.held_out_quality(line["validation"]) for line in lines)
    return True, score, -statistics.fmean(losses)


def rounded(rate: float) -> float:
    """Return a rate with two digits, so that it is the same on every machine.

    Examples
    --------
    >>> rounded(0.01 / 3), rounded(0.01 * 3)
    (0.0033, 0.03)
    """
    return float(f"{rate:.2g}")
