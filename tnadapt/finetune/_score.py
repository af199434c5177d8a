"""Metrics: the number that a study compares methods by, and how it is shown."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence

__all__ = ["ACCURACY", "Metric"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes
    ----------
    name : str
    lower : bool
        Whether lower is better.
    percent : bool
        Whether it is a fraction that is shown in percent.

    Examples
    --------
    >>> ACCURACY.show([0.875]), Metric("loss", lower=True, percent=False).show([1.25, 1.75])
    ('87.5%', '1.5 ± 0.354')
    >>> ACCURACY.better(0.9, 0.8), Metric("loss", lower=True).better(0.9, 0.8)
    (True, False)
    """

    name: str
    lower: bool = False
    percent: bool = True

    @property
    def worst(self) -> float:
        """A value worse than all others."""
        return math.inf if self.lower else -math.inf

    def quality(self, value: float) -> float:
        """Return a number that is higher for better values."""
        return -value if self.lower else value

    def better(self, one: float, other: float) -> bool:
        """Return whether a value is better than another."""
        return self.quality(one) > self.quality(other)

    def show(self, values: Sequence[float]) -> str:
        """Return the mean, and the standard deviation of several values, as text."""
        mean = statistics.fmean(values)
        text = f"{mean:.1%}" if self.percent else f"{mean:.4g}"
        if len(values) > 1:
            spread = statistics.stdev(values)
            text += f" ± {100 * spread:.1f}" if self.percent else f" ± {spread:.3g}"
        return text

    @property
    def unit(self) -> str:
        """The name with the direction, for captions."""
        return f"{self.name}, lower is better" if self.lower else self.name


ACCURACY = Metric("accuracy")
