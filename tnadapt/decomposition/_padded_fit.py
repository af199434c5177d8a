"""Fit of a network to a vector that ends within the tensor: starts, and damped Gauss-Newton on the given elements.

Nothing is missing in the full rows of the first mode, so the method of the format fits them as any tensor. With its
result, the row that the vector's end cuts is a linear least-squares problem. If the vector has a decomposition, this is
often it; otherwise it is a start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._fit import Fit, Limits
from ._linear_algebra import Algebra
from ._observed_elements import ObservedElements
from ._observed_fit import affordable, fit_observed, moved, random_start

__all__ = ["fit_given", "from_full_rows"]

Arrays = dict[str, Array]
Solve = Callable[[Array, Limits], Mapping[str, Array]]

# Iterations of the format's method for a start; random starts; size of the noise on starts that may be saddle points.
_STARTED, _RANDOM = 10, 8
_NOISE, _MORE_NOISE = 0.02, 0.1
# The most entries of the derivatives of the row that padding cuts: 128 MiB.
_ENTRIES = 1 << 24


def from_full_rows(algebra: Algebra, network: Network, solve: Solve, vec: Array, limits: Limits) -> Arrays | None:
    """Fit the full rows of the first mode, then the row that the vector's end cuts; None if no row is full, for
    products of several splits, or if the derivatives of the cut row would not fit in memory.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    solve : callable
        Fits the first rows of the tensor, divided by the network's scale, and returns all arrays.
    vec : array, shape (size,)
    limits : Limits

    Returns
    -------
    dict of str to array or None
    """
    backend, rest = algebra.backend, math.prod(network.sizes[1:])
    full = network.size // rest
    if not full or len(network.splits) > 1:
        return None
    tail = ObservedElements.of_network(network, np.arange(full * rest, network.size))
    if tail.count * sum(tail.positions(name).shape[1] for name in tail.shapes) > _ENTRIES:
        return None
    rows = backend.reshape(vec[: full * rest] * (1.0 / network.scale), (full, *network.sizes[1:]))
    found = dict(solve(rows, limits))
    host = {name: np.asarray(backend.to_numpy(array), np.float64) for name, array in found.items()}
    at = tail.flat(host)
    # The cut row of the arrays is still zero. The others do not change these elements, so their derivatives are zero.
    jacobian = tail.jacobian(at)
    own = np.unique(jacobian.indices[jacobian.data != 0.0])
    left = np.asarray(backend.to_numpy(vec[full * rest :]), np.float64) - tail.values(at)
    if own.size:
        at[own] += np.linalg.lstsq(jacobian[:, own].toarray(), left, rcond=1e-10)[0]
        host = tail.arrays(at)
    else:  # several arrays have a cut row, all of them zero: a saddle point
        host = next(moved([host], algebra.rng, _MORE_NOISE))
    return {name: algebra.array(array) for name, array in host.items()}


def fit_given(
    algebra: Algebra,
    network: Network,
    solve: Solve,
    fold: Callable[[Array], Array],
    vec: Array,
    limits: Limits,
    watch: Callable[[int, float], None],
) -> Fit | None:
    """Fit the given elements alone, from several starts; None if the problem is too large for it.

    Parameters
    ----------
    algebra : Algebra
        In float64.
    network : Network
    solve : callable
        Fits a tensor without padding, or its first rows, and returns all arrays.
    fold : callable
        Maps a vector to a tensor that is padded with zeros.
    vec : array, shape (size,)
    limits : Limits
    watch : callable
        Called with the number and the relative error of each step.

    Returns
    -------
    Fit or None
        With arrays on the host.
    """
    if not affordable(ObservedElements.of_network(network, np.zeros(0, np.intp)), network.size):
        return None
    backend, rng = algebra.backend, algebra.rng
    elements = ObservedElements.of_network(network)
    wanted = np.asarray(backend.to_numpy(vec), np.float64)
    few = limits._replace(iterations=min(limits.iterations, _STARTED))

    def on_host(arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return {name: np.asarray(backend.to_numpy(array), np.float64) for name, array in arrays.items()}

    def starts() -> Iterator[Mapping[str, np.ndarray]]:
        rows = from_full_rows(algebra, network, solve, vec, few)
        if rows is not None:
            yield on_host(rows)
        filled = on_host(solve(fold(vec * (1.0 / network.scale)), few))
        yield from moved([filled], rng, _NOISE)
        for _ in range(_RANDOM):
            yield random_start(elements, rng, float(np.linalg.norm(wanted)))
        if rows is not None:
            yield from moved([on_host(rows)], rng, _MORE_NOISE)

    found = fit_observed(elements, wanted, starts(), limits, watch=watch)
    return Fit(found.arrays, False, found.iterations, "Gauss-Newton on the given elements")
