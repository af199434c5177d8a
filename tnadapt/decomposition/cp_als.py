"""CP decompositions: the driver of ``cp`` and ``decompose``, alternating least squares, and Levenberg-Marquardt.

Carroll & Chang (1970) and Harshman (1970); Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51,
2009), section 3.4. The products of the tensor with all factors but one come from two large matrix products a sweep, one
for each half of the modes (Phan, Tichavský & Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC
tensor factorizations", IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.products import cp_to_tensor, hadamard_tensor, khatri_rao, mode_product, unfolded
from tnadapt.backends import Array, Backend, load_backend

from .fits import Fit, Iteration
from .linear_algebra import Algebra, Triplets, double_on_host, norm_of
from .sparse_tensor import SparseTensor

# -- The driver: SVD of a matrix; else sweeps from several starts, then Levenberg-Marquardt ---------------------------


#: Standard deviation of the noise on singular vectors that sweeps start from: without it, a structured tensor may keep
#: them at a saddle point.
MOVED = 0.01
# Sweeps crawl if they have not converged after this many, the last ten of which have reduced the relative error by more
# than this, but not to this fraction of it: then all factors are moved at once.
_CRAWLS, _SWEEPS, _FAST = ((20, 1e-5), (30, 0.0)), 10, 0.1
# If the error is then below this, there may be an exact answer. It is searched for from this many other starts, unless
# this many have reached the same error, up to this fraction of it.
_NEAR, _OTHER_STARTS, _AGREE, _ALIKE = 0.3, 7, 3, 1e-4
# All of them together take at most as many steps as this number of full ones.
_DESCENTS = 4
# Up to this rank, a small tensor is also fitted from the fit with one component less, unless it has fewer for certain.
_NESTED = 8
# With more parameters, the part of the tensor in its leading singular vectors is fitted first.
_COARSE = 300
# Starts for a tensor of at most this many elements, unless there are fewer sweeps than this.
_STARTS, _SMALL, _FEW_SWEEPS = 3, 1 << 14, 10
# The same for rank one, whose sweeps cost little.
_STARTS_OF_ONE, _SMALL_OF_ONE = 5, 1 << 16
# An error of this many times epsilon is rounding. Starts whose errors differ by less than this found the same optimum.
_ROUNDING, _SAME = 64.0, 1e-7


def fit_cp(
    algebra: Algebra,
    tensor: Array | SparseTensor,
    rank: int,
    steps: Iteration,
    *,
    init: str | Sequence[Array] = "svd",
    fixed: Collection[int] = (),
    starts: int | None = None,
    ridge: float = 0.0,
) -> Fit:
    """Fit a sum of outer products to a tensor.

    Parameters
    ----------
    algebra : Algebra
        For matrices like the tensor; of a sparse one, in NumPy and double precision.
    tensor : array or SparseTensor, shape (d_1, …, d_M)
        Real or complex. A sparse one is not zero, and has at least two modes.
    rank : int
    steps : Iteration
    init : {"svd", "random"} or sequence of array
        Singular vectors with a little noise; random factors; or given ones.
    fixed : collection of int
        Modes whose given factors are kept.
    starts : int, optional
        Number of starts, the first by ``init`` and the others random, each followed to its end and the same whatever
        their number. By default 1, but for a small tensor and ``"svd"`` 3, of which the others are given up where they
        would not become the best; and 8 where an exact answer may be near.
    ridge : float
        Penalty of the squared elements of the M free factors, relative to the tensor's norm to the power of
        ``2 - 2 / M``.

    Returns
    -------
    Fit
        Arrays ``factor0``, …; of a matrix also ``weights``.
    """
    backend, shape = algebra.backend, tuple(int(size) for size in tensor.shape)
    if len(shape) == 2 and not fixed:
        return _of_matrix(algebra, tensor, rank, ridge)
    norm = tensor.norm if isinstance(tensor, SparseTensor) else norm_of(backend, tensor)
    if norm == 0.0:
        zeros = {f"factor{mode}": backend.zeros((size, rank), like=tensor) for mode, size in enumerate(shape)}
        kept = {f"factor{mode}": init[mode] for mode in fixed}
        return Fit(zeros | kept, True, 0, "zero", error=0.0)
    if len(shape) == 1:

        def column(vector: Array) -> dict[str, Array]:
            return {"factor0": backend.reshape(vector, (-1, 1)) * (1.0 / (1.0 + ridge))}

        return Fit(column(tensor), not ridge, 0, "shrunk" if ridge else "exact", closed=column)
    return _CPSearch(algebra, tensor, rank, norm, steps, init, fixed, ridge).fit(starts)


def _of_matrix(algebra: Algebra, matrix: Array | SparseTensor, rank: int, ridge: float) -> Fit:
    backend = algebra.backend

    def named(triplets: Triplets, shrinkage: Any) -> dict[str, Array]:
        weights, factor1 = triplets.s, backend.matrix_transpose(triplets.vh)
        if ridge:
            # The minimum with a penalty: Srebro, Rennie & Jaakkola, "Maximum-margin matrix factorization" (2005).
            weights = backend.where(weights > shrinkage, weights - shrinkage, weights * 0.0)
        return {"weights": weights, "factor0": triplets.u, "factor1": factor1}

    def closed(matrix: Array) -> dict[str, Array]:
        shrinkage = None
        if ridge:
            flat = backend.flatten(matrix)
            squares = flat * backend.conj(flat) if backend.is_complex(flat) else flat * flat
            shrinkage = backend.sqrt(backend.sum(squares, axis=0)) * ridge
        return named(algebra.truncated(matrix, rank), shrinkage)

    if isinstance(matrix, SparseTensor):
        triplets = Triplets(*matrix.matrix_triplets(rank, algebra.seed), False)
        return Fit(named(triplets, ridge * matrix.norm), False, 0, "SVD, shrunk" if ridge else "SVD")
    triplets = algebra.truncated(matrix, rank)
    method = "SVD" if triplets.exact is not False else "randomized SVD"
    if not ridge:
        return Fit(named(triplets, None), triplets.exact, 0, method, closed=closed)
    return Fit(named(triplets, ridge * norm_of(backend, matrix)), False, 0, f"{method}, shrunk", closed=closed)


class _CPSearch:
    """The search for the factors of one tensor and rank, with its random numbers."""

    def __init__(
        self,
        algebra: Algebra,
        tensor: Array | SparseTensor,
        rank: int,
        norm: float,
        steps: Iteration,
        init: str | Sequence[Array],
        fixed: Collection[int],
        ridge: float,
    ) -> None:
        self.backend, self.tensor, self.norm = algebra.backend, tensor, norm
        self.steps, self.limits, self.init, self.algebra = steps, steps.limits, init, algebra
        self.sweeps, self.ridge = _sweeps_of(self.backend, tensor, fixed), ridge
        # With this rank every tensor can be represented exactly; more components would only slow convergence.
        self.rank = min(rank, math.prod(self.sweeps.sizes) // max(self.sweeps.sizes))
        self.exact = _ROUNDING * self.sweeps.epsilon * norm

    def fit(self, starts: int | None) -> Fit:
        """Return the best of all starts."""
        steps, svd = self.steps, isinstance(self.init, str) and self.init == "svd"
        usual, largest = (_STARTS, _SMALL) if self.rank > 1 else (_STARTS_OF_ONE, _SMALL_OF_ONE)
        small = math.prod(self.sweeps.sizes) <= largest and self.limits.iterations > _FEW_SWEEPS
        tries, most = starts or (usual if svd and small else 1), _DESCENTS * self.limits.iterations
        best, number, agreeing, near, begun = None, 0, 0, False, len(steps.history)
        while number < tries and not (near and (agreeing >= _AGREE or len(steps.history) - begun >= most)):
            rival = math.inf if starts or near or best is None else best.error
            run = self._followed(self._start(number), number, rival, near)
            alike = best is not None and abs(run.error - best.error) <= _ALIKE * best.error
            agreeing = agreeing + 1 if alike else 1 if best is None or run.error < best.error else agreeing
            if best is None or run.error < best.error * (1.0 - _SAME):
                best = run
            if best.error <= self.exact or run.stopped == "callback":
                break
            number += 1
            if (
                not starts
                and run.together
                and number == 1
                and best.error <= _NEAR * self.norm
                and not self.sweeps.fixed
            ):
                tries, near = 1 + _OTHER_STARTS, True
        assert best is not None
        if svd and small and not starts and not self.ridge and steps.stopped != "callback":
            best = self._no_worse_than_fewer(best)
        if steps.stopped == "callback":
            best.stopped = "callback"
        arrays = {f"factor{mode}": factor for mode, factor in enumerate(best.factors)}
        error = (self.sweeps.residual(best.factors) if self.ridge else best.error) / self.norm
        if not best.error <= self.exact and best.stopped != "callback":
            hosts = [double_on_host(self.backend, factor) for factor in best.factors]
            best.stopped = "degenerate" if cancels(hosts, self.norm) else best.stopped
        method = "ALS, Levenberg-Marquardt" if best.together else "ALS"
        return steps.fit(arrays, method, error)._replace(stopped=best.stopped)

    def _no_worse_than_fewer(self, best: _Run) -> _Run:
        """Return a run whose error is no larger than that of the fit with one component less."""
        if not 1 < self.rank <= _NESTED or best.error <= self.exact or self._beats(best.error, self.rank - 1):
            return best
        search = _CPSearch(self.algebra, self.tensor, self.rank - 1, self.norm, self.steps, "svd", (), 0.0)
        fewer = search.fit(None)
        if self.steps.stopped == "callback" or not fewer.error * self.norm < best.error:
            return best
        factors = list(fewer.arrays.values())
        left = self.backend.reshape(self.sweeps.difference(factors), self.sweeps.sizes)
        component = _split(self.algebra, left)
        extended = [self.backend.concat(list(pair), axis=1) for pair in zip(factors, component, strict=True)]
        run = self._followed(extended, 0, math.inf, False)
        return min(best, run, key=lambda run: run.error)

    def _beats(self, error: float, rank: int) -> bool:
        """Return whether no tensor of a rank is nearer than this, by the singular values of an unfolding."""
        host, wanted = double_on_host(self.backend, self.tensor) / self.norm, (error / self.norm) ** 2
        for mode, size in enumerate(host.shape):
            matrix = np.moveaxis(host, mode, 0).reshape(size, -1)
            matrix = matrix if size <= matrix.shape[1] else matrix.T
            values = np.linalg.eigvalsh(matrix @ matrix.conj().T)[: max(len(matrix) - rank, 0)]
            if values.sum() - _ROUNDING * size * np.finfo(np.float64).eps >= wanted:
                return True
        return False

    def _followed(self, factors: Sequence[Array], number: int, rival: float, quick: bool) -> _Run:
        """Follow a start: sweeps, and all factors at once where these crawl; unless it will not get below a rival."""
        steps, most = self.steps, self.limits.iterations
        run = _Run(self.sweeps, factors, self.norm, steps, rival)
        if self.ridge:
            # Sweeps without the penalty bring it near a minimum with it.
            before = _Run(self.sweeps, factors, self.norm, Iteration(self.limits._replace(iterations=most)))
            before.advance(min(_SWEEPS, most))
            run.factors = before.factors
            self._together(run, number)
            return run
        for sweeps, least in ((_SWEEPS, -math.inf),) if quick else _CRAWLS:
            run.advance(min(sweeps, most))
            if steps.stopped or (sweeps < most and run.crawls(least)):
                break
        while math.isfinite(rival) and not steps.stopped and run.error >= rival and run.reaches(rival, most):
            run.advance(len(run.errors) + _SWEEPS)
        if steps.stopped in ("", "stalled", "singular") and (rival == math.inf or run.error < rival):
            if math.isfinite(run.error) and any(self.descents):
                self._together(run, number)
            else:
                run.advance(most)
        run.stopped = steps.stopped
        return run

    def _descent(self, coarse: bool) -> CPDescent:
        fixed = self.sweeps.fixed
        return CPDescent(self.algebra, self.tensor, self.rank, self.norm, fixed, self.ridge, coarse)

    @functools.cached_property
    def descents(self) -> tuple[tuple[CPDescent, int] | None, tuple[CPDescent, int] | None]:
        """The descents with all factors, of the part in the leading singular vectors and of all, and their most steps;
        None if a descent is not worth while.
        """
        most = self.limits.iterations
        # Sweeps of one component cost a fraction of a step with all factors, and get as far.
        if (most <= _CRAWLS[-1][0] or self.rank == 1) and not self.ridge:
            return None, None
        # As much work as all sweeps, or as is done in seconds.
        work = max(_WORK, 4 * self.rank * self.sweeps.cost * most)
        fine, coarse = self._descent(coarse=False), None
        large = fine.count > _COARSE and max(fine.sweeps.sizes) > 2 * self.rank
        if large and not self.ridge and self.sweeps.core_cost(self.rank) <= work:
            coarse = self._descent(coarse=True)
        counted = [
            (descent, work // descent.cost) if descent and descent.cost * _FEW_SWEEPS <= work else None
            for descent in (coarse, fine)
        ]
        return counted[0], (fine, most) if self.ridge else counted[1]

    def _together(self, run: _Run, number: int) -> None:
        """Move all factors of a run at once; every second start with a penalty that falls with the error."""
        steps, run.together, annealed = self.steps, True, bool(number % 2)
        coarse, fine = self.descents
        if coarse is not None:
            # Not watched: the errors of the part are not exactly those of the tensor.
            factors, _ = coarse[0].run(run.factors, Iteration(self.limits), coarse[1], annealed)
            if (error := self.sweeps.residual(factors)) < run.error:
                run.factors, run.error = factors, error
            # From near the optimum, sweeps may converge.
            steps.begin(run.error / self.norm)
            run.advance(len(run.errors) + (2 * _SWEEPS if fine else self.limits.iterations))
        if fine is not None and (coarse is None or steps.stopped in ("", "stalled", "singular")):
            factors, error = fine[0].run(run.factors, steps, fine[1], annealed and coarse is None)
            if error * self.norm < run.error:
                run.factors, run.error = factors, error * self.norm
        run.stopped = steps.stopped

    @functools.cached_property
    def _of_rank_one(self) -> list[list[Array]]:
        return sorted(rank_one_starts(self.algebra, self.tensor), key=self.sweeps.residual)

    def _start(self, number: int) -> list[Array]:
        """Return the factors of a start, where the first start is by ``init`` and the others are random."""
        backend, sizes, rank = self.backend, self.sweeps.sizes, self.rank
        dense = not isinstance(self.tensor, SparseTensor)
        if self.init == "svd" and rank == 1 and dense and not self.algebra.plain and number < len(self._of_rank_one):
            return self._of_rank_one[number]
        # A start depends on the seed and its number alone.
        rng = np.random.default_rng([self.algebra.seed, number]) if number else self.algebra.rng
        if not isinstance(self.init, str):
            return [
                factor if not number or mode in self.sweeps.fixed else self._random(rng, "normal", sizes[mode], rank)
                for mode, factor in enumerate(self.init)
            ]
        if number or self.init == "random":
            return [self._random(rng, "normal", size, rank) for size in sizes]
        factors = []
        for mode, size in enumerate(sizes):
            columns = self.sweeps.leading(self.algebra, mode, rank)
            if (missing := rank - int(columns.shape[1])) > 0:
                columns = backend.concat([columns, self._random(rng, "uniform", size, missing)], axis=1)
            factors.append(columns + self._random(rng, "normal", size, rank) * (MOVED / math.sqrt(size)))
        return factors

    def _random(self, rng: np.random.RandomState | np.random.Generator, kind: str, size: int, columns: int) -> Array:
        numbers = getattr(rng, kind)(size=(size, columns))
        if self.sweeps.complex:
            numbers = numbers + 1j * getattr(rng, kind)(size=(size, columns))
        return self.algebra.array(numbers)


# Components cancel if the sum of their norms is this many times that of the tensor, and two have a cosine below this.
_WEIGHTS, _COSINE = 100.0, -0.95


def cancels(factors: Sequence[np.ndarray], norm: float) -> bool:
    """Return whether components have grown and cancel, as where no best approximation exists (degeneracy).

    Krijnen, Dijkstra & Stegeman, "On the non-existence of optimal solutions and the occurrence of degeneracy in the
    CANDECOMP/PARAFAC model" (Psychometrika 73, 2008).
    """
    gram = np.asarray(hadamard_tensor([factor.conj().T @ factor for factor in factors]))
    sizes = np.sqrt(np.abs(gram.diagonal()))
    large = sizes > norm
    if not sizes.sum() > _WEIGHTS * norm or not large.any():
        return False
    cosines = gram[np.ix_(large, large)].real / np.outer(sizes[large], sizes[large])
    return bool(cosines.min() < _COSINE)


# -- Alternating least squares -----------------------------------------------------------------------------------------


# Sweeps before the first extrapolation, and from one to the next.
_BEFORE, _BETWEEN = 10, 5
# Sweeps from one look at the gradient to the next.
_AHEAD = 3
# A squared error below this many epsilons of the squared norm is not computed as a difference.
_CANCELS = 1e4


class CPSweeps:
    """Sweeps of alternating least squares over the factors of a tensor.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
        Real or complex, with at least two modes.
    fixed : collection of int
        Modes whose factors are not changed.

    Attributes
    ----------
    cost : int
        Multiply-adds of the products with one component.
    """

    def __init__(self, backend: Backend, tensor: Array, fixed: Collection[int] = ()) -> None:
        self.backend, self.fixed = backend, frozenset(fixed)
        self.sizes = [int(size) for size in tensor.shape]
        cut = _cut(self.sizes)
        self.halves = [list(range(cut)), list(range(cut, len(self.sizes)))]
        self.epsilon = float(np.finfo(backend.dtype_name(tensor)).eps)
        self.complex = backend.is_complex(tensor)
        self.matrix = backend.reshape(tensor, (math.prod(self.sizes[:cut]), math.prod(self.sizes[cut:])))
        self.cost = math.prod(self.sizes)

    def core_cost(self, rank: int) -> float:
        """Return the multiply-adds of a projection to as many leading singular vectors of each mode as components."""
        return rank * self.cost

    def leading(self, algebra: Algebra, mode: int, rank: int) -> Array:
        """Return leading left singular vectors of an unfolding, as many as there are up to a rank."""
        return algebra.left(unfolded(self.backend, self.backend.reshape(self.matrix, self.sizes), mode), rank)[0]

    def sweep(self, factors: Sequence[Array], ridge: float = 0.0) -> list[Array]:
        """Return the factors after each was replaced by the best one with the others fixed.

        Parameters
        ----------
        factors : sequence of array, shape (d_m, r)
        ridge : float
            Added to the diagonal of the equations.

        Raises
        ------
        Exception
            Of the library, if the equations are singular.
        """
        backend, factors = self.backend, list(factors)
        grams = [self._gram(factor) for factor in factors]
        for half, other in (self.halves, self.halves[::-1]):
            if all(mode in self.fixed for mode in half):
                continue
            partial = self._partial = self._half_contracted(self.matrix, factors, half, other)
            for mode in half:
                if mode in self.fixed:
                    continue
                right = self._contracted(partial, factors, half, mode)
                system = hadamard_tensor([gram for m, gram in enumerate(grams) if m != mode])
                factors[mode] = self._solved(system, right, ridge)
                grams[mode] = self._gram(factors[mode])
                self._last = right, factors[mode]
        self._square = backend.to_numpy(hadamard_tensor(grams))
        return factors

    def distance(self, factors: Sequence[Array], norm: float) -> float:
        """Return the distance of the tensor from the factors that the last sweep returned.

        Parameters
        ----------
        factors : sequence of array
        norm : float
            That of the tensor.

        Notes
        -----
        From the products of the sweep, unless these would cancel: then from the residual.
        """
        right, factor = self._last
        inner = np.sum(self.backend.to_numpy(right * self._conj(factor)).real, dtype=np.float64)
        square = float(norm * norm - 2.0 * inner + np.sum(self._square.real, dtype=np.float64))
        if square > _CANCELS * self.epsilon * norm * norm:
            return math.sqrt(square)
        return self.residual(factors)

    def residual(self, factors: Sequence[Array]) -> float:
        """Return the distance of the tensor from any factors, by forming their tensor."""
        return norm_of(self.backend, self.difference(factors))

    def difference(self, factors: Sequence[Array]) -> Array:
        """Return the tensor less that of any factors, as the matrix of the two halves."""
        backend = self.backend
        rows, cols = (khatri_rao(backend, [factors[mode] for mode in half]) for half in self.halves)
        return self.matrix - backend.matmul(rows, backend.matrix_transpose(cols))

    def measured(self, factors: Sequence[Array]) -> tuple[float, Any]:
        """Return the distance of the tensor from any factors, and what :meth:`gradients` takes."""
        left = -self.difference(factors)
        return norm_of(self.backend, left), left

    def gradients(self, left: Any, factors: Sequence[Array]) -> dict[int, Array]:
        """Return the gradient of half the squared distance by each free factor, conjugated."""
        return self.products(left, factors)

    def products(self, matrix: Array, factors: Sequence[Array], last: Array | None = None) -> dict[int, Array]:
        """Return a tensor, as the matrix of the halves, times all factors but one, conjugated, for each free mode.

        ``last`` is its product with the factors of the first half, if that is known.
        """
        products = {}
        for half, other, known in (
            (self.halves[0], self.halves[1], None),
            (self.halves[1], self.halves[0], last),
        ):
            if free := [mode for mode in half if mode not in self.fixed]:
                partial = self._half_contracted(matrix, factors, half, other) if known is None else known
                products.update({mode: self._contracted(partial, factors, half, mode) for mode in free})
        return products

    def slope(self, factors: Sequence[Array], error: float, swept: bool = False) -> float:
        """Return the relative gradient at factors, perhaps those of the last sweep: see :func:`relative_slope`."""
        return relative_slope(*self._slopes(factors, self._partial if swept and not self.fixed else None), error)

    def _slopes(
        self, factors: Sequence[Array], last: Array | None = None
    ) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Return the gradients as differences of products, and the squared norms of the derivatives by columns."""
        grams, gradients, columns = [self._gram(factor) for factor in factors], {}, {}
        for mode, product in self.products(self.matrix, factors, last).items():
            system = hadamard_tensor([gram for m, gram in enumerate(grams) if m != mode])
            gradients[mode] = self.backend.to_numpy(self.backend.matmul(factors[mode], system) - product)
            columns[mode] = self.backend.to_numpy(system).diagonal().real
        return gradients, columns

    def largest(self) -> float:
        """Return the largest norm of a component that the last sweep returned; infinity if one is not finite."""
        squares = np.abs(self._square.diagonal())
        return math.sqrt(float(squares.max())) if np.isfinite(squares).all() else math.inf

    def _conj(self, x: Array) -> Array:
        return self.backend.conj(x) if self.complex else x

    def _half_contracted(self, matrix: Array, factors: Sequence[Array], half: list[int], other: list[int]) -> Array:
        """Contract the modes of the other half with its factors, conjugated: one column for each component."""
        cols = self._conj(khatri_rao(self.backend, [factors[mode] for mode in other]))
        matrix = matrix if half[0] == 0 else self.backend.matrix_transpose(matrix)
        return self.backend.matmul(matrix, cols)

    def _gram(self, factor: Array) -> Array:
        """Return ``factorᵀ conj(factor)``."""
        return self.backend.matmul(self.backend.matrix_transpose(factor), self._conj(factor))

    def _contracted(self, partial: Array, factors: Sequence[Array], own: list[int], mode: int) -> Array:
        """Contract a half's product with the other factors of that half: shape (d_mode, r)."""
        if len(own) == 1:
            return partial
        backend, rank = self.backend, int(factors[0].shape[1])
        place = own.index(mode)
        before, after = own[:place], own[place + 1 :]
        left = math.prod(self.sizes[m] for m in before)
        right = math.prod(self.sizes[m] for m in after)
        product = backend.reshape(partial, (left, self.sizes[mode], right, rank))
        if after:
            weights = self._conj(khatri_rao(backend, [factors[m] for m in after]))
            product = backend.sum(product * backend.reshape(weights, (1, 1, right, rank)), axis=2)
        product = backend.reshape(product, (left, self.sizes[mode], rank))
        if before:
            weights = self._conj(khatri_rao(backend, [factors[m] for m in before]))
            product = backend.sum(product * backend.reshape(weights, (left, 1, rank)), axis=0)
        return backend.reshape(product, (self.sizes[mode], rank))

    def _solved(self, system: Array, right: Array, ridge: float) -> Array:
        """Solve ``x @ system = right``."""
        backend = self.backend
        if ridge:
            eye = backend.asarray(np.eye(int(system.shape[0])), backend.dtype_name(system), backend.device(system))
            system = system + ridge * eye
        transposed = backend.matrix_transpose
        return transposed(backend.solve(transposed(system), transposed(right)))


