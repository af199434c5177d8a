"""Fit of a sum of Kronecker products to one tensor: SVD or CP of the rearrangement, then split by split.

Rearranged (:mod:`tnadapt.algebra.products`), a sum of T Kronecker products of K splits is a CP tensor of rank T
whose factors are the splits' vectors. For K = 2 dense splits, its truncated SVD is the optimum; for more, ALS is used.
Splits that are themselves factored are optimized one after another, with the others fixed. As the others only scale a
split, its optimum is the format's best fit to the contracted tensor, and no step increases the error.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tnadapt.algebra.formats import CP, Dense, Format
from tnadapt.algebra.network import Network
from tnadapt.algebra.products import contracted
from tnadapt.backends import Array

from ._single_tensor import fit_format
from .completion import ObservedElements, affordable, arrays_on_host, double_on_host, fit_observed, random_start
from .cp_als import outer_vector
from .fits import Fit, Iteration, Limits
from .linear_algebra import Algebra

# Up to this many iterations are a start for something else, and not refined. Random starts of the refinement.
_FEW, _RANDOM = 10, 3

Watch = Callable[[int, float], None]


def fit_sum(
    algebra: Algebra, network: Network, tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch
) -> Fit:
    """Fit the arrays of a sum of Kronecker products to a tensor.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    tensor : array, shape (p_1, …, p_K)
        The rearranged tensor, divided by the network's scale.
    start : mapping of str to array, optional
        Initial arrays.
    limits : Limits
    watch : callable
        Called with each sweep's number and its relative error.

    Returns
    -------
    Fit
    """
    if start is not None:
        return _Sum(algebra, network, tensor, start).fit(limits, watch)
    vectors, fit = _dense_start(algebra, tensor, network.terms, limits)
    arrays: dict[str, Array] = {}
    for prefixes, term in zip(network.prefixes, vectors, strict=True):
        for prefix, split, vector in zip(prefixes, network.splits, term, strict=True):
            fitted = fit_format(algebra, split, algebra.backend.reshape(vector, split.sizes), None, limits)
            arrays |= {prefix + name: array for name, array in fitted.arrays.items()}
    if all(isinstance(split, Dense) for split in network.splits):
        return fit._replace(arrays=arrays)
    fit = _Sum(algebra, network, tensor, arrays).fit(limits, watch)
    return _refined(algebra, network, tensor, fit, limits, watch) if limits.iterations > _FEW else fit


def _refined(algebra: Algebra, network: Network, tensor: Array, fit: Fit, limits: Limits, watch: Watch) -> Fit:
    """Continue on all arrays at once by Gauss-Newton, and from random arrays, if the problem is small."""
    size = math.prod(tensor.shape)
    if not affordable(_elements(network, 0), size):
        return fit
    elements, rng = _elements(network, size), algebra.rng
    wanted = double_on_host(algebra.backend, tensor).reshape(-1)

    def starts() -> Iterator[dict[str, np.ndarray]]:
        yield arrays_on_host(algebra.backend, fit.arrays)
        for _ in range(_RANDOM):
            yield random_start(elements, rng, float(np.linalg.norm(wanted)), wanted.dtype)

    best = fit_observed(
        elements, wanted, starts(), limits, watch=lambda count, error: watch(fit.iterations + count, error)
    )
    return best._replace(
        arrays=algebra.arrays(best.arrays),
        iterations=fit.iterations + best.iterations,
        method=f"{fit.method}, Gauss-Newton",
    )


def _elements(network: Network, count: int) -> ObservedElements:
    """Return the first elements of a rearranged tensor."""
    splits = network.splits
    rows = np.unravel_index(np.arange(count), [math.prod(split.sizes) for split in splits])
    places = [np.unravel_index(row, split.sizes) for row, split in zip(rows, splits, strict=True)]
    return ObservedElements(splits, network.prefixes, places)


def outer_sum(algebra: Algebra, network: Network, arrays: Mapping[str, Array]) -> Array:
    """Compute the rearranged tensor of arrays, divided by the network's scale."""
    return _outer_sum(algebra, _split_tensors(algebra, network, arrays))


def _split_tensors(algebra: Algebra, network: Network, arrays: Mapping[str, Array]) -> list[list[Array]]:
    """Return the tensor of each split of each term."""
    terms = (network.of_term(prefixes, arrays) for prefixes in network.prefixes)
    return [[_whole(algebra, *pair) for pair in zip(network.splits, term, strict=True)] for term in terms]


def _whole(algebra: Algebra, split: Format, arrays: dict[str, Array]) -> Array:
    return split.tensor(algebra.backend, arrays, [(0, size) for size in split.sizes])


def _outer_sum(algebra: Algebra, terms: Sequence[Sequence[Array]]) -> Array:
    backend = algebra.backend
    vectors = [outer_vector(backend, [backend.flatten(split) for split in term]) for term in terms]
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

    def __init__(self, algebra: Algebra, network: Network, tensor: Array, start: Mapping[str, Array]) -> None:
        self.algebra, self.network, self.tensor, self.splits = algebra, network, tensor, network.splits
        self.arrays = [network.of_term(prefixes, start) for prefixes in network.prefixes]
        self.made = _split_tensors(algebra, network, start)

    def fit(self, limits: Limits, watch: Watch) -> Fit:
        """Optimize the splits of all terms in turn until a sweep gains no more than the tolerance."""
        norm, steps = self.algebra.norm(self.tensor), Iteration(limits, watch)
        steps.begin(self._error() / norm)
        while not steps.stopped:
            for term, k in itertools.product(range(len(self.arrays)), range(len(self.splits))):
                self._improve(term, k, limits)
            steps.step(self._error() / norm)
        arrays = {
            prefix + name: array
            for prefixes, term_arrays in zip(self.network.prefixes, self.arrays, strict=True)
            for prefix, split_arrays in zip(prefixes, term_arrays, strict=True)
            for name, array in split_arrays.items()
        }
        method = "term by term" if len(self.splits) == 1 else "alternating over splits"
        return steps.fit(arrays, method, steps.before)

    def _error(self) -> float:
        return self.algebra.norm(self.tensor - _outer_sum(self.algebra, self.made))

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
