"""How far an adapter is from what it was."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tnadapt.algebra.norms import exponent_of, norm, norm_of_difference, relative, scaled_by, together

from ._updates import Float, Pair, Update, scaled

__all__ = ["errors_of", "is_rounding", "low_rank_norms", "norms_of"]

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


def norms_of(old: Float, new: Float) -> tuple[float, float]:
    """The Frobenius norms of a difference, and of what was there."""
    return norm_of_difference(old, new), norm(old)


def low_rank_norms(old: Update | None, new: Update | None) -> tuple[float, float] | None:
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
        return 0.0, _norm_of(one)
    both = Pair(np.concatenate([one.b, -two.b], axis=1), np.concatenate([one.a, two.a], axis=1))
    return _norm_of(both), _norm_of(one)


def _norm_of(pair: Pair) -> float:
    # Each half at a size of one: what they make together may be a common number where neither of them is.
    exponents = [exponent_of(half) for half in pair]
    upper, lower = (
        np.asarray(np.linalg.qr(scaled_by(half, -exponent), mode="r"))
        for half, exponent in zip(pair, exponents, strict=True)
    )
    return norm(scaled_by(upper @ lower.T, sum(exponents)))


def errors_of(norms: Mapping[str, tuple[float, float]]) -> tuple[float, dict[str, float]]:
    """The relative error of all together, and of each; infinite where something became of nothing.

    Examples
    --------
    >>> errors_of({"q": (0.0, 4.0), "v": (1.0, 3.0)})
    (0.2, {'q': 0.0, 'v': 0.3333333333333333})
    """
    errors = {name: relative(*pair) for name, pair in norms.items()}
    off, whole = (together(pair[place] for pair in norms.values()) for place in (0, 1))
    return relative(off, whole), errors