def _cut(sizes: Sequence[int]) -> int:
    """Return the mode that begins the second half if the halves together are to have the fewest elements."""
    return min(range(1, len(sizes)), key=lambda m: math.prod(sizes[:m]) + math.prod(sizes[m:]))


class SparseSweeps(CPSweeps):
    """Sweeps over the factors of a sparse tensor, in NumPy and double precision, from its products with one mode left
    out; gradients are differences of products.
    """

    def __init__(self, tensor: SparseTensor, fixed: Collection[int] = ()) -> None:
        self.backend, self.fixed, self.matrix = load_backend("numpy"), frozenset(fixed), tensor
        self.sizes, order = list(tensor.shape), len(tensor.shape)
        # One half has all modes.
        self.halves = [list(range(order)), []]
        self.epsilon, self.complex = float(np.finfo(np.float64).eps), tensor.values.dtype.kind == "c"
        # Sums of scattered numbers take several times as long as those of a matrix product.
        self.cost = 4 * order * order * len(tensor.values)

    def core_cost(self, rank: int) -> float:
        return math.inf if self.fixed else self.cost * rank ** (len(self.sizes) - 1)

    def leading(self, algebra: Algebra, mode: int, rank: int) -> Array:
        return self.matrix.left(mode, min(rank, self.sizes[mode]), algebra.seed)

    def residual(self, factors: Sequence[Array]) -> float:
        def entries(places: np.ndarray) -> np.ndarray:
            rows = (factor[places[:, mode]] for mode, factor in enumerate(factors))
            return np.asarray(functools.reduce(np.multiply, rows).sum(axis=1))

        square = float(np.sum(hadamard_tensor([self._gram(factor) for factor in factors])).real)
        return float(self.matrix.distance(entries, math.sqrt(max(square, 0.0)), lambda: cp_to_tensor((None, factors))))

    def measured(self, factors: Sequence[Array]) -> tuple[float, Any]:
        return self.residual(factors), None

    def gradients(self, left: Any, factors: Sequence[Array]) -> dict[int, Array]:
        return self._slopes(factors)[0]

    def _half_contracted(self, matrix: Array, factors: Sequence[Array], half: list[int], other: list[int]) -> Array:
        return None

    def _contracted(self, partial: Array, factors: Sequence[Array], own: list[int], mode: int) -> Array:
        return self.matrix.product([self._conj(factor) for factor in factors], mode)


