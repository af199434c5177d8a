"""Means and confidence intervals of paired differences over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import scipy.stats

from .compared_studies import ComparedPair

__all__ = ["interval", "pooled"]


def pooled(pairs: Sequence[ComparedPair]) -> tuple[float, float, float]:
    """Return the mean gain of pairs, and the wider of two 95 % intervals.

    One interval is over seeds, of the means of all pairs, because pairs with the same seed are correlated. With few
    seeds their differences may cancel by chance. The other uses the pairs' own spread, as if they were independent.
    """
    mean, low, high = interval(
        [statistics.fmean(column) for column in zip(*(pair.gains for pair in pairs), strict=True)]
    )
    seeds = len(pairs[0].gains)
    if seeds < 2:
        return mean, low, high
    error = sum(statistics.variance(pair.gains) / seeds for pair in pairs) ** 0.5 / len(pairs)
    half = max(high - mean, float(scipy.stats.t.ppf(0.975, len(pairs) * (seeds - 1))) * error)
    return mean, mean - half, mean + half


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean, and the ends of the 95 % interval of Student's t.

    Examples
    --------
    >>> [round(value, 3) for value in interval([1.0, 2.0, 3.0])]
    [2.0, -0.484, 4.484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("-inf"), float("inf")
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half
