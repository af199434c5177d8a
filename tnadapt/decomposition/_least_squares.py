"""Least-squares solvers: damped Gauss-Newton, CGLS for linear problems, alternating least squares, and L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends import Array

from .fits import Fit, Iteration, Limits
from .linear_algebra import Algebra

# -- Damped Gauss-Newton (Levenberg-Marquardt) -------------------------------------------------------------------------

# The arrays of a network are determined only up to changes that leave its tensor as it is, so the Jacobian never has
# full rank. Damping takes the shortest step among equal ones. In proportion to the residual (Fan & Yuan, 2005), it
# keeps the convergence quadratic where the residual is zero at the solution, whatever the Jacobian's rank.


# Initial damping relative to the mean diagonal of the normal equations; its limits; attempts for one step.
_FIRST, _LEAST, _MOST = 1e-2, 1e-14, 1e8
_ATTEMPTS = 12
# The normal equations are formed for up to this many parameters, and this many multiply-adds.
_FORMED, _WORK = 1024, 1 << 33


class Descent(NamedTuple):
    """The result of a descent.

    Attributes
    ----------
    x : ndarray
    error : float
        Norm of the residual.
    converged : bool
        Whether it ended because no step reduced the error by more than the tolerance.
    history : tuple of float
        The error after each step, relative to the norm of what is fitted.
    """

    x: np.ndarray
    error: float
    converged: bool
    history: tuple[float, ...]


def damped_gauss_newton(
    residual: Callable[[np.ndarray], np.ndarray],
    jacobian: Callable[[np.ndarray], Any],
    start: np.ndarray,
    norm: float,
    limits: Limits,
    watch: Callable[[int, float], Any] = lambda *_: None,
) -> Descent:
    """Minimize the norm of a residual.

    Parameters
    ----------
    residual : callable
        Maps parameters, shape (p,), to the residual, shape (n,); real or complex.
    jacobian : callable
        Maps parameters to the derivative of the residual, shape (n, p): an array, a sparse array, or SciPy's
        ``LinearOperator``, of which only products are used.
    start : ndarray, shape (p,)
    norm : float
        Norm of what is fitted, to which errors are relative.
    limits : Limits
        It ends where a step has converged, as :meth:`Limits.converged` says.
    watch : callable
        Called with each step's number and relative error; stops the iteration if it returns True.

    Returns
    -------
    Descent
        The error never increases.

    Examples
    --------
    >>> descent = damped_gauss_newton(
    ...     lambda x: np.array([x[0] * x[1] - 6.0]), lambda x: np.array([[x[1], x[0]]]), np.array([1.0, 1.0]), 6.0,
    ...     Limits(1e-12, 50))
    >>> float(np.prod(descent.x).round(12)), descent.converged
    (6.0, True)
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x, left, damping, history = start, residual(start), _FIRST, list[float]()
        error, floor = _norm(left), 4.0 * float(np.finfo(left.dtype).eps) * norm
        for _ in range(limits.iterations):
            if not error > floor:
                return Descent(x, error, True, tuple(history))
            solver = _solver(jacobian(x), left)
            growth = 4.0
            for _ in range(_ATTEMPTS):
                step, predicted = solver.step(damping * min(1.0, error / norm))
                moved = x + step
                after = residual(moved)
                now = _norm(after)
                if now < error:
                    break
                damping, growth = min(damping * growth, _MOST), 2.0 * growth
            else:
                return Descent(x, error, True, tuple(history))
            agreement = (error**2 - now**2) / predicted if predicted > 0.0 else 0.0
            damping = max(_LEAST, damping * (0.2 if agreement > 0.75 else 2.0 if agreement < 0.25 else 0.7))
            before, x, left, error = error, moved, after, now
            history.append(error / norm)
            if watch(len(history), error / norm) is True:
                return Descent(x, error, False, tuple(history))
            if limits.converged(before / norm, error / norm):
                return Descent(x, error, True, tuple(history))
        return Descent(x, error, not error > floor, tuple(history))


def _norm(x: np.ndarray) -> float:
    norm = float(np.linalg.norm(x))
    return norm if math.isfinite(norm) else math.inf


# -- Steps of the damped Gauss-Newton method ---------------------------------------------------------------------------


