"""CP decompositions: the driver of ``cp`` and ``decompose``, alternating least squares, and the nearest of rank one.

Carroll & Chang (1970) and Harshman (1970); Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51,
2009), section 3.4. The products of the tensor with all factors but one come from two large matrix products a sweep, one
for each half of the modes (Phan, Tichavský & Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC
tensor factorizations", IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np

from tnadapt.algebra.formats import CP
from tnadapt.algebra.products import contracted, hadamard_tensor, khatri_rao, unfolded
from tnadapt.backends import Array, Backend, load_backend

from .completion import ObservedElements, all_places, double_on_host, fit_observed, refinable
from .fits import Fit, Iteration, Limits
from .linear_algebra import Algebra, MatrixTruncation, Triplets, norm_of, on_host

# -- The driver: SVD of a matrix; else sweeps from several starts, then Gauss-Newton -----------------------------------


# Standard deviation of the noise on singular vectors that sweeps start from: without it, a structured tensor may keep
# them at a saddle point.
_MOVED = 0.01
# Sweeps crawl if they have not converged after so many, of which the last ten have reduced the relative error by more
# than this, but not to this part of it.
_CRAWLS, _SWEEPS, _FAST = ((20, 1e-5), (30, 0.0)), 10, 0.1
# If the error is then below this, there may be an exact answer, which Gauss-Newton looks for from there and from so
# many other starts, after ten sweeps each.
_NEAR, _OTHER_STARTS = 0.3, 15
# Starts for a tensor of at most so many elements, unless there are fewer sweeps than this.
_STARTS, _SMALL, _FEW_SWEEPS = 3, 1 << 14, 10
# An error of this many times epsilon is rounding. Starts whose errors differ by less than this found the same optimum.
_ROUNDING, _SAME = 64.0, 1e-7


def fit_cp(
    truncation: MatrixTruncation,
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
    truncation : MatrixTruncation
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
    backend, shape = truncation.backend, tuple(int(size) for size in tensor.shape)
    if len(shape) == 2 and not fixed:
        return _of_matrix(truncation, tensor, rank)
    if (norm := norm_of(backend, tensor)) == 0.0:
        zeros = {f"factor{mode}": backend.zeros((size, rank), like=tensor) for mode, size in enumerate(shape)}
        return Fit(zeros, True, 0, "zero", error=0.0)
    if len(shape) == 1:

        def column(vector: Array) -> dict[str, Array]:
            return {"factor0": backend.reshape(vector, (-1, 1))}

        return Fit(column(tensor), True, 0, "exact", closed=column)
    return _CPSearch(truncation, tensor, rank, norm, steps, init, fixed).fit(starts)


def _of_matrix(truncation: MatrixTruncation, matrix: Array, rank: int) -> Fit:
    def named(triplets: Triplets) -> dict[str, Array]:
        factor1 = truncation.backend.matrix_transpose(triplets.vh)
        return {"weights": triplets.s, "factor0": triplets.u, "factor1": factor1}

    triplets = truncation.to_rank(matrix, rank)
    method = "SVD" if triplets.exact is not False else "randomized SVD"
    return Fit(
        named(triplets), triplets.exact, 0, method, closed=lambda matrix: named(truncation.to_rank(matrix, rank))
    )


class _CPSearch:
    """The search for the factors of one tensor and rank, with its random numbers."""

    def __init__(
        self,
        truncation: MatrixTruncation,
        tensor: Array,
        rank: int,
        norm: float,
        steps: Iteration,
        init: str | Sequence[Array],
        fixed: Collection[int],
    ) -> None:
        self.backend, self.tensor, self.norm = truncation.backend, tensor, norm
        self.steps, self.limits, self.init, self.truncation = steps, steps.limits, init, truncation
        self.sweeps = CPSweeps(self.backend, tensor, fixed)
        # With this rank every tensor can be represented exactly; more components would only slow convergence.
        self.rank = min(rank, math.prod(self.sweeps.sizes) // max(self.sweeps.sizes))
        self.rng = np.random.RandomState(truncation.seed % (1 << 32))

    def fit(self, starts: int | None) -> Fit:
        """Run sweeps from each start, and Gauss-Newton from the first whose sweeps crawl near an exact answer."""
        steps = self.steps
        automatic = isinstance(self.init, str) and self.init == "svd"
        if automatic and self.rank == 1 and self.truncation.algebra is not None:
            factors, error = nearest_rank_one(self.truncation.algebra, self.tensor, steps)
            return self._fit(factors, error, "power iteration", steps.stopped)
        small = math.prod(self.sweeps.sizes) <= _SMALL and self.limits.iterations > _FEW_SWEEPS
        tries = starts or (_STARTS if automatic and small else 1)
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
                run.advance(run.count + _SWEEPS)
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
        """Run Gauss-Newton from the factors that sweeps have reached, and from those of other starts after a few.

        Sweeps make fast progress at first, and then crawl where components are nearly collinear; Gauss-Newton does not.
        """
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
        dtype, device = backend.dtype_name(self.tensor), backend.device(self.tensor)
        factors = [backend.asarray(np.ascontiguousarray(x), dtype, device) for x in refined.arrays.values()]
        return self._fit(factors, refined.error, "ALS, Gauss-Newton", stopped)

    def _start(self, number: int) -> list[Array]:
        """Return the factors of a start: the first one by ``init``, the others random."""
        backend, sizes, rank = self.backend, self.sweeps.sizes, self.rank
        if not isinstance(self.init, str):
            return [
                factor if not number or mode in self.sweeps.fixed else self._random("normal", sizes[mode], rank)
                for mode, factor in enumerate(self.init)
            ]
        if number or self.init == "random":
            return [self._random("normal", size, rank) for size in sizes]
        factors = []
        for mode, size in enumerate(sizes):
            columns = self.truncation.left(unfolded(backend, self.tensor, mode), rank)
            if (missing := rank - int(columns.shape[1])) > 0:
                columns = backend.concat([columns, self._random("uniform", size, missing)], axis=1)
            factors.append(columns + self._random("normal", size, rank) * (_MOVED / math.sqrt(size)))
        return factors

    def _random(self, kind: str, size: int, columns: int) -> Array:
        dtype, device = self.backend.dtype_name(self.tensor), self.backend.device(self.tensor)
        numbers = getattr(self.rng, kind)(size=(size, columns))
        if dtype.startswith("complex"):
            numbers = numbers + 1j * getattr(self.rng, kind)(size=(size, columns))
        return self.backend.asarray(numbers, dtype, device)


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
    """Return the mode that begins the second half, where the halves together have the fewest elements."""
    return min(range(1, len(sizes)), key=lambda m: math.prod(sizes[:m]) + math.prod(sizes[m:]))


class _Run:
    """Sweeps from one start; the best factors so far, and their distance from the tensor.

    From time to time, a longer step in the direction of the last sweep is tried, and kept if it reduces the error
    (Harshman's line search, as in Andersson & Bro's N-way toolbox). Components that become collinear make the equations
    singular, or diverge with opposite signs (degeneracy). Then a small ridge is added to the equations, and the
    iteration goes on from the best factors.
    """

    def __init__(self, sweeps: CPSweeps, start: Sequence[Array], norm: float, steps: Iteration) -> None:
        self.sweeps, self.norm, self.steps = sweeps, norm, steps
        self.factors, self.error, self.errors = list(start), math.inf, list[float]()
        self.ridges = [0.0, 100.0 * sweeps.epsilon, sweeps.epsilon**0.5]
        steps.begin()

    @property
    def count(self) -> int:
        """Number of sweeps."""
        return len(self.errors)

    def advance(self, most: int) -> None:
        """Run sweeps, up to a number of all, or until the iteration stops."""
        sweeps, steps, norm = self.sweeps, self.steps, self.norm
        while self.count < most and not steps.stopped:
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
            if not sweeps.fixed and self.count >= _BEFORE and self.count % _BETWEEN == 0:
                longer = [
                    new + (new - old) * math.sqrt(self.count) for new, old in zip(self.factors, previous, strict=True)
                ]
                if (error := sweeps.residual(longer)) < self.error:
                    self.factors, self.error = longer, error

    def reaches(self, least: float, most: int) -> bool:
        """Return whether the error would fall below another one in the sweeps that are left, as fast as in the last."""
        gain = (self.errors[-_SWEEPS - 1] - self.error) / _SWEEPS
        return self.error - gain * (most - self.count) < least

    def _swept(self) -> list[Array] | None:
        """Return the factors after a sweep; None if the equations are singular or the factors diverge."""
        ridge = self.ridges[0] * self.norm ** (2.0 / len(self.factors)) if self.ridges[0] else 0.0
        with np.errstate(all="ignore"):
            try:
                factors = self.sweeps.sweep(self.factors, ridge)
            except (np.linalg.LinAlgError, RuntimeError):  # torch raises a RuntimeError
                return None
            return factors if self.sweeps.largest() <= self.norm * self.sweeps.epsilon**-0.5 else None


# -- The nearest tensor of rank one: power iteration on all modes, from several starts ---------------------------------

# De Lathauwer, De Moor & Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"
# (SIAM J. Matrix Anal. Appl. 21, 2000). A sweep takes two products with the whole tensor, one for each half of the
# modes; the vectors of a half come from the small tensor that is left. One start splits modes off one by one, each by a
# leading singular triplet of what is left, from either end; another takes each mode's own leading vector.


# Tensors of up to this many elements have random starts, too, and each start is followed to its end. Of larger ones
# the start that is best after a few sweeps is followed.
_SMALL_POWERS = 1 << 16
_RANDOM, _TRIED = 4, 4
# Power iterations for a start, of small tensors and of others.
_POWERS = 30, 3
# An iteration ends when a sweep reduces the error by no more than this part of the tolerance. Sweeps cost little. The
# error is flat at its minimum: some more sweeps find the vectors to more digits.
_FINER, _LAST = 1e-2, 4


def nearest_rank_one(algebra: Algebra, tensor: Array, steps: Iteration) -> tuple[list[Array], float]:
    """Fit an outer product to a real tensor of three modes or more, not zero: factors of one column, and the error."""
    if algebra.backend.name != "numpy" and on_host(algebra.backend, tensor):
        numpy = load_backend("numpy")
        host = Algebra(numpy, algebra.backend.to_numpy(algebra.like), algebra.svd_method, algebra.seed)
        factors, error = nearest_rank_one(host, algebra.backend.to_numpy(tensor), steps)
        return [algebra.array(factor) for factor in factors], error
    powers, small = _Powers(algebra, tensor, steps), math.prod(tensor.shape) <= _SMALL_POWERS
    runs = [(start, 0.0) for start in _starts(algebra, tensor, small)]
    if not small:
        runs = [max((powers.followed(*run, _TRIED) for run in runs), key=lambda run: run[1])]
    vectors, size = max((powers.followed(*run, steps.limits.iterations) for run in runs), key=lambda run: run[1])
    for _ in range(_LAST):
        vectors, size = powers.sweep(vectors)
    backend = algebra.backend
    factors = [backend.reshape(v * size if mode == 0 else v, (-1, 1)) for mode, v in enumerate(vectors)]
    return factors, powers.error(size)


def _starts(algebra: Algebra, tensor: Array, small: bool) -> Iterator[list[Array]]:
    backend, order = algebra.backend, len(tensor.shape)
    yield _split(algebra, tensor)
    yield _split(algebra, backend.permute_dims(tensor, range(order)[::-1]))[::-1]
    yield [_leading(algebra, unfolded(backend, tensor, mode))[0] for mode in range(order)]
    rng = algebra.rng
    for _ in range(_RANDOM if small else 0):
        yield [algebra.array(rng.normal(size=int(size))) for size in tensor.shape]


def _split(algebra: Algebra, tensor: Array) -> list[Array]:
    """Return a vector for each mode, each from the leading triplet of what the one before left."""
    backend, sizes = algebra.backend, [int(size) for size in tensor.shape]
    vectors, left = list[Array](), tensor
    for mode, size in enumerate(sizes[:-1]):
        u, left = _leading(algebra, backend.reshape(left, (size, math.prod(sizes[mode + 1 :]))))
        vectors.append(u)
    return [*vectors, left]


def _leading(algebra: Algebra, matrix: Array) -> tuple[Array, Array]:
    """Return a left vector near the leading one, and the matrix times it, after a few power iterations."""
    backend = algebra.backend
    along = algebra.array(algebra.rng.normal(size=(1, int(matrix.shape[0]))))
    steps = _POWERS[matrix.shape[0] * matrix.shape[1] > _SMALL_POWERS]
    for step in range(steps + 1):
        along = along * (1.0 / (algebra.norm(along) or 1.0))
        rest = backend.matmul(along, matrix)
        if step < steps:
            along = backend.matrix_transpose(backend.matmul(matrix, backend.matrix_transpose(rest)))
    return backend.flatten(along), backend.flatten(rest)


class _Powers:
    """Sweeps of the power iteration on a tensor, seen as a matrix of one half of its modes by the other."""

    def __init__(self, algebra: Algebra, tensor: Array, steps: Iteration) -> None:
        self.steps, self.algebra, self.sizes = steps, algebra, [int(size) for size in tensor.shape]
        self.cut = _cut(self.sizes)
        rows = math.prod(self.sizes[: self.cut])
        self.matrix = algebra.backend.reshape(tensor, (rows, math.prod(self.sizes) // rows))
        self.norm = algebra.norm(tensor)

    def sweep(self, vectors: Sequence[Array]) -> tuple[list[Array], float]:
        """Return improved vectors of norm one, and the size of their outer product that is nearest to the tensor."""
        backend, cut = self.algebra.backend, self.cut
        left, right = list(vectors[:cut]), list(vectors[cut:])
        rest = backend.matmul(self.matrix, backend.reshape(outer_vector(backend, right), (-1, 1)))
        left, _ = self._half(rest, left)
        rest = backend.matmul(backend.reshape(outer_vector(backend, left), (1, -1)), self.matrix)
        right, size = self._half(rest, right)
        return left + right, size

    def _half(self, rest: Array, vectors: list[Array]) -> tuple[list[Array], float]:
        """Improve the vectors of one half, for what the other half leaves."""
        backend, sizes = self.algebra.backend, [int(vector.shape[0]) for vector in vectors]
        rest, size = backend.reshape(rest, sizes), 0.0
        for mode in range(len(vectors)):
            others: list[Array | None] = [None if m == mode else vector for m, vector in enumerate(vectors)]
            product = contracted(backend, rest, others, (sizes[mode],))
            size = float(np.linalg.norm(backend.to_numpy(product).astype(np.float64)))
            if size > 0.0:
                vectors[mode] = product * (1.0 / size)
        return vectors, size

    def error(self, size: float) -> float:
        """Return the relative error of an outer product of vectors of norm one and this size."""
        return math.sqrt(max(0.0, 1.0 - (size / self.norm) ** 2))

    def followed(self, vectors: list[Array], size: float, most: int) -> tuple[list[Array], float]:
        """Run sweeps until one gains too little; return the vectors and their size."""
        eps, steps = self.algebra.eps, self.steps
        if steps.stopped == "callback":
            return vectors, size
        steps.begin()
        for _ in range(min(most, steps.limits.iterations)):
            improved, now = self.sweep(vectors)
            gain = (now - size) * (now + size) / self.norm**2
            vectors, size = (improved, now) if gain > 0.0 else (vectors, size)
            if steps.note(self.error(size)):
                break
            if gain <= max(4.0 * eps, 2.0 * max(eps**0.5, self.error(size)) * _FINER * steps.limits.tol):
                steps.stopped = "converged"
                break
        else:
            steps.stopped = "max_iterations"
        return vectors, size


def outer_vector(backend: Backend, vectors: Sequence[Array]) -> Array:
    """Return the outer product of vectors, flattened."""

    def pair(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    return functools.reduce(pair, vectors)
