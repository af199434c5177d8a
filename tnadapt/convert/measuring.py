"""How far an adapter is from what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .updates import Float

__all__ = ["errors_of", "squares_of"]


def squares_of(old: Float, new: Float) -> tuple[float, float]:
    """The squares of the Frobenius norms of a difference, and of what was there."""
    return float(np.sum((new - old) ** 2)), float(np.sum(old**2))


def errors_of(squares: Mapping[str, tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """The relative error of all together, and of each; infinite where something became of nothing.

    Examples
    --------
    >>> errors_of({"q": (0.0, 16.0), "v": (1.0, 9.0)})
    (0.2, {'q': 0.0, 'v': 0.3333333333333333})
    """
    errors = {name: _relative(*pair) for name, pair in squares.items()}
    off, whole = (math.fsum(pair[place] for pair in squares.values()) for place in (0, 1))
    return _relative(off, whole), errors


def _relative(off: float, whole: float) -> float:
    return math.sqrt(off / whole) if whole else (math.inf if off else 0.0)
