"""Fit all groups of a plan, one after another, by the method that each group's F and arrays allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.group import Group
from tnadapt.algebra.layout import group_vectors
from tnadapt.algebra.maps import Linear, Nonlinear, tanhshrink
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import Array, load_backend
from tnadapt.errors import ConfigError, ShapeError

from ._least_squares import Alternation, least_squares, refine
from ._network_fit import fit_network, start_network
from ._parameter_fit import fit_parameters
from ._reports import FitReport, GroupReport, Step
from .fits import OPEN, Fit, Iteration, Limits, holds, unwatched
from .linear_algebra import Algebra, arrays_on_host, at_size, double_on_host, power_of
from .lower_bounds import lower_bound

Progress = Callable[[Step], None]
Watch = Callable[[int, float | None], None]

# An error of up to this many times the dtype's epsilon is rounding.
_ROUNDING = 64
# A bound counts as met within this relative tolerance.
_MET = 1e-6
_NOT_FINITE = "an update holds NaN, infinity, or numbers whose Frobenius norm exceeds float64: it cannot be fitted"
# Elements of updates that reports keep for bounds that have not been read yet.
_HELD = 1 << 24


def fit_plan(
    algebra: Algebra, plan: UpdatePlan, read: Callable[[int], Array], limits: Limits, progress: Progress | None = None
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a plan to given updates.

    Parameters
    ----------
    algebra : Algebra
    plan : UpdatePlan
    read : callable
        Returns the update of one weight, given its index: an array, shape (rows, cols), in algebra's library and
        dtype. It is called once per weight, unless a weight lies in groups that do not follow one another.
    limits : Limits
    progress : callable, optional
        Called with a :class:`Step` when a group begins and after each iteration.

    Returns
    -------
    dict of str to array
        With the names and shapes of ``plan.param_shapes``.
    FitReport

    Raises
    ------
    ShapeError
        If an update contains NaN or infinity.
    ConfigError
        If the config has sources or a map before the network, and F is nonlinear; or a frozen array is missing; or the
        config does more than add its updates.

    Notes
    -----
    Memory is a few times one group's part of the long vector.
    """
    if not plan.applying.additive:
        raise ConfigError(
            f"a fit needs updates that are added to the weights, and apply={plan.config.apply!r} does more: use "
            "apply='add'"
        )
    if plan.theta is not None or any(config.sources for config, _ in plan.config.split(plan.shapes)):
        return _fitted_together(algebra, plan, read, limits, progress)
    params: dict[str, Array] = {}
    reports, held = [], 0
    count = len(plan.groups)
    for number, (group, y) in enumerate(_vectors(algebra, plan, read)):
        watch = _watch(progress, number, count)
        watch(0, None)
        arrays, report = _fitted(algebra, group, y, limits, watch)
        params.update({full: arrays[name] for name, full in group.names.items()})
        reports.append(report)
        held += group.size
        if held > _HELD:
            report.bound  # noqa: B018 - computed now, so that the update is not kept
            held -= group.size
    return params, FitReport(plan, tuple(reports))


def _watch(progress: Progress | None, number: int, count: int) -> Callable[[int, float | None], None]:
    """Return the callback for each iteration of a group and its error."""
    if progress is None:
        return unwatched
    return lambda iteration, error: progress(Step(number, count, iteration, error))


def _vectors(algebra: Algebra, plan: UpdatePlan, read: Callable[[int], Array]) -> Iterator[tuple[Group, Array]]:
    """Yield each group with its part of the long vector."""
    return zip(plan.groups, group_vectors(algebra.backend, read, (group.pieces for group in plan.groups)), strict=True)


