"""Matrix-free linear least squares, by a map and its adjoint: SciPy's LSQR, and CGLS for other libraries.

Paige & Saunders, "LSQR" (ACM TOMS 8, 1982). Both are conjugate gradients on the normal equations, and equal up to
rounding. SciPy needs vectors on the host, so CGLS is used for arrays on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tnadapt.backends.backend import Array

from ._linear_algebra import Algebra

__all__ = ["Solution", "cgls", "least_squares", "lsqr"]

Map = Callable[[Array], Array]


class Solution(NamedTuple):
    """The solution of a least-squares problem.

    Attributes
    ----------
    x : array
    converged : bool
        Whether the gradient or the residual is zero to the tolerance.
    iterations : int
    """

    x: Array
    converged: bool
    iterations: int


def least_squares(
    algebra: Algebra, forward: Map, adjoint: Map, y: Array, start: Array, tol: float, iterations: int
) -> Solution:
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
    Solution

    Examples
    --------
    >>> a, y = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), np.array([3.0, 8.0, 1.0])
    >>> found = least_squares(Algebra(*_numpy(y)), lambda x: a @ x, lambda y: a.T @ y, y, np.zeros(2), 1e-12, 10)
    >>> found.x, found.converged
    (array([3., 4.]), True)
    """
    return _SOLVERS.get(algebra.backend.name, cgls)(algebra, forward, adjoint, y, start, tol, iterations)


def lsqr(algebra: Algebra, forward: Map, adjoint: Map, y: Array, start: Array, tol: float, iterations: int) -> Solution:
    """:func:`least_squares` by SciPy, for NumPy arrays."""
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import lsqr as solve

    kind = y.dtype

    def on_vectors(apply: Map) -> Map:
        return lambda x: apply(np.asarray(x, kind).reshape(-1))

    operator = LinearOperator((y.size, start.size), on_vectors(forward), on_vectors(adjoint), dtype=kind)
    residual = y - forward(start)
    if not residual.any():
        return Solution(start, True, 0)
    found = solve(operator, residual, atol=tol, btol=tol, conlim=0.0, iter_lim=iterations)
    return Solution((start + found[0]).astype(kind), found[1] in (0, 1, 2), int(found[2]))


def cgls(algebra: Algebra, forward: Map, adjoint: Map, y: Array, start: Array, tol: float, iterations: int) -> Solution:
    """:func:`least_squares` by conjugate gradients, for arrays of any library."""
    x, residual = start, y - forward(start)
    gradient = adjoint(residual)
    direction, slope = gradient, algebra.squares(gradient)
    right = algebra.norm(y)
    # Running estimate of the map's norm, as in LSQR.
    size = 0.0
    for count in range(iterations + 1):
        left = algebra.norm(residual)
        if left <= tol * right or slope**0.5 <= tol * size * left:
            return Solution(x, True, count)
        if count == iterations or slope == 0.0:
            break
        image = forward(direction)
        curvature = algebra.squares(image)
        if curvature == 0.0:
            return Solution(x, True, count)
        size = max(size, (curvature / algebra.squares(direction)) ** 0.5)
        step = slope / curvature
        x, residual = x + direction * step, residual - image * step
        gradient = adjoint(residual)
        before, slope = slope, algebra.squares(gradient)
        direction = gradient + direction * (slope / before)
    return Solution(x, slope == 0.0, count)


def _numpy(like: np.ndarray) -> tuple[object, np.ndarray]:
    from tnadapt.backends import get_backend

    return get_backend(like), like


_SOLVERS: dict[str, Callable[..., Solution]] = {"numpy": lsqr}
