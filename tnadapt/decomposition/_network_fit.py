"""Fit a network to one group before F: one split, sums of Kronecker products, and free padding.

Padding elements, which a fold or a cropped Kronecker product adds to the tensor, may take any value that helps to fit
the others. Rows of the first mode with nothing but padding are left out. If there is other padding, a small network is
fitted to the given elements alone (:func:`fit_given`). For a large one, the padding is filled with the values of the
last fit, and the fit is repeated (expectation maximization), which never increases the error.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.folding import folded
from tnadapt.algebra.formats import CP, Dense, Format
from tnadapt.algebra.network import Network
from tnadapt.algebra.products import contracted, rearranged
from tnadapt.backends import Array

from ._hadamard_fit import fit_hadamard
from ._single_tensor import fit_format
from .completion import ObservedElements, affordable, fit_observed, moved, random_start
from .cp_als import outer_vector
from .fits import Fit, Iteration, Limits, unwatched
from .linear_algebra import Algebra, arrays_on_host, double_on_host

Arrays = dict[str, Array]
Watch = Callable[[int, float], None]

# Ratio of elements with and without padding up to which a start fits the padding to zero.
_LITTLE = 1.1


def fit_network(algebra: Algebra, network: Network, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """Fit the arrays of a network to a vector.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    vec : array, shape (size,)
        Not zero.
    limits : Limits
    watch : callable
        Called with the number and the relative error of each iteration over the whole network.

    Returns
    -------
    Fit
        Arrays with the names and shapes of ``network.shapes``.
    """
    if len(network.splits) > 1 and not network.kronecker:
        return fit_hadamard(algebra, network, vec, limits, watch)
    way = _way(algebra, network)
    if math.prod(way.sizes) == network.size:
        return way.solve(way.fold(vec * (1.0 / network.scale)), None, limits, watch)
    # The given elements are fitted in float64 on the host, from starts in float64.
    double = algebra.double
    fit = fit_given(double, network, _way(double, network), algebra.doubled(vec), limits, watch)
    if fit is None:
        return _completed(algebra, network, way, vec, limits, watch)
    return fit._replace(arrays=algebra.arrays(fit.arrays))


def start_network(algebra: Algebra, network: Network, vec: Array, limits: Limits) -> Arrays:
    """Fit the arrays of a network to a vector in a fraction of the time of :func:`fit_network`.

    Where there is little padding, full rows are fitted, and then the one that is cut; or the padding is fitted to zero.
    """
    if len(network.splits) == 1 or network.kronecker:
        way = _way(algebra, network)
        if math.prod(way.sizes) <= _LITTLE * network.size:
            rows = from_full_rows(algebra, network, way, vec, limits)
            if rows is not None:
                return rows
            return way.solve(way.fold(vec * (1.0 / network.scale)), None, limits, unwatched).arrays
    return fit_network(algebra, network, vec, limits, unwatched).arrays


class _Way(NamedTuple):
    """The method that fits a vector without padding.

    Attributes
    ----------
    sizes : tuple of int
        Sizes of the tensor that the vector is folded into.
    fold : callable
        Maps a vector to that tensor, padded with zeros.
    solve : callable
        Maps a tensor, and initial arrays or None, to a Fit.
    make : callable
        Maps arrays to that tensor.
    """

    sizes: tuple[int, ...]
    fold: Callable[[Array], Array]
    solve: Callable[[Array, Mapping[str, Array] | None, Limits, Watch], Fit]
    make: Callable[[Mapping[str, Array]], Array]

    def started(self, tensor: Array, limits: Limits) -> Arrays:
        """Return arrays fitted to a tensor, from no initial ones."""
        return self.solve(tensor, None, limits, unwatched).arrays


def _way(algebra: Algebra, network: Network) -> _Way:
    plain = len(network.splits) == 1
    if plain and (network.terms == 1 or network.splits[0].summed(network.terms) is not None):
        return _one_split(algebra, network)
    return _several(algebra, network)


def _completed(algebra: Algebra, network: Network, way: _Way, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """Fit a large vector with padding, repeating the fit with the padding filled in from the last one."""
    backend, target, scale = algebra.backend, vec * (1.0 / network.scale), network.scale
    fit = way.solve(way.fold(target), None, limits, unwatched)
    norm = algebra.norm(target)

    def residual(arrays: Mapping[str, Array]) -> Array:
        return target - network.whole(backend, arrays) * (1.0 / scale)

    rows = from_full_rows(algebra, network, way, vec, limits)
    if rows is not None and algebra.squares(residual(rows)) < algebra.squares(residual(fit.arrays)):
        fit = fit._replace(arrays=rows)
    left = residual(fit.arrays)
    steps, rounds = Iteration(limits, watch), fit.iterations
    steps.begin(algebra.norm(left) / norm)
    if steps.before == 0.0:
        return fit
    # A few steps of the method in each round are enough: the next round continues from the result.
    few = limits._replace(iterations=min(limits.iterations, 5))
    while not steps.stopped:
        again = way.solve(way.make(fit.arrays) + way.fold(left), fit.arrays, few, unwatched)
        rounds += max(1, again.iterations)
        left = residual(again.arrays)
        if (error := algebra.norm(left) / norm) > steps.before:
            steps.stopped = "converged"  # up to rounding
            break
        fit = again
        steps.step(error)
    return steps.fit(fit.arrays, f"{fit.method}, padding filled in", steps.before)._replace(iterations=rounds)


# -- One split ---------------------------------------------------------------------------------------------------------


def _one_split(algebra: Algebra, network: Network) -> _Way:
    """Return the method for a single split, where a sum of T CP or dense terms is one term of T times the rank."""
    backend, split, terms = algebra.backend, network.splits[0], network.terms
    rest = math.prod(network.sizes[1:])
    # Rows of the first mode beyond the vector's end are unconstrained.
    sizes = (-(-network.size // rest), *network.sizes[1:])
    prefixes = [prefix for (prefix,) in network.prefixes]
    whole = (split.summed(terms) or split) if terms > 1 else split

    def fold(vec: Array) -> Array:
        return folded(backend, vec, sizes)

    def joined(arrays: Mapping[str, Array]) -> Arrays:
        if whole is split:
            return {name: arrays[prefixes[0] + name] for name in whole.shapes}
        return {
            name: backend.concat([arrays[prefix + name] for prefix in prefixes], axis=len(shape) - 1)
            for name, shape in whole.shapes.items()
        }

    def parted(arrays: Mapping[str, Array]) -> Arrays:
        parts: Arrays = {}
        for term, prefix in enumerate(prefixes):
            for name, shape in split.shapes.items():
                if whole is split:
                    parts[prefix + name] = arrays[name] if term == 0 else algebra.zeros(shape)
                else:
                    columns = slice(term * shape[-1], (term + 1) * shape[-1])
                    parts[prefix + name] = arrays[name][..., columns]
        return parts

    def solve(tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch) -> Fit:
        fit = fit_format(algebra, whole, tensor, None if start is None else joined(start), limits)
        if watch is not unwatched:
            # The tensor may have only the first rows.
            same = whole.tensor(backend, fit.arrays, [(0, int(size)) for size in tensor.shape])
            watch(max(1, fit.iterations), algebra.norm(tensor - same) / algebra.norm(tensor))
        return fit._replace(arrays=parted(fit.arrays))

    def make(arrays: Mapping[str, Array]) -> Array:
        return whole.tensor(backend, joined(arrays), [(0, size) for size in sizes])

    return _Way(sizes, fold, solve, make)


# -- Sums of Kronecker products: SVD or CP of the rearrangement, then split by split -----------------------------------

# Rearranged (:mod:`tnadapt.algebra.products`), a sum of T Kronecker products of K splits is a CP tensor of rank T whose
# factors are the splits' vectors. For K = 2 dense splits, its truncated SVD is the optimum; for more, ALS is used.
# Splits that are themselves factored are optimized one after another, with the others fixed. As the others only scale a
# split, its optimum is the format's best fit to the contracted tensor, and no step increases the error.


# Random starts of the refinement by Gauss-Newton.
_MORE = 3


def _several(algebra: Algebra, network: Network) -> _Way:
    backend, inner = algebra.backend, [split.sizes for split in network.splits]

    def fold(vec: Array) -> Array:
        return rearranged(backend, folded(backend, vec, network.sizes), inner)

    def solve(tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch) -> Fit:
        fit = _fit_sum(algebra, network, tensor, start, limits, watch)
        return fit._replace(arrays={name: fit.arrays[name] for name in network.shapes})

    def make(arrays: Mapping[str, Array]) -> Array:
        return _outer_sum(algebra, _split_tensors(algebra, network, arrays))

    return _Way(tuple(math.prod(sizes) for sizes in inner), fold, solve, make)


def _fit_sum(
    algebra: Algebra, network: Network, tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch
) -> Fit:
    """Fit the arrays of a sum of Kronecker products to its rearranged tensor, divided by the network's scale."""
    if start is not None:
        return _Sum(algebra, network, tensor, start).fit(limits, watch)
    vectors, fit = _dense_start(algebra, tensor, network.terms, limits)
    arrays: Arrays = {}
    for prefixes, term in zip(network.prefixes, vectors, strict=True):
        for prefix, split, vector in zip(prefixes, network.splits, term, strict=True):
            fitted = fit_format(algebra, split, algebra.backend.reshape(vector, split.sizes), None, limits)
            arrays |= {prefix + name: array for name, array in fitted.arrays.items()}
    if all(isinstance(split, Dense) for split in network.splits):
        return fit._replace(arrays=arrays)
    fit = _Sum(algebra, network, tensor, arrays).fit(limits, watch)
    return _refined(algebra, network, tensor, fit, limits, watch) if limits.iterations > _STARTED else fit


