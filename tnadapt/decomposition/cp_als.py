"""CP decompositions: the driver of ``cp`` and ``decompose``, alternating least squares, and starts of rank one.

Carroll & Chang (1970) and Harshman (1970); Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51,
2009), section 3.4. The products of the tensor with all factors but one come from two large matrix products a sweep, one
for each half of the modes (Phan, Tichavský & Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC
tensor factorizations", IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import CP
from tnadapt.algebra.products import hadamard_tensor, khatri_rao, unfolded
from tnadapt.backends import Array, Backend

from .completion import ObservedElements, all_places, double_on_host, fit_observed, refinable
from .fits import Fit, Iteration, Limits
from .linear_algebra import Algebra, Triplets, norm_of

# -- The driver: SVD of a matrix; else sweeps from several starts, then Gauss-Newton -----------------------------------


# Standard deviation of the noise on singular vectors that sweeps start from: without it, a structured tensor may keep
# them at a saddle point.
_MOVED = 0.01
# Sweeps crawl if they have not converged after this many, the last ten of which have reduced the relative error by more
# than this, but not to this fraction of it.
_CRAWLS, _SWEEPS, _FAST = ((20, 1e-5), (30, 0.0)), 10, 0.1
# If the error is then below this, there may be an exact answer: Gauss-Newton searches for it from there and from this
# many other starts, after ten sweeps each.
_NEAR, _OTHER_STARTS = 0.3, 15
# Starts for a tensor of at most this many elements, unless there are fewer sweeps than this.
_STARTS, _SMALL, _FEW_SWEEPS = 3, 1 << 14, 10
# The same for rank one, whose sweeps cost little.
_STARTS_OF_ONE, _SMALL_OF_ONE = 5, 1 << 16
# An error of this many times epsilon is rounding. Starts whose errors differ by less than this found the same optimum.
_ROUNDING, _SAME = 64.0, 1e-7


def fit_cp(
    algebra: Algebra,
    tensor: Array,
    rank: int,
    steps: Iteration,
    *,
    init: str | Sequence[Array] = "svd",
    fixed: Collection[int] = (),
    starts: int | None = None,
) -> Fit:
    """Fit a sum of outer products to a tensor.

    Parameters
    ----------
    algebra : Algebra
        For matrices like the tensor.
    tensor : array, shape (d_1, …, d_M)
        Real or complex.
    rank : int
    steps : Iteration
    init : {"svd", "random"} or sequence of array
        Singular vectors with a little noise, and Gauss-Newton where sweeps from them crawl; random factors; or given
        ones.
    fixed : collection of int
        Modes whose given factors are kept.
    starts : int, optional
        Number of starts, the first by ``init`` and the others random, each followed to its end. By default 1, but for a
        small tensor and ``"svd"`` 3, of which the others are given up where they would not become the best.

    Returns
    -------
    Fit
        Arrays ``factor0``, …; of a matrix also ``weights``.
    """
    backend, shape = algebra.backend, tuple(int(size) for size in tensor.shape)
    if len(shape) == 2 and not fixed:
        return _of_matrix(algebra, tensor, rank)
    if (norm := norm_of(backend, tensor)) == 0.0:
        zeros = {f"factor{mode}": backend.zeros((size, rank), like=tensor) for mode, size in enumerate(shape)}
        return Fit(zeros, True, 0, "zero", error=0.0)
    if len(shape) == 1:

        def column(vector: Array) -> dict[str, Array]:
            return {"factor0": backend.reshape(vector, (-1, 1))}

        return Fit(column(tensor), True, 0, "exact", closed=column)
    return _CPSearch(algebra, tensor, rank, norm, steps, init, fixed).fit(starts)


def _of_matrix(algebra: Algebra, matrix: Array, rank: int) -> Fit:
    def named(triplets: Triplets) -> dict[str, Array]:
        factor1 = algebra.backend.matrix_transpose(triplets.vh)
        return {"weights": triplets.s, "factor0": triplets.u, "factor1": factor1}

    triplets = algebra.truncated(matrix, rank)
    method = "SVD" if triplets.exact is not False else "randomized SVD"
    return Fit(named(triplets), triplets.exact, 0, method, closed=lambda matrix: named(algebra.truncated(matrix, rank)))


class _CPSearch:
    """The search for the factors of one tensor and rank, with its random numbers."""

    def __init__(
        self,
        algebra: Algebra,
        tensor: Array,
        rank: int,
        norm: float,
        steps: Iteration,
        init: str | Sequence[Array],
        fixed: Collection[int],
    ) -> None:
        self.backend, self.tensor, self.norm = algebra.backend, tensor, norm
        self.steps, self.limits, self.init, self.algebra = steps, steps.limits, init, algebra
        self.sweeps = CPSweeps(self.backend, tensor, fixed)
        # With this rank every tensor can be represented exactly; more components would only slow convergence.
        self.rank = min(rank, math.prod(self.sweeps.sizes) // max(self.sweeps.sizes))
        self.rng = np.random.RandomState(algebra.seed % (1 << 32))

    def fit(self, starts: int | None) -> Fit:
        """Run sweeps from each start, and Gauss-Newton from the first whose sweeps crawl near an exact answer."""
        steps = self.steps
        automatic = isinstance(self.init, str) and self.init == "svd"
        usual, largest = (_STARTS, _SMALL) if self.rank > 1 else (_STARTS_OF_ONE, _SMALL_OF_ONE)
        small = math.prod(self.sweeps.sizes) <= largest and self.limits.iterations > _FEW_SWEEPS
        tries = starts or (usual if automatic and small else 1)
        best, best_stopped = None, ""
        for number in range(tries):
            run = _Run(self.sweeps, self._start(number), self.norm, steps)
            for most, least in _CRAWLS:
                run.advance(most)
                if automatic and not number and not steps.stopped and self._crawls(steps.history, least):
                    return self._refined(run)
            if starts or best is None:
                run.advance(self.limits.iterations)
            while best is not None and not steps.stopped and run.reaches(best.error, self.limits.iterations):
                run.advance(len(run.errors) + _SWEEPS)
            if best is None or run.error < best.error * (1.0 - _SAME):
                best, best_stopped = run, steps.stopped
            if best.error <= _ROUNDING * self.sweeps.epsilon * self.norm or steps.stopped == "callback":
                best_stopped = steps.stopped
                break
        assert best is not None
        return self._fit(best.factors, best.error / self.norm, "ALS", best_stopped)

    def _fit(self, factors: Sequence[Array], error: float, method: str, stopped: str) -> Fit:
        arrays = {f"factor{mode}": factor for mode, factor in enumerate(factors)}
        return self.steps.fit(arrays, method, error)._replace(stopped=stopped)

    def _crawls(self, history: Sequence[float], least: float) -> bool:
        """Return whether sweeps crawl where there may be an exact answer that Gauss-Newton can reach."""
        before, error = history[-_SWEEPS - 1], history[-1]
        crawls = before - error > least and error > _FAST * before and self.limits.iterations > _CRAWLS[-1][0]
        near = _ROUNDING * self.sweeps.epsilon < error <= _NEAR
        return crawls and near and refinable(CP(self.sweeps.sizes, self.rank))

    def _refined(self, run: _Run) -> Fit:
        """Run Gauss-Newton from the factors that sweeps have reached, and from other starts after a few sweeps."""
        # Sweeps are fast at first, and then crawl if components are nearly collinear; Gauss-Newton does not.
        backend, steps = self.backend, self.steps
        few = Limits(self.limits.tol, min(self.limits.iterations, _SWEEPS))

        def begun() -> Iterator[Mapping[str, np.ndarray]]:
            for number in range(1 + _OTHER_STARTS):
                other = run
                if number:
                    other = _Run(self.sweeps, self._start(number), self.norm, Iteration(few))
                    other.advance(_SWEEPS)
                yield {f"factor{mode}": double_on_host(backend, factor) for mode, factor in enumerate(other.factors)}

        split = CP(self.sweeps.sizes, self.rank)
        elements = ObservedElements([split], [[""]], [all_places(split.sizes)])
        wanted = double_on_host(backend, self.tensor).reshape(-1)
        refined = fit_observed(elements, wanted, begun(), self.limits, watch=lambda _, error: steps.note(error))
        stopped = steps.stopped or refined.stopped
        if not refined.error < run.error / self.norm:
            return self._fit(run.factors, run.error / self.norm, "ALS", stopped)
        factors = [self.algebra.array(factor) for factor in refined.arrays.values()]
        return self._fit(factors, refined.error, "ALS, Gauss-Newton", stopped)

    @functools.cached_property
    def _of_rank_one(self) -> list[list[Array]]:
        return sorted(rank_one_starts(self.algebra, self.tensor), key=self.sweeps.residual)

    def _start(self, number: int) -> list[Array]:
        """Return the factors of a start, where the first start is by ``init`` and the others are random."""
        backend, sizes, rank = self.backend, self.sweeps.sizes, self.rank
        if not isinstance(self.init, str):
            return [
                factor if not number or mode in self.sweeps.fixed else self._random("normal", sizes[mode], rank)
                for mode, factor in enumerate(self.init)
            ]
        if self.init == "svd" and rank == 1 and not self.algebra.plain and number < len(self._of_rank_one):
            return self._of_rank_one[number]
        if number or self.init == "random":
            return [self._random("normal", size, rank) for size in sizes]
        factors = []
        for mode, size in enumerate(sizes):
            columns, _ = self.algebra.left(unfolded(backend, self.tensor, mode), rank)
            if (missing := rank - int(columns.shape[1])) > 0:
                columns = backend.concat([columns, self._random("uniform", size, missing)], axis=1)
            factors.append(columns + self._random("normal", size, rank) * (_MOVED / math.sqrt(size)))
        return factors

    def _random(self, kind: str, size: int, columns: int) -> Array:
        numbers = getattr(self.rng, kind)(size=(size, columns))
        if self.sweeps.complex:
            numbers = numbers + 1j * getattr(self.rng, kind)(size=(size, columns))
        return self.algebra.array(numbers)


# -- Alternating least squares -----------------------------------------------------------------------------------------


# Sweeps before the first extrapolation, and from one to the next.
_BEFORE, _BETWEEN = 10, 5
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
    """

    def __init__(self, backend: Backend, tensor: Array, fixed: Collection[int] = ()) -> None:
        self.backend, self.fixed = backend, frozenset(fixed)
        self.sizes = [int(size) for size in tensor.shape]
        cut = _cut(self.sizes)
        self.halves = [list(range(cut)), list(range(cut, len(self.sizes)))]
        self.epsilon = float(np.finfo(backend.dtype_name(tensor)).eps)
        self.complex = backend.is_complex(tensor)
        self.matrix = backend.reshape(tensor, (math.prod(self.sizes[:cut]), math.prod(self.sizes[cut:])))

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
            # The tensor times the factors of the other half, conjugated: one column for each component.
            cols = self._conj(khatri_rao(backend, [factors[mode] for mode in other]))
            matrix = self.matrix if half[0] == 0 else backend.matrix_transpose(self.matrix)
            partial = backend.matmul(matrix, cols)
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
        backend = self.backend
        rows, cols = (khatri_rao(backend, [factors[mode] for mode in half]) for half in self.halves)
        return norm_of(backend, self.matrix - backend.matmul(rows, backend.matrix_transpose(cols)))

    def largest(self) -> float:
        """Return the largest norm of a component that the last sweep returned; infinity if one is not finite."""
        squares = np.abs(self._square.diagonal())
        return math.sqrt(float(squares.max())) if np.isfinite(squares).all() else math.inf

    def _conj(self, x: Array) -> Array:
        return self.backend.conj(x) if self.complex else x

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


