"""The control of a study: whether the best adapter is better than the head alone, or than the untrained base."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from .grid import BASE, HEAD
from .pareto_report import Point

__all__ = ["Control", "control_of"]


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
    gain = metric.quality(statistics.fmean(best.test)) - metric.quality(statistics.fmean(reference.test))
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