def _refined(algebra: Algebra, network: Network, tensor: Array, fit: Fit, limits: Limits, watch: Watch) -> Fit:
    """Continue by Gauss-Newton on all arrays at once, also from random arrays, if the problem is small."""
    size = math.prod(tensor.shape)
    if not affordable(_elements(network, 0), size):
        return fit
    elements, rng = _elements(network, size), algebra.rng
    wanted = double_on_host(algebra.backend, tensor).reshape(-1)

    def starts() -> Iterator[dict[str, np.ndarray]]:
        yield arrays_on_host(algebra.backend, fit.arrays)
        for _ in range(_MORE):
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


def _split_tensors(algebra: Algebra, network: Network, arrays: Mapping[str, Array]) -> list[list[Array]]:
    """Return the tensor of each split of each term."""
    terms = (network.of_term(prefixes, arrays) for prefixes in network.prefixes)
    return [[_whole(algebra, *pair) for pair in zip(network.splits, term, strict=True)] for term in terms]


def _whole(algebra: Algebra, split: Format, arrays: Arrays) -> Array:
    return split.tensor(algebra.backend, arrays, [(0, size) for size in split.sizes])


def _outer_sum(algebra: Algebra, terms: Sequence[Sequence[Array]]) -> Array:
    backend = algebra.backend
    vectors = [outer_vector(backend, [backend.flatten(split) for split in term]) for term in terms]
    return backend.reshape(functools.reduce(operator.add, vectors), [math.prod(split.shape) for split in terms[0]])