def _solver(jacobian: Any, left: np.ndarray) -> _Formed | _Products:
    """Return the solver of the damped normal equations for a Jacobian."""
    rows, columns = jacobian.shape
    if columns <= _FORMED and rows * columns**2 <= _WORK and (_sparse(jacobian) or isinstance(jacobian, np.ndarray)):
        return _Formed(jacobian, left)
    return _Products(jacobian, left)


def _sparse(jacobian: Any) -> bool:
    return hasattr(jacobian, "toarray")


class _Formed:
    """Steps from the normal equations, formed once for all dampings."""

    def __init__(self, jacobian: Any, left: np.ndarray) -> None:
        self.matrix = _gram(jacobian)
        self.gradient = np.asarray(jacobian.conj().T @ left)
        self.size = max(float(np.trace(self.matrix).real) / len(self.matrix), 1e-300)

    def step(self, damping: float) -> tuple[np.ndarray, float]:
        """Return a step, and by how much it reduces the square of the linearized residual."""
        from scipy.linalg import cho_factor, cho_solve

        shift = max(damping, _LEAST) * self.size
        damped = self.matrix + shift * np.eye(len(self.matrix))
        try:
            step = -cho_solve(cho_factor(damped, lower=True, overwrite_a=True, check_finite=False), self.gradient)
        except np.linalg.LinAlgError:  # not positive definite up to rounding
            return np.full_like(self.gradient, np.nan), 0.0
        return step, shift * float(np.vdot(step, step).real) - float(np.vdot(step, self.gradient).real)


# Rows of the Jacobian that are made dense at a time.
_ROWS = 1 << 12


def _gram(jacobian: Any) -> np.ndarray:
    """Compute ``Jᴴ J`` as a dense matrix, from the sparse product or from dense rows, whichever takes less time."""
    if not _sparse(jacobian):
        return np.asarray(jacobian.conj().T @ jacobian)
    rows, columns = jacobian.shape
    # An entry of a sparse product costs about as much as 16 multiply-adds of a dense one.
    if 16 * (jacobian.nnz / rows) ** 2 < columns**2:
        return np.asarray((jacobian.conj().T @ jacobian).toarray())
    total = np.zeros((columns, columns), jacobian.dtype)
    for start in range(0, rows, _ROWS):
        dense = jacobian[start : start + _ROWS].toarray()
        total += dense.conj().T @ dense
    return total


class _Products:
    """Steps from products with the Jacobian and its adjoint, by LSMR (Fong & Saunders, 2011)."""

    def __init__(self, jacobian: Any, left: np.ndarray) -> None:
        self.jacobian, self.left = jacobian, left
        self.gradient = np.asarray(jacobian.conj().T @ left if _sparse(jacobian) else jacobian.H @ left)
        # The mean diagonal is that of the gradient's direction: no other product is needed.
        image = np.linalg.norm(jacobian @ self.gradient) / max(float(np.linalg.norm(self.gradient)), 1e-300)
        self.size = max(float(image) ** 2, 1e-300)

    def step(self, damping: float) -> tuple[np.ndarray, float]:
        from scipy.sparse.linalg import lsmr

        shift = max(damping, _LEAST) * self.size
        step = lsmr(
            self.jacobian, -self.left, damp=math.sqrt(shift), atol=1e-10, btol=1e-10,
            maxiter=4 * min(self.jacobian.shape),
        )[0]  # fmt: skip
        return step, shift * float(np.vdot(step, step).real) - float(np.vdot(step, self.gradient).real)


# -- Linear problems given by a map and its adjoint, by conjugate gradients on the normal equations --------------------

# Björck, Elfving & Strakoš, "Stability of conjugate gradient and Lanczos methods for linear least squares problems"
# (SIAM J. Matrix Anal. Appl. 19, 1998): CGLS, for arrays of any library, on their device.


Map = Callable[[Array], Array]