def _sweeps_of(backend: Backend, tensor: Array | SparseTensor, fixed: Collection[int]) -> CPSweeps:
    return SparseSweeps(tensor, fixed) if isinstance(tensor, SparseTensor) else CPSweeps(backend, tensor, fixed)


class _Run:
    """Sweeps from one start; the best factors so far, and their distance from the tensor.

    From time to time, a longer step in the direction of the last sweep is tried, and kept if it reduces the error
    (Harshman's line search, as in Andersson & Bro's N-way toolbox). Components that become collinear make the equations
    singular, or diverge with opposite signs (degeneracy). Then a small ridge is added to the equations, and the
    iteration continues from the best factors.
    """

    def __init__(
        self, sweeps: CPSweeps, start: Sequence[Array], norm: float, steps: Iteration, rival: float = math.inf
    ) -> None:
        self.sweeps, self.norm, self.steps, self.rival = sweeps, norm, steps, rival
        self.factors, self.error, self.errors = list(start), math.inf, list[float]()
        self.ridges = [0.0, 100.0 * sweeps.epsilon, sweeps.epsilon**0.5]
        self.stopped, self.together, self._look = "", False, 0
        steps.begin()

    def advance(self, most: int) -> None:
        """Run sweeps, up to a number of all, or until the iteration stops."""
        sweeps, steps, norm = self.sweeps, self.steps, self.norm
        while len(self.errors) < most and not steps.stopped:
            factors = self._swept()
            error = math.inf if factors is None else sweeps.distance(factors, norm)
            if factors is None or not error < self.error * (1.0 + 1e-12):
                if factors is not None and math.isfinite(self.error):
                    if not steps.note(self.error / norm):  # no better up to rounding
                        flat = steps.limits.flat(sweeps.slope(self.factors, self.error), sweeps.epsilon)
                        exact = self.error <= _ROUNDING * sweeps.epsilon * norm
                        steps.stopped = "converged" if flat or exact else "stalled"
                elif len(self.ridges) > 1:
                    self.ridges.pop(0)
                else:
                    steps.stopped = "singular"
                continue
            previous, self.factors, self.error = self.factors, factors, min(error, self.error)
            self.errors.append(self.error)
            if steps.step(self.error / norm, self._ends):
                return
            if not sweeps.fixed and len(self.errors) >= _BEFORE and len(self.errors) % _BETWEEN == 0:
                longer = [
                    new + (new - old) * math.sqrt(len(self.errors))
                    for new, old in zip(self.factors, previous, strict=True)
                ]
                if (error := sweeps.residual(longer)) < self.error:
                    self.factors, self.error = longer, error

    def _ends(self) -> bool:
        """Return whether the gradient is small, which is looked at a few sweeps apart, or another start is no worse."""
        if self.error >= self.rival * (1.0 - _ALIKE):
            return True
        sweeps, limits = self.sweeps, self.steps.limits
        gained = self.errors[-2] - self.error if len(self.errors) > 1 else math.inf
        # The first factor of a sweep gains at least what moving one of its columns does.
        if not limits.flat(math.sqrt(max(gained, 0.0) / self.error), sweeps.epsilon) or self._look > len(self.errors):
            return False
        self._look = len(self.errors) + _AHEAD
        return limits.flat(sweeps.slope(self.factors, self.error, swept=True), sweeps.epsilon)

    def crawls(self, least: float) -> bool:
        """Return whether the last sweeps reduced the error by more than this, but not to a small fraction."""
        before = self.errors[-_SWEEPS - 1] / self.norm if len(self.errors) > _SWEEPS else math.inf
        return before - self.error / self.norm > least and self.error > _FAST * before * self.norm

    def reaches(self, least: float, most: int) -> bool:
        """Return whether the error would fall below another one in the sweeps that are left, as fast as in the last."""
        gain = (self.errors[-_SWEEPS - 1] - self.error) / _SWEEPS
        return self.error - gain * (most - len(self.errors)) < least

    def _swept(self) -> list[Array] | None:
        """Return the factors after a sweep, or None if the equations are singular or the factors diverge."""
        ridge = self.ridges[0] * self.norm ** (2.0 / len(self.factors)) if self.ridges[0] else 0.0
        with np.errstate(all="ignore"):
            try:
                factors = self.sweeps.sweep(self.factors, ridge)
            except (np.linalg.LinAlgError, RuntimeError):  # torch raises a RuntimeError
                return None
            return factors if self.sweeps.largest() <= self.norm * self.sweeps.epsilon**-0.5 else None


