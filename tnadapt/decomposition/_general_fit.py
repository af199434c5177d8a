"""Fit of any format to one tensor by alternating least squares.

A tensor is linear in each array, so each array in turn solves a linear least-squares problem with the others fixed; no
step increases the error. The problems are solved by LSQR, which needs only the tensor and the adjoint of the format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tnadapt.algebra.formats import Format
from tnadapt.backends.backend import Array

from ._fit import Fit, Limits
from ._least_squares import least_squares
from ._linear_algebra import Algebra

__all__ = ["fit_any"]

Arrays = dict[str, Array]

# Number of random starts for a small tensor, and its maximum size; larger ones have a single start.
_STARTS, _SMALL = 4, 1 << 14
# Solver steps for each least-squares problem; the next sweep continues from the result.
_STEPS = 30


def fit_any(algebra: Algebra, split: Format, tensor: Array, start: Mapping[str, Array] | None, limits: Limits) -> Fit:
    """Fit the arrays of a format to a tensor; return the best result of several starts.

    Parameters
    ----------
    algebra : Algebra
    split : Format
    tensor : array, shape (d_1, …, d_M)
        Not zero. It may have fewer rows in the first mode than the format; the other rows are then unconstrained.
    start : mapping of str to array, optional
        Initial arrays; random if None.
    limits : Limits

    Returns
    -------
    Fit
        Never marked optimal, as alternating least squares may end in a local minimum.
    """
    now = _Alternation(algebra, split, tensor, limits)
    if start is not None:
        return now.descent({name: start[name] for name in split.shapes})
    rng = algebra.rng
    starts = _STARTS if math.prod(tensor.shape) <= _SMALL else 1
    best: Fit | None = None
    error, sweeps = math.inf, 0
    for _ in range(starts):
        begun = {name: algebra.array(rng.normal(size=shape)) for name, shape in split.shapes.items()}
        found = now.descent(begun)
        sweeps += found.iterations
        left = now.error(found.arrays)
        if best is None or left < error:
            best, error = found, left
        if error <= 64.0 * algebra.eps * now.norm:
            break
    assert best is not None
    return best._replace(iterations=sweeps)


class _Alternation:
    """A format, the tensor that it is fitted to, and the sweeps over its arrays."""

    def __init__(self, algebra: Algebra, split: Format, tensor: Array, limits: Limits) -> None:
        self.algebra, self.split, self.tensor, self.limits = algebra, split, tensor, limits
        self.norm = algebra.norm(tensor)
        self.box = [(0, int(size)) for size in tensor.shape]
        self.missing = math.prod(split.sizes) - math.prod(tensor.shape)

    def made(self, arrays: Mapping[str, Array]) -> Array:
        return self.split.tensor(self.algebra.backend, arrays, self.box)

    def error(self, arrays: Mapping[str, Array]) -> float:
        return self.algebra.norm(self.tensor - self.made(arrays))

    def descent(self, begun: Arrays) -> Fit:
        """Run sweeps from given arrays until one gains no more than the tolerance."""
        arrays, best = dict(begun), dict(begun)
        error, sweeps = math.inf, 0
        while sweeps < self.limits.iterations:
            sweeps += 1
            for name in self.split.shapes:
                arrays[name] = self._solved(arrays, name)
            before, error = error, self.error(arrays)
            if not error < before:  # converged up to rounding, or NaN
                break
            best = dict(arrays)
            if before - error <= self.limits.tol * self.norm:
                break
        return Fit(best, False, sweeps, "alternating least squares")

    def _solved(self, arrays: Mapping[str, Array], name: str) -> Array:
        """Return the optimal value of one array with the others fixed."""
        backend, shape = self.algebra.backend, self.split.shapes[name]

        def forward(vec: Array) -> Array:
            return backend.flatten(self.made({**arrays, name: backend.reshape(vec, shape)}))

        def adjoint(vec: Array) -> Array:
            # Rows that the tensor does not have are not part of the problem, so they are zero in the adjoint.
            filled = backend.reshape(backend.pad_last(vec, vec.shape[0] + self.missing), self.split.sizes)
            return backend.flatten(self.split.adjoint(backend, arrays, filled)[name])

        wanted, begun = backend.flatten(self.tensor), backend.flatten(arrays[name])
        tol = min(self.limits.tol, 1e-6)
        found: Any = least_squares(self.algebra, forward, adjoint, wanted, begun, tol, _STEPS)
        return backend.reshape(found.x, shape)
