"""Fit a Hadamard product of splits, from several starts.

One start is the fit of one split alone, with the others near ones. In another all splits share the magnitudes: for K
splits, the K-th root of each element's magnitude, one of them with the signs. The others are random. If all of them end
far from an exact answer that may exist, another start is computed from the row space of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tnadapt.algebra.folding import folded
from tnadapt.algebra.formats import CP, Dense
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.backends import Array

from ._least_squares import refine
from ._single_tensor import fit_format
from .completion import ObservedElements, affordable, fit_observed, random_start
from .fits import Fit, Limits, unwatched
from .linear_algebra import Algebra, arrays_on_host, double_on_host

Arrays = dict[str, Array]
Watch = Callable[[int, float], None]

# Limits of a split's own fit, which is only a start.
_START = Limits(iterations=10)
# Standard deviation of the noise on arrays that start near the fit to ones.
_NOISE = 0.1
# Elements of a matrix that is too large for Gauss-Newton, and gets a start from its row space.
_SEARCHED = 1 << 16
# Random starts of small networks; steps from each start before the best one is refined; steps of Gauss-Newton from
# there; the error below which other starts may lead to an exact answer; and the error of an exact answer.
_RANDOM, _TRIED, _LAST, _NEAR, _ANSWER = 4, 25, 50, 0.2, 1e-6


def fit_hadamard(algebra: Algebra, network: Network, vec: Array, limits: Limits, watch: Watch) -> Fit:
    """Fit the arrays of a Hadamard product to a vector; see :func:`~._network_fit.fit_network` for the parameters."""
    backend = algebra.backend
    plain, moved = _one_alone(algebra, network, vec, limits)
    if any(isinstance(split, Dense) for split in network.splits):
        return Fit(plain, True, 0, "exact")
    fit = _by_gradients(algebra, network, vec, moved, limits, watch)

    def error(arrays: Mapping[str, Array]) -> float:
        return algebra.norm(network.whole(backend, arrays) - vec)

    # The fit of one split alone, with the others equal to ones, is a valid result, too: return the better one.
    if not error(fit.arrays) < error(plain):
        return fit._replace(arrays=plain, method="one split alone")
    return fit


def _folded(algebra: Algebra, network: Network, vec: Array) -> Array:
    return folded(algebra.backend, vec * (1.0 / network.scale), network.sizes)


def _one_alone(algebra: Algebra, network: Network, vec: Array, limits: Limits) -> tuple[Arrays, Arrays]:
    """Return the fit of one split with the others equal to ones, and the same with noise on the others."""
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
    host, rng, count = double_on_host(algebra.backend, _folded(algebra, network, vec)), algebra.rng, len(network.splits)
    root = algebra.array(np.abs(host / network.terms) ** (1.0 / count))
    signed = root * algebra.array(np.sign(host))
    arrays: Arrays = {}
    for prefixes in network.prefixes:
        for k, (prefix, split) in enumerate(zip(prefixes, network.splits, strict=True)):
            for name, array in fit_format(algebra, split, root if k else signed, None, _START).arrays.items():
                size = algebra.norm(array) / float(np.prod(split.shapes[name])) ** 0.5
                arrays[prefix + name] = array + algebra.array(rng.normal(size=split.shapes[name])) * (_NOISE * size)
    return arrays


def _by_gradients(algebra: Algebra, network: Network, vec: Array, moved: Arrays, limits: Limits, watch: Watch) -> Fit:
    """Run a few steps from each start, then continue from the best by L-BFGS; if possible, end with Gauss-Newton."""
    identity, backend = Projection("identity", network.size, network.size), algebra.backend
    norm, rng = algebra.norm(vec), algebra.rng
    starts = [moved, _roots(algebra, network, vec)]
    small = affordable(ObservedElements.of_network(network, np.zeros(0, np.intp)), network.size) > 0
    if small:
        elements = ObservedElements.of_network(network)
        for _ in range(_RANDOM):
            starts.append(algebra.arrays(random_start(elements, rng, norm)))

    def error(fit: Fit) -> float:
        distance = algebra.norm(network.whole(backend, fit.arrays) - vec)
        return distance if math.isfinite(distance) else math.inf

    def refined(start: Arrays, limits: Limits, watch: Watch) -> Fit:
        return refine(algebra, network, identity, vec, start, limits, watch)

    few = limits._replace(iterations=min(limits.iterations, _TRIED))
    tried = sorted((refined(start, few, unwatched) for start in starts), key=error)
    steps = sum(fit.iterations for fit in tried)
    lbfgs_fit = refined(tried[0].arrays, limits, lambda count, left: watch(steps + count, left))
    lbfgs_fit = lbfgs_fit._replace(iterations=steps + lbfgs_fit.iterations)
    if small and limits.iterations > _TRIED:
        tried[0] = lbfgs_fit
        return _by_gauss_newton(algebra, network, vec, tried, error(lbfgs_fit) / norm, limits, watch)
    start = None
    if limits.iterations > _TRIED and network.size <= _SEARCHED:
        start = _from_rows(algebra, network, vec, error(lbfgs_fit) / norm)
    if start is None:
        return lbfgs_fit
    steps = lbfgs_fit.iterations
    again = refined(algebra.arrays(start), limits, lambda count, left: watch(steps + count, left))
    best = min(lbfgs_fit, again, key=error)
    return best._replace(iterations=steps + again.iterations)


def _by_gauss_newton(
    algebra: Algebra, network: Network, vec: Array, tried: Sequence[Fit], error: float, limits: Limits, watch: Watch
) -> Fit:
    """Continue by Gauss-Newton from the best fit, and from the others where the error is small."""
    elements, now, steps = ObservedElements.of_network(network), error, tried[0].iterations

    def seen(count: int, left: float) -> None:
        nonlocal now
        now = min(now, left)
        watch(steps + count, now)

    def starts() -> Iterator[Mapping[str, np.ndarray]]:
        for number, fit in enumerate(tried):
            # There may be an exact answer that another start leads to.
            if not number or now <= _NEAR:
                yield arrays_on_host(algebra.backend, fit.arrays)

    few = limits._replace(iterations=min(limits.iterations, _LAST))
    wanted = double_on_host(algebra.backend, vec)
    best = fit_observed(elements, wanted, starts(), few, watch=seen)
    steps += best.iterations
    another = _from_rows(algebra, network, vec, best.error)
    if another is not None:
        again = fit_observed(elements, wanted, [another], few, watch=seen)
        steps += again.iterations
        best = again if again.error < best.error else best
    return best._replace(arrays=algebra.arrays(best.arrays), iterations=steps, method="L-BFGS, Gauss-Newton")


def _from_rows(algebra: Algebra, network: Network, vec: Array, error: float) -> Mapping[str, np.ndarray] | None:
    """Return a start from the row space of a matrix, if it is better than the result so far."""
    sizes, splits = network.sizes, network.splits
    plain = len(sizes) == 2 and network.size == math.prod(sizes) and network.terms == 1
    if not plain or any(type(split) is not CP for split in splits) or error < _ANSWER:
        return None
    matrix = double_on_host(algebra.backend, _folded(algebra, network, vec))
    pairs = subspace_start(matrix, [split.shapes["factor0"][1] for split in splits], error, algebra.rng)
    if pairs is None:
        return None
    return {
        f"{prefix}factor{mode}": factor
        for prefix, pair in zip(network.prefixes[0], pairs, strict=True)
        for mode, factor in enumerate(pair)
    }


# -- A start for CP splits of a matrix, from its row space -------------------------------------------------------------

# If X = (A1 B1ᵀ) ∘ … ∘ (AK BKᵀ), then X = U Vᵀ, where each row of V is the Kronecker product of the rows of the Bk. The
# rank r1 ⋯ rK of X is smaller than its sizes in general, and V spans its row space. With the projector P onto the
# complement of that, the Bk solve ‖P V‖ = 0, in which there are no Ak. With all others fixed, the best orthonormal Bk
# are the eigenvectors of ``P ∘ (B1 B1ᵀ) ∘ … ∘ (BK BKᵀ)``, without Bk itself, that belong to its least eigenvalues.
#
# Factors with disjoint rows solve it, too, but are useless. To avoid them, rows are divided by a power of their norms
# between the steps. The exponent is 1/2 for two parts and 3/4 for three: with smaller ones the steps end at such
# factors, and with larger ones they seldom end at all.


# Random starts of a round, their steps, how many of the best continue, and for how many steps; the most rounds. Each
# step decomposes a matrix with as many rows as there are columns, of which no more than this number are used.
_TRIED_STARTS, _FIRST, _KEPT, _LAST_STEPS, _ROUNDS, _COLUMNS = 20, 90, 5, 400, 4, 40
# Steps end when the loss is below the first number; a result is the answer if its error is below the second one, or
# below this many times the error of the nearest matrix of this rank.
_ENOUGH, _EXACT, _NEAR_RANK = 1e-14, 1e-4, 3.0
# A matrix is tried only if its distance to the matrices of this rank is below this fraction of the error to improve.
_FAR = 0.1

Pairs = list[tuple[np.ndarray, np.ndarray]]


def subspace_start(
    matrix: np.ndarray, ranks: Sequence[int], error: float, rng: np.random.RandomState
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Search the factors of a matrix that is nearly a Hadamard product of matrices of low rank.

    Parameters
    ----------
    matrix : ndarray, shape (m, n)
        Real; not zero.
    ranks : sequence of int
        Of the K ≥ 2 matrices.
    error : float
        The relative error of a known result.
    rng : RandomState

    Returns
    -------
    list of (ndarray, ndarray), shapes (m, r_k) and (n, r_k), or None
        None if the matrix is too far from the rank that such products have, if its rows' space does not determine them,
        or if nothing better was found.

    Examples
    --------
    >>> rng = np.random.RandomState(0)
    >>> parts = [rng.normal(size=(9, 2)) @ rng.normal(size=(2, 12)) for _ in range(2)]
    >>> wanted = parts[0] * parts[1]
    >>> (a, b), (c, d) = subspace_start(wanted, (2, 2), 1.0, rng)
    >>> bool(np.linalg.norm((a @ b.T) * (c @ d.T) - wanted) < 1e-3 * np.linalg.norm(wanted))
    True
    """
    if matrix.shape[0] > matrix.shape[1]:
        transposed = subspace_start(matrix.T, ranks, error, rng)
        return None if transposed is None else [(left, right) for right, left in transposed]
    whole, norm = math.prod(ranks), float(np.linalg.norm(matrix))
    some = matrix[:, np.sort(rng.permutation(matrix.shape[1])[:_COLUMNS])]
    if not _determined(some.shape, ranks):
        return None
    least = float(np.linalg.norm(np.linalg.svd(matrix, compute_uv=False)[whole:])) / norm
    if least > _FAR * error:
        return None
    vh = np.linalg.svd(some, full_matrices=False)[2][:whole]
    search = _Search(np.eye(some.shape[1]) - vh.T @ vh, ranks, rng)
    best: Pairs | None = None
    for _ in range(_ROUNDS):
        for factors in search.round():
            pairs = _completed(matrix, _with_left(some, factors))
            left = math.prod((a @ b.T for a, b in pairs), start=np.ones(matrix.shape)) - matrix
            now = float(np.linalg.norm(left)) / norm
            if now < error:
                best, error = pairs, now
        if best is not None and error <= max(_EXACT, _NEAR_RANK * least):
            break
    return best