def least_squares(
    algebra: Algebra, forward: Map, adjoint: Map, y: Array, start: Array, tol: float, iterations: int
) -> tuple[Array, bool, int]:
    """Find the x that minimizes ``|forward(x) - y|``.

    Parameters
    ----------
    algebra : Algebra
    forward, adjoint : callable
        A linear map of vectors, and its adjoint.
    y, start : array, vectors
        The right-hand side, and the initial x.
    tol : float
        Tolerance of the gradient relative to the norms of the map and the residual; LSQR's ``atol`` and ``btol``.
    iterations : int
        Maximum number of iterations.

    Returns
    -------
    x : array
    converged : bool
        Whether the gradient is small.
    iterations : int

    Examples
    --------
    >>> from tnadapt.backends import load_backend
    >>> a, y = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), np.array([3.0, 8.0, 1.0])
    >>> algebra = Algebra(load_backend("numpy"), y)
    >>> least_squares(algebra, lambda x: a @ x, lambda y: a.T @ y, y, np.zeros(2), 1e-12, 10)[:2]
    (array([3., 4.]), True)
    """
    x, residual = start, y - forward(start)
    gradient = adjoint(residual)
    direction, slope = gradient, algebra.squares(gradient)
    right = algebra.norm(y)
    # Running estimate of the map's norm, as in LSQR.
    size = 0.0
    for count in range(iterations + 1):
        left = algebra.norm(residual)
        if left <= tol * right or slope**0.5 <= tol * size * left:
            return x, True, count
        if count == iterations or slope == 0.0:
            break
        image = forward(direction)
        curvature = algebra.squares(image)
        if curvature == 0.0:
            return x, True, count
        size = max(size, (curvature / algebra.squares(direction)) ** 0.5)
        step = slope / curvature
        x, residual = x + direction * step, residual - image * step
        gradient = adjoint(residual)
        before, slope = slope, algebra.squares(gradient)
        direction = gradient + direction * (slope / before)
    return x, slope == 0.0, count


# -- Alternating least squares: one array after another, by conjugate gradients ----------------------------------------

# The output of a network, also through a linear F, is linear in each array. With the others fixed, the best one solves
# a linear least-squares problem, which needs only the map and its adjoint, no matrix. No step increases the error. The
# map dominates the time, so the residual is updated instead of recomputed: a step of conjugate gradients takes one map
# and one adjoint.


# Steps for each least-squares problem; the next sweep continues from the result. A few are enough while the other
# arrays still change. Sweeps of many steps show whether the error no longer falls.
_FEW, _MANY = 4, 20
# A step that gains less than this fraction of the tolerance is the last one for its array.
_NEGLIGIBLE = 0.1
# Below this error, in units of epsilon, the rounding of the updated residual is not negligible.
_ROUNDED = 1e4
# A sweep's change is continued by a multiple within these limits: twice the last one, or a quarter if that was too far.
_NEAREST, _FARTHEST = 0.25, 16.0

Arrays = dict[str, Array]


class Alternation:
    """Sweeps over arrays that are fitted to a vector.

    Parameters
    ----------
    algebra : Algebra
    shapes : mapping of str to tuple of int
        Of the arrays.
    forward : callable
        Computes the vector of arrays, which is linear in each of them; or affine, if ``affine``.
    adjoint : callable
        Computes the gradient of the inner product of a vector and that of arrays; called with the arrays, the vector
        and the name of one array.
    y : array, shape (n,)
        Not zero.
    affine : bool
    """

    def __init__(
        self,
        algebra: Algebra,
        shapes: Mapping[str, tuple[int, ...]],
        forward: Callable[[Mapping[str, Array]], Array],
        adjoint: Callable[[Mapping[str, Array], Array, str], Array],
        y: Array,
        affine: bool = False,
    ) -> None:
        self.algebra, self.shapes, self.forward, self.adjoint, self.y = algebra, shapes, forward, adjoint, y
        self.affine, self.norm, self.error = affine, algebra.norm(y), math.inf

    def fit(self, start: Mapping[str, Array], steps: Iteration) -> Fit:
        """Run sweeps from a start until they gain too little."""
        self.arrays, self.reach, limits = dict(start), _NEAREST, steps.limits
        self.least, near = limits.tol * self.norm, _ROUNDED * self.algebra.eps * self.norm
        self._measure()
        steps.begin()
        conjugate = _FEW
        while not steps.stopped:
            arrays, before = dict(self.arrays), self.error
            for name in self.shapes:
                self._solve(name, conjugate)
                self.error = self.algebra.norm(self.residual)
            if self.error <= near:
                self._measure()
            else:
                self._go_on(arrays)
            improved = self.error < before  # not if converged up to rounding, or NaN
            if not improved:
                self.arrays = arrays
                self._measure()
            steps.count += 1
            if steps.note(self.error / self.norm):
                break
            if not improved or limits.converged(before / self.norm, self.error / self.norm):
                if conjugate == _MANY:
                    steps.stopped = "converged"
                conjugate = _MANY
            else:
                conjugate = _FEW if self.error > near else 2 * _FEW
            if steps.count >= limits.iterations:
                steps.stopped = steps.stopped or "max_iterations"
        return steps.fit(self.arrays, "alternating least squares", self.error / self.norm)

    def _measure(self) -> None:
        """Compute the residual from the arrays."""
        self.residual = self.y - self.forward(self.arrays)
        self.error = self.algebra.norm(self.residual)

    def _solve(self, name: str, steps: int) -> None:
        """Do steps of conjugate gradients for one array."""
        algebra = self.algebra
        constant = self.forward({**self.arrays, name: algebra.zeros(self.shapes[name])}) if self.affine else None
        direction: Array | None = None
        slope = 0.0
        for _ in range(steps):
            gradient = self.adjoint(self.arrays, self.residual, name)
            before, slope = slope, algebra.squares(gradient)
            if not slope > 0.0:
                break
            direction = gradient if direction is None else gradient + direction * (slope / before)
            image = self.forward({**self.arrays, name: direction})
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

    def _go_on(self, before: Mapping[str, Array]) -> None:
        """Continue the change of the arrays since ``before``, if that reduces the error."""
        kept = self.arrays, self.residual, self.error
        self.arrays = {name: array + (array - before[name]) * self.reach for name, array in self.arrays.items()}
        self._measure()
        if self.error < kept[2]:
            self.reach = min(2.0 * self.reach, _FARTHEST)
        else:
            self.arrays, self.residual, self.error = kept
            self.reach = max(0.25 * self.reach, _NEAREST)


