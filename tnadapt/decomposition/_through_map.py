"""Fit of one group through its F.

- identity, shuffle: F preserves distances, so the network is fitted to ``Fᵀ y``.
- linear F: least squares gives the vector before F. If the network is dense, that vector is the result. Otherwise the
  network is fitted to it, and then refined by alternating least squares through F. For a large group with few
  parameters, ``Fᵀ y`` takes the place of that vector: fastfood nearly preserves the lengths of what such a network can
  be, so that sweeps find the rest in few steps.
- nonlinear F: the same for the argument that tanhshrink would need, then L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import Linear, Nonlinear, tanhshrink
from tnadapt.algebra.maps.projection import Projection
from tnadapt.backends.backend import Array

from ._alternating import alternate
from ._fit import unwatched
from ._gradient import refine
from ._least_squares import least_squares
from ._linear_algebra import Algebra
from ._network_fit import fit_network, start_network
from ._scaling import at_size, power_of
from ._single_tensor import Fit, Limits

__all__ = ["fit_group"]

Watch = Callable[[int, float], None]

_STEPS = 50  # least-squares steps for an initial guess
_FAR = 100.0  # beyond this, t - tanh(t) is t - 1 in every dtype
_FORMED = 1 << 21  # F is formed as a matrix up to this number of elements
# Elements from which a linear F is not inverted for a start, and inputs of F for each parameter of the network.
_LARGE, _SPARSE = 1 << 18, 6


def fit_group(algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Watch) -> Fit:
    """Fit the arrays of a group to its part of the long vector.

    Parameters
    ----------
    algebra : Algebra
    group : Group
    y : array, shape (size,)
    limits : Limits
    watch : callable
        Called with the number and the relative error of each iteration.

    Returns
    -------
    Fit
        Arrays with the network's names.
    """
    network, projection = group.network, group.projection
    if algebra.largest(y) == 0.0:
        return Fit(started(algebra, group), True, 0, "zero")
    if not projection.linear:
        return _nonlinear(algebra, group, y, limits, watch)
    if projection.map.isometry:
        return fit_network(algebra, network, projection.adjoint(y), limits, watch)
    plain = len(network.splits) == 1 and isinstance(network.splits[0], Dense)
    if not plain and _preserves(group):
        pulled = projection.adjoint(y) * (projection.n_in / projection.map.squared_norm())
        start = start_network(algebra, network, pulled, limits)
        return alternate(algebra, network, projection, y, start, limits, watch, preserved=True)
    before = _before(algebra, projection, y, limits, limits.iterations if plain else _STEPS)
    if algebra.squares(before.arrays["x"]) == 0.0:
        # y is orthogonal to the range of F.
        return Fit({name: algebra.zeros(shape) for name, shape in network.shapes.items()}, False, 0, before.method)
    found = fit_network(algebra, network, before.arrays["x"], limits, unwatched)
    if plain:
        return found._replace(optimal=before.optimal, iterations=before.iterations, method=before.method)
    return alternate(algebra, network, projection, y, found.arrays, limits, watch)


def _preserves(group: Group) -> bool:
    """Return whether F nearly preserves the lengths of the vectors that the network can be, up to a factor."""
    network, projection = group.network, group.projection
    few = _SPARSE * network.num_parameters <= projection.n_in
    return few and projection.n_out >= _LARGE and isinstance(projection.map, Linear)


def started(algebra: Algebra, group: Group) -> dict[str, Array]:
    """Return the initial arrays of training, whose update is zero."""
    return {name: algebra.array(group.start.host(name)) for name in group.network.shapes}


def _before(algebra: Algebra, projection: Projection, y: Array, limits: Limits, steps: int) -> Fit:
    """Compute the vector before a linear F by least squares."""
    if projection.n_in * projection.n_out <= _FORMED:
        # Solve with F as a float64 matrix, which gives a certified optimum. The small gradient of an iterative solver
        # would not tell how near the optimum is.
        backend = algebra.backend
        rows = backend.to_numpy(projection(algebra.array(np.eye(projection.n_in)))).astype(np.float64)
        x, *_ = np.linalg.lstsq(rows.T, backend.to_numpy(y).astype(np.float64), rcond=None)
        return Fit({"x": algebra.array(x)}, True, 0, "least squares through F")
    start = algebra.zeros((projection.n_in,))
    tol = min(limits.tol, 1e-6)
    found = least_squares(algebra, projection, projection.adjoint, y, start, tol, steps)
    method = "least squares through F by LSQR" + (", converged" if found.converged else "")
    return Fit({"x": found.x}, False, found.iterations, method)


def _nonlinear(algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Watch) -> Fit:
    backend, network, projection = algebra.backend, group.network, group.projection
    begun = started(algebra, group)
    # The update is F(x) - F(x_start).
    wanted = y + projection(network.whole(backend, begun))
    guesses = [begun]
    if not isinstance(projection.map, Nonlinear):
        return refine(algebra, network, projection, wanted, begun, limits, watch)
    # Fit the required argument of tanhshrink through the linear part of F, scaled to magnitude one.
    linear, target = projection.linear_part, _unshrunk(algebra, wanted)
    exponent = power_of(algebra, target)
    target = algebra.scaled(target, -exponent)
    before = _before(algebra, linear, target, limits, _STEPS).arrays["x"]
    if 0.0 < algebra.largest(before) < np.inf:
        few = limits._replace(iterations=min(limits.iterations, 10))
        fitted = fit_network(algebra, network, before, few, unwatched).arrays
        fitted = alternate(algebra, network, linear, target, fitted, few, unwatched).arrays
        near = at_size(algebra, network, fitted, exponent)
        # Add a little of the initial arrays: where two factors of a product are zero, both gradients vanish.
        guesses.append({name: near[name] + begun[name] * 1e-3 for name in network.shapes})

    def error(arrays: dict[str, Array]) -> float:
        with np.errstate(over="ignore", invalid="ignore"):  # arrays that overflow are not chosen
            return algebra.norm(projection(network.whole(backend, arrays)) - wanted)

    best = min(guesses, key=error)
    return refine(algebra, network, projection, wanted, best, limits, watch)


def _unshrunk(algebra: Algebra, y: Array) -> Array:
    """Solve ``t - tanh(t) = y`` for t by Newton's method from the cube root of 3 y."""
    backend = algebra.backend
    # Beyond _FAR tanh is exactly 1, and cubes would overflow.
    near = backend.where(y > _FAR, y * 0.0 + _FAR, backend.where(y < -_FAR, y * 0.0 - _FAR, y))
    cube = near * 3.0
    root = backend.where(y > 0.0, y * 0.0 + 1.0, y * 0.0 - 1.0)
    for _ in range(60):
        root = root * (2.0 / 3.0) + cube / (root * root + 1e-30) * (1.0 / 3.0)
    t = root
    for _ in range(20):
        slope = backend.tanh(t)
        t = t - (tanhshrink(backend, t) - near) / (slope * slope + 1e-30)
    # If y is negligible, so is t.
    return backend.where(near * near > 1e-36, t, y * 0.0) + (y - near)
