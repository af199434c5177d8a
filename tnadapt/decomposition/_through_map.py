"""One group with its F to the arrays that make its update.

- identity, shuffle: F keeps all distances, so the network is fitted to ``Fᵀ y``.
- linear F: least squares for the vector before F. Where that vector is the parameter (dense), it is the answer;
  else the network is fitted to it, and then array after array through F.
- nonlinear F: the same for what tanhshrink's argument would have to be, then L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import Nonlinear, tanhshrink
from tnadapt.algebra.maps.projection import Projection
from tnadapt.backends.backend import Array

from ._alternating import alternate
from ._gradient import refine
from ._least_squares import least_squares
from ._linear_algebra import Algebra
from ._network_fit import fit_network
from ._scaling import at_size, power_of
from ._single_tensor import Fit, Limits

__all__ = ["fit_group"]

Watch = Callable[[int, float], None]

_STEPS = 50  # of least squares for a first guess
_FAR = 100.0  # where t - tanh(t) is t - 1 in every dtype
_FORMED = 1 << 21  # elements of F as a matrix, up to which it is one


def fit_group(algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Watch) -> Fit:
    """The arrays of a group that make its part of the long vector, as nearly as is known.

    Parameters
    ----------
    algebra : Algebra
    group : Group
    y : array, shape (size,)
    limits : Limits
    watch : callable
        Called with a number and the relative error as it goes.

    Returns
    -------
    Fit
        Arrays under the network's names.
    """
    network, projection = group.network, group.projection
    if algebra.largest(y) == 0.0:
        return Fit(started(algebra, group), True, 0, "zero")
    if not projection.linear:
        return _nonlinear(algebra, group, y, limits, watch)
    if projection.map.isometry:
        return fit_network(algebra, network, projection.adjoint(y), limits, watch)
    plain = len(network.splits) == 1 and isinstance(network.splits[0], Dense)
    before = _before(algebra, projection, y, limits, limits.iterations if plain else _STEPS)
    if algebra.squares(before.arrays["x"]) == 0.0:
        # Nothing of y is within F's reach.
        return Fit({name: algebra.zeros(shape) for name, shape in network.shapes.items()}, False, 0, before.method)
    found = fit_network(algebra, network, before.arrays["x"], limits, lambda *_: None)
    if plain:
        return found._replace(optimal=before.optimal, iterations=before.iterations, method=before.method)
    return alternate(algebra, network, projection, y, found.arrays, limits, watch)


def started(algebra: Algebra, group: Group) -> dict[str, Array]:
    """The arrays at the start of training, whose update is zero."""
    return {name: algebra.array(group.start.host(name)) for name in group.network.shapes}


def _before(algebra: Algebra, projection: Projection, y: Array, limits: Limits, steps: int) -> Fit:
    """The vector before a linear F: least squares by F and its adjoint."""
    if projection.n_in * projection.n_out <= _FORMED:
        # Of F as a matrix, in float64: a small gradient alone would not tell how near the optimum it is.
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
    # What the argument of tanhshrink would have to be is fitted through the linear part of F, at a size of one.
    linear, target = projection.linear_part, _unshrunk(algebra, wanted)
    exponent = power_of(algebra, target)
    target = algebra.scaled(target, -exponent)
    before = _before(algebra, linear, target, limits, _STEPS).arrays["x"]
    if 0.0 < algebra.largest(before) < np.inf:
        few = limits._replace(iterations=min(limits.iterations, 10))
        fitted = fit_network(algebra, network, before, few, lambda *_: None).arrays
        fitted = alternate(algebra, network, linear, target, fitted, few, lambda *_: None).arrays
        near = at_size(algebra, network, fitted, exponent)
        # Moved a little from where two zeros would hold each other.
        guesses.append({name: near[name] + begun[name] * 1e-3 for name in network.shapes})

    def error(arrays: dict[str, Array]) -> float:
        with np.errstate(over="ignore", invalid="ignore"):  # arrays that reach too far are not chosen
            return algebra.norm(projection(network.whole(backend, arrays)) - wanted)

    best = min(guesses, key=error)
    return refine(algebra, network, projection, wanted, best, limits, watch)


def _unshrunk(algebra: Algebra, y: Array) -> Array:
    """The t with ``t - tanh(t) = y``, by Newton's method from the cube root of 3 y."""
    backend = algebra.backend
    # Further out the tanh is 1 to the last bit, and cubes would leave the dtype.
    near = backend.where(y > _FAR, y * 0.0 + _FAR, backend.where(y < -_FAR, y * 0.0 - _FAR, y))
    cube = near * 3.0
    root = backend.where(y > 0.0, y * 0.0 + 1.0, y * 0.0 - 1.0)
    for _ in range(60):
        root = root * (2.0 / 3.0) + cube / (root * root + 1e-30) * (1.0 / 3.0)
    t = root
    for _ in range(20):
        slope = backend.tanh(t)
        t = t - (tanhshrink(backend, t) - near) / (slope * slope + 1e-30)
    # Where y is all but nothing, so is t.
    return backend.where(near * near > 1e-36, t, y * 0.0) + (y - near)
