"""The result of checking one law, its error measure, and the collector that gathers results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend

__all__ = ["TIGHT", "Law", "LawCollector", "relative_error"]

# Relative to the largest element compared; a float64 has sixteen digits.
TIGHT = 1e-12


@dataclasses.dataclass(frozen=True)
class Law:
    """The result of one law on one library.

    Attributes
    ----------
    name : str
        The statement of the law.
    subject : str
        What was checked: a method, a config, or the library.
    backend : str
        The array library.
    cases : int
        Number of comparisons.
    error : float
        The largest error found; NaN if a value that must be a number is NaN.
    allowed : float
        The largest error allowed.
    """

    name: str
    subject: str
    backend: str
    cases: int
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is at most the allowed one (NaN is not) and there was at least one case."""
        return self.cases > 0 and self.error <= self.allowed


def relative_error(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected element; infinite if the shapes differ."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    scale = float(np.max(np.abs(expected)))
    return float(np.max(np.abs(found - expected))) / (scale or 1.0)


class LawCollector:
    """Gathers the results of laws for one subject and library."""

    def __init__(self, subject: str, backend: Backend) -> None:
        self.subject, self.backend, self.found = subject, backend, list[Law]()

    def add(self, name: str, errors: Sequence[float], allowed: float = TIGHT) -> None:
        worst = math.nan if any(math.isnan(error) for error in errors) else max(errors, default=math.nan)
        self.found.append(Law(name, self.subject, self.backend.name, len(errors), worst, allowed))
