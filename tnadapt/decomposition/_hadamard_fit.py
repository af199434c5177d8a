"""Fit of a Hadamard product of splits, from several starts.

One start is the fit of one split alone, with the others near ones. In another all splits share the magnitudes: for K
splits, the K-th root of each element's magnitude, one of them with the signs. The others are random. Where all of them
end far from an answer that may exist, another one comes from the space of a matrix's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tnadapt.algebra.formats import CP, Dense
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends.backend import Array

from ._gradient import refine
from ._hadamard_subspace import subspace_start
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
# that; the error up to which the other starts may lead it to an exact answer; and that of an exact answer.
_RANDOM, _TRIED, _LAST, _NEAR, _ANSWER = 4, 25, 50, 0.2, 1e-6


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
        return _by_gauss_newton(
            algebra, network, elements, vec, [found, *tried[1:]], error(found) / norm, limits, watch
        )
    return found


def _by_gauss_newton(
    algebra: Algebra,
    network: Network,
    elements: ObservedElements,
    vec: Array,
    tried: Sequence[Fit],
    error: float,
    limits: Limits,
    watch: Watch,
) -> Fit:
    """Continue by Gauss-Newton from the best fit, and from the others where the error is small."""
    now, steps = error, tried[0].iterations

    def seen(count: int, left: float) -> None:
        nonlocal now
        now = min(now, left)
        watch(steps + count, now)

    def starts() -> Iterator[Mapping[str, np.ndarray]]:
        for number, fit in enumerate(tried):
            # There may be an exact answer, which another start leads to.
            if not number or now <= _NEAR:
                yield {name: on_host(algebra, array) for name, array in fit.arrays.items()}

    own = limits._replace(iterations=min(limits.iterations, _LAST))
    wanted = on_host(algebra, vec)
    found = fit_observed(elements, wanted, starts(), own, watch=seen)
    steps += found.iterations
    another = _from_rows(algebra, network, vec, found.error)
    if another is not None:
        again = fit_observed(elements, wanted, [another], own, watch=seen)
        steps += again.iterations
        found = again if again.error < found.error else found
    arrays = {name: algebra.array(array) for name, array in found.arrays.items()}
    return Fit(arrays, False, steps, "L-BFGS, Gauss-Newton")


def _from_rows(algebra: Algebra, network: Network, vec: Array, error: float) -> Mapping[str, np.ndarray] | None:
    """Return a start from the space of a matrix's rows, if it is better than the result so far."""
    sizes, splits = network.sizes, network.splits
    plain = len(sizes) == 2 and network.size == math.prod(sizes) and network.terms == 1
    if not plain or any(type(split) is not CP for split in splits) or error < _ANSWER:
        return None
    matrix, ranks = on_host(algebra, _folded(algebra, network, vec)), [split.shapes["factor0"][1] for split in splits]
    pairs = subspace_start(matrix, ranks, error, algebra.rng)
    if pairs is None:
        return None
    return {
        f"{prefix}factor{mode}": factor
        for prefix, pair in zip(network.prefixes[0], pairs, strict=True)
        for mode, factor in enumerate(pair)
    }
