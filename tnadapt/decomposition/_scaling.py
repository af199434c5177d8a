"""Scaling of updates by powers of two, and of the arrays accordingly, each within its dtype's range.

An update may have numbers near the limits of a dtype's range although none of its arrays has to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._linear_algebra import Algebra

__all__ = ["at_size", "power_of"]


def power_of(algebra: Algebra, x: Array) -> int:
    """Return the exponent of the power of two nearest to the root mean square of a vector.

    For ``x`` times ``2 ** k`` it is exactly k larger, at any magnitude.
    """
    largest = algebra.largest(x)
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    first = math.frexp(largest)[1]
    return first + round(math.log2(algebra.norm(algebra.scaled(x, -first)) / math.sqrt(x.shape[0])))


def at_size(algebra: Algebra, network: Network, arrays: Mapping[str, Array], exponent: int) -> dict[str, Array]:
    """Scale the arrays of a network so that its tensor is multiplied by ``2 ** exponent``.

    Parameters
    ----------
    algebra : Algebra
        Algebra of the arrays.
    network : Network
        Linear in each array.
    arrays : mapping of str to array
        With the names of the network's arrays.
    exponent : int

    Returns
    -------
    dict of str to array
        In each term, the array that starts at zero takes the factor, as far as it stays in the dtype's normal range;
        the others take the rest. If no array can take it (a single array, of an update outside of that range), the
        first one takes it all the same and is rounded to the dtype.
    """
    found = dict(arrays)
    if exponent == 0:
        return found
    for prefixes in network.prefixes:
        first = prefixes[-1] + network.splits[-1].zero
        names = [prefix + name for prefix, split in zip(prefixes, network.splits, strict=True) for name in split.shapes]
        left = exponent
        for name in [first, *(name for name in names if name != first)]:
            share = _within(algebra, found[name], left)
            found[name], left = algebra.scaled(found[name], share), left - share
        found[first] = algebra.scaled(found[first], left)
    return found


def _within(algebra: Algebra, array: Array, exponent: int) -> int:
    """Return as much of an exponent as keeps an array's largest number well within the dtype's normal range."""
    largest = algebra.largest(array)
    if largest == 0.0 or not math.isfinite(largest):
        return exponent
    kind = np.finfo(algebra.backend.dtype_name(algebra.like))
    now = math.frexp(largest)[1]
    # Keep a margin at the lower end for the digits of smaller numbers.
    least, most = kind.minexp + 2 * kind.nmant, kind.maxexp - 1
    return max(min(exponent, most - now), least - now) if least <= now <= most else 0
