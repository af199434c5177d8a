"""What a run would train, and how long that would take by the seconds of earlier trainings."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .methods import Setting
from .tasks import QualityTask
from .tuning import BEYOND, Plan, tuned

__all__ = ["Estimate", "estimate", "seconds_of"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Trainings that are left, at least and at most, and their seconds in sum (None if none was ever timed)."""

    finished: int
    least: int
    most: int
    least_seconds: float | None
    most_seconds: float | None


def seconds_of(setting: Setting, lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median seconds of a training: of this method, or else of all."""
    timed = [line for line in lines if line["seconds"]]
    own = [line["seconds"] for line in timed if line["method"] == setting.method]
    seconds = own or [line["seconds"] for line in timed]
    return statistics.median(seconds) if seconds else None


def estimate(
    task: QualityTask,
    scale: str,
    settings: Sequence[Setting],
    records: Mapping[str, Mapping[str, Any]],
    plan: Plan,
    timed: Sequence[Mapping[str, Any]],
) -> Estimate:
    """Return what is left to train.

    Parameters
    ----------
    task, scale, settings, records, plan
        As in :func:`benchmarks.quality.tuning.due`.
    timed : sequence of mapping
        Result lines whose seconds count, such as those of another machine.
    """
    least = most = finished = 0
    seconds: list[tuple[float | None, int, int]] = []
    for setting in settings:
        state = tuned(task, scale, setting, records, plan)
        tuning = min(plan.tuned_by, plan.seeds)
        own = sum(line["method"] == setting.method and line["config"] == setting.values for line in records.values())
        finished += own
        if state.rate is None and not state.missing:
            continue  # it failed
        if state.rate is not None:
            low = high = max(0, plan.seeds + (len(state.tried) - 1) * tuning - own)
        else:
            others = plan.seeds - tuning
            near = 2 * tuning * plan.refine
            whole = len(plan.rates) * tuning + others
            low, high = whole + near - own, whole + near + 2 * BEYOND * tuning - own
            low = max(low, len(state.missing) + others)
        least, most = least + low, most + high
        seconds.append((seconds_of(setting, timed), low, high))
    known = all(one is not None for one, _, _ in seconds)
    return Estimate(
        finished, least, most,
        sum(one * low for one, low, _ in seconds if one is not None) if known else None,
        sum(one * high for one, _, high in seconds if one is not None) if known else None,
    )  # fmt: skip
