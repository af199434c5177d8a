"""Learning rates, the same rule for every method: which trainings are due next, and which rate is chosen.

Every rate of the task's list is tried with the tuning seeds. While the best of those tried is the lowest or highest,
one more beyond it is tried, a limited number of times on each side. Then the neighbors of the best rate, half a step
away, are tried. The best rate is trained with the remaining seeds. Only scores on the held-out part decide. A rate at
which a training fails with an error counts as one that diverges, unless all fail.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .grid import Trial
from .methods import BASE, Setting
from .tasks import QualityTask

Records = Mapping[str, Mapping[str, Any]]

#: How many rates beyond the list may be tried on each side.
BEYOND = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is trained."""

    #: The rates that are tried first, evenly spaced on a logarithmic scale.
    rates: tuple[float, ...]
    #: Seeds 0 to ``seeds - 1``.
    seeds: int = 5
    #: Number of seeds with which rates are tried.
    tuned_by: int = 1
    #: Whether the neighbors of the best rate are tried.
    refine: bool = True

    @property
    def step(self) -> float:
        """The quotient of two neighboring rates."""
        return self.rates[1] / self.rates[0] if len(self.rates) > 1 else 10.0


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The state of a setting's tuning."""

    #: The chosen rate; None while trainings are missing, or if all of them failed with an error.
    rate: float | None
    #: All rates that have been tried or are due, sorted.
    tried: tuple[float, ...]
    #: The trainings that are due before anything else can be decided.
    missing: tuple[Trial, ...]


def tuned(task: QualityTask, scale: str, setting: Setting, records: Records, plan: Plan) -> Tuned:
    """Return how far the tuning of a setting is."""
    seeds = range(min(plan.tuned_by, plan.seeds))
    if setting.method == BASE.name and not task.has_head:
        # Nothing is trained.
        return Tuned(plan.rates[0], plan.rates[:1], ())
    rates = sorted(set(plan.rates))
    left = {"low": BEYOND, "high": BEYOND}
    refined = not plan.refine
    while True:
        trials = [Trial(task.name, scale, setting, seed, rate) for rate in rates for seed in seeds]
        missing = tuple(trial for trial in trials if trial.key not in records)
        if missing:
            return Tuned(None, tuple(rates), missing)
        if all("failed" in records[trial.key] for trial in trials):
            return Tuned(None, tuple(rates), ())
        best = max(
            rates, key=lambda rate: held_out(task, [records[trial.key] for trial in trials if trial.rate == rate])
        )
        if best == rates[0] and left["low"]:
            left["low"] -= 1
            rates.insert(0, rounded(best / plan.step))
        elif best == rates[-1] and left["high"]:
            left["high"] -= 1
            rates.append(rounded(best * plan.step))
        elif not refined:
            refined = True
            near = (rounded(best / plan.step**0.5), rounded(best * plan.step**0.5))
            rates = sorted({*rates, *near})
        else:
            return Tuned(best, tuple(rates), ())


def due(task: QualityTask, scale: str, settings: Sequence[Setting], records: Records, plan: Plan) -> list[Trial]:
    """Return the trainings that can be run now; an empty list if all are finished."""
    found: list[Trial] = []
    for setting in settings:
        state = tuned(task, scale, setting, records, plan)
        found += state.missing
        if state.rate is not None:
            trials = [Trial(task.name, scale, setting, seed, state.rate) for seed in range(plan.seeds)]
            found += [trial for trial in trials if trial.key not in records]
    return found


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
    >>> rounded(0.1 / 10**0.5), rounded(0.1 * 10)
    (0.032, 1.0)
    """
    return float(f"{rate:.2g}")
