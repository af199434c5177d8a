"""Fit of a Hadamard product of splits, from several starts.

One start is the fit of one split alone, with the others near ones. In another all splits share the magnitudes: for K
splits, the K-th root of each element's magnitude, one of them with the signs. The others are random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Dense
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._gradient import refine
from ._linear_algebra import Algebra
from ._observed_elements import ObservedElements
from ._observed_fit import affordable, fit_observed, random_start
from ._refined_format import on_host
from ._single_tensor import Fit, Limits, fit_format

__all__ = ["fit_hadamard"]

Arrays = dict[str, Array]
Watch = Callable[[int, float], None]

# Limits of a split's own fit, which is only a start.
_START = Limits(iterations=10)
# Standard deviation of the noise on arrays that start near the fit to ones.
_NOISE = 0.1
# Random starts of small networks; steps from each start, before the best of them is refined; steps of Gauss-Newton from
# that; and the error up to which the other starts may lead it to an exact answer.
_RANDOM, _TRIED, _LAST, _NEAR = 4, 25, 50, 0.2


def fit_hadamard(algebra: Algebra, network: Network, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """Fit the arrays of a Hadamard product to a vector; see :func:`~._network_fit.fit_network` for the parameters."""
    backend = algebra.backend
    plain, moved = _one_alone(algebra, network, vec, limits)
    if any(isinstance(split, Dense) for split in network.splits):
        return Fit(plain, True, 0, "exact")
    found = _by_gradients(algebra, network, vec, moved, limits, watch)

    def error(arrays: Mapping[str, Array]) -> float:
        return algebra.norm(network.whole(backend, arrays) - vec)

    # The fit of one split alone, with the others equal to ones, is a valid result, too: return the better one.
    if not error(found.arrays) < error(plain):
        return Fit(plain, False, found.iterations, "one split alone")
    return found


def _folded(algebra: Algebra, network: Network, vec: Array) -> Array:
    size = int(np.prod(network.sizes))
    return algebra.backend.reshape(algebra.backend.pad_last(vec * (1.0 / network.scale), size), network.sizes)


def _one_alone(algebra: Algebra, network: Network, vec: Array, limits: Limits) -> tuple[Arrays, Arrays]:
    """Return the fit of one split with the others ones, and the same with noise on the others."""
    splits = network.splits
    tensor, ones, rng = _folded(algebra, network, vec), algebra.array(np.ones(network.sizes)), algebra.rng
    dense = [k for k, split in enumerate(splits) if isinstance(split, Dense)]
    first = dense[0] if dense else 0
    plain: Arrays = {}
    moved: Arrays = {}
    for term, prefixes in enumerate(network.prefixes):
        for k, (prefix, split) in enumerate(zip(prefixes, splits, strict=True)):
            wanted = tensor if k == first else ones
            if term and k == first:
                wanted = tensor * 0.0
            for name, array in fit_format(algebra, split, wanted, None, limits).arrays.items():
                plain[prefix + name] = array
                # At exact zeros or ones, gradients of these arrays can vanish, and they would never change.
                noise = algebra.array(rng.normal(size=split.shapes[name])) * _NOISE
                moved[prefix + name] = array if k == first else array + noise
    return plain, moved


def _roots(algebra: Algebra, network: Network, vec: Array) -> Arrays:
    """Return fits of each split to a root of the magnitudes, the first with the signs, and a little noise."""
    host, rng, count = on_host(algebra, _folded(algebra, network, vec)), algebra.rng, len(network.splits)
    root = algebra.array(np.abs(host / network.terms) ** (1.0 / count))
    signed = root * algebra.array(np.sign(host))
    found: Arrays = {}
    for prefixes in network.prefixes:
        for k, (prefix, split) in enumerate(zip(prefixes, network.splits, strict=True)):
            for name, array in fit_format(algebra, split, root if k else signed, None, _START).arrays.items():
                size = algebra.norm(array) / float(np.prod(split.shapes[name])) ** 0.5
                found[prefix + name] = array + algebra.array(rng.normal(size=split.shapes[name])) * (_NOISE * size)
    return found


def _by_gradients(algebra: Algebra, network: Network, vec: Array, moved: Arrays, limits: Limits, watch: Watch) -> Fit:
    """Run a few steps from each start, then continue from the best by L-BFGS; if possible, end with Gauss-Newton."""
    identity, backend = Projection("identity", network.size, network.size), algebra.backend
    norm, rng = algebra.norm(vec), algebra.rng
    starts = [moved, _roots(algebra, network, vec)]
    small = affordable(ObservedElements.of_network(network, np.zeros(0, np.intp)), network.size) > 0
    if small:
        elements = ObservedElements.of_network(network)
        for _ in range(_RANDOM):
            start = random_start(elements, rng, norm)
            starts.append({name: algebra.array(array) for name, array in start.items()})

    def error(fit: Fit) -> float:
        found = algebra.norm(network.whole(backend, fit.arrays) - vec)
        return found if math.isfinite(found) else math.inf

    few = limits._replace(iterations=min(limits.iterations, _TRIED))
    tried = sorted(
        (refine(algebra, network, identity, vec, start, few, lambda *_: None) for start in starts), key=error
    )
    steps = sum(fit.iterations for fit in tried)
    found = refine(
        algebra, network, identity, vec, tried[0].arrays, limits, lambda count, left: watch(steps + count, left)
    )
    found = found._replace(iterations=steps + found.iterations)
    if small and limits.iterations > _TRIED:
        return _by_gauss_newton(algebra, elements, vec, [found, *tried[1:]], error(found) / norm, limits, watch)
    return found


def _by_gauss_newton(
    algebra: Algebra,
    elements: ObservedElements,
    vec: Array,
    tried: Sequence[Fit],
    error: float,
    limits: Limits,
    watch: Watch,
) -> Fit:
    """Continue by Gauss-Newton from the best fit, and from the others where the error is small."""
    now, steps = error, tried[0].iterations

    def seen(count: int, left: float, _: Any) -> None:
        nonlocal now
        now = min(now, left)
        watch(steps + count, now)

    def starts() -> Iterator[Mapping[str, np.ndarray]]:
        for number, fit in enumerate(tried):
            # There may be an exact answer, which another start leads to.
            if not number or now <= _NEAR:
                yield {name: on_host(algebra, array) for name, array in fit.arrays.items()}

    own = limits._replace(iterations=min(limits.iterations, _LAST))
    found = fit_observed(elements, on_host(algebra, vec), starts(), own, watch=seen)
    arrays = {name: algebra.array(array) for name, array in found.arrays.items()}
    return Fit(arrays, False, steps + found.iterations, "L-BFGS, Gauss-Newton")
