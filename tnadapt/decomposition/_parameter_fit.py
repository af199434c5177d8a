"""Fit the parameters of a plan whose arrays are frozen, tied, scaled or made from θ, by Gauss-Newton.

The updates are a function of all parameters together: an array may belong to several groups, and θ to all. Its
derivative is computed exactly from the network, which is linear in each of its arrays. If the updates are linear in the
parameters, as with one trained array per term, one linear least-squares problem gives the optimum. Otherwise the damped
Gauss-Newton method iterates, from several starts. Groups that share no parameter are fitted one after another.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.group import Group
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import load_backend

from ._least_squares import damped_gauss_newton
from .fits import Fit, Limits, all_of

Arrays = dict[str, np.ndarray]

# The derivative is formed as a matrix up to this number of elements, which gives a certified optimum.
_FORMED = 1 << 22
# Up to this many columns of it are computed in each step; products with it are enough otherwise.
_COLUMNS = 256
# Number of random starts of a problem that is not linear, after that of training.
_STARTS = 3


def fit_parameters(
    plan: UpdatePlan,
    wanted: Sequence[np.ndarray],
    limits: Limits,
    seed: int,
    rounding: float,
    watch: Callable[[int, float | None], None],
) -> Fit:
    """Fit the parameters of a plan with linear maps F to the updates of its groups.

    Parameters
    ----------
    plan : UpdatePlan
    wanted : sequence of ndarray of float64
        The vector of each group.
    limits : Limits
    seed : int
        Of the random starts.
    rounding : float
        The relative error at which no other start is tried.
    watch : callable
        Called with the number and the relative error of each iteration.

    Returns
    -------
    Fit
        Its arrays are the parameters, in float64.
    """
    start = {name: np.asarray(array, np.float64) for name, array in _start(plan).items()}
    seen = itertools.count(1)
    fits = []
    for indices in _independent(plan):
        problem = _Problem(plan, [plan.groups[index] for index in indices], [wanted[index] for index in indices])
        begun = {name: start[name] for name in problem.shapes}
        if problem.linear:
            fits.append(_linear(problem, begun, limits))
        else:
            fits.append(_nonlinear(problem, begun, limits, seed, rounding, lambda *_: watch(next(seen), None)))
    return Fit(
        start | {name: array for fit in fits for name, array in fit.arrays.items()},
        all_of(fit.optimal for fit in fits),
        sum(fit.iterations for fit in fits),
        ", ".join(dict.fromkeys(fit.method for fit in fits)),
        next((fit.stopped for fit in fits if not fit.converged), fits[0].stopped),
    )


def _independent(plan: UpdatePlan) -> list[list[int]]:
    """Return the indices of the groups, in sets that have no parameter in common."""
    if plan.theta is not None:
        return [list(range(len(plan.groups)))]
    sets: list[tuple[set[str], list[int]]] = []
    for index, group in enumerate(plan.groups):
        names, indices = set(group.names.values()), [index]
        rest = []
        for other in sets:
            if names & other[0]:
                names, indices = names | other[0], other[1] + indices
            else:
                rest.append(other)
        sets = [*rest, (names, indices)]
    return [sorted(indices) for _, indices in sets]


def _start(plan: UpdatePlan) -> Arrays:
    """Return the initial parameters, which for θ are zeros, whether or not training could begin there."""
    if plan.theta is not None:
        return {name: np.zeros(shape) for name, shape in plan.param_shapes.items()}
    return plan.init(dtype="float64")


class _Problem:
    """Residuals of a plan's updates, and the products of their derivative with vectors."""

    def __init__(self, plan: UpdatePlan, groups: Sequence[Group], wanted: Sequence[np.ndarray]) -> None:
        self.plan, self.groups, self.backend = plan, groups, load_backend("numpy")
        names = {full for group in groups for full in group.names.values()}
        shapes = plan.param_shapes
        self.shapes = shapes if plan.theta is not None else {name: shapes[name] for name in shapes if name in names}
        self.wanted = np.concatenate(wanted)
        self.norm = float(np.linalg.norm(self.wanted))
        self.size = sum(math.prod(shape) for shape in self.shapes.values())
        self.edges = np.cumsum([0, *(len(vec) for vec in wanted)]).tolist()

    @property
    def linear(self) -> bool:
        """Whether the updates are an affine function of the parameters: one trained array or multiplier per term."""
        for group in self.groups:
            for prefixes in group.network.prefixes:
                trained = [name for name in group.names if name.startswith(tuple(prefixes))]
                if len(trained) > 1:
                    return False
        return True

    def arrays(self, vec: np.ndarray) -> Arrays:
        """Return the trained arrays: the parameters, or what θ makes."""
        params = self.params(vec)
        return params if self.plan.theta is None else self.plan.arrays(params)

    def flat(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([params[name].reshape(-1) for name in self.shapes])

    def params(self, vec: np.ndarray) -> Arrays:
        edges = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
        parts = np.split(vec, edges)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def residual(self, vec: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            arrays = self.arrays(vec)
            updates = [group.update(self.backend, arrays, 0, group.size) for group in self.groups]
            return np.asarray(np.concatenate(updates) - self.wanted)

    def moved(self, vec: np.ndarray, way: np.ndarray) -> np.ndarray:
        """Compute the derivative of the updates in one direction."""
        arrays, tangents = self.arrays(vec), self._array_tangents(self.params(way))
        derivatives = []
        for group in self.groups:
            whole, ways = group.arrays(self.backend, arrays), _network_tangents(group, arrays, tangents)
            total = np.zeros(group.network.size)
            for name, tangent in ways.items():
                total = total + group.network.whole(self.backend, {**whole, name: tangent})
            derivatives.append(np.asarray(group.projection(total)))
        return np.concatenate(derivatives)

    def derivative(self, vec: np.ndarray, columns: float = math.inf) -> Any:
        """Return the derivative: a matrix of up to a number of columns, if it is not too large, or an operator."""
        from scipy.sparse.linalg import LinearOperator

        shape = self.wanted.size, self.size
        if self.size <= columns and math.prod(shape) <= _FORMED:
            return np.stack([self.moved(vec, unit) for unit in np.eye(self.size)], axis=1)
        return LinearOperator(
            shape,
            lambda way: self.moved(vec, way.reshape(-1)),
            lambda residual: self.pulled(vec, residual.reshape(-1)),
            dtype=np.float64,
        )

    def pulled(self, vec: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """Compute the adjoint of the derivative."""
        arrays = self.arrays(vec)
        gradients: Arrays = {name: np.zeros(array.shape) for name, array in arrays.items()}
        for index, group in enumerate(self.groups):
            part = group.projection.adjoint(residual[self.edges[index] : self.edges[index + 1]])
            network_gradients = group.network.adjoint(self.backend, group.arrays(self.backend, arrays), part)
            for full, gradient in _parameter_gradients(group, arrays, network_gradients):
                gradients[full] = gradients[full] + gradient
        theta = self.plan.theta
        if theta is not None:
            gradients = {
                part.name: theta.pulled(self.backend, part, [gradients[full] for full in part.arrays])
                for part in theta.parts
            }
        return self.flat(gradients)

    def _array_tangents(self, ways: Arrays) -> Arrays:
        if (theta := self.plan.theta) is None:
            return ways
        return {
            full: np.asarray(moved)
            for part in theta.parts
            for full, moved in theta.moved(self.backend, part, ways[part.name]).items()
        }


def _parts(group: Group, name: str, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return an array without its multipliers, and these."""
    base = arrays[group.names[name]] if name in group.names else group.frozen.host((name, "float64")).astype(np.float64)
    if name not in group.multiplied:
        return base, {}
    return base, {part: arrays[group.names[f"{name}.{part}"]] for part in group.multiplied[name].multipliers}


def _network_tangents(
    group: Group, arrays: Mapping[str, np.ndarray], tangents: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the derivative of each array of the network, by the product rule over its multipliers."""
    backend, derivatives = load_backend("numpy"), {}
    for name in group.network.shapes:
        base, multipliers = _parts(group, name, arrays)
        if name not in group.multiplied:
            if name in group.names:
                derivatives[name] = tangents[group.names[name]]
            continue
        product = group.multiplied[name].product
        terms = [
            product(backend, base, {**multipliers, part: tangents[group.names[f"{name}.{part}"]]})
            for part in multipliers
        ]
        if name in group.names:
            terms.append(product(backend, tangents[group.names[name]], multipliers))
        derivatives[name] = np.asarray(sum(terms))
    return derivatives


def _parameter_gradients(
    group: Group, arrays: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """Return the gradient of each trained array and multiplier by full name, given the network arrays' ones."""
    gradients: list[tuple[str, np.ndarray]] = []
    for name, gradient in found.items():
        if name in group.multiplied:
            base, multipliers = _parts(group, name, arrays)
            gradient, parts = group.multiplied[name].gradients(base, multipliers, gradient)
            gradients += [(group.names[f"{name}.{part}"], array) for part, array in parts.items()]
        if name in group.names:
            gradients.append((group.names[name], gradient))
    return gradients


def _linear(problem: _Problem, start: Arrays, limits: Limits) -> Fit:
    begun = np.zeros_like(problem.flat(start))
    at_zero, derivative = problem.residual(begun), problem.derivative(begun)
    if isinstance(derivative, np.ndarray):
        solution, *_ = np.linalg.lstsq(derivative, -at_zero, rcond=None)
        return Fit(problem.params(solution), True, 0, "least squares")
    from scipy.sparse.linalg import lsqr

    tol = min(limits.tol, 1e-10)
    most = 10 * limits.iterations
    solution, reason, steps, *_ = lsqr(derivative, -at_zero, atol=tol, btol=tol, conlim=0.0, iter_lim=most)
    stopped = "converged" if reason in (1, 2) else "max_iterations"
    return Fit(problem.params(solution), False, int(steps), "least squares by LSQR", stopped)


def _nonlinear(
    problem: _Problem, start: Arrays, limits: Limits, seed: int, rounding: float, watch: Callable[[int, float], None]
) -> Fit:
    def jacobian(vec: np.ndarray) -> Any:
        return problem.derivative(vec, _COLUMNS)

    rng = np.random.RandomState(seed % (1 << 32))
    best, steps = None, 0
    for begun in _starts(problem.flat(start), rng):
        descent = damped_gauss_newton(problem.residual, jacobian, begun, problem.norm, limits, watch)
        steps += len(descent.history)
        if best is None or descent.error < best.error:
            best = descent
        if best.error <= rounding * problem.norm:
            break
    assert best is not None
    stopped = "converged" if best.converged else "max_iterations"
    return Fit(problem.params(best.x), False, steps, "Gauss-Newton", stopped, history=best.history)


def _starts(start: np.ndarray, rng: np.random.RandomState) -> Iterator[np.ndarray]:
    """Yield the start of training, then random ones."""
    yield start
    for _ in range(_STARTS):
        yield start + rng.normal(size=start.size) * (np.sqrt(np.mean(start**2)) or 1.0)
