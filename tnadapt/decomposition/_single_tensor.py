"""Fit of one format to one tensor: SVD, ALS, HOOI, TT-SVD, or the general solver.

There is one function per built-in format. If the optimum is known in closed form, it is returned. The iterations are
those of :mod:`tnadapt.tensors`, each in a file of its own. Any other format is fitted by its own ``fit``, or by
:func:`fit_any`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import CP, BatchedCP, Dense, Format, Permuted, TensorTrain, Tucker, WeightedCP, unfolded
from tnadapt.algebra.products import padded_to
from tnadapt.backends import Array

from ._least_squares import least_squares
from .completion import ObservedElements, fit_observed, refinable
from .cp_als import CRAWLS, MOVED, NEAR, OTHER_STARTS, CPSweeps, cp_als, nearest_rank_one
from .fits import Claim, Fit, Limits, all_of
from .hooi import SMALL, hooi, hosvd, projected
from .linear_algebra import Algebra, Leading, MatrixTruncation
from .tt_svd import improved_train, tt_svd

__all__ = [
    "double_on_host",
    "fit_format",
]


Arrays = dict[str, Array]


def fit_format(
    algebra: Algebra,
    split: Format,
    tensor: Array,
    start: Mapping[str, Array] | None = None,
    limits: Limits | None = None,
) -> Fit:
    """Fit the arrays of a format to a tensor.

    Parameters
    ----------
    algebra : Algebra
    split : Format
        Any format.
    tensor : array, shape (d_1, …, d_M)
        It may have fewer rows in the first mode than the format; the arrays are then padded with zeros.
    start : mapping of str to array, optional
        Initial arrays of an alternating method.
    limits : Limits, optional

    Returns
    -------
    Fit
        Arrays with the format's shapes.
    """
    limits = limits or Limits()
    if algebra.squares(tensor) == 0.0:
        return Fit({name: algebra.zeros(shape) for name, shape in split.shapes.items()}, True, 0, "zero")
    if isinstance(split, Permuted):
        found = fit_format(algebra, split.own, split.turned(algebra.backend, tensor), start, limits)
    elif type(split) in _SOLVERS:
        found = _SOLVERS[type(split)](algebra, split, tensor, start, limits)
    else:
        own = split.fit(algebra, tensor, start, limits)
        found = fit_any(algebra, split, tensor, start, limits) if own is None else own
    arrays = {name: padded_to(algebra.backend, found.arrays[name], shape) for name, shape in split.shapes.items()}
    return found._replace(arrays=arrays)


def _cut(start: Mapping[str, Array], shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
    """Crop each array to a shape, at the end of every axis."""
    return {name: start[name][tuple(slice(0, size) for size in shape)] for name, shape in shapes.items()}


# -- Dense -------------------------------------------------------------------------------------------------------------


def _dense(algebra: Algebra, split: Format, tensor: Array, start: Any, limits: Limits) -> Fit:
    return Fit({"dense": tensor}, True, 0, "exact")


# -- CP: SVD, the nearest tensor of rank one, ALS ----------------------------------------------------------------------


def _cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    factors, sizes, found = _components(algebra, split.rank, tensor, start, limits)
    # Distribute the magnitude of a component equally over its factors.
    shared = algebra.array(sizes ** (1.0 / len(factors)))
    return found._replace(arrays={f"factor{mode}": factor * shared for mode, factor in enumerate(factors)})


def _weighted_cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    if start is not None:
        start = {**start, "factor0": start["factor0"] * start["weights"]}
    factors, sizes, found = _components(algebra, split.rank, tensor, start, limits)
    arrays = {f"factor{mode}": factor for mode, factor in enumerate(factors)}
    return found._replace(arrays={"weights": algebra.array(sizes), **arrays})


def _batched_cp(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    """Fit each index of the leading mode by itself."""
    backend = algebra.backend
    if len(tensor.shape) < 3:
        return Fit({f"factor{len(tensor.shape) - 1}": tensor}, True, 0, "exact")
    parts, fits = list[dict[str, Array]](), list[Fit]()
    for index in range(tensor.shape[0]):
        own = None
        if start is not None:
            own = {f"factor{mode}": start[f"factor{mode + 1}"][index] for mode in range(len(tensor.shape) - 1)}
        if algebra.squares(tensor[index]) == 0.0:
            fits.append(Fit({}, True, 0, "zero"))
        else:
            fits.append(_cp(algebra, split, tensor[index], own, limits))
        shapes = {f"factor{mode}": (size, split.rank) for mode, size in enumerate(tensor.shape[1:])}
        found = fits[-1].arrays
        parts.append(
            {
                name: padded_to(backend, found[name], shape) if found else algebra.zeros(shape)
                for name, shape in shapes.items()
            }
        )
    arrays = {
        f"factor{mode + 1}": backend.concat(
            [backend.reshape(part[f"factor{mode}"], (1, size, split.rank)) for part in parts], axis=0
        )
        for mode, size in enumerate(tensor.shape[1:])
    }
    optimal, iterations = all_of(fit.optimal for fit in fits), max(fit.iterations for fit in fits)
    return Fit(arrays, optimal, iterations, next((fit.method for fit in fits if fit.arrays), "zero"))


def _components(
    algebra: Algebra, rank: int, tensor: Array, start: Any, limits: Limits
) -> tuple[list[Array], np.ndarray, Fit]:
    """Compute factors with unit columns, and the magnitude of each component; at most as many as rank or are useful."""
    backend, order = algebra.backend, len(tensor.shape)
    if order == 1:
        size = algebra.norm(tensor)
        return [backend.reshape(tensor, (-1, 1)) * (1.0 / size)], np.array([size]), Fit({}, True, 0, "exact")
    if order == 2:
        u, s, v, exact = algebra.svd(tensor, min(rank, *tensor.shape))
        return [u, v], s, Fit({}, exact, 0, _svd_name(algebra, tensor, rank))
    # With this rank every tensor can be represented exactly; more components would only slow convergence.
    rank = min(rank, math.prod(tensor.shape) // max(tensor.shape))
    method = "ALS"
    if rank == 1 and start is None:
        factors, iterations = nearest_rank_one(algebra, tensor, limits)
    else:
        factors, iterations, method = _als(algebra, rank, tensor, start, limits)
    norms = [algebra.columns(factor) for factor in factors]
    units = [
        factor * algebra.array(1.0 / np.where(norm > 1e-30, norm, 1.0))
        for factor, norm in zip(factors, norms, strict=True)
    ]
    sizes: np.ndarray = np.prod(norms, axis=0)
    return units, sizes, Fit({}, False, iterations, method)


def _svd_name(algebra: Algebra, matrix: Array, rank: int) -> str:
    return "randomized SVD" if algebra.randomized(matrix.shape, rank) else "SVD"


# Sweeps between two checks of the error; number of starts for a small tensor, and its maximum size.
_SWEEPS = 10
_STARTS, _SMALL = 3, 1 << 14


def _als(algebra: Algebra, rank: int, tensor: Array, start: Any, limits: Limits) -> tuple[list[Array], int, str]:
    """Run alternating least squares from one start, or for a small tensor from several; return the best result."""
    if start is not None:
        begun = [start[f"factor{mode}"][:size, :rank] for mode, size in enumerate(tensor.shape)]
        factors, _, sweeps = _descent(algebra, rank, tensor, begun, limits)
        return factors, sweeps, "ALS"
    rng, norm = algebra.rng, algebra.norm(tensor)
    first = _singular_start(algebra, rank, tensor, rng)
    several = limits.iterations > _SWEEPS
    few = limits._replace(iterations=min(limits.iterations, CRAWLS))
    factors, error, sweeps = _descent(algebra, rank, tensor, first, few)
    # Where sweeps converge fast, Gauss-Newton would take longer than all of them.
    crawls = several and sweeps >= CRAWLS
    fine = crawls and error > 64.0 * algebra.eps * norm and refinable(CP(tensor.shape, rank))
    if not (fine and error <= NEAR * norm):
        if crawls and limits.iterations > CRAWLS:
            rest = limits._replace(iterations=limits.iterations - CRAWLS)
            factors, error, more = _descent(algebra, rank, tensor, factors, rest)
            sweeps += more
        for _ in range(_STARTS - 1 if several and math.prod(tensor.shape) <= _SMALL else 0):
            if error <= 64.0 * algebra.eps * norm:
                break
            begun = [algebra.array(rng.normal(size=(size, rank))) for size in tensor.shape]
            found, other, more = _descent(algebra, rank, tensor, begun, limits)
            sweeps += more
            if other < error:
                factors, error = found, other
    if fine and error <= NEAR * norm:
        return _refined_als(algebra, rank, tensor, factors, limits, sweeps)
    return factors, sweeps, "ALS"


def _refined_als(
    algebra: Algebra, rank: int, tensor: Array, first: list[Array], limits: Limits, swept: int
) -> tuple[list[Array], int, str]:
    """Run Gauss-Newton from the factors that sweeps have reached, and from those of other starts after a few sweeps.

    Sweeps make fast progress at first, and then crawl where components are nearly collinear; Gauss-Newton does not.
    """
    rng, few = algebra.rng, limits._replace(iterations=_SWEEPS)

    def starts() -> Iterator[Arrays]:
        nonlocal swept
        for number in range(1 + OTHER_STARTS):
            factors = first
            if number:
                begun = [algebra.array(rng.normal(size=(size, rank))) for size in tensor.shape]
                factors, _, sweeps = _descent(algebra, rank, tensor, begun, few)
                swept += sweeps
            yield {f"factor{mode}": factor for mode, factor in enumerate(factors)}

    found = refined_format(algebra, CP(tensor.shape, rank), tensor, starts(), limits)
    factors = [found.arrays[f"factor{mode}"] for mode in range(len(tensor.shape))]
    return factors, swept + found.iterations, "ALS, Gauss-Newton"


def _descent(
    algebra: Algebra, rank: int, tensor: Array, begun: Sequence[Array], limits: Limits
) -> tuple[list[Array], float, int]:
    """Run sweeps until as many as are compared at a time gain too little, and keep the best."""
    norm, before = algebra.norm(tensor), math.inf

    def stops(count: int, error: float) -> bool:
        nonlocal before
        if count % _SWEEPS:
            return False
        gain, before = before - error, error
        return gain <= limits.tol * _SWEEPS

    found = cp_als(CPSweeps(algebra.backend, tensor), begun, norm, limits.iterations, stops)
    if not found.error < norm:
        # No success: return zeros; the report shows the error.
        return [algebra.zeros((size, rank)) for size in tensor.shape], norm, found.sweeps
    return found.factors, found.error, found.sweeps


def _singular_start(algebra: Algebra, rank: int, tensor: Array, rng: np.random.RandomState) -> list[Array]:
    """Return the leading singular vectors of each unfolding with a little noise; random columns if there are too few.

    Without the noise, a structured tensor may keep them at a saddle point. (TensorLy's own start has too few columns if
    an unfolding has fewer columns than the rank.)
    """
    found = []
    for mode, size in enumerate(tensor.shape):
        rows = unfolded(algebra.backend, tensor, mode)
        known = min(rank, *rows.shape)
        columns = [algebra.svd(rows, known)[0]]
        if known < rank:
            columns.append(algebra.array(rng.uniform(size=(size, rank - known))))
        moved = algebra.array(rng.normal(size=(size, rank)) * (MOVED / math.sqrt(size)))
        found.append(algebra.backend.concat(columns, axis=1) + moved)
    return found


# -- Tucker: HOSVD, HOOI -----------------------------------------------------------------------------------------------


def _tucker(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:

    sizes = tuple(int(size) for size in tensor.shape)
    if not split.modes:
        return Fit({"core": tensor}, True, 0, "exact")
    ranks = _possible_ranks([min(r, d) for r, d in zip(split.core, sizes, strict=True)], split.modes)
    cut = [mode for mode in split.modes if ranks[mode] < sizes[mode]]
    if len(sizes) == len(split.modes) == 2:
        u, values, v, optimal = algebra.svd(tensor, ranks[0])
        core = algebra.array(np.diag(values))
        return Fit({"core": core, "factor0": u, "factor1": v}, optimal, 0, _svd_name(algebra, tensor, ranks[0]))
    backend, exact = algebra.backend, list[Claim]()
    truncation = MatrixTruncation(backend, tensor, algebra.svd_method, algebra.seed)

    def truncated(matrix: Array, mode: int) -> Leading:
        found = truncation.left_to_rank(matrix, ranks[mode])
        exact.append(found.exact)
        return found

    if start is None:
        # Modes that shrink most come first: what follows is then smaller.
        order = sorted(split.modes, key=lambda mode: ranks[mode] / sizes[mode])
        core, factors, lossy = hosvd(backend, tensor, order, truncated, sequential=math.prod(sizes) > SMALL)
    else:
        begun = _cut(start, {f"factor{mode}": (sizes[mode], ranks[mode]) for mode in split.modes})
        factors = {mode: backend.qr(begun[f"factor{mode}"])[0] for mode in split.modes}
        core, lossy = functools.reduce(lambda c, m: projected(backend, c, factors[m], m), split.modes, tensor), len(cut)
    sweeps = 0
    if start is not None or lossy > 1:
        norm, before = algebra.norm(tensor), math.inf

        def stops(count: int, core: Array) -> bool:
            nonlocal before, sweeps
            # The factors are orthonormal, so what the core lacks is the error.
            sweeps, error = count, math.sqrt(max(0.0, 1.0 - (algebra.norm(core) / norm) ** 2))
            gain, before = before - error, error
            return gain <= max(limits.tol, algebra.eps)

        core, factors = hooi(backend, tensor, factors, cut, truncated, stops, limits.iterations)
    arrays = {"core": core} | {f"factor{mode}": factors[mode] for mode in split.modes}
    name = "randomized SVD" if False in exact and algebra.svd_method == "randomized" else "SVD"
    if not sweeps:
        return Fit(arrays, all_of(exact), 1, name)
    return Fit(arrays, False, sweeps, "HOSVD, HOOI")


def _possible_ranks(ranks: list[int], modes: list[int]) -> tuple[int, ...]:
    """Reduce ranks of a core to the product of the other ranks, as more is useless; modes without a factor stay."""
    before: list[int] = []
    while ranks != before:
        before = list(ranks)
        for mode in modes:
            ranks[mode] = min(ranks[mode], math.prod(ranks[:mode]) * math.prod(ranks[mode + 1 :]))
    return tuple(ranks)


# -- Tensor train: TT-SVD, ALS -----------------------------------------------------------------------------------------


def _tensor_train(algebra: Algebra, split: Any, tensor: Array, start: Any, limits: Limits) -> Fit:
    if len(tensor.shape) == 1:
        return Fit({"core0": algebra.backend.reshape(tensor, (1, -1, 1))}, True, 0, "exact")
    truncation = MatrixTruncation(algebra.backend, tensor, algebra.svd_method, algebra.seed)
    exact = list[Claim]()

    def truncated(matrix: Array, bond: int) -> Leading:
        found = truncation.left_to_rank(matrix, int(split.ranks[bond + 1]))
        exact.append(found.exact)
        return found

    cores, cut = tt_svd(algebra.backend, tensor, truncated)
    # With one bond that is cut, the result is the optimum.
    optimal, sweeps = all_of(exact) if sum(cut) <= 1 else False, 0
    if sum(cut) > 1 or False in exact:
        cores, sweeps, _ = improved_train(algebra.backend, tensor, cores, limits)
    arrays = {f"core{mode}": core for mode, core in enumerate(cores)}
    return Fit(arrays, optimal, sweeps, "TT-SVD, ALS" if sweeps else "TT-SVD")


_SOLVERS: dict[type[Format], Callable[[Algebra, Any, Array, Any, Limits], Fit]] = {
    Dense: _dense,
    CP: _cp,
    WeightedCP: _weighted_cp,
    BatchedCP: _batched_cp,
    Tucker: _tucker,
    TensorTrain: _tensor_train,
}


# -- Any other format: one array after another, from several starts ----------------------------------------------------

# A tensor is linear in each array, so each array in turn solves a linear least-squares problem with the others fixed;
# no step increases the error. The problems are solved by LSQR, which needs only the tensor and the adjoint of the
# format.


# Number of random starts for a small tensor, and its maximum size; larger ones have a single start.
_GENERAL_STARTS, _SMALL_GENERAL = 4, 1 << 14
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
    starts = _GENERAL_STARTS if math.prod(tensor.shape) <= _SMALL_GENERAL else 1
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


# -- Any format of a small tensor: damped Gauss-Newton on all arrays, from several starts ------------------------------


def refined_format(
    algebra: Algebra, split: Format, tensor: Array, starts: Iterable[Mapping[str, Array]], limits: Limits
) -> Fit:
    """Fit the arrays of a format to a tensor of its sizes, in float64 on the host.

    Parameters
    ----------
    algebra : Algebra
    split : Format
    tensor : array, shape (d_1, …, d_M)
        Not zero.
    starts : iterable of mapping of str to array
        Each is made when it is needed. No more are made once one fits exactly, or three end at the same error.
    limits : Limits
        Of each descent.

    Returns
    -------
    Fit
    """
    elements = ObservedElements([split], [[""]], [all_places(split.sizes)])
    wanted = double_on_host(algebra, tensor).reshape(-1)
    begun = ({name: double_on_host(algebra, array) for name, array in start.items()} for start in starts)
    found = fit_observed(elements, wanted, begun, limits)
    arrays = {name: algebra.array(array) for name, array in found.arrays.items()}
    return Fit(arrays, False, found.iterations, "Gauss-Newton")


def all_places(sizes: Sequence[int]) -> list[np.ndarray]:
    """Return for each mode the index of every element, in order."""
    return list(np.unravel_index(np.arange(math.prod(sizes)), tuple(sizes)))


def double_on_host(algebra: Algebra, x: Array) -> np.ndarray:
    """Return an array in NumPy, in double precision, real or complex."""
    host = np.asarray(algebra.backend.to_numpy(x))
    return host.astype(np.result_type(host.dtype, np.float64))