# -- Levenberg-Marquardt on all factors at once ------------------------------------------------------------------------

# Tomasi & Bro, "A comparison of algorithms for fitting the PARAFAC model" (Comput. Stat. Data Anal. 50, 2006); Phan,
# Tichavský & Cichocki, "Low complexity damped Gauss-Newton algorithms for CANDECOMP/PARAFAC" (SIAM J. Matrix Anal.
# Appl. 34, 2013); Sorber, Van Barel & De Lathauwer (SIAM J. Optim. 23, 2013). With Γ_m the elementwise product of the
# Gram matrices ``Aᴴ A`` of all factors but those of the modes m, the normal equations need no Jacobian:
#
#     (Jᴴ J)[(m, i, r), (m, j, s)] = δ_ij Γ_m[r, s]
#     (Jᴴ J)[(m, i, r), (n, j, s)] = A_m[i, s] conj(A_n[j, r]) Γ_mn[r, s]
#
# A step gets a second-order correction along itself, from the same equations: in narrow curved valleys, as of collinear
# components, it saves nine steps of ten (Transtrum & Sethna, "Improvements to the Levenberg-Marquardt algorithm for
# nonlinear least-squares minimization", arXiv:1201.5885, 2012).


# Tensors of up to this many elements are moved to the host, in double precision, and compressed to their multilinear
# ranks. A core of this norm, relative to the tensor and in epsilons, is rounding.
_ON_HOST, _DROPPED = 1 << 20, 4.0
# The equations are formed for up to this many parameters; beyond, they are solved by conjugate gradients, up to this
# many steps and this residual.
_FORMED, _CONJUGATE, _SOLVED = 2000, 100, 1e-6
# Multiply-adds of the descent from one start; the calls of a step, and of one of conjugate gradients, count as many.
_WORK, _STEP, _CONJUGATES = 1 << 34, 1 << 22, 1 << 21
# Damping relative to the mean diagonal: the first and its limits, and by what a step reduces it at most.
_FIRST, _LEAST, _MOST, _DOWN = 1e-2, 1e-15, 1e10, 0.1
# Steps go on until the gradient is this much smaller than converged.
_STRICTER = 10.0
# The correction may be this long, relative to its step.
_CURVED = 0.75
# An annealed descent has a ridge of this part of the relative error for up to this many steps, until the error is below
# this or changes by less than this fraction of itself.
_ANNEALED, _ANNEALS, _COLD, _STILL = 1e-2, 100, 1e-3, 1e-4


