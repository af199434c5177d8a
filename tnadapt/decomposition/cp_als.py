"""Solvers for CP: alternating least squares, and the nearest tensor of rank one.

Carroll & Chang (1970) and Harshman (1970); Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51,
2009), section 3.4. The products of the tensor with all factors but one come from two large matrix products a sweep, one
for each half of the modes (Phan, Tichavský & Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC
tensor factorizations", IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.formats import unfolded
from tnadapt.algebra.products import contracted, hadamard_tensor, khatri_rao
from tnadapt.backends import Array, Backend, load_backend

from .fits import Limits
from .linear_algebra import Algebra, norm_of, on_host

__all__ = [
    "CRAWLS",
    "MOVED",
    "NEAR",
    "OTHER_STARTS",
    "CPFactors",
    "CPSweeps",
    "cp_als",
    "nearest_rank_one",
]


# -- Alternating least squares -----------------------------------------------------------------------------------------


# Standard deviation of the noise on singular vectors that sweeps start from: without it, a structured tensor may keep
# them at a saddle point.
MOVED = 0.01
# Sweeps that have not converged after this many crawl. If their relative error is below the second number, there may be
# an exact answer, which Gauss-Newton looks for from there and from so many other starts.
CRAWLS, NEAR, OTHER_STARTS = 30, 0.3, 15
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
        halves = [math.prod(self.sizes[:m]) + math.prod(self.sizes[m:]) for m in range(1, len(self.sizes))]
        cut = 1 + halves.index(min(halves))
        self.halves = [list(range(cut)), list(range(cut, len(self.sizes)))]
        self.epsilon = float(np.finfo(backend.dtype_name(tensor)).eps)
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
        for own, other in (self.halves, self.halves[::-1]):
            if all(mode in self.fixed for mode in own):
                continue
            # The tensor times the factors of the other half, conjugated: one column for each component.
            cols = backend.conj(khatri_rao(backend, [factors[mode] for mode in other]))
            matrix = self.matrix if own[0] == 0 else backend.matrix_transpose(self.matrix)
            partial = backend.matmul(matrix, cols)
            for mode in own:
                if mode in self.fixed:
                    continue
                right = self._contracted(partial, factors, own, mode)
                system = hadamard_tensor([grams[m] for m in range(len(factors)) if m != mode])
                factors[mode] = self._solved(system, right, ridge)
                grams[mode] = self._gram(factors[mode])
                self._last = right, factors[mode]
        self._square = hadamard_tensor(grams)
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
        backend, (right, factor) = self.backend, self._last
        inner = self._total(right * backend.conj(factor))
        square = norm * norm - 2.0 * inner + self._total(self._square)
        if square > _CANCELS * self.epsilon * norm * norm:
            return math.sqrt(square)
        return self.residual(factors)

    def residual(self, factors: Sequence[Array]) -> float:
        """Return the distance of the tensor from any factors, by forming their tensor."""
        backend = self.backend
        rows, cols = (khatri_rao(backend, [factors[mode] for mode in half]) for half in self.halves)
        return norm_of(backend, self.matrix - backend.matmul(rows, backend.matrix_transpose(cols)))

    def sizes_of(self, factors: Sequence[Array]) -> np.ndarray:
        """Return the norm of each component, on the host."""
        squares = [self.backend.to_numpy(self._diagonal(self._gram(factor))) for factor in factors]
        found: np.ndarray = np.sqrt(np.prod(np.abs(squares), axis=0, dtype=np.float64))
        return found

    def _diagonal(self, matrix: Array) -> Array:
        rank = int(matrix.shape[0])
        places = self.backend.constant(np.arange(rank) * (rank + 1), self.backend.device(matrix))
        return self.backend.take(self.backend.flatten(matrix), places)

    def _total(self, x: Array) -> float:
        """Return the real part of the sum of all elements."""
        return float(np.sum(self.backend.to_numpy(x), dtype=np.complex128).real)

    def _gram(self, factor: Array) -> Array:
        """Return ``factorᵀ conj(factor)``."""
        return self.backend.matmul(self.backend.matrix_transpose(factor), self.backend.conj(factor))

    def _contracted(self, partial: Array, factors: Sequence[Array], own: list[int], mode: int) -> Array:
        """Contract a half's product with the other factors of that half: shape (d_mode, r)."""
        backend, rank = self.backend, int(factors[0].shape[1])
        place = own.index(mode)
        before, after = own[:place], own[place + 1 :]
        left = math.prod(self.sizes[m] for m in before)
        right = math.prod(self.sizes[m] for m in after)
        found = backend.reshape(partial, (left, self.sizes[mode], right, rank))
        if after:
            weights = backend.conj(khatri_rao(backend, [factors[m] for m in after]))
            found = backend.sum(found * backend.reshape(weights, (1, 1, right, rank)), axis=2)
        found = backend.reshape(found, (left, self.sizes[mode], rank))
        if before:
            weights = backend.conj(khatri_rao(backend, [factors[m] for m in before]))
            found = backend.sum(found * backend.reshape(weights, (left, 1, rank)), axis=0)
        return backend.reshape(found, (self.sizes[mode], rank))

    def _solved(self, system: Array, right: Array, ridge: float) -> Array:
        """Solve ``x @ system = right``."""
        backend = self.backend
        if ridge:
            system = system + ridge * self._eye(system)
        transposed = backend.matrix_transpose
        return transposed(backend.solve(transposed(system), transposed(right)))

    def _eye(self, like: Array) -> Array:
        backend = self.backend
        return backend.asarray(np.eye(int(like.shape[0])), backend.dtype_name(like), backend.device(like))


