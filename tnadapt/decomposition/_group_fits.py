"""Fit of all groups of a plan, one after another, each by what its F and its arrays allow."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import CP, Dense
from tnadapt.algebra.group import Group
from tnadapt.algebra.maps import Linear, Nonlinear, tanhshrink
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import Array, load_backend
from tnadapt.errors import ConfigError, ShapeError

from ._least_squares import least_squares, refine
from ._network_fit import fit_network, start_network
from ._parameter_fit import fit_parameters
from ._reports import FitReport, GroupReport, Step
from .completion import arrays_on_host, double_on_host
from .fits import OPEN, Fit, Iteration, Limits, holds, unwatched
from .linear_algebra import Algebra, at_size, power_of
from .lower_bounds import lower_bound

Progress = Callable[[Step], None]
Watch = Callable[[int, float | None], None]

# An error of up to this many times the dtype's epsilon is rounding.
_ROUNDING = 64
# A bound counts as met within this relative tolerance.
_MET = 1e-6
_NOT_FINITE = "an update holds NaN, infinity, or numbers whose Frobenius norm exceeds float64: it cannot be fitted"
# Elements of updates that reports keep for bounds that were not read yet.
_HELD = 1 << 24


def fit_plan(
    algebra: Algebra, plan: SuperLoRA, read: Callable[[int], Array], limits: Limits, progress: Progress | None = None
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a plan to given updates.

    Parameters
    ----------
    algebra : Algebra
    plan : SuperLoRA
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
    """Return what is called with each iteration of a group and its error."""
    if progress is None:
        return unwatched
    return lambda iteration, error: progress(Step(number, count, iteration, error))


def _vectors(algebra: Algebra, plan: SuperLoRA, read: Callable[[int], Array]) -> Iterator[tuple[Group, Array]]:
    """Yield each group with its part of the long vector."""
    last: tuple[int, Array] | None = None
    for group in plan.groups:
        parts = []
        for piece in group.pieces:
            if last is None or last[0] != piece.weight:
                last = piece.weight, algebra.backend.flatten(read(piece.weight))
            parts.append(last[1][piece.weight_start : piece.weight_start + piece.length])
        yield group, algebra.backend.concat(parts)


def _fitted_together(
    algebra: Algebra, plan: SuperLoRA, read: Callable[[int], Array], limits: Limits, progress: Progress | None
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
        # Arrays are rounded with a start that is subtracted, however small the update is.
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
    """What the bound of a group and its certificate are computed from, when they are read."""

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
            # Other arrays can be better by at most the rounding of the optimum to the dtype.
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
#   parameters, ``Fᵀ y`` takes the place of that vector: fastfood nearly preserves the lengths of what such a network
#   can be, so that sweeps find the rest in few steps.
# - nonlinear F: the same for the argument that tanhshrink would need, then L-BFGS.


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
        return _Descent(algebra, network, projection, y, start).fit(limits, watch, preserved=True)
    before = _before(algebra, projection, y, limits, limits.iterations if plain else _STEPS)
    if algebra.squares(before.arrays["x"]) == 0.0:
        # y is orthogonal to the range of F.
        zeros = {name: algebra.zeros(shape) for name, shape in network.shapes.items()}
        return Fit(zeros, False, 0, before.method, before.stopped)
    fit = fit_network(algebra, network, before.arrays["x"], limits, unwatched)
    if plain:
        return before._replace(arrays=fit.arrays)
    return _Descent(algebra, network, projection, y, fit.arrays).fit(limits, watch)


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
    solution = least_squares(algebra, projection, projection.adjoint, y, start, tol, steps)
    stopped = "converged" if solution.converged else "max_iterations"
    return Fit({"x": solution.x}, False, solution.iterations, "least squares through F by CGLS", stopped)


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
        fitted = _Descent(algebra, network, linear, target, fitted).fit(few, unwatched).arrays
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


# -- Through a linear F: alternating least squares over the arrays of a network ----------------------------------------

# ``F(network)`` is linear in each array. With the others fixed, the optimal array solves a linear least-squares
# problem, which needs only the map (the network followed by F) and its adjoint, no matrix. No step increases the error.
#
# F dominates the time, so the residual is updated instead of computed again: a step of conjugate gradients takes one F
# and one adjoint. F nearly preserves the lengths of vectors that have few parameters. What is left is the curvature of
# the network itself, which is known for CP and divided out, so that one step nearly solves a problem.


# Steps for each least-squares problem; the next sweep continues from the result. A few are enough while the other
# arrays still change, one where the curvature is known and F preserves lengths. That the error no longer falls is known
# from sweeps of many.
_ONE, _FEW, _MANY = 1, 2, 20
# A step that gains less than this part of the tolerance is the last one for its array.
_NEGLIGIBLE = 0.1
# Below this error, in units of epsilon, the rounding of the updated residual is not negligible.
_NEAR = 1e4
# A sweep's change is continued by a multiple within these limits: twice the last one, or a quarter if that was too far.
_NEAREST, _FARTHEST = 0.25, 16.0


class _Descent:
    """Arrays with the residual of their update, which are fitted through a linear F to a vector, from a start."""

    def __init__(
        self, algebra: Algebra, network: Network, projection: Projection, y: Array, start: Mapping[str, Array]
    ) -> None:
        self.algebra, self.network, self.projection, self.y = algebra, network, projection, y
        self.arrays, self.norm, self.reach = dict(start), algebra.norm(y), _NEAREST
        self.measure()

    def fit(self, limits: Limits, watch: Watch, preserved: bool = False) -> Fit:
        """Run sweeps until they gain too little.

        A sweep solves one problem per array, each in one or two steps; its change is then continued as far as that
        reduces the error, at the cost of one F. Once a sweep reduces the error by no more than ``tol``, the next one
        has up to 20 steps. It ends with a sweep of the latter kind. With ``preserved``, F nearly preserves the lengths
        of the vectors that the network can be, up to a factor.
        """
        known = all(
            _curvature(self.network, self.arrays, self.algebra, name) is not None for name in self.network.shapes
        )
        few = _ONE if preserved and known else _FEW
        near = _NEAR * self.algebra.eps * self.norm
        self.least = limits.tol * self.norm
        steps, conjugate = Iteration(limits, watch), few
        for _ in range(limits.iterations):
            arrays, before = dict(self.arrays), self.error
            self.sweep(conjugate)
            if self.error <= near:
                self.measure()
            else:
                self.go_on(arrays)
            steps.note(self.error / self.norm)
            improved = self.error < before  # not if converged up to rounding, or NaN
            if not improved:
                self.arrays = arrays
            if not improved or limits.converged(before / self.norm, self.error / self.norm):
                if conjugate == _MANY:
                    steps.stopped = "converged"
                    break
                conjugate = _MANY
            else:
                conjugate = few if self.error > near else _FEW * 2
            if not improved:
                self.measure()
        else:
            steps.stopped = "max_iterations"
        return steps.fit(self.arrays, "alternating least squares")

    def measure(self) -> None:
        """Compute the residual from the arrays."""
        self.residual = self.y - self.made(self.arrays)
        self.error = self.algebra.norm(self.residual)

    def made(self, arrays: Mapping[str, Array]) -> Array:
        return self.projection(self.network.whole(self.algebra.backend, arrays))

    def sweep(self, steps: int) -> None:
        """Improve the arrays one after another."""
        for name in self.network.shapes:
            self._solve(name, steps)
            self.error = self.algebra.norm(self.residual)

    def _solve(self, name: str, steps: int) -> None:
        """Do steps of conjugate gradients for one array."""
        algebra, backend = self.algebra, self.algebra.backend
        inverse = _inverse(algebra, _curvature(self.network, self.arrays, algebra, name))
        # The terms of a sum that do not contain the array are a constant.
        several = self.network.terms > 1
        constant = self.made({**self.arrays, name: algebra.zeros(self.network.shapes[name])}) if several else None
        direction: Array | None = None
        slope = 0.0
        for _ in range(steps):
            pulled = self.projection.adjoint(self.residual)
            gradient = self.network.adjoint(backend, self.arrays, pulled, only=name)[name]
            ahead = gradient if inverse is None else backend.matmul(gradient, inverse)
            before, slope = slope, _dot(algebra, gradient, ahead)
            if not slope > 0.0:
                break
            direction = ahead if direction is None else ahead + direction * (slope / before)
            image = self.made({**self.arrays, name: direction})
            image = image if constant is None else image - constant
            curvature = algebra.squares(image)
            if not curvature > 0.0:
                break
            step = slope / curvature
            self.arrays[name] = self.arrays[name] + direction * step
            self.residual = self.residual - image * step
            # The square of the error falls by slope * step.
            if slope * step <= 2.0 * _NEGLIGIBLE * self.least * self.error:
                break

    def go_on(self, before: Mapping[str, Array]) -> None:
        """Continue the change of the arrays since ``before``, if that reduces the error."""
        kept = self.arrays, self.residual, self.error
        self.arrays = {name: array + (array - before[name]) * self.reach for name, array in self.arrays.items()}
        self.measure()
        if self.error < kept[2]:
            self.reach = min(2.0 * self.reach, _FARTHEST)
        else:
            self.arrays, self.residual, self.error = kept
            self.reach = max(0.25 * self.reach, _NEAREST)


def _curvature(network: Network, arrays: Mapping[str, Array], algebra: Algebra, name: str) -> np.ndarray | None:
    """Return the matrix K of an array, up to a factor: the network's adjoint of its value at D is ``D K``.

    None if it is not known. If padding is cut off, it is an approximation.
    """
    prefix, _, array_name = name.rpartition(".")
    split = network.splits[int(prefix.rpartition("split")[2])]
    if network.terms > 1 or not network.kronecker:
        return None
    if isinstance(split, Dense):
        return np.ones((1, 1))
    if not isinstance(split, CP) or array_name == "weights":
        return None
    curvature = np.ones((split.rank, split.rank))
    for other in split.shapes:
        array = double_on_host(algebra.backend, arrays[f"{prefix}.{other}"])
        if other == "weights":
            curvature *= np.outer(array, array)
        elif other != array_name:
            curvature *= array.T @ array
    return curvature


def _inverse(algebra: Algebra, curvature: np.ndarray | None) -> Array | None:
    """Return the inverse of a curvature, up to a factor; small eigenvalues, which are rounding, are raised."""
    if curvature is None or len(curvature) == 1:
        return None
    mean = float(np.trace(curvature)) / len(curvature)
    if not 0.0 < mean < np.inf:
        return None
    return algebra.array(np.linalg.inv(curvature / mean + algebra.eps**0.5 * np.eye(len(curvature))))


def _dot(algebra: Algebra, a: Array, b: Array) -> float:
    return float(np.dot(*(double_on_host(algebra.backend, x).reshape(-1) for x in (a, b))))
