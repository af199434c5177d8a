"""Alternating least squares over the arrays of a network, through a linear F.

``F(network)`` is linear in each array. With the others fixed, the optimal array solves a linear least-squares problem,
which needs only the map (the network followed by F) and its adjoint, no matrix. No step increases the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._least_squares import least_squares
from ._linear_algebra import Algebra
from ._single_tensor import Fit, Limits

__all__ = ["alternate"]

# Solver steps for each least-squares problem; the next sweep continues from the result. A few are enough while the
# other arrays still change; that the error no longer falls is known from sweeps of many.
_FEW, _STEPS = 2, 20


def alternate(
    algebra: Algebra,
    network: Network,
    projection: Projection,
    y: Array,
    start: Mapping[str, Array],
    limits: Limits,
    watch: Callable[[int, float], None],
) -> Fit:
    """Fit the arrays of a network through a linear F to a vector, from a start.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    projection : Projection
        Linear.
    y : array, shape (n_out,)
    start : mapping of str to array
        With the names and shapes of ``network.shapes``.
    limits : Limits
    watch : callable
        Called with each sweep's number and relative error.

    Returns
    -------
    Fit

    Notes
    -----
    A sweep solves one problem per array, each with up to 2 products with the network, F and their adjoints; once that
    reduces the error by no more than ``tol``, with up to 20. It ends with a sweep of the latter kind.
    """
    backend = algebra.backend
    arrays = dict(start)
    norm = algebra.norm(y)

    def whole() -> Array:
        return projection(network.whole(backend, arrays))

    error = algebra.norm(y - whole())
    best, sweeps, steps = dict(arrays), 0, _FEW
    for sweeps in range(1, limits.iterations + 1):
        for name in network.shapes:
            arrays[name] = _solved(algebra, network, projection, y, arrays, name, limits, steps)
        before, error = error, algebra.norm(y - whole())
        watch(sweeps, error / norm)
        if not error < before:  # converged up to rounding, or NaN
            arrays, error = dict(best), before
            if steps == _STEPS:
                break
            steps = _STEPS
            continue
        best = dict(arrays)
        if before - error <= limits.tol * norm:
            if steps == _STEPS:
                break
            steps = _STEPS
        else:
            steps = _FEW
    return Fit(arrays, False, sweeps, "alternating least squares")


def _solved(
    algebra: Algebra,
    network: Network,
    projection: Projection,
    y: Array,
    arrays: Mapping[str, Array],
    name: str,
    limits: Limits,
    steps: int,
) -> Array:
    """Return the optimal value of one array with the others fixed."""
    backend, shape = algebra.backend, network.shapes[name]

    def made(vec: Array) -> Array:
        return projection(network.whole(backend, {**arrays, name: backend.reshape(vec, shape)}))

    # The terms of a sum that do not contain the array are a constant.
    constant = made(algebra.zeros((math.prod(shape),))) if network.terms > 1 else None

    def forward(vec: Array) -> Array:
        return made(vec) if constant is None else made(vec) - constant

    def adjoint(vec: Array) -> Array:
        return backend.flatten(network.adjoint(backend, arrays, projection.adjoint(vec), only=name)[name])

    wanted = y if constant is None else y - constant
    found = least_squares(
        algebra, forward, adjoint, wanted, backend.flatten(arrays[name]), min(limits.tol, 1e-6), steps
    )
    return backend.reshape(found.x, shape)
