"""One tensor to the arrays of any format: alternating least squares by its tensor and its adjoint alone.

A tensor is linear in each array by itself. Each array in turn is the solution of a linear least-squares problem, the
others held: no step makes the error larger. The problems are solved by LSQR, for which the format forms its tensor and
the adjoint; nothing else is asked of it.
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

# Random starts of a small tensor, and what is small; of larger ones the first start alone is taken.
_STARTS, _SMALL = 4, 1 << 14
# Steps of each least-squares problem: the next sweep goes on from there.
_STEPS = 30


def fit_any(algebra: Algebra, split: Format, tensor: Array, start: Mapping[str, Array] | None, limits: Limits) -> Fit:
    """The arrays of a format that make a tensor, as nearly as the best of several starts comes.

    Parameters
    ----------
    algebra : Algebra
    split : Format
    tensor : array, shape (d_1, …, d_M)
        Not zero. It may have fewer rows in the first mode than the format: the others then take any value.
    start : mapping of str to array, optional
        Where to begin; random arrays if None.
    limits : Limits

    Returns
    -------
    Fit
        Never called optimal: alternating least squares may end beside the optimum.
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
        """Sweeps from given arrays, until one gains no more than the tolerance."""
        arrays, best = dict(begun), dict(begun)
        error, sweeps = math.inf, 0
        while sweeps < self.limits.iterations:
            sweeps += 1
            for name in self.split.shapes:
                arrays[name] = self._solved(arrays, name)
            before, error = error, self.error(arrays)
            if not error < before:  # rounding, at the end; or not a number
                break
            best = dict(arrays)
            if before - error <= self.limits.tol * self.norm:
                break
        return Fit(best, False, sweeps, "alternating least squares")

    def _solved(self, arrays: Mapping[str, Array], name: str) -> Array:
        """The best of one array, the others held."""
        backend, shape = self.algebra.backend, self.split.shapes[name]

        def forward(vec: Array) -> Array:
            return backend.flatten(self.made({**arrays, name: backend.reshape(vec, shape)}))

        def adjoint(vec: Array) -> Array:
            # The rows that the tensor does not have are no part of the problem: zeros in the adjoint.
            filled = backend.reshape(backend.pad_last(vec, vec.shape[0] + self.missing), self.split.sizes)
            return backend.flatten(self.split.adjoint(backend, arrays, filled)[name])

        wanted, begun = backend.flatten(self.tensor), backend.flatten(arrays[name])
        tol = min(self.limits.tol, 1e-6)
        found: Any = least_squares(self.algebra, forward, adjoint, wanted, begun, tol, _STEPS)
        return backend.reshape(found.x, shape)
