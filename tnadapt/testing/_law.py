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
    """One law on one library.

    Attributes
    ----------
    name : str
        What must hold.
    subject : str
        Of what: a method, a config, or the library.
    backend : str
        On which array library.
    cases : int
        How many comparisons were made.
    error : float
        The largest seen; NaN where something that must be a number is none.
    allowed : float
        The largest allowed.
    """

    name: str
    subject: str
    backend: str
    cases: int
    error: float
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the error is within what is allowed (NaN is not) and there was a case at all."""
        return self.cases > 0 and self.error <= self.allowed


def relative_error(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest element of what is expected."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return math.inf
    if not expected.size:
        return 0.0
    scale = float(np.max(np.abs(expected)))
    return float(np.max(np.abs(found - expected))) / (scale or 1.0)


class LawCollector:
    """Laws as they are checked, one name at a time."""

    def __init__(self, subject: str, backend: Backend) -> None:
        self.subject, self.backend, self.found = subject, backend, list[Law]()

    def add(self, name: str, errors: Sequence[float], allowed: float = TIGHT) -> None:
        worst = math.nan if any(math.isnan(error) for error in errors) else max(errors, default=math.nan)
        self.found.append(Law(name, self.subject, self.backend.name, len(errors), worst, allowed))
