"""Powers of two: that of an update's size, and arrays that make it times one, each within its dtype's range.

An update of numbers near the end of a dtype's range is the product of arrays of which none needs to be.
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
    """The exponent of the power of two nearest to the root mean square of a vector.

    It depends on the digits of the numbers alone: of ``x`` times ``2 ** k`` it is k more, to whatever size that is.
    """
    largest = algebra.largest(x)
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    first = math.frexp(largest)[1]
    return first + round(math.log2(algebra.norm(algebra.scaled(x, -first)) / math.sqrt(x.shape[0])))


def at_size(algebra: Algebra, network: Network, arrays: Mapping[str, Array], exponent: int) -> dict[str, Array]:
    """The arrays with which a network makes ``2 ** exponent`` times as much; it is linear in each of them.

    Parameters
    ----------
    algebra : Algebra
        Of the arrays.
    network : Network
    arrays : mapping of str to array
        Named as the network's.
    exponent : int

    Returns
    -------
    dict of str to array
        One array of each term takes the factor, the one that starts at zero; what it cannot take without leaving the
        dtype's normal range, the others do. Where none can (one array, of an update outside of that range), it takes
        all the same, and rounds as the dtype does.
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
    """As much of an exponent as leaves an array's largest number well within the dtype's normal range."""
    largest = algebra.largest(array)
    if largest == 0.0 or not math.isfinite(largest):
        return exponent
    kind = np.finfo(algebra.backend.dtype_name(algebra.like))
    now = math.frexp(largest)[1]
    # Leave range below for the digits of smaller numbers.
    least, most = kind.minexp + 2 * kind.nmant, kind.maxexp - 1
    return max(min(exponent, most - now), least - now) if least <= now <= most else 0