def _fitted_together(
    algebra: Algebra, plan: UpdatePlan, read: Callable[[int], Array], limits: Limits, progress: Progress | None
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a plan that has more than one trained array per array of the network."""
    if not all(group.projection.linear for group in plan.groups):
        raise ConfigError(
            "the solvers fit frozen, tied and scaled arrays and θ through linear maps F only; got "
            f"projection={plan.config.projection!r}: use another one, or leave sources and before out"
        )
    wide = [double_on_host(algebra.backend, y) for _, y in _vectors(algebra, plan, read)]
    norms = [float(np.linalg.norm(y)) for y in wide]
    if not all(map(math.isfinite, norms)):
        raise ShapeError(_NOT_FINITE)
    watch = _watch(progress, 0, len(wide))
    watch(0, None)
    fit = fit_parameters(plan, wide, limits, algebra.seed, _ROUNDING * algebra.eps, watch)
    params = algebra.arrays(fit.arrays)
    arrays = plan.arrays(arrays_on_host(algebra.backend, params))
    numpy, reports = load_backend("numpy"), []
    for group, y, norm in zip(plan.groups, wide, norms, strict=True):
        error = float(np.linalg.norm(group.update(numpy, arrays, 0, group.size) - y))
        if group.subtracts:
            y = y + np.asarray(group.projection(group.network.whole(numpy, group.begun(numpy, arrays))))
        # With a start that is subtracted, the arrays have rounding errors however small the update is.
        rounding = _ROUNDING * algebra.eps * float(np.linalg.norm(y))
        known = _Known(Algebra(numpy, y), group, y, norm, error, rounding, fit, len(wide) == 1)
        reports.append(_report(known, norm, fit))
    return params, FitReport(plan, tuple(reports))


def _fitted(
    algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Watch
) -> tuple[dict[str, Array], GroupReport]:
    # If F is linear, F and the network are homogeneous: scale the update to magnitude one by a power of two, which is
    # exact. A start that is subtracted has its own scale.
    linear = group.projection.linear
    exponent = power_of(algebra, y) if linear and not group.subtracts else 0
    scaled = algebra.scaled(y, -exponent)
    norm = algebra.norm(scaled)
    if not norm < math.inf or math.frexp(norm)[1] + exponent > 1024:
        raise ShapeError(_NOT_FINITE)
    target = scaled
    if linear and group.subtracts and norm:
        target = scaled + group.projection(group.network.whole(algebra.backend, started(algebra, group)))
    fit = fit_group(algebra, group, target, limits, watch)
    arrays = at_size(algebra, group.network, fit.arrays, exponent) if norm else fit.arrays
    error = _error(algebra, group, arrays, scaled, exponent)
    if not error <= norm:
        # Never return a fit that is worse than an update of zeros.
        method = f"{fit.method}: no better than zero"
        fit = Fit(started(algebra, group), False, fit.iterations, method, fit.stopped)
        arrays = fit.arrays
        error = _error(algebra, group, arrays, scaled, exponent)
    # The caller may change the update before the report is read.
    kept = target if exponent else target * 1.0
    rounding = _ROUNDING * algebra.eps * algebra.norm(kept)
    known = _Known(algebra, group, kept, norm, error, rounding, fit._replace(arrays={}, closed=None))
    return arrays, _report(known, math.ldexp(norm, exponent), fit)


class _Known(NamedTuple):
    """The values from which a group's bound and certificate are computed when they are read."""

    algebra: Algebra
    group: Group
    y: Array
    norm: float
    error: float
    rounding: float
    fit: Fit
    alone: bool = True

    def optimum(self) -> tuple[float, bool]:
        """Return the relative bound, and whether the fit is certified."""
        optimal = self.fit.factor <= 1.0 and holds(self.fit.optimal)
        if not self.norm:
            return 0.0, bool(optimal or self.error <= self.rounding)
        bound, projection = 0.0, self.group.projection
        if projection.map.isometry:
            bound = lower_bound(self.algebra, self.group.network, projection.adjoint(self.y))
        certified = bool(optimal or self.error <= self.rounding or self.error <= bound * (1.0 + _MET))
        if optimal and self.alone:
            # Other arrays can be better by at most the error of rounding the optimum to the dtype.
            bound = max(bound, self.error * (1.0 - OPEN) - self.rounding)
        return min(self.error, bound) / self.norm, certified


def _report(known: _Known, norm: float, fit: Fit) -> GroupReport:
    error = known.error / known.norm if known.norm else 0.0
    return GroupReport.computed_later(
        lambda _: known.optimum(), size=known.group.size, norm=norm, error=error, iterations=fit.iterations,
        method=fit.method, stopped=fit.stopped, history=fit.history,
    )  # fmt: skip


def _error(algebra: Algebra, group: Group, arrays: Mapping[str, Array], scaled: Array, exponent: int) -> float:
    """Compute, in float64, the distance of the arrays' update from ``scaled``, both divided by ``2 ** exponent``."""
    double = algebra.double
    wide = {name: algebra.doubled(array) for name, array in arrays.items()}
    if group.projection.linear:
        wide = at_size(double, group.network, wide, -exponent)
    params = {full: wide[name] for name, full in group.names.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # the error is infinite for arrays that overflow
        update = group.update(double.backend, params, 0, group.size, algebra.backend.dtype_name(algebra.like))
        return double.norm(update - algebra.doubled(scaled))


# -- One group, through its F ------------------------------------------------------------------------------------------

# - identity, shuffle: F preserves distances, so the network is fitted to ``Fᵀ y``.
# - linear F: least squares gives the vector before F. If the network is dense, that vector is the result. Otherwise the
#   network is fitted to it, and then refined by alternating least squares through F. For a large group with few
#   parameters, ``Fᵀ y`` replaces that vector: fastfood nearly preserves the lengths of the vectors of such a network,
#   so that sweeps find the rest in a few steps.
# - nonlinear F: the same for the argument that tanhshrink would need, then L-BFGS.


_STEPS = 50  # least-squares steps for an initial guess
_FAR = 100.0  # beyond this, t - tanh(t) is t - 1 in every dtype
_FORMED = 1 << 21  # F is formed as a matrix up to this number of elements
# For F with at least this many elements, and inputs per parameter of the network, the start does not invert F.
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
        return _through(algebra, network, projection, y, start, Iteration(limits, watch))
    before = _before(algebra, projection, y, limits, limits.iterations if plain else _STEPS)
    if algebra.squares(before.arrays["x"]) == 0.0:
        # y is orthogonal to the range of F.
        zeros = {name: algebra.zeros(shape) for name, shape in network.shapes.items()}
        return Fit(zeros, False, 0, before.method, before.stopped)
    fit = fit_network(algebra, network, before.arrays["x"], limits, unwatched)
    if plain:
        return before._replace(arrays=fit.arrays)
    return _through(algebra, network, projection, y, fit.arrays, Iteration(limits, watch))


def _through(
    algebra: Algebra, network: Network, projection: Projection, y: Array, start: Mapping[str, Array], steps: Iteration
) -> Fit:
    """Fit the arrays of a network through a linear F to a vector, by alternating least squares from a start."""
    backend = algebra.backend
    return Alternation(
        algebra,
        network.shapes,
        lambda arrays: projection(network.whole(backend, arrays)),
        lambda arrays, vec, name: network.adjoint(backend, arrays, projection.adjoint(vec), only=name)[name],
        y,
        affine=network.terms > 1,
    ).fit(start, steps)


def _preserves(group: Group) -> bool:
    """Return whether F nearly preserves the lengths of the network's vectors, up to a factor."""
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
        # would not show how close the optimum is.
        backend = algebra.backend
        rows = backend.to_numpy(projection(algebra.array(np.eye(projection.n_in)))).astype(np.float64)
        x, *_ = np.linalg.lstsq(rows.T, backend.to_numpy(y).astype(np.float64), rcond=None)
        return Fit({"x": algebra.array(x)}, True, 0, "least squares through F")
    start = algebra.zeros((projection.n_in,))
    tol = min(limits.tol, 1e-6)
    x, converged, iterations = least_squares(algebra, projection, projection.adjoint, y, start, tol, steps)
    stopped = "converged" if converged else "max_iterations"
    return Fit({"x": x}, False, iterations, "least squares through F by CGLS", stopped)


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
        fitted = _through(algebra, network, linear, target, fitted, Iteration(few)).arrays
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
