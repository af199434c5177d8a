"""One group before F to the arrays of its network, padding free.

What a fold, or the cut of a Kronecker product, adds to the tensor is nobody's: those elements take whatever value
suits the rest. Rows of the first mode that hold nothing else are left out; the others are filled with what the last fit
made of them, and the fit is done again (expectation maximisation), which never makes the error larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.rearrangement import rearranged
from tnadapt.backends.backend import Array

from ._gradient import refine
from ._kronecker_sums import Term, fit_sum, outer_sum
from ._linear_algebra import Algebra
from ._single_tensor import Fit, Limits, fit_format

__all__ = ["fit_network"]

Arrays = dict[str, Array]
Watch = Callable[[int, float], None]

# How far the arrays that begin as ones are from it.
_NOISE = 0.1


def fit_network(algebra: Algebra, network: Network, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """The arrays whose vector is nearest to one, as nearly as is known.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    vec : array, shape (size,)
        Not zero.
    limits : Limits
    watch : callable
        Called with a number and the relative error after each iteration over the whole.

    Returns
    -------
    Fit
        Arrays named and shaped as ``network.shapes``.
    """
    if len(network.splits) > 1 and not network.kronecker:
        return _hadamard(algebra, network, vec, limits, watch)
    target = vec * (1.0 / network.scale)
    way = _way(algebra, network)
    return _completed(algebra, network, way, target, limits, watch)


class _Way(NamedTuple):
    """How a vector is fitted where nothing is missing.

    Attributes
    ----------
    sizes : tuple of int
        Of the tensor that it is folded to.
    fold : callable
        A vector to that tensor, zeros where it ends.
    solve : callable
        A tensor, and arrays to begin with or None, to a Fit.
    make : callable
        Arrays to that tensor.
    """

    sizes: tuple[int, ...]
    fold: Callable[[Array], Array]
    solve: Callable[[Array, Mapping[str, Array] | None, Limits, Watch], Fit]
    make: Callable[[Mapping[str, Array]], Array]


def _way(algebra: Algebra, network: Network) -> _Way:
    plain = len(network.splits) == 1
    if plain and (network.terms == 1 or network.splits[0].summed(network.terms) is not None):
        return _one_split(algebra, network)
    return _several(algebra, network)


def _completed(algebra: Algebra, network: Network, way: _Way, target: Array, limits: Limits, watch: Watch) -> Fit:
    """The fit, and where elements are missing again and again with what it made of them."""
    backend = algebra.backend
    tensor = way.fold(target)
    missing = math.prod(way.sizes) > network.size
    found = way.solve(tensor, None, limits, (lambda *_: None) if missing else watch)
    if not missing:
        return found
    norm, scale = algebra.norm(target), network.scale

    def residual(arrays: Mapping[str, Array]) -> Array:
        return target - network.whole(backend, arrays) * (1.0 / scale)

    left = residual(found.arrays)
    error, rounds = algebra.norm(left), found.iterations
    if error == 0.0:
        return found
    # A few steps of a method's own in each round: the next goes on from there.
    few = limits._replace(iterations=min(limits.iterations, 5))
    for count in range(limits.iterations):
        watch(count, error / norm)
        again = way.solve(way.make(found.arrays) + way.fold(left), found.arrays, few, lambda *_: None)
        rounds += max(1, again.iterations)
        left = residual(again.arrays)
        before, error = error, algebra.norm(left)
        if error > before:
            break
        found = again
        if before - error <= limits.tol * norm:
            break
    return found._replace(optimal=False, iterations=rounds, method=f"{found.method}, padding filled in")


# -- One split -----------------------------------------------------------------------------------


def _one_split(algebra: Algebra, network: Network) -> _Way:
    """A format by itself; of CP and dense, T terms are one of T times the rank."""
    backend, split, terms = algebra.backend, network.splits[0], network.terms
    rest = math.prod(network.sizes[1:])
    # Rows of the first mode beyond the vector's end are whatever one likes.
    sizes = (-(-network.size // rest), *network.sizes[1:])
    prefixes = [prefix for (prefix,) in network.prefixes]
    whole = (split.summed(terms) or split) if terms > 1 else split

    def fold(vec: Array) -> Array:
        return backend.reshape(backend.pad_last(vec, math.prod(sizes)), sizes)

    def joined(arrays: Mapping[str, Array]) -> Arrays:
        axis = {name: len(shape) - 1 for name, shape in whole.shapes.items()}
        if whole is split:
            return {name: arrays[prefixes[0] + name] for name in whole.shapes}
        return {name: backend.concat([arrays[p + name] for p in prefixes], axis=axis[name]) for name in whole.shapes}

    def parted(arrays: Mapping[str, Array]) -> Arrays:
        found: Arrays = {}
        for term, prefix in enumerate(prefixes):
            for name, shape in split.shapes.items():
                if whole is split:
                    found[prefix + name] = arrays[name] if term == 0 else algebra.zeros(shape)
                else:
                    columns = slice(term * shape[-1], (term + 1) * shape[-1])
                    found[prefix + name] = arrays[name][..., columns]
        return found

    def solve(tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch) -> Fit:
        found = fit_format(algebra, whole, tensor, None if start is None else joined(start), limits)
        watch(max(1, found.iterations), algebra.norm(tensor - made(found.arrays)) / algebra.norm(tensor))
        return found._replace(arrays=parted(found.arrays))

    def made(arrays: Mapping[str, Array]) -> Array:
        return whole.tensor(backend, arrays, [(0, size) for size in sizes])

    return _Way(sizes, fold, solve, lambda arrays: made(joined(arrays)))


# -- Sums, and Kronecker products -----------------------------------------------------------------


def _several(algebra: Algebra, network: Network) -> _Way:
    backend, splits = algebra.backend, network.splits
    inner = [split.sizes for split in splits]

    def fold(vec: Array) -> Array:
        tensor = backend.reshape(backend.pad_last(vec, math.prod(network.sizes)), network.sizes)
        return rearranged(backend, tensor, inner)

    def by_term(arrays: Mapping[str, Array]) -> list[Term]:
        return [network.of_term(prefixes, arrays) for prefixes in network.prefixes]

    def solve(tensor: Array, start: Mapping[str, Array] | None, limits: Limits, watch: Watch) -> Fit:
        begun = None if start is None else by_term(start)
        terms, found = fit_sum(algebra, tensor, splits, network.terms, begun, limits, watch)
        arrays = {
            prefix + name: array
            for prefixes, term in zip(network.prefixes, terms, strict=True)
            for prefix, own in zip(prefixes, term, strict=True)
            for name, array in own.items()
        }
        return found._replace(arrays={name: arrays[name] for name in network.shapes})

    def make(arrays: Mapping[str, Array]) -> Array:
        return outer_sum(algebra, splits, by_term(arrays))

    return _Way(tuple(math.prod(sizes) for sizes in inner), fold, solve, make)


# -- Hadamard products -----------------------------------------------------------------------------


def _hadamard(algebra: Algebra, network: Network, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """One split fitted alone, the others near one; then all arrays by their gradients."""
    backend, splits = algebra.backend, network.splits
    tensor = backend.reshape(backend.pad_last(vec * (1.0 / network.scale), math.prod(network.sizes)), network.sizes)
    dense = [k for k, split in enumerate(splits) if isinstance(split, Dense)]
    first = dense[0] if dense else 0
    ones, rng = algebra.array(np.ones(network.sizes)), algebra.rng
    plain: Arrays = {}
    moved: Arrays = {}
    for term, prefixes in enumerate(network.prefixes):
        for k, (prefix, split) in enumerate(zip(prefixes, splits, strict=True)):
            wanted = tensor if k == first else ones
            if term and k == first:
                wanted = tensor * 0.0
            for name, array in fit_format(algebra, split, wanted, None, limits).arrays.items():
                plain[prefix + name] = array
                # What is exactly zero, or exactly one, would stay so: the other arrays have no say in it.
                noise = algebra.array(rng.normal(size=split.shapes[name])) * _NOISE
                moved[prefix + name] = array if k == first else array + noise
    if dense:
        return Fit(plain, True, 0, "exact")
    identity = Projection("identity", network.size, network.size)
    found = refine(algebra, network, identity, vec, moved, limits, watch)

    def error(arrays: Mapping[str, Array]) -> float:
        return algebra.norm(network.whole(backend, arrays) - vec)

    # One split alone, the others being ones, is among what it can be.
    if not error(found.arrays) < error(plain):
        return Fit(plain, False, found.iterations, "one split alone")
    return found
