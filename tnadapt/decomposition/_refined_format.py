"""Fit of one format to all elements of one small tensor by damped Gauss-Newton, from several starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tnadapt.algebra.formats import Format
from tnadapt.backends.backend import Array

from ._fit import Fit, Limits
from ._linear_algebra import Algebra
from ._observed_elements import ObservedElements
from ._observed_fit import affordable, fit_observed

__all__ = ["on_host", "refinable", "refined_format"]


def refinable(split: Format) -> bool:
    """Return whether a format of these sizes is small enough for :func:`refined_format`."""
    none = [np.zeros(0, np.intp)] * len(split.sizes)
    return affordable(ObservedElements([split], [[""]], [none]), math.prod(split.sizes)) > 0


def refined_format(
    algebra: Algebra, split: Format, tensor: Array, starts: Iterable[Mapping[str, Array]], limits: Limits
) -> Fit:
    """Fit the arrays of a format to a tensor of its sizes, in float64 on the host.

    Parameters
    ----------
    algebra : Algebra
    split : Format
    tensor : array, shape (d_1, …, d_M)
        Not zero.
    starts : iterable of mapping of str to array
        Each is made when it is needed. No more are made once one fits exactly, or three end at the same error.
    limits : Limits
        Of each descent.

    Returns
    -------
    Fit
    """
    elements = ObservedElements([split], [[""]], [all_places(split.sizes)])
    wanted = on_host(algebra, tensor).reshape(-1)
    begun = ({name: on_host(algebra, array) for name, array in start.items()} for start in starts)
    found = fit_observed(elements, wanted, begun, limits)
    arrays = {name: algebra.array(array) for name, array in found.arrays.items()}
    return Fit(arrays, False, found.iterations, "Gauss-Newton")


def all_places(sizes: Sequence[int]) -> list[np.ndarray]:
    """Return for each mode the index of every element, in order."""
    return list(np.unravel_index(np.arange(math.prod(sizes)), tuple(sizes)))


def on_host(algebra: Algebra, x: Array) -> np.ndarray:
    """Return an array in NumPy, in double precision, real or complex."""
    host = np.asarray(algebra.backend.to_numpy(x))
    return host.astype(np.result_type(host.dtype, np.float64))