class CPFactors(NamedTuple):
    """The result of :func:`cp_als`.

    Attributes
    ----------
    factors : list of array, shape (d_m, r)
    error : float
        Their distance from the tensor; infinity if there was no sweep that succeeded.
    sweeps : int
    """

    factors: list[Array]
    error: float
    sweeps: int


def cp_als(
    sweeps: CPSweeps,
    start: Sequence[Array],
    norm: float,
    iterations: int,
    on_sweep: Callable[[int, float], bool],
    extrapolate: bool = True,
) -> CPFactors:
    """Run sweeps from given factors; return the best.

    Parameters
    ----------
    sweeps : CPSweeps
    start : sequence of array, shape (d_m, r)
    norm : float
        Frobenius norm of the tensor; not zero.
    iterations : int
        Maximum number of sweeps.
    on_sweep : callable
        Called with the number of sweeps and the relative error; stops the iteration if it returns True.
    extrapolate : bool
        Whether to try longer steps in the direction of the last sweeps, and keep those that reduce the error
        (Harshman's line search, as in Andersson & Bro's N-way toolbox).

    Notes
    -----
    Components that become collinear make the equations singular, or diverge with opposite signs (degeneracy). Then a
    small ridge is added to the equations, and the iteration goes on from the best factors.
    """
    eps = sweeps.epsilon
    ridges = [0.0, 100.0 * eps, eps**0.5]
    best, error, previous = list(start), math.inf, list(start)
    count = 0
    while count < iterations and ridges:
        found = _tried(sweeps, best, ridges[0] * norm ** (2.0 / len(best)), norm)
        now = math.inf if found is None else sweeps.distance(found, norm)
        if found is None or not now < error * (1.0 + 1e-12):
            if found is not None and math.isfinite(error):
                on_sweep(count + 1, error / norm)
                break  # converged up to rounding
            ridges.pop(0)
            continue
        count += 1
        previous, best, error = best, found, min(now, error)
        if on_sweep(count, error / norm):
            break
        if extrapolate and count >= _BEFORE and count % _BETWEEN == 0:
            longer = [new + (new - old) * math.sqrt(count) for new, old in zip(best, previous, strict=True)]
            further = sweeps.residual(longer)
            if further < error:
                best, error = longer, further
    return CPFactors(best, error, count)


def _tried(sweeps: CPSweeps, factors: Sequence[Array], ridge: float, norm: float) -> list[Array] | None:
    """Return the factors after a sweep; None if the equations are singular or the factors diverge."""
    with np.errstate(all="ignore"):
        try:
            found = sweeps.sweep(factors, ridge)
        except (np.linalg.LinAlgError, RuntimeError):  # torch raises a RuntimeError
            return None
    sizes = sweeps.sizes_of(found)
    if not np.isfinite(sizes).all() or sizes.max() > norm * sweeps.epsilon**-0.5:
        return None
    return found


# -- The nearest tensor of rank one: power iteration on all modes, from several starts ---------------------------------

# De Lathauwer, De Moor & Vandewalle, "On the best rank-1 and rank-(R1, …, RN) approximation of higher-order tensors"
# (SIAM J. Matrix Anal. Appl. 21, 2000). A sweep takes two products with the whole tensor, one for each half of the
# modes; the vectors of a half come from the small tensor that is left. One start splits modes off one by one, each by a
# leading singular triplet of what is left, from either end; another takes each mode's own leading vector.


# Tensors of up to this many elements have random starts, too, and each start is followed to its end. Of larger ones
# the start that is best after a few sweeps is followed.
_SMALL = 1 << 16
_RANDOM, _TRIED = 4, 4
# Power iterations for a start, of small tensors and of others.
_POWERS = 30, 3
# An iteration ends when a sweep reduces the error by no more than this part of the tolerance. Sweeps cost little.
_FINER = 1e-2


