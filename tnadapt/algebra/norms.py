"""Norms that neither overflow nor underflow: numbers are scaled by a power of two before they are squared."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np


def exponent_of(*arrays: np.ndarray) -> int:
    """Return the e for which the largest magnitude is in [2**(e - 1), 2**e); 0 if all elements are zero.

    Examples
    --------
    >>> exponent_of(np.array([0.3, -6.0])), exponent_of(np.zeros(2))
    (3, 0)
    """
    return math.frexp(max((float(np.max(np.abs(array), initial=0.0)) for array in arrays), default=0.0))[1]


def scaled_by(array: np.ndarray, exponent: int) -> np.ndarray:
    """Multiply an array in float64 by ``2 ** exponent``; exact unless a result leaves float64's normal range.

    Examples
    --------
    >>> scaled_by(np.array([1e-310]), 1030)[0].item() == 1e-310 * 2.0**515 * 2.0**515
    True
    """
    scaled: np.ndarray = np.ldexp(array.astype(np.float64), exponent)
    return scaled


def norm(array: np.ndarray) -> float:
    """Compute the Frobenius norm; infinite only if it is beyond the range of float64.

    Examples
    --------
    >>> norm(np.full(4, 1e-300)), norm(np.full(4, 1e300))
    (2e-300, 2e+300)
    """
    exponent = exponent_of(array)
    return _times_power(float(np.linalg.norm(scaled_by(array, -exponent))), exponent)


def norm_of_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Compute the Frobenius norm of ``one - other``, even if the difference is beyond the range of float64.

    Examples
    --------
    >>> norm_of_difference(np.full(4, 1e-300), np.zeros(4))
    2e-300
    """
    return _times_power(*_difference(one, other))


def relative_difference(whole: np.ndarray, other: np.ndarray) -> float:
    """Compute ``|whole - other| / |whole|``; 0 if both are zero, infinite if ``whole`` alone is zero or negligible.

    Examples
    --------
    >>> relative_difference(np.full(4, 1e-320), np.zeros(4)), relative_difference(np.full(4, 1e-300), np.full(4, 1e300))
    (1.0, inf)
    """
    off, exponent = _difference(whole, other)
    power = exponent_of(whole)
    return _times_power(relative(off, float(np.linalg.norm(scaled_by(whole, -power)))), exponent - power)


def _difference(one: np.ndarray, other: np.ndarray) -> tuple[float, int]:
    """Return the norm of a difference as a number and the exponent of the power of two to multiply it by."""
    exponent = exponent_of(one, other)
    return norm(scaled_by(one, -exponent) - scaled_by(other, -exponent)), exponent


def relative(off: float, whole: float) -> float:
    """Compute ``off / whole``; 0 if both are zero, infinite if ``whole`` alone is zero.

    Examples
    --------
    >>> relative(1e-300, 4e-300), relative(0.0, 0.0), relative(1.0, 0.0)
    (0.25, 0.0, inf)
    """
    if not whole:
        return math.inf if off else 0.0
    return off / whole


def together(norms: Iterable[float]) -> float:
    """Compute the norm of several parts together from the norm of each.

    Examples
    --------
    >>> together([3.0, 4.0]), together([2.0**-900] * 4) == 2.0**-899, together([])
    (5.0, True, 0.0)
    """
    return math.hypot(*norms)


def _times_power(number: float, exponent: int) -> float:
    try:
        return math.ldexp(number, exponent)
    except OverflowError:
        return math.inf