# -- L-BFGS on all arrays of a network, for a nonlinear F and for Hadamard products ------------------------------------

# The gradient is computed by the adjoints of F at a point and of the network. The few parameters are passed to SciPy in
# float64 on the host; long vectors stay on their device.


def refine(
    algebra: Algebra,
    network: Network,
    projection: Projection,
    y: Array,
    start: Mapping[str, Array],
    limits: Limits,
    watch: Callable[[int, float], None],
) -> Fit:
    """Improve the arrays of a network so that F of the network is nearer to a vector.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    projection : Projection
        Any kind.
    y : array, shape (n_out,)
        The target of ``F(x)``; for a nonlinear F, the update plus ``F(x_start)``.
    start : mapping of str to array
    limits : Limits
    watch : callable
        Called with each iteration's number and error relative to y.

    Returns
    -------
    Fit

    Notes
    -----
    L-BFGS-B of Byrd, Lu, Nocedal & Zhu (1995), in SciPy. Each evaluation runs F and the network forwards and backwards.
    """
    from scipy.optimize import minimize

    backend, shapes = algebra.backend, network.shapes
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    norm = algebra.norm(y)
    # Each array is scaled to a root mean square of one, so that the method sees parameters of similar size.
    units = {name: max(algebra.norm(start[name]) / size**0.5, 1e-6) for name, size in zip(shapes, sizes, strict=True)}

    def arrays_of(theta: np.ndarray) -> dict[str, Array]:
        pieces = np.split(theta, np.cumsum(sizes)[:-1])
        return {
            name: algebra.array((piece * units[name]).reshape(shape))
            for (name, shape), piece in zip(shapes.items(), pieces, strict=True)
        }

    def flat(arrays: Mapping[str, Array], exponent: int) -> np.ndarray:
        host = {name: backend.to_numpy(arrays[name]).astype(np.float64) * units[name] ** exponent for name in shapes}
        return np.concatenate([host[name].reshape(-1) for name in shapes])

    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        arrays = arrays_of(theta)
        x = network.whole(backend, arrays)
        left = projection(x) - y
        # Divide twice by the norm: its square may overflow.
        relative = left * (1.0 / norm)
        gradient = network.adjoint(backend, arrays, projection.adjoint(relative, at=x) * (2.0 / norm))
        return algebra.squares(relative), flat(gradient, 1)

    seen = 0

    def step(intermediate_result: object) -> None:
        nonlocal seen
        seen += 1
        watch(seen, max(0.0, float(getattr(intermediate_result, "fun", 0.0))) ** 0.5)

    with np.errstate(over="ignore", invalid="ignore"):  # the line search backtracks from a step that overflows
        result = minimize(
            value, flat(start, -1), jac=True, method="L-BFGS-B", callback=step,
            options={"maxiter": limits.iterations, "ftol": limits.tol**2, "gtol": 0.0},
        )  # fmt: skip
    return Fit(
        arrays_of(result.x), False, int(result.nit), "L-BFGS", "converged" if result.success else "max_iterations"
    )
