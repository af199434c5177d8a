"""CP decomposition by alternating least squares.

Carroll & Chang (1970) and Harshman (1970); Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51,
2009), section 3.4. The products of the tensor with all factors but one come from two large matrix products a sweep, one
for each half of the modes (Phan, Tichavský & Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC
tensor factorizations", IEEE Trans. Signal Process. 61, 2013).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.factor_products import khatri_rao
from tnadapt.algebra.products import hadamard_tensor
from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

from .frobenius import norm_of

__all__ = ["CPSweeps", "cp_als"]

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