def nearest_rank_one(algebra: Algebra, tensor: Array, limits: Limits) -> tuple[list[Array], int]:
    """Fit one outer product to a tensor of at least three modes.

    Parameters
    ----------
    algebra : Algebra
    tensor : array, shape (d_1, …, d_M)
        Real, not zero.
    limits : Limits

    Returns
    -------
    list of array, shape (d_m, 1)
    int
        Number of sweeps.
    """
    if algebra.backend.name != "numpy" and on_host(algebra.backend, tensor):
        numpy = load_backend("numpy")
        host = Algebra(numpy, algebra.backend.to_numpy(algebra.like), algebra.svd_method, algebra.seed)
        factors, count = nearest_rank_one(host, algebra.backend.to_numpy(tensor), limits)
        return [algebra.array(factor) for factor in factors], count
    powers, small = _Powers(algebra, tensor), math.prod(tensor.shape) <= _SMALL
    runs = [(start, 0.0) for start in _starts(algebra, tensor, small)]
    if not small:
        tried = limits._replace(iterations=min(_TRIED, limits.iterations))
        runs = [max((powers.followed(*run, tried)[0] for run in runs), key=lambda run: run[1])]
    count = 0
    for number, run in enumerate(runs):
        runs[number], more = powers.followed(*run, limits)
        count += more
    vectors, size = max(runs, key=lambda run: run[1])
    backend = algebra.backend
    return [backend.reshape(v * size if mode == 0 else v, (-1, 1)) for mode, v in enumerate(vectors)], count


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
    found, left = list[Array](), tensor
    for mode, size in enumerate(sizes[:-1]):
        u, left = _leading(algebra, backend.reshape(left, (size, math.prod(sizes[mode + 1 :]))))
        found.append(u)
    return [*found, left]


def _leading(algebra: Algebra, matrix: Array) -> tuple[Array, Array]:
    """Return a left vector near the leading one, and the matrix times it, after a few power iterations."""
    backend = algebra.backend
    along = algebra.array(algebra.rng.normal(size=(1, int(matrix.shape[0]))))
    steps = _POWERS[matrix.shape[0] * matrix.shape[1] > _SMALL]
    for step in range(steps + 1):
        along = along * (1.0 / (algebra.norm(along) or 1.0))
        rest = backend.matmul(along, matrix)
        if step < steps:
            along = backend.matrix_transpose(backend.matmul(matrix, backend.matrix_transpose(rest)))
    return backend.flatten(along), backend.flatten(rest)


class _Powers:
    """Sweeps of the power iteration on a tensor, seen as a matrix of one half of its modes by the other."""

    def __init__(self, algebra: Algebra, tensor: Array) -> None:
        self.algebra, self.sizes = algebra, [int(size) for size in tensor.shape]
        halves = [math.prod(self.sizes[:m]) + math.prod(self.sizes[m:]) for m in range(1, len(self.sizes))]
        self.cut = 1 + halves.index(min(halves))
        rows = math.prod(self.sizes[: self.cut])
        self.matrix = algebra.backend.reshape(tensor, (rows, math.prod(self.sizes) // rows))
        self.norm = algebra.norm(tensor)

    def sweep(self, vectors: Sequence[Array]) -> tuple[list[Array], float]:
        """Return improved vectors of norm one, and the size of their outer product that is nearest to the tensor."""
        backend, cut = self.algebra.backend, self.cut
        left, right = list(vectors[:cut]), list(vectors[cut:])
        rest = backend.matmul(self.matrix, backend.reshape(_outer(backend, right), (-1, 1)))
        left, _ = self._half(rest, left)
        rest = backend.matmul(backend.reshape(_outer(backend, left), (1, -1)), self.matrix)
        right, size = self._half(rest, right)
        return left + right, size

    def _half(self, rest: Array, vectors: list[Array]) -> tuple[list[Array], float]:
        """Improve the vectors of one half, for what the other half leaves."""
        backend, sizes = self.algebra.backend, [int(vector.shape[0]) for vector in vectors]
        rest, size = backend.reshape(rest, sizes), 0.0
        for mode in range(len(vectors)):
            others: list[Array | None] = [None if m == mode else vector for m, vector in enumerate(vectors)]
            found = contracted(backend, rest, others, (sizes[mode],))
            size = float(np.linalg.norm(backend.to_numpy(found).astype(np.float64)))
            if size > 0.0:
                vectors[mode] = found * (1.0 / size)
        return vectors, size

    def followed(self, vectors: list[Array], size: float, limits: Limits) -> tuple[tuple[list[Array], float], int]:
        """Run sweeps until one gains too little; return the vectors and their size, and the number of sweeps."""
        eps, count = self.algebra.eps, 0
        while count < limits.iterations:
            found, now = self.sweep(vectors)
            count += 1
            gain = (now - size) * (now + size) / self.norm**2
            if not gain > 0.0:
                break
            vectors, size = found, now
            error = math.sqrt(max(eps, 1.0 - (size / self.norm) ** 2))
            if gain <= max(4.0 * eps, 2.0 * error * _FINER * limits.tol):
                break
        return (vectors, size), count


def _outer(backend: Array, vectors: Sequence[Array]) -> Array:
    """Return the outer product of vectors, flattened."""

    def pair(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    return functools.reduce(pair, vectors)