class _Run:
    """Sweeps from one start; the best factors so far, and their distance from the tensor.

    From time to time, a longer step in the direction of the last sweep is tried, and kept if it reduces the error
    (Harshman's line search, as in Andersson & Bro's N-way toolbox). Components that become collinear make the equations
    singular, or diverge with opposite signs (degeneracy). Then a small ridge is added to the equations, and the
    iteration continues from the best factors.
    """

    def __init__(self, sweeps: CPSweeps, start: Sequence[Array], norm: float, steps: Iteration) -> None:
        self.sweeps, self.norm, self.steps = sweeps, norm, steps
        self.factors, self.error, self.errors = list(start), math.inf, list[float]()
        self.ridges = [0.0, 100.0 * sweeps.epsilon, sweeps.epsilon**0.5]
        steps.begin()

    def advance(self, most: int) -> None:
        """Run sweeps, up to a number of all, or until the iteration stops."""
        sweeps, steps, norm = self.sweeps, self.steps, self.norm
        while len(self.errors) < most and not steps.stopped:
            factors = self._swept()
            error = math.inf if factors is None else sweeps.distance(factors, norm)
            if factors is None or not error < self.error * (1.0 + 1e-12):
                if factors is not None and math.isfinite(self.error):
                    if not steps.note(self.error / norm):
                        steps.stopped = "converged"  # up to rounding
                elif len(self.ridges) > 1:
                    self.ridges.pop(0)
                else:
                    steps.stopped = "singular"
                continue
            previous, self.factors, self.error = self.factors, factors, min(error, self.error)
            self.errors.append(self.error)
            if steps.step(self.error / norm):
                return
            if not sweeps.fixed and len(self.errors) >= _BEFORE and len(self.errors) % _BETWEEN == 0:
                longer = [
                    new + (new - old) * math.sqrt(len(self.errors))
                    for new, old in zip(self.factors, previous, strict=True)
                ]
                if (error := sweeps.residual(longer)) < self.error:
                    self.factors, self.error = longer, error

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


# -- Where products are all that is known of a tensor: sparse, in blocks, or with factors that are not negative --------

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