def _dense_start(algebra: Algebra, tensor: Array, terms: int, limits: Limits) -> tuple[list[list[Array]], Fit]:
    """Compute the vectors of every split of every term as if all splits were dense."""
    backend, sizes = algebra.backend, [int(size) for size in tensor.shape]
    if len(sizes) == 1:
        # The first term is fitted to the whole tensor, the others later to the residual that its format leaves.
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


# -- Given elements alone: starts, and damped Gauss-Newton -------------------------------------------------------------

# Nothing is missing in the full rows of the first mode, so the method of the format fits them like any tensor. Given
# its result, the row that the vector's end cuts is a linear least-squares problem. If the vector has an exact
# decomposition, this often finds it; otherwise it is a start.


# Iterations of a method for a start, which is not refined; random starts; size of the noise on starts that may be
# saddle points.
_STARTED, _RANDOM = 10, 8
_NOISE, _MORE_NOISE = 0.02, 0.1
# The most entries of the derivatives of the row that padding cuts: 128 MiB.
_ENTRIES = 1 << 24


def from_full_rows(algebra: Algebra, network: Network, way: _Way, vec: Array, limits: Limits) -> Arrays | None:
    """Fit the full rows of the first mode, then the row that the vector's end cuts; None if no row is full, for
    products of several splits, or if the derivatives of the cut row would not fit in memory.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    way : _Way
        Fits the first rows of the tensor, too, divided by the network's scale.
    vec : array, shape (size,)
    limits : Limits

    Returns
    -------
    dict of str to array or None
    """
    backend, rest = algebra.backend, math.prod(network.sizes[1:])
    full = network.size // rest
    if not full or len(network.splits) > 1:
        return None
    tail = ObservedElements.of_network(network, np.arange(full * rest, network.size))
    if tail.count * sum(tail.positions(name).shape[1] for name in tail.shapes) > _ENTRIES:
        return None
    rows = backend.reshape(vec[: full * rest] * (1.0 / network.scale), (full, *network.sizes[1:]))
    host = arrays_on_host(backend, way.started(rows, limits))
    at = tail.flat(host)
    # The cut row of the arrays is still zero. The others do not change these elements, so their derivatives are zero.
    jacobian = tail.jacobian(at)
    columns = np.unique(jacobian.indices[jacobian.data != 0.0])
    left = np.asarray(backend.to_numpy(vec[full * rest :]), np.float64) - tail.values(at)
    if columns.size:
        at[columns] += np.linalg.lstsq(jacobian[:, columns].toarray(), left, rcond=1e-10)[0]
        host = tail.arrays(at)
    else:  # several arrays have a cut row, all of them zero: a saddle point
        host = next(moved([host], algebra.rng, _MORE_NOISE))
    return algebra.arrays(host)


