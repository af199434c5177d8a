"""How far an adapter is from what it was."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .updates import Float, Pair, Update, scaled

__all__ = ["errors_of", "is_rounding", "low_rank_squares", "squares_of"]

# Errors that a few roundings explain: of arrays that multiply to the same update, and of any that do.
_ROUNDING = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}
_SAME = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-6, "bfloat16": 1e-6}


def is_rounding(error: float, dtype: str, algebra: bool) -> bool:
    """Whether an error is that of rounding to a dtype.

    Parameters
    ----------
    error : float
        Measured.
    dtype : str
        Of the arrays.
    algebra : bool
        Whether these arrays, unrounded, are known to make the same update. Factors that nearly cancel may lose
        far more by rounding than their last digit.
    """
    return error <= (_ROUNDING if algebra else _SAME)[dtype]


def squares_of(old: Float, new: Float) -> tuple[float, float]:
    """The squares of the Frobenius norms of a difference, and of what was there."""
    return float(np.sum((new - old) ** 2)), float(np.sum(old**2))


def low_rank_squares(old: Update | None, new: Update | None) -> tuple[float, float] | None:
    """The same of two updates by their factors alone, or None where they have too many columns for that to be cheaper.

    Notes
    -----
    ``|b a^T - b' a'^T|`` is the norm of a product of two matrices, ``[b, -b'] [a, a']^T``, and with that the norm of
    the product of their triangular factors, as small as the ranks. It is as exact as the dense one: no squares are
    subtracted.
    """
    if old is None or new is None or {old.kind, new.kind} != {"lora"} or 2 * (old.rank + new.rank) > min(old.shape):
        return None
    (one,), (two,) = scaled(old).parts, scaled(new).parts
    assert isinstance(one, Pair)
    assert isinstance(two, Pair)
    if np.array_equal(one.b, two.b) and np.array_equal(one.a, two.a):
        return 0.0, _square_of(one)
    both = Pair(np.concatenate([one.b, -two.b], axis=1), np.concatenate([one.a, two.a], axis=1))
    return _square_of(both), _square_of(one)


def _square_of(pair: Pair) -> float:
    upper, lower = (np.asarray(np.linalg.qr(half, mode="r")) for half in pair)
    return float(np.sum((upper @ lower.T) ** 2))


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
