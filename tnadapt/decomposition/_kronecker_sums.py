"""Fit of a sum of Kronecker products to one tensor: SVD or CP of the rearrangement, then split by split.

Rearranged (:mod:`tnadapt.algebra.products`), a sum of T Kronecker products of K splits is a CP tensor of rank T
whose factors are the splits' vectors. For K = 2 dense splits, its truncated SVD is the optimum; for more, ALS is used.
Splits that are themselves factored are optimized one after another, with the others fixed. As the others only scale a
split, its optimum is the format's best fit to the contracted tensor, and no step increases the error.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tnadapt.algebra.formats import CP, Dense, Format
from tnadapt.algebra.products import contracted
from tnadapt.backends import Array

from ._single_tensor import fit_format
from .completion import ObservedElements, affordable, double_on_host, fit_observed, random_start
from .fits import Fit, Iteration, Limits
from .linear_algebra import Algebra

__all__ = ["Term", "fit_sum", "outer_sum"]

# Up to this many iterations are a start for something else, and not refined. Random starts of the refinement.
_FEW, _RANDOM = 10, 3

# The arrays of each split of one term.
Term = list[dict[str, Array]]


def fit_sum(
    algebra: Algebra,
    tensor: Array,
    splits: Sequence[Format],
    terms: int,
    start: Sequence[Term] | None = None,
    limits: Limits | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> tuple[list[Term], Fit]:
    """Fit the arrays of a sum of Kronecker products to a tensor.

    Parameters
    ----------
    algebra : Algebra
    tensor : array, shape (p_1, …, p_K)
        The rearranged tensor.
    splits : sequence of Format
        The K splits.
    terms : int
        T.
    start : sequence of Term, optional
        Initial arrays.
    limits : Limits, optional
    watch : callable, optional
        Called with each sweep's number and its relative error.

    Returns
    -------
    list of Term
    Fit
        Without arrays.
    """
    limits = limits or Limits()
    if start is None:
        vectors, fit = _dense_start(algebra, tensor, terms, limits)
        start = [
            [
                fit_format(algebra, split, algebra.backend.reshape(vector, split.sizes), None, limits).arrays
                for split, vector in zip(splits, term, strict=True)
            ]
            for term in vectors
        ]
        if all(isinstance(split, Dense) for split in splits):
            return list(start), fit
        if limits.iterations > _FEW:
            arrays, fit = _alternated(algebra, tensor, splits, start, limits, watch)
            return _refined(algebra, tensor, splits, arrays, fit, limits, watch)
    return _alternated(algebra, tensor, splits, start, limits, watch)


def _alternated(
    algebra: Algebra,
    tensor: Array,
    splits: Sequence[Format],
    start: Sequence[Term],
    limits: Limits,
    watch: Callable[[int, float], None] | None,
) -> tuple[list[Term], Fit]:
    """Optimize the splits of all terms in turn until a sweep gains no more than the tolerance."""
    norm, steps = algebra.norm(tensor), Iteration(limits, watch)
    now = _Sum(algebra, tensor, splits, [list(term) for term in start])
    steps.begin(now.error() / norm)
    while not steps.stopped:
        now.sweep(limits)
        steps.step(now.error() / norm)
    method = "term by term" if len(splits) == 1 else "alternating over splits"
    return now.arrays, Fit({}, False, steps.count, method, steps.stopped, steps.before, tuple(steps.history))


def _refined(
    algebra: Algebra,
    tensor: Array,
    splits: Sequence[Format],
    arrays: list[Term],
    found: Fit,
    limits: Limits,
    watch: Callable[[int, float], None] | None,
) -> tuple[list[Term], Fit]:
    """Continue on all arrays at once by Gauss-Newton, and from random arrays, if the problem is small."""
    prefixes = [[f"{term}.{k}." for k in range(len(splits))] for term in range(len(arrays))]
    if not affordable(_elements(splits, prefixes, 0), math.prod(tensor.shape)):
        return arrays, found
    elements, rng = _elements(splits, prefixes, math.prod(tensor.shape)), algebra.rng
    wanted = double_on_host(algebra.backend, tensor).reshape(-1)
    named = {
        prefix + name: double_on_host(algebra.backend, array)
        for term_prefixes, term in zip(prefixes, arrays, strict=True)
        for prefix, split in zip(term_prefixes, term, strict=True)
        for name, array in split.items()
    }

    def starts() -> Iterator[dict[str, np.ndarray]]:
        yield named
        for _ in range(_RANDOM):
            yield random_start(elements, rng, float(np.linalg.norm(wanted)), wanted.dtype)

    def seen(count: int, error: float) -> None:
        if watch is not None:
            watch(found.iterations + count, error)

    best = fit_observed(elements, wanted, starts(), limits, watch=seen)
    terms = [
        [
            {name: algebra.array(best.arrays[prefix + name]) for name in split.shapes}
            for prefix, split in zip(term_prefixes, splits, strict=True)
        ]
        for term_prefixes in prefixes
    ]
    return terms, best._replace(
        arrays={}, iterations=found.iterations + best.iterations, method=f"{found.method}, Gauss-Newton"
    )


def _elements(splits: Sequence[Format], prefixes: Sequence[Sequence[str]], count: int) -> ObservedElements:
    """Return the first elements of a rearranged tensor."""
    rows = np.unravel_index(np.arange(count), [math.prod(split.sizes) for split in splits])
    places = [np.unravel_index(row, split.sizes) for row, split in zip(rows, splits, strict=True)]
    return ObservedElements(splits, prefixes, places)


def outer_sum(algebra: Algebra, splits: Sequence[Format], terms: Sequence[Term]) -> Array:
    """Compute the rearranged tensor of arrays."""
    return _outer_sum(
        algebra, [[_whole(algebra, split, part) for split, part in zip(splits, term, strict=True)] for term in terms]
    )


def _whole(algebra: Algebra, split: Format, arrays: dict[str, Array]) -> Array:
    return split.tensor(algebra.backend, arrays, [(0, size) for size in split.sizes])


def _outer_sum(algebra: Algebra, terms: Sequence[Sequence[Array]]) -> Array:
    backend = algebra.backend

    def outer(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    vectors = [functools.reduce(outer, [backend.flatten(split) for split in term]) for term in terms]
    return backend.reshape(functools.reduce(operator.add, vectors), [math.prod(split.shape) for split in terms[0]])


def _dense_start(algebra: Algebra, tensor: Array, terms: int, limits: Limits) -> tuple[list[list[Array]], Fit]:
    """Compute the vectors of every split of every term as if all splits were dense."""
    backend, sizes = algebra.backend, [int(size) for size in tensor.shape]
    if len(sizes) == 1:
        # The first term is fitted to all of the tensor, the others later to the residual that its format leaves.
        return [[tensor]] + [[algebra.zeros(sizes)] for _ in range(terms - 1)], Fit({}, True, 0, "exact")
    fit = fit_format(algebra, CP(sizes, terms), tensor, None, limits)
    vectors = [
        [backend.flatten(fit.arrays[f"factor{k}"][:, term : term + 1]) for k in range(len(sizes))]
        for term in range(terms)
    ]
    return vectors, fit._replace(arrays={}, method=f"nearest Kronecker product, {fit.method}")


class _Sum:
    """State of the alternation: the arrays, and the tensor of each split of each term."""

    def __init__(self, algebra: Algebra, tensor: Array, splits: Sequence[Format], arrays: list[Term]) -> None:
        self.algebra, self.tensor, self.splits, self.arrays = algebra, tensor, splits, arrays
        self.made = [
            [_whole(algebra, split, part) for split, part in zip(splits, term, strict=True)] for term in arrays
        ]

    def error(self) -> float:
        return self.algebra.norm(self.tensor - _outer_sum(self.algebra, self.made))

    def sweep(self, limits: Limits) -> None:
        for term in range(len(self.arrays)):
            for k in range(len(self.splits)):
                self._improve(term, k, limits)

    def _improve(self, term: int, k: int, limits: Limits) -> None:
        """Optimize one split of one term, with everything else fixed."""
        algebra, factors = self.algebra, self.made[term]
        others = [None if j == k else split for j, split in enumerate(factors)]
        size = math.prod(algebra.squares(split) for split in others if split is not None)
        if size == 0.0 or not math.isfinite(size):
            return  # the other factors vanish or overflow, so the split cannot be determined
        wanted = contracted(algebra.backend, self.tensor, others, self.splits[k].sizes)
        for other, theirs in enumerate(self.made):
            if other != term:
                overlap = math.prod(self._product(factors[j], theirs[j]) for j in range(len(self.splits)) if j != k)
                wanted = wanted - theirs[k] * overlap
        wanted = wanted * (1.0 / size)
        # A few steps of a format's own iteration are enough: later sweeps continue it.
        few = limits._replace(iterations=min(limits.iterations, 5))
        arrays = fit_format(algebra, self.splits[k], wanted, self.arrays[term][k], few).arrays
        whole = _whole(algebra, self.splits[k], arrays)
        if algebra.squares(wanted - whole) <= algebra.squares(wanted - factors[k]):
            self.arrays[term][k], self.made[term][k] = arrays, whole

    def _product(self, a: Array, b: Array) -> float:
        total = self.algebra.backend.sum(self.algebra.backend.flatten(a * b), axis=0)
        return float(np.asarray(self.algebra.backend.to_numpy(total), np.float64))
