"""Fit of a network to observed elements: damped Gauss-Newton from several starts, in float64 on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ._damped_gauss_newton import Descent, damped_gauss_newton
from ._fit import Limits
from ._observed_elements import ObservedElements

__all__ = ["ObservedFit", "Seen", "affordable", "balanced", "fit_observed", "moved", "random_start"]

Arrays = dict[str, np.ndarray]
#: Called with the number and the relative error of each step; True stops.
Seen = Callable[[int, float], Any]

# Up to this many entries of a Jacobian are kept, and this many multiply-adds go into all steps of one fit, where each
# step costs at least as much as the second number of them.
_ENTRIES, _WORK, _STEP = 1 << 24, 1 << 33, 1 << 20
# At least this many steps must be possible for a fit to be tried.
_FEW = 8
# A descent that has come this near to zero is continued.
_NEAR = 1e-2
# All descents take at most as many steps as this number of full ones.
_DESCENTS = 8
# An error of this many times epsilon is rounding. Descents that end this close to each other found the same optimum,
# and no more are tried after as many as this.
_ROUNDING, _SAME, _AGREE = 64.0, 1e-4, 3


class ObservedFit(NamedTuple):
    """Arrays fitted to observed elements.

    Attributes
    ----------
    arrays : dict of str to ndarray
    error : float
        Of the observed elements, weighted, relative to their norm.
    converged : bool
    history : tuple of float
        The error after each step of the best descent.
    iterations : int
        Steps of all descents.
    """

    arrays: Arrays
    error: float
    converged: bool
    history: tuple[float, ...]
    iterations: int


def affordable(elements: ObservedElements, count: int | None = None) -> int:
    """Return the number of steps that a fit may take; 0 if too few to be worth a try.

    Parameters
    ----------
    elements : ObservedElements
    count : int, optional
        Number of elements to assume; by default those that there are.
    """
    size, count = elements.size, elements.count if count is None else count
    dense, sparse = count * size**2, 16 * count * elements.entries**2
    steps = int(_WORK // (min(dense, sparse) + size**3 + _STEP))
    return steps if steps >= _FEW and count * elements.entries <= _ENTRIES else 0


def fit_observed(
    elements: ObservedElements,
    wanted: np.ndarray,
    starts: Iterable[Mapping[str, np.ndarray]],
    limits: Limits,
    *,
    weights: np.ndarray | None = None,
    watch: Seen = lambda *_: None,
) -> ObservedFit:
    """Fit arrays to observed elements from each of several starts, until one reaches zero or three reach one optimum.

    Parameters
    ----------
    elements : ObservedElements
    wanted : ndarray, shape (n,)
        The observed elements; not all zero.
    starts : iterable of mapping of str to ndarray
        Each is made when it is needed; at least one.
    limits : Limits
        Of each descent. All descents together take a bounded number of steps, fewer for larger problems.
    weights : ndarray, shape (n,), optional
        Nonnegative weights of the squared errors.
    watch : callable
        Called with the number of each step and the least relative error so far; stops all descents if it returns True.

    Returns
    -------
    ObservedFit
        The best descent's.
    """
    problem = _Weighted(elements, wanted, weights)
    best: Descent | None = None
    agreeing, seen = 0, _BestSoFar(watch)
    left = min(max(affordable(elements), _FEW), _DESCENTS * limits.iterations)

    def descent(begun: np.ndarray, most: int) -> Descent:
        own = limits._replace(iterations=most)
        return damped_gauss_newton(problem.residual, problem.jacobian, begun, problem.norm, own, seen)

    for start in starts:
        begun = elements.flat(balanced(elements, start)).astype(problem.kind)
        found = descent(begun, min(limits.iterations, left - seen.steps))
        same = best is not None and abs(found.error - best.error) <= _SAME * best.error
        better = best is None or found.error < best.error
        agreeing = agreeing + 1 if same else 1 if better else agreeing
        best = found if better or best is None else best
        exact = best.error <= _ROUNDING * problem.eps * problem.norm
        if agreeing == _AGREE or seen.steps >= left or exact or seen.stopped:
            break
    assert best is not None
    if not best.converged and seen.steps < left and best.error <= _NEAR * problem.norm and not seen.stopped:
        # It may be on its way to an exact answer, slowly.
        further = descent(best.x, left - seen.steps)
        best = further._replace(history=best.history + further.history)
    error, converged = best.error / problem.norm, best.converged and not seen.stopped
    return ObservedFit(elements.arrays(best.x), error, converged, best.history or (error,), seen.steps)


class _BestSoFar:
    """Counts the steps of all descents, and passes on the least error so far."""

    def __init__(self, watch: Seen) -> None:
        self.watch = watch
        self.steps, self.error, self.stopped = 0, math.inf, False

    def __call__(self, _: int, error: float) -> bool:
        self.steps, self.error = self.steps + 1, min(self.error, error)
        self.stopped = self.watch(self.steps, self.error) is True
        return self.stopped


class _Weighted:
    """The residual of weighted elements, and its Jacobian."""

    def __init__(self, elements: ObservedElements, wanted: np.ndarray, weights: np.ndarray | None) -> None:
        self.elements, self.kind = elements, np.result_type(wanted.dtype, np.float64)
        self.roots = None if weights is None else np.sqrt(np.asarray(weights, np.float64))
        self.wanted = wanted if self.roots is None else wanted * self.roots
        self.norm, self.eps = float(np.linalg.norm(self.wanted)), float(np.finfo(self.kind).eps)

    def residual(self, vec: np.ndarray) -> np.ndarray:
        made = self.elements.values(vec)
        return np.asarray((made if self.roots is None else made * self.roots) - self.wanted)

    def jacobian(self, vec: np.ndarray) -> Any:
        found = self.elements.jacobian(vec)
        if self.roots is not None:
            found.data *= np.repeat(self.roots, self.elements.entries)
        return found


# -- Starts ---------------------------------------------------------------------------------------


def balanced(elements: ObservedElements, arrays: Mapping[str, Any]) -> Arrays:
    """Return arrays whose norms are equal within each term, without changing any element.

    Damping treats all parameters alike, so they should be of similar size.
    """
    found = {name: np.asarray(arrays[name]) for name in elements.shapes}
    for prefixes in elements.prefixes:
        names = [name for name in elements.shapes if name.startswith(tuple(prefixes))]
        norms = np.array([np.linalg.norm(found[name]) for name in names])
        if not (np.isfinite(norms).all() and norms.all()):
            continue
        mean = math.exp(float(np.mean(np.log(norms))))
        found |= {name: found[name] * (mean / norm) for name, norm in zip(names, norms, strict=True)}
    return found


def random_start(elements: ObservedElements, rng: np.random.RandomState, norm: float, kind: Any = np.float64) -> Arrays:
    """Return normal arrays, scaled so that their elements have a given norm."""
    found: Arrays = {}
    for name, shape in elements.shapes.items():
        found[name] = rng.normal(size=shape).astype(kind)
        if np.dtype(kind).kind == "c":
            found[name] += 1j * rng.normal(size=shape)
    made = float(np.linalg.norm(elements.values(elements.flat(found))))
    # Every array of a term takes an equal part of the factor.
    each = max(len(elements.shapes) // len(elements.prefixes), 1)
    factor = (norm / made) ** (1.0 / each) if made else 1.0
    return {name: array * factor for name, array in found.items()}


def moved(starts: Iterable[Mapping[str, np.ndarray]], rng: np.random.RandomState, size: float) -> Iterator[Arrays]:
    """Yield starts with noise of a size relative to the root mean square of each array."""
    for start in starts:
        yield {
            name: array + size * (float(np.sqrt(np.mean(np.abs(array) ** 2))) or 1.0) * rng.normal(size=array.shape)
            for name, array in start.items()
        }