def _determined(shape: tuple[int, ...], ranks: Sequence[int]) -> bool:
    """Return whether there are at least as many equations as unknowns, up to changes that keep all products."""
    rows, cols = shape
    whole, more = math.prod(ranks), len(ranks) - 1
    unknowns = cols * (sum(ranks) - more) - sum(rank**2 for rank in ranks) + more
    return whole < rows and whole * (cols - whole) >= unknowns


class _Search:
    """Alternating eigenvectors from random starts."""

    def __init__(self, projector: np.ndarray, ranks: Sequence[int], rng: np.random.RandomState) -> None:
        self.projector, self.ranks, self.rng, self.size = projector, ranks, rng, len(projector)

    def round(self) -> list[list[np.ndarray]]:
        """Return the factors from some starts, best first."""
        starts = [[self.rng.normal(size=(self.size, rank)) for rank in self.ranks] for _ in range(_TRIED_STARTS)]
        tried = sorted((self._steps(start, _FIRST) for start in starts), key=lambda pair: pair[0])
        kept = (self._steps(factors, _LAST_STEPS) for _, factors in tried[:_KEPT])
        return [factors for _, factors in sorted(kept, key=lambda pair: pair[0])]

    def _steps(self, factors: list[np.ndarray], count: int) -> tuple[float, list[np.ndarray]]:
        """Return the loss relative to the norm, and the factors."""
        from scipy.linalg import eigh

        factors, loss, power = list(factors), math.inf, 1.0 - 2.0 ** (1 - len(factors))
        for step in range(count):
            k = step % len(factors)
            weighed = np.ones_like(self.projector)
            for j, factor in enumerate(factors):
                if j != k:
                    rows = np.linalg.norm(factor, axis=1, keepdims=True)
                    factors[j] = factor / np.maximum(rows, 1e-150) ** power
                    weighed *= factors[j] @ factors[j].T
            values, factors[k] = eigh(
                self.projector * weighed, subset_by_index=[0, self.ranks[k] - 1], check_finite=False
            )
            size = float(np.einsum("ij,ij,i->", factors[k], factors[k], np.diag(weighed)))
            loss = float(values.sum()) / size if size else math.inf
            if loss < _ENOUGH:
                break
        return loss, factors


def _completed(matrix: np.ndarray, pairs: Pairs) -> Pairs:
    """Return the right factors of all columns, given the left ones."""
    if len(pairs[0][1]) == matrix.shape[1]:
        return pairs
    return [(left, right) for right, left in _with_left(matrix.T, [left for left, _ in pairs])]


def _with_left(matrix: np.ndarray, right: Sequence[np.ndarray]) -> Pairs:
    """Return pairs of the given right factors with left ones: least-squares rows, made Kronecker products."""
    products = right[0]
    for factor in right[1:]:
        products = (products[:, :, None] * factor[:, None, :]).reshape(len(factor), -1)
    rest = np.linalg.lstsq(products, matrix.T, rcond=1e-8)[0].T
    pairs = []
    for factor in right[:-1]:
        u, s, vh = np.linalg.svd(rest.reshape(len(matrix), factor.shape[1], -1), full_matrices=False)
        pairs.append((u[:, :, 0], factor))
        rest = s[:, :1] * vh[:, 0]
    return [*pairs, (rest, right[-1])]
