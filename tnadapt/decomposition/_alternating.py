"""Alternating least squares over the arrays of a network, through a linear F.

``F(network)`` is linear in each array. With the others fixed, the optimal array solves a linear least-squares problem,
which needs only the map (the network followed by F) and its adjoint, no matrix. No step increases the error.

F dominates the time, so the residual is updated instead of computed again: a step of conjugate gradients takes one F
and one adjoint. F nearly preserves the lengths of vectors that have few parameters. What is left is the curvature of
the network itself, which is known for CP and divided out, so that one step nearly solves a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tnadapt.algebra.formats import CP, Dense
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._linear_algebra import Algebra
from ._single_tensor import Fit, Limits

__all__ = ["alternate"]

# Steps for each least-squares problem; the next sweep continues from the result. A few are enough while the other
# arrays still change, one where the curvature is known and F preserves lengths. That the error no longer falls is known
# from sweeps of many.
_ONE, _FEW, _STEPS = 1, 2, 20
# A step that gains less than this part of the tolerance is the last one for its array.
_NEGLIGIBLE = 0.1
# Below this error, in units of epsilon, the rounding of the updated residual is not negligible.
_NEAR = 1e4
# A sweep's change is continued by a multiple within these limits: twice the last one, or a quarter if that was too far.
_NEAREST, _FARTHEST = 0.25, 16.0


def alternate(
    algebra: Algebra,
    network: Network,
    projection: Projection,
    y: Array,
    start: Mapping[str, Array],
    limits: Limits,
    watch: Callable[[int, float], None],
    preserved: bool = False,
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
    preserved : bool
        Whether F nearly preserves the lengths of the vectors that the network can be, up to a factor.

    Returns
    -------
    Fit

    Notes
    -----
    A sweep solves one problem per array, each in one or two steps; its change is then continued as far as that reduces
    the error, at the cost of one F. Once a sweep reduces the error by no more than ``tol``, the next one has up to 20
    steps. It ends with a sweep of the latter kind.
    """
    state = _Descent(algebra, network, projection, y, start, limits.tol)
    known = all(_curvature(network, start, algebra, name) is not None for name in network.shapes)
    few = _ONE if preserved and known else _FEW
    sweeps, steps = 0, few
    for sweeps in range(1, limits.iterations + 1):
        arrays, before = dict(state.arrays), state.error
        state.sweep(steps)
        if state.error <= _NEAR * algebra.eps * state.norm:
            state.measure()
        else:
            state.go_on(arrays)
        watch(sweeps, state.error / state.norm)
        improved = state.error < before  # not if converged up to rounding, or NaN
        if not improved:
            state.arrays = arrays
        if not improved or before - state.error <= state.least:
            if steps == _STEPS:
                break
            steps = _STEPS
        else:
            steps = few if state.error > _NEAR * algebra.eps * state.norm else _FEW * 2
        if not improved:
            state.measure()
    return Fit(state.arrays, False, sweeps, "alternating least squares")


class _Descent:
    """Arrays with the residual of their update; steps change both."""

    def __init__(
        self,
        algebra: Algebra,
        network: Network,
        projection: Projection,
        y: Array,
        start: Mapping[str, Array],
        tol: float,
    ) -> None:
        self.algebra, self.network, self.projection, self.y = algebra, network, projection, y
        self.arrays, self.norm = dict(start), algebra.norm(y)
        self.least = tol * self.norm
        self.reach = _NEAREST
        self.measure()

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
    prefix, _, own = name.rpartition(".")
    split = network.splits[int(prefix.rpartition("split")[2])]
    if network.terms > 1 or not network.kronecker:
        return None
    if isinstance(split, Dense):
        return np.ones((1, 1))
    if not isinstance(split, CP) or own == "weights":
        return None
    found = np.ones((split.rank, split.rank))
    for other in split.shapes:
        array = np.asarray(algebra.backend.to_numpy(arrays[f"{prefix}.{other}"]), np.float64)
        if other == "weights":
            found *= np.outer(array, array)
        elif other != own:
            found *= array.T @ array
    return found


def _inverse(algebra: Algebra, curvature: np.ndarray | None) -> Array | None:
    """Return the inverse of a curvature, up to a factor; small eigenvalues, which are rounding, are raised."""
    if curvature is None or len(curvature) == 1:
        return None
    mean = float(np.trace(curvature)) / len(curvature)
    if not 0.0 < mean < np.inf:
        return None
    return algebra.array(np.linalg.inv(curvature / mean + algebra.eps**0.5 * np.eye(len(curvature))))


def _dot(algebra: Algebra, a: Array, b: Array) -> float:
    host = (np.asarray(algebra.backend.to_numpy(x), np.float64).reshape(-1) for x in (a, b))
    return float(np.dot(*host))