def fit_given(algebra: Algebra, network: Network, way: _Way, vec: Array, limits: Limits, watch: Watch) -> Fit | None:
    """Fit the given elements alone, from several starts; None if the problem is too large for it.

    Parameters
    ----------
    algebra : Algebra
        In float64.
    network : Network
    way : _Way
    vec : array, shape (size,)
    limits : Limits
    watch : callable
        Called with the number and the relative error of each step.

    Returns
    -------
    Fit or None
        With arrays on the host.
    """
    if not affordable(ObservedElements.of_network(network, np.zeros(0, np.intp)), network.size):
        return None
    backend, rng = algebra.backend, algebra.rng
    elements = ObservedElements.of_network(network)
    wanted = np.asarray(backend.to_numpy(vec), np.float64)
    few = limits._replace(iterations=min(limits.iterations, _STARTED))

    def starts() -> Iterator[Mapping[str, np.ndarray]]:
        rows = from_full_rows(algebra, network, way, vec, few)
        if rows is not None:
            yield arrays_on_host(backend, rows)
        filled = arrays_on_host(backend, way.started(way.fold(vec * (1.0 / network.scale)), few))
        yield from moved([filled], rng, _NOISE)
        for _ in range(_RANDOM):
            yield random_start(elements, rng, float(np.linalg.norm(wanted)))
        if rows is not None:
            yield from moved([arrays_on_host(backend, rows)], rng, _MORE_NOISE)

    fit = fit_observed(elements, wanted, starts(), limits, watch=watch)
    return fit._replace(method="Gauss-Newton on the given elements")