def relative_slope(gradients: Mapping[int, np.ndarray], columns: Mapping[int, np.ndarray], error: float) -> float:
    """Return the largest part of the error that moving one column of a factor could remove, to first order.

    Parameters
    ----------
    gradients : mapping of int to ndarray, shape (d_m, r)
        Of half the squared error.
    columns : mapping of int to ndarray, shape (r,)
        Squared norms of the derivatives by an element of each column.
    error : float
        The distance from the tensor.

    Returns
    -------
    float
        From 0 to 1: the largest cosine of the residual with its derivative by a column. It depends on no scale.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = [
            np.sqrt(np.sum(np.abs(gradient) ** 2, axis=0) / columns[mode]) for mode, gradient in gradients.items()
        ]
    # fmax leaves out NaN: columns without a derivative.
    return float(np.fmax.reduce(np.ravel(cosines), initial=0.0)) / error if error > 0.0 else 0.0


class CPDescent:
    """Levenberg-Marquardt on the free factors of a tensor.

    Parameters
    ----------
    algebra : Algebra
    tensor : array or SparseTensor, shape (d_1, …, d_M)
    rank : int
    norm : float
        The tensor's.
    fixed : collection of int
        Modes whose factors are kept.
    ridge : float
        As in :func:`fit_cp`.
    coarse : bool
        Whether to fit the tensor's part in the subspace of the leading singular vectors of the free modes, as many as
        components. A sparse tensor then has no fixed modes.

    Attributes
    ----------
    count : int
        Number of parameters.
    cost : int
        Multiply-adds of a step.
    """

    def __init__(
        self,
        algebra: Algebra,
        tensor: Array | SparseTensor,
        rank: int,
        norm: float,
        fixed: Collection[int],
        ridge: float,
        coarse: bool = False,
    ) -> None:
        backend, self.algebra, self.ridge = algebra.backend, algebra, ridge
        self.free = [mode for mode in range(len(tensor.shape)) if mode not in fixed]
        # Relative to the tensor, nothing over- or underflows.
        self.scale, self.epsilon, self.lost = norm ** (1.0 / len(self.free)), algebra.eps, 0.0
        self.bases = dict[int, np.ndarray]()
        self.put: Callable[[np.ndarray], Array] = algebra.array
        tensor = tensor * (1.0 / norm)
        sparse = isinstance(tensor, SparseTensor)
        host = not sparse and math.prod(tensor.shape) <= _ON_HOST
        if coarse and sparse:
            self.bases = {mode: tensor.left(mode, min(rank, tensor.shape[mode]), algebra.seed) for mode in self.free}
            tensor = tensor.projected(self.bases)
        elif coarse:
            for mode in self.free:
                basis, _ = algebra.left(unfolded(backend, tensor, mode), rank)
                self.bases[mode] = double_on_host(backend, basis)
                adjoint = backend.matrix_transpose(backend.conj(basis) if backend.is_complex(basis) else basis)
                tensor = mode_product(backend, tensor, adjoint, mode)
        if coarse:
            self.lost = max(0.0, 1.0 - norm_of(backend, tensor) ** 2)
        if coarse or host:
            tensor, backend, self.put = double_on_host(backend, tensor), load_backend("numpy"), _as_it_is
            for mode in self.free if not coarse else ():
                basis, tail = _span(unfolded(backend, tensor, mode), self.epsilon)
                if basis is not None:
                    self.bases[mode], tensor = basis, mode_product(backend, tensor, basis.conj().T, mode)
                    self.lost += tail**2
        self.sweeps = _sweeps_of(backend, tensor, fixed)
        self.count = rank * sum(self.sweeps.sizes[mode] for mode in self.free)
        conjugates = 2 * _CONJUGATE * max(_CONJUGATES, 3 * rank * self.count)
        equations = self.count**3 // 3 if self.count <= _FORMED else conjugates
        self.cost = equations + 8 * rank * self.sweeps.cost + _STEP

    def run(
        self, factors: Sequence[Array], steps: Iteration, most: int, annealed: bool = False
    ) -> tuple[list[Array], float]:
        """Descend from factors until the iteration stops.

        Parameters
        ----------
        factors : sequence of array, shape (d_m, r)
        steps : Iteration
        most : int
            The most steps, if the iteration has no lower limit.
        annealed : bool
            Whether to begin with a ridge that falls with the error: components then stay small until they fit, where
            others diverge.

        Returns
        -------
        factors : list of array
        error : float
            The root of the squared relative error and the penalty. Except for an annealed descent, it is never above
            that of the start.
        """
        with np.errstate(all="ignore"):
            x, error = self._descended(self._begun(factors), steps, most, annealed)
        ends = []
        for mode, factor in enumerate(x):
            if mode in self.bases:
                factor = self.bases[mode] @ factor
            ends.append(self.algebra.array(factor * self.scale) if mode in self.free else factors[mode])
        return ends, error

    def _begun(self, factors: Sequence[Array]) -> list[np.ndarray]:
        x = [double_on_host(self.algebra.backend, factor) for factor in factors]
        for mode in self.free:
            x[mode] = (self.bases[mode].conj().T @ x[mode] if mode in self.bases else x[mode]) / self.scale
        return self._balanced(x)

    def _balanced(self, x: list[np.ndarray]) -> list[np.ndarray]:
        """Give the free columns of each component equal norms: damping treats all alike."""
        norms = {mode: np.linalg.norm(x[mode], axis=0) for mode in self.free}
        mean = np.prod([*norms.values()], axis=0) ** (1.0 / len(self.free))
        return [
            factor * (mean / np.where(norms[mode] > 0.0, norms[mode], 1.0)) if mode in norms else factor
            for mode, factor in enumerate(x)
        ]

    def _descended(
        self, x: list[np.ndarray], steps: Iteration, most: int, annealed: bool
    ) -> tuple[list[np.ndarray], float]:
        (square, left), damping, taken, before = self._measured(x), _FIRST, 0, math.inf
        least = (_ROUNDING / 4.0 * self.epsilon) ** 2
        steps.begin(math.sqrt(square + self._penalty(x, self.ridge)))
        while True:
            error = math.sqrt(square)
            annealed = annealed and taken < _ANNEALS and error > _COLD and abs(before - error) > _STILL * error
            before, ridge = error, self.ridge + (_ANNEALED * error if annealed else 0.0)
            total = square + self._penalty(x, ridge)
            equations = _Equations(self.free, x, self._pulled(left, x), ridge, _FORMED)
            known = square + self._penalty(x, self.ridge)
            if taken:
                slope = math.inf if annealed else equations.slope(math.sqrt(total))
                steps.step(math.sqrt(known), functools.partial(steps.limits.flat, _STRICTER * slope, self.epsilon))
            if not steps.stopped and known <= least:
                steps.stopped = "converged"
            elif not steps.stopped and equations.largest > self.epsilon**-0.5:
                steps.stopped = "degenerate"
            elif not steps.stopped and taken >= most:
                steps.stopped = "max_iterations"
            growth = 2.0
            while not steps.stopped:
                step, gain = equations.step(damping)
                moved = [factor + step.get(mode, 0.0) for mode, factor in enumerate(x)]
                after, now = self._measured(moved)
                if (lost := total - after - self._penalty(moved, ridge)) > 0.0:
                    damping *= max(_DOWN, 1.0 - (2.0 * lost / gain - 1.0) ** 3) if gain > 0.0 else 1.0
                    damping = max(damping, _LEAST)
                    x, left, square, taken = self._balanced(moved), now, after, taken + 1
                    break
                damping, growth = max(damping, _LEAST) * growth, 2.0 * growth
                if damping > _MOST:
                    flat = steps.limits.flat(equations.slope(math.sqrt(total)), self.epsilon)
                    steps.stopped = "converged" if flat or known <= 16.0 * least else "stalled"
            if steps.stopped:
                return x, math.sqrt(known)

    def _put(self, x: Sequence[np.ndarray]) -> list[Array]:
        return [self.put(factor) for factor in x]

    def _measured(self, x: Sequence[np.ndarray]) -> tuple[float, Any]:
        """Return the squared distance from the factors, and what their gradient takes."""
        distance, left = self.sweeps.measured(self._put(x))
        return distance * distance + self.lost if math.isfinite(distance) else math.inf, left

    def _penalty(self, x: Sequence[np.ndarray], ridge: float) -> float:
        return ridge * sum(float(np.linalg.norm(x[mode])) ** 2 for mode in self.free) if ridge else 0.0

    def _pulled(self, left: Any, x: Sequence[np.ndarray]) -> dict[int, np.ndarray]:
        """Return the gradient of half the squared distance by each free factor, conjugated."""
        gradients = self.sweeps.gradients(left, self._put(x))
        return {mode: double_on_host(self.sweeps.backend, gradient) for mode, gradient in gradients.items()}


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _span(matrix: np.ndarray, epsilon: float) -> tuple[np.ndarray | None, float]:
    """Return an orthonormal basis of the columns up to rounding, None if it is no smaller; and the norm of the rest."""
    rows = matrix.shape[0]
    triangle = np.asarray(np.linalg.qr(matrix.T, mode="r")).T if matrix.shape[1] >= rows else matrix
    u, s, _ = np.linalg.svd(triangle, full_matrices=False)
    tails = np.append(np.sqrt(np.cumsum(s[::-1] ** 2)[::-1]), 0.0)
    rank = max(1, int(np.sum(tails > _DROPPED * epsilon * tails[0])))
    return (u[:, :rank], float(tails[rank])) if rank < rows else (None, 0.0)


class _Equations:
    """The damped normal equations of all free factors, from small matrices."""

    def __init__(
        self,
        free: Sequence[int],
        x: Sequence[np.ndarray],
        gradient: Mapping[int, np.ndarray],
        ridge: float,
        formed: int,
    ) -> None:
        self.free, self.x, self.ridge = free, x, ridge
        self.shapes = {mode: x[mode].shape for mode in free}
        self.grams = [factor.conj().T @ factor for factor in x]
        self.alone = {mode: self._others(mode) for mode in free}
        self.gradient = {mode: gradient[mode] + ridge * x[mode] if ridge else gradient[mode] for mode in free}
        self.count = sum(math.prod(shape) for shape in self.shapes.values())
        total = sum(len(x[mode]) * float(np.trace(gram).real) for mode, gram in self.alone.items())
        self.size = max(total / self.count, 1e-300)
        self.formed = self._matrix() if self.count <= formed else None

    def _others(self, *modes: int) -> np.ndarray:
        """Return the elementwise product of the Gram matrices of all factors but some."""
        rank = self.x[0].shape[1]
        start = np.ones((rank, rank))
        return math.prod((gram for m, gram in enumerate(self.grams) if m not in modes), start=start)

    @property
    def largest(self) -> float:
        """The largest norm of a component."""
        return math.sqrt(float(np.abs(self._others().diagonal()).max()))

    def slope(self, error: float) -> float:
        """Return the relative gradient."""
        columns = {mode: gram.diagonal().real + self.ridge for mode, gram in self.alone.items()}
        return relative_slope(self.gradient, columns, error)

    def step(self, damping: float) -> tuple[dict[int, np.ndarray], float]:
        """Return a step with its correction, and by how much it reduces the linearized squared error."""
        shift = damping * self.size
        try:
            solve = self._solver(shift + self.ridge)
        except np.linalg.LinAlgError:  # not positive definite up to rounding
            return {mode: np.full(shape, np.nan) for mode, shape in self.shapes.items()}, 0.0
        step = {mode: -change for mode, change in solve(self.gradient).items()}
        gain = shift * _inner(step, step) - _inner(step, self.gradient)
        correction = solve(self.curvature(step))
        if _inner(correction, correction) <= (0.5 * _CURVED) ** 2 * _inner(step, step):
            step = {mode: change - correction[mode] for mode, change in step.items()}
        return step, gain

    def curvature(self, step: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return half the second derivative of the tensor along a step, pulled back like a gradient."""
        # The Gram matrix with the factor, which moves along the step, is a polynomial of the step's length.
        overlaps, start = self._overlaps(step), np.zeros(self.grams[0].shape)
        pulled = {}
        for mode in self.free:
            others = [m for m in self.free if m != mode]
            once = sum((self._others(mode, m) * overlaps[m] for m in others), start=start)
            pairs = itertools.combinations(others, 2)
            twice = sum((self._others(mode, m, n) * overlaps[m] * overlaps[n] for m, n in pairs), start=start)
            pulled[mode] = step[mode] @ once.T + self.x[mode] @ twice.T
        return pulled

    def _overlaps(self, step: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        return {mode: self.x[mode].conj().T @ part for mode, part in step.items()}

    def _solver(self, shift: float) -> Callable[[Mapping[int, np.ndarray]], dict[int, np.ndarray]]:
        if self.formed is None:
            return lambda right: self._by_products(shift, right)
        from scipy.linalg import cho_factor, cho_solve

        damped = self.formed.copy()
        damped[np.diag_indices(self.count)] += shift
        factored = cho_factor(damped, lower=True, overwrite_a=True, check_finite=False)

        def solve(right: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
            flat = cho_solve(factored, np.concatenate([right[mode].reshape(-1) for mode in self.free]))
            parts = np.split(flat, np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1])
            return {mode: part.reshape(self.shapes[mode]) for mode, part in zip(self.free, parts, strict=True)}

        return solve

    def _matrix(self) -> np.ndarray:
        """Return ``Jᴴ J``."""
        rank = self.x[0].shape[1]
        edges = np.cumsum([0, *(math.prod(shape) for shape in self.shapes.values())])
        matrix = np.zeros((self.count, self.count), np.result_type(*self.x))
        for a, m in enumerate(self.free):
            rows, size = slice(edges[a], edges[a + 1]), len(self.x[m])
            same = matrix[rows, rows].reshape(size, rank, size, rank)
            same[np.arange(size), :, np.arange(size), :] = self.alone[m]
            for b in range(a + 1, len(self.free)):
                n, cols = self.free[b], slice(edges[b], edges[b + 1])
                left = self.x[m][:, None, :] * self._others(m, n)
                block = left[:, :, None, :] * self.x[n].conj().T[:, :, None]
                matrix[rows, cols] = block.reshape(size * rank, -1)
                matrix[cols, rows] = matrix[rows, cols].conj().T
        return matrix

    def _product(self, vec: Mapping[int, np.ndarray], shift: float) -> dict[int, np.ndarray]:
        """Multiply by ``Jᴴ J`` plus a multiple of the identity."""
        overlaps, start, product = self._overlaps(vec), np.zeros(self.grams[0].shape), {}
        for m in self.free:
            mixed = sum((self._others(m, n) * overlaps[n] for n in self.free if n != m), start=start)
            product[m] = vec[m] @ self.alone[m].T + shift * vec[m] + self.x[m] @ mixed.T
        return product

    def _by_products(self, shift: float, right: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Solve by conjugate gradients, preconditioned by the blocks of the modes."""
        eye = np.eye(self.x[0].shape[1])
        inverses = {
            mode: np.linalg.inv(gram + (shift + 1e-14 * self.size) * eye).T for mode, gram in self.alone.items()
        }

        def conditioned(left: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
            return {mode: part @ inverses[mode] for mode, part in left.items()}

        x, left = {mode: np.zeros_like(part) for mode, part in right.items()}, dict(right)
        way = conditioned(left)
        slope = _inner(left, way)
        enough = _SOLVED**2 * slope
        for _ in range(_CONJUGATE):
            if not slope > enough:
                break
            image = self._product(way, shift)
            length = slope / _inner(way, image)
            x = {mode: part + length * way[mode] for mode, part in x.items()}
            left = {mode: part - length * image[mode] for mode, part in left.items()}
            ahead = conditioned(left)
            before, slope = slope, _inner(left, ahead)
            way = {mode: part + (slope / before) * way[mode] for mode, part in ahead.items()}
        return x


def _inner(a: Mapping[int, np.ndarray], b: Mapping[int, np.ndarray]) -> float:
    return float(sum(np.vdot(part, b[mode]).real for mode, part in a.items()))


# -- Starts of rank one -----------------------------------------------------------------------------------------------

# De Lathauwer, De Moor & Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"
# (SIAM J. Matrix Anal. Appl. 21, 2000): sweeps of rank one are the power iteration.


# Power iterations for a start: of matrices of up to this many elements, and of larger ones.
_FEW_ELEMENTS, _POWERS = 1 << 16, (30, 3)


def rank_one_starts(algebra: Algebra, tensor: Array) -> list[list[Array]]:
    """Return vectors of which each is a leading one of what those before it left, from the first mode or the last; of a
    small tensor also those of its unfoldings.
    """
    backend, modes = algebra.backend, range(len(tensor.shape))
    starts = [_split(algebra, tensor), _split(algebra, backend.permute_dims(tensor, modes[::-1]))[::-1]]
    if math.prod(tensor.shape) <= _FEW_ELEMENTS:
        starts.append([algebra.left(unfolded(backend, tensor, mode), 1)[0] for mode in modes])
    return starts


def _split(algebra: Algebra, tensor: Array) -> list[Array]:
    backend, sizes = algebra.backend, [int(size) for size in tensor.shape]
    vectors, left = list[Array](), tensor
    for mode, size in enumerate(sizes[:-1]):
        matrix = backend.reshape(left, (size, math.prod(sizes[mode + 1 :])))
        along = algebra.array(algebra.rng.normal(size=(1, size)))
        steps = _POWERS[matrix.shape[0] * matrix.shape[1] > _FEW_ELEMENTS]
        for step in range(steps + 1):
            along = along * (1.0 / (algebra.norm(along) or 1.0))
            left = backend.matmul(along, matrix)
            if step < steps:
                along = backend.matrix_transpose(backend.matmul(matrix, backend.matrix_transpose(left)))
        vectors.append(backend.reshape(along, (-1, 1)))
    return [*vectors, backend.reshape(left, (-1, 1))]


def outer_vector(backend: Backend, vectors: Sequence[Array]) -> Array:
    """Return the outer product of vectors, flattened."""

    def pair(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    return functools.reduce(pair, vectors)


# -- Where products are all that is known of a tensor: in blocks, or with factors that are not negative ----------------

# Alternating least squares, or for factors without negative elements hierarchical alternating least squares: one column
# after another (Gillis & Glineur, "Accelerated multiplicative updates and hierarchical ALS algorithms for nonnegative
# matrix factorization", Neural Computation 24, 2012). Each sweep starts from factors extrapolated along the last one,
# further as long as that succeeds (Ang, Cohen, Gillis & Hien, "Accelerating block coordinate descent for nonnegative
# tensor factorization", Numer. Linear Algebra Appl. 28, 2021). In double precision, on the host.

# How far to extrapolate at first, the factor after a success, and the divisor after a failure.
_FORWARD, _FURTHER, _BACK = 0.5, 1.05, 1.5
# Most passes over the columns of a factor, and the part of the first one's change at which they end.
_PASSES, _SETTLED = 10, 0.05
# A column that becomes zero keeps this part of the largest element, so that its component is not lost for good.
_LEFT = 1e-12
# Ridge of equations with a diagonal of ones, which may be singular.
_LEAST_RIDGE = 1e-15


class Products(NamedTuple):
    """What a fit takes from a tensor.

    Attributes
    ----------
    shape : tuple of int
    norm : float
    product : callable
        Multiplies the unfolding of a mode by the Khatri-Rao product of the other modes' matrices, given all of them and
        the mode.
    distance : callable
        Computes the distance from the tensor of given factors.
    at : callable, optional
        Returns the products for a sweep from given factors, if the tensor depends on these.
    """

    shape: tuple[int, ...]
    norm: float
    product: Callable[[Sequence[np.ndarray], int], np.ndarray]
    distance: Callable[[Sequence[np.ndarray]], float]
    at: Callable[[Sequence[np.ndarray]], Products] | None = None


def fit_cp_by_products(
    tensor: Products,
    starts: Iterable[Sequence[np.ndarray]],
    steps: Iteration,
    *,
    fixed: Collection[int] = (),
    nonnegative: Collection[int] = (),
) -> Fit:
    """Fit a sum of outer products from each of several starts.

    Parameters
    ----------
    tensor : Products
        Not zero.
    starts : iterable of sequence of ndarray, shape (d_m, r)
        In double precision.
    steps : Iteration
    fixed : collection of int
        Modes whose factors are kept.
    nonnegative : collection of int
        Modes whose factors have no negative element, in the starts either.

    Returns
    -------
    Fit
        Arrays ``factor0``, …; the best of all starts.
    """
    best, best_error, best_stopped = list[np.ndarray](), math.inf, "singular"
    for start in starts:
        factors, error = _reached_from(tensor, start, steps, fixed, nonnegative)
        if error < best_error * (1.0 - _SAME):
            best, best_error, best_stopped = factors, error, steps.stopped
        if best_error <= _ROUNDING * float(np.finfo(np.float64).eps) * tensor.norm or steps.stopped == "callback":
            break
    arrays = {f"factor{mode}": factor for mode, factor in enumerate(best)}
    method = "non-negative HALS" if nonnegative else "ALS"
    return steps.fit(arrays, method, best_error / tensor.norm)._replace(stopped=best_stopped)


def _reached_from(
    tensor: Products,
    start: Sequence[np.ndarray],
    steps: Iteration,
    fixed: Collection[int],
    nonnegative: Collection[int],
) -> tuple[list[np.ndarray], float]:
    """Return the factors that sweeps from one start have reached, and their distance."""
    # Those of any sign come first: they give a component the sign that the others cannot.
    modes = sorted(range(len(tensor.shape)), key=lambda mode: mode in nonnegative)
    moving = [mode for mode in modes if mode not in fixed]

    def swept(factors: Sequence[np.ndarray]) -> tuple[list[np.ndarray], float]:
        factors, now = list(factors), tensor if tensor.at is None else tensor.at(factors)
        grams = [factor.T @ factor.conj() for factor in factors]
        for mode in moving:
            right = now.product([factor.conj() for factor in factors], mode)
            gram = hadamard_tensor([other for m, other in enumerate(grams) if m != mode])
            if mode in nonnegative:
                factors[mode] = _nonnegative_factor(factors[mode], right, gram)
            else:
                # Columns of any length, also those that are almost zero, are scaled to one.
                lengths = np.sqrt(gram.diagonal().real)
                lengths[lengths == 0.0] = 1.0
                scaled = gram / lengths / lengths[:, None] + _LEAST_RIDGE * np.eye(len(gram))
                factors[mode] = np.linalg.solve(scaled.T, (right / lengths).T).T / lengths
            grams[mode] = factors[mode].T @ factors[mode].conj()
        square = tensor.norm**2 - 2.0 * float(np.vdot(factors[mode], right).real)
        square += float(np.sum(hadamard_tensor(grams)).real)
        close = square <= _CANCELS * float(np.finfo(np.float64).eps) * tensor.norm**2
        return factors, now.distance(factors) if close else math.sqrt(square)

    steps.begin()
    factors, error = swept(_scaled_to(tensor, start, moving[0]))
    before, ahead = factors, _FORWARD
    while not steps.step(error / tensor.norm):
        further = [new + ahead * (new - old) for new, old in zip(factors, before, strict=True)]
        further = [np.maximum(x, 0.0) if mode in nonnegative else x for mode, x in enumerate(further)]
        candidate, distance = swept(further)
        if distance < error:
            ahead = min(1.0, _FURTHER * ahead)
        else:
            ahead /= _BACK
            candidate, distance = swept(factors)
        if not distance < error:  # up to rounding
            steps.stopped = steps.stopped or "converged"
            break
        before, factors, error = factors, candidate, distance
    return factors, error


def _scaled_to(tensor: Products, factors: Sequence[np.ndarray], mode: int) -> list[np.ndarray]:
    """Return factors of which one is scaled so that the distance is the least."""
    scaled = [np.array(factor, np.result_type(factor, np.float64)) for factor in factors]
    tensor = tensor if tensor.at is None else tensor.at(scaled)
    right = tensor.product([factor.conj() for factor in scaled], mode)
    square = float(np.sum(hadamard_tensor([factor.T @ factor.conj() for factor in scaled])).real)
    inner = float(np.vdot(scaled[mode], right).real)
    if inner > 0.0 and square > 0.0:
        scaled[mode] *= inner / square
    return scaled


def _nonnegative_factor(factor: np.ndarray, right: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """Improve the columns of a factor in turn, each to the best without negative elements."""
    rows, rights, first = np.ascontiguousarray(factor.T), np.ascontiguousarray(right.T), 0.0
    for number in range(_PASSES):
        change = 0.0
        for k, size in enumerate(gram.diagonal()):
            if size > 0.0:
                row = np.maximum(0.0, rows[k] + (rights[k] - gram[k] @ rows) / size)
                if not row.any():
                    row[:] = _LEFT * rows.max()
                change += float(np.sum((row - rows[k]) ** 2))
                rows[k] = row
        first = first if number else change
        if change <= _SETTLED**2 * first:
            break
    return np.ascontiguousarray(rows.T)
