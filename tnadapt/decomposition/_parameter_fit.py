"""Fit of the parameters of a plan whose arrays are frozen, tied, scaled or made from θ, by Gauss-Newton.

The updates are a function of all parameters together: an array may belong to several groups, and θ to all. Its
derivative is computed exactly from the network, which is linear in each of its arrays. If the updates are linear in the
parameters, as with one trained array per term, one linear least-squares problem gives the optimum. Otherwise the damped
Gauss-Newton method iterates, from several starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.group import Group
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend

from ._damped_gauss_newton import Descent, damped_gauss_newton
from ._single_tensor import Limits

__all__ = ["ParameterFit", "fit_parameters"]

Arrays = dict[str, np.ndarray]

# The derivative is formed as a matrix up to this number of elements, which gives a certified optimum.
_FORMED = 1 << 22
# Up to this many columns of it are computed in each step; products with it are enough otherwise.
_COLUMNS = 256
# Number of starts of a problem that is not linear: that of training, and random ones.
_STARTS = 4


class ParameterFit(NamedTuple):
    """Fitted parameters.

    Attributes
    ----------
    params : dict of str to ndarray of float64
    optimal : bool
        Whether they are known to be the optimum.
    iterations : int
    method : str
    """

    params: Arrays
    optimal: bool
    iterations: int
    method: str


def fit_parameters(
    plan: SuperLoRA,
    wanted: Sequence[np.ndarray],
    limits: Limits,
    seed: int,
    watch: Callable[[int, float | None], None],
) -> ParameterFit:
    """Fit the parameters of a plan with linear maps F to the updates of its groups.

    Parameters
    ----------
    plan : SuperLoRA
    wanted : sequence of ndarray of float64
        The vector of each group.
    limits : Limits
    seed : int
        Of the random starts.
    watch : callable
        Called with the number and the relative error of each iteration.

    Returns
    -------
    ParameterFit
    """
    problem = _Problem(plan, wanted)
    start = {name: np.asarray(array, np.float64) for name, array in _start(plan).items()}
    if problem.linear:
        return _linear(problem, start, limits)
    return _nonlinear(problem, start, limits, seed, watch)


def _start(plan: SuperLoRA) -> Arrays:
    """Return the initial parameters: for θ zeros, whether or not training could begin there."""
    if plan.theta is not None:
        return {name: np.zeros(shape) for name, shape in plan.param_shapes.items()}
    return plan.init(dtype="float64")


class _Problem:
    """Residuals of a plan's updates, and the products of their derivative with vectors."""

    def __init__(self, plan: SuperLoRA, wanted: Sequence[np.ndarray]) -> None:
        self.plan, self.backend = plan, load_backend("numpy")
        self.shapes = plan.param_shapes
        self.wanted = np.concatenate(wanted)
        self.norm = float(np.linalg.norm(self.wanted))
        self.edges = np.cumsum([0, *(len(vec) for vec in wanted)]).tolist()

    @property
    def linear(self) -> bool:
        """Whether the updates are an affine function of the parameters: one trained array or multiplier per term."""
        for group in self.plan.groups:
            for prefixes in group.network.prefixes:
                own = [name for name in group.names if name.startswith(tuple(prefixes))]
                if len(own) > 1:
                    return False
        return True

    def flat(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([params[name].reshape(-1) for name in self.shapes])

    def params(self, vec: np.ndarray) -> Arrays:
        edges = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
        parts = np.split(vec, edges)
        return {name: part.reshape(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def residual(self, vec: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            made: np.ndarray = self._made(self.plan.arrays(self.params(vec)))
            return np.asarray(made - self.wanted)

    def _made(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([group.update(self.backend, arrays, 0, group.size) for group in self.plan.groups])

    def moved(self, vec: np.ndarray, way: np.ndarray) -> np.ndarray:
        """Compute the derivative of the updates in one direction."""
        arrays, tangents = self.plan.arrays(self.params(vec)), self._array_tangents(self.params(way))
        found = []
        for group in self.plan.groups:
            whole, ways = _network_arrays(group, arrays), _network_tangents(group, arrays, tangents)
            total = np.zeros(group.network.size)
            for name, tangent in ways.items():
                total = total + group.network.whole(self.backend, {**whole, name: tangent})
            found.append(np.asarray(group.projection(total)))
        return np.concatenate(found)

    def pulled(self, vec: np.ndarray, residual: np.ndarray) -> np.ndarray:
        """Compute the adjoint of the derivative."""
        arrays = self.plan.arrays(self.params(vec))
        gradients: Arrays = {name: np.zeros(shape) for name, shape in self.plan.array_shapes.items()}
        for index, group in enumerate(self.plan.groups):
            part = group.projection.adjoint(residual[self.edges[index] : self.edges[index + 1]])
            found = group.network.adjoint(self.backend, _network_arrays(group, arrays), part)
            for full, gradient in _parameter_gradients(group, arrays, found):
                gradients[full] = gradients[full] + gradient
        if self.plan.theta is None:
            return self.flat(gradients)
        theta = self.plan.theta
        return self.flat(
            {
                part.name: theta.pulled(self.backend, part, [gradients[full] for full in part.arrays])
                for part in theta.parts
            }
        )

    def _array_tangents(self, ways: Arrays) -> Arrays:
        theta = self.plan.theta
        if theta is None:
            return ways
        return {
            full: np.asarray(moved)
            for part in theta.parts
            for full, moved in theta.moved(self.backend, part, ways[part.name]).items()
        }


def _network_arrays(group: Group, arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    return group.arrays(load_backend("numpy"), arrays)


def _parts(group: Group, name: str, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return an array without its multipliers, and the multipliers."""
    base = arrays[group.names[name]] if name in group.names else group.frozen.host((name, "float64")).astype(np.float64)
    if name not in group.multiplied:
        return base, {}
    return base, {part: arrays[group.names[f"{name}.{part}"]] for part in group.multiplied[name].multipliers}


def _network_tangents(
    group: Group, arrays: Mapping[str, np.ndarray], tangents: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the derivative of each array of the network, by the product rule over its multipliers."""
    backend, found = load_backend("numpy"), {}
    for name in group.network.shapes:
        base, own = _parts(group, name, arrays)
        if name not in group.multiplied:
            if name in group.names:
                found[name] = tangents[group.names[name]]
            continue
        product = group.multiplied[name].product
        terms = [product(backend, base, {**own, part: tangents[group.names[f"{name}.{part}"]]}) for part in own]
        if name in group.names:
            terms.append(product(backend, tangents[group.names[name]], own))
        found[name] = np.asarray(sum(terms))
    return found


def _parameter_gradients(
    group: Group, arrays: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> list[tuple[str, np.ndarray]]:
    """Return the gradient of each trained array and multiplier, by full name, from those of the network's arrays."""
    gradients: list[tuple[str, np.ndarray]] = []
    for name, gradient in found.items():
        if name in group.multiplied:
            base, own = _parts(group, name, arrays)
            gradient, parts = group.multiplied[name].gradients(base, own, gradient)
            gradients += [(group.names[f"{name}.{part}"], array) for part, array in parts.items()]
        if name in group.names:
            gradients.append((group.names[name], gradient))
    return gradients


def _linear(problem: _Problem, start: Arrays, limits: Limits) -> ParameterFit:
    begun = np.zeros_like(problem.flat(start))
    at_zero = problem.residual(begun)
    size = begun.size
    if size * problem.wanted.size <= _FORMED:
        matrix = np.stack([problem.moved(begun, unit) for unit in np.eye(size)], axis=1)
        found, *_ = np.linalg.lstsq(matrix, -at_zero, rcond=None)
        return ParameterFit(problem.params(found), True, 0, "least squares")
    from scipy.sparse.linalg import LinearOperator, lsqr

    operator = LinearOperator(
        (problem.wanted.size, size),
        lambda way: problem.moved(begun, way.reshape(-1)),
        lambda residual: problem.pulled(begun, residual.reshape(-1)),
        dtype=np.float64,
    )
    tol = min(limits.tol, 1e-10)
    found, stopped, steps, *_ = lsqr(
        operator, -at_zero, atol=tol, btol=tol, conlim=0.0, iter_lim=10 * limits.iterations
    )
    method = "least squares by LSQR" + (", converged" if stopped in (1, 2) else "")
    return ParameterFit(problem.params(found), False, int(steps), method)


def _nonlinear(
    problem: _Problem, start: Arrays, limits: Limits, seed: int, watch: Callable[[int, float | None], None]
) -> ParameterFit:
    from scipy.sparse.linalg import LinearOperator

    size = problem.flat(start).size
    seen = 0

    def jacobian(vec: np.ndarray) -> Any:
        if size <= _COLUMNS and size * problem.wanted.size <= _FORMED:
            return np.stack([problem.moved(vec, unit) for unit in np.eye(size)], axis=1)
        return LinearOperator(
            (problem.wanted.size, size),
            lambda way: problem.moved(vec, way.reshape(-1)),
            lambda residual: problem.pulled(vec, residual.reshape(-1)),
            dtype=np.float64,
        )

    def on_step(*_: Any) -> None:
        nonlocal seen
        seen += 1
        watch(seen, None)

    rng = np.random.RandomState(seed % (1 << 32))
    best: Descent | None = None
    for attempt in range(_STARTS):
        begun = problem.flat(start)
        if attempt:
            begun = begun + rng.normal(size=begun.size) * (np.sqrt(np.mean(begun**2)) or 1.0)
        found = damped_gauss_newton(problem.residual, jacobian, begun, problem.norm, limits, on_step)
        if best is None or found.error < best.error:
            best = found
        if best.error <= 1e-14 * problem.norm:
            break
    assert best is not None
    return ParameterFit(problem.params(best.x), False, seen, "Gauss-Newton")
