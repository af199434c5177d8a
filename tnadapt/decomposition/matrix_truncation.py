"""Truncation of a matrix to its leading singular triplets, by a number of them or by the error that is allowed.

By :meth:`Algebra.svd`, which computes no more triplets than are asked for, and inside a trace by the library's own SVD.
Where derivatives are recorded, the triplets are the same, and their derivative is that of singular vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ConfigError, safe_repr

from .fits import Claim
from .linear_algebra import SVD_METHODS, TENSORLY, Algebra

__all__ = [
    "Leading",
    "MatrixTruncation",
    "Triplets",
    "kept",
    "with_value",
]


class Leading(NamedTuple):
    """The leading left singular vectors of a matrix.

    Attributes
    ----------
    u : array, shape (m, r)
    exact : bool or function that returns one
        Whether these are known to be the leading ones.
    """

    u: Array
    exact: Claim


class Triplets(NamedTuple):
    """The leading singular triplets of a matrix.

    Attributes
    ----------
    u : array, shape (m, r)
    s : array, shape (r,)
    vh : array, shape (r, n)
    exact : bool or function that returns one
        Whether these are known to be the leading ones.
    """

    u: Array
    s: Array
    vh: Array
    exact: Claim


def kept(values: np.ndarray, most: int, loss: float) -> int:
    """Return how many singular values to keep: at least one, at most ``most``, and none that ``loss`` allows to drop.

    Parameters
    ----------
    values : ndarray
        In descending order.
    most : int
    loss : float
        Norm of the values that may be dropped.

    Examples
    --------
    >>> kept(np.array([3.0, 0.4, 0.3]), 3, 0.5), kept(np.array([3.0, 0.4, 0.3]), 3, 0.49)
    (1, 2)
    """
    tails = np.sqrt(np.cumsum(np.square(values[::-1], dtype=np.float64)))[::-1]
    needed = int(np.count_nonzero(tails > loss * (1.0 + 1e-12)))
    return max(1, min(needed, most))


class MatrixTruncation:
    """Truncates matrices of one library, dtype and device.

    Parameters
    ----------
    backend : Backend
    like : array
        What is decomposed.
    svd : {"auto", "full", "randomized"}
        As for :func:`tnadapt.decompose`.
    seed : int
    settled : bool
        Whether nobody else can change the matrices later; otherwise what a proof needs is copied.
    """

    def __init__(
        self, backend: Backend, like: Array, svd: str = "auto", seed: int = 0, *, settled: bool = False
    ) -> None:
        self.backend = backend
        if svd not in SVD_METHODS:
            raise ConfigError(f"svd must be one of {', '.join(SVD_METHODS)}; got {safe_repr(svd)}")
        traced = not backend.is_concrete(like)
        plain = traced or backend.is_complex(like) or backend.name not in TENSORLY
        self.algebra = None if plain else Algebra(backend, backend.detached(like), svd, seed, settled)

    def to_rank(self, matrix: Array, rank: int) -> Triplets:
        """Return at most ``rank`` triplets."""
        rank = min(rank, *(int(size) for size in matrix.shape))
        if self._recorded(matrix):
            found = self.to_rank(self.backend.detached(matrix), rank)
            u = self._with_derivative(matrix, found.u, triplets=True)
            rest = self.backend.matmul(self.backend.conj(self.backend.matrix_transpose(u)), matrix)
            s = with_value(
                self.backend, found.s, self._real(self.backend.sum(rest * self.backend.conj(found.vh), axis=1))
            )
            vh = rest / self.backend.reshape(self.backend.where(abs(s) > 0.0, s, s * 0.0 + 1.0), (-1, 1))
            return Triplets(u, s, with_value(self.backend, found.vh, vh), found.exact)
        if self.algebra is None:
            return self._cut(*self.backend.svd(matrix), rank)
        u, values, v, exact = self.algebra.svd(matrix, rank)
        return Triplets(u, self.algebra.array(values), self.backend.matrix_transpose(v), exact)

    def left_to_rank(self, matrix: Array, rank: int) -> Leading:
        """Return at most ``rank`` left vectors."""
        rank = min(rank, *(int(size) for size in matrix.shape))
        if self._recorded(matrix):
            found = self.left_to_rank(self.backend.detached(matrix), rank)
            return found._replace(u=self._with_derivative(matrix, found.u))
        if self.algebra is None:
            return Leading(self.backend.svd(matrix)[0][:, :rank], True)
        return Leading(*self.algebra.left(matrix, rank))

    def left_to_loss(self, matrix: Array, loss: float) -> Leading:
        """Return as many left vectors as are needed for an error of at most ``loss``; not inside a trace."""
        u, s = self.backend.svd(matrix)[:2] if self.algebra is None else self.algebra.all_left(matrix)
        return Leading(u[:, : kept(self.backend.to_numpy(s), int(s.shape[0]), loss)], True)

    def _recorded(self, matrix: Array) -> bool:
        return self.backend.is_concrete(matrix) and self.backend.differentiates(matrix)

    def _real(self, x: Array) -> Array:
        """Return the real part, in the same dtype."""
        return (x + self.backend.conj(x)) * 0.5 if self.backend.is_complex(x) else x

    def _with_derivative(self, matrix: Array, u: Array, triplets: bool = False) -> Array:
        """Return leading left singular vectors of a matrix with their derivative.

        With ``triplets``, the right vectors are computed from them, which takes singular values that are not zero.
        """
        backend, kind = self.backend, self.backend.dtype_name(matrix)
        host = backend.to_numpy(u)

        def pullback(x: Array, cotangents: Sequence[Array]) -> Array:
            found = _pulled_back(backend.to_numpy(x), host, backend.to_numpy(cotangents[0]), triplets)
            return backend.asarray(found, kind, backend.device(x))

        return backend.with_pullback(matrix, [u], pullback)[0]

    def _cut(self, u: Array, s: Array, vh: Array, rank: int) -> Triplets:
        # The singular values of a complex matrix are real, but multiply complex vectors.
        return Triplets(u[:, :rank], self.backend.astype(s[:rank], self.backend.dtype_name(u)), vh[:rank, :], True)


def with_value(backend: Backend, value: Array, array: Array) -> Array:
    """Return an array with the derivative of another one, which differs from it by rounding."""
    return value + (array - backend.detached(array))


def _pulled_back(matrix: np.ndarray, leading: np.ndarray, cotangent: np.ndarray, triplets: bool) -> np.ndarray:
    """Return the gradient with respect to a matrix, given that with respect to its leading left singular vectors.

    With ``A Aᴴ = U diag(λ) Uᴴ``, the vectors change by ``du_j = Σ_k u_k (u_kᴴ d(A Aᴴ) u_j) / (λ_j - λ_k)`` over all
    k ≠ j. A function that does not depend on the basis of their span has no terms of k within it.
    """
    eps = float(np.finfo(matrix.dtype).eps)
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    a, given, cotangent = matrix.astype(wide), leading.astype(wide), cotangent.astype(wide)
    rank = given.shape[1]
    u, s, _ = np.linalg.svd(a, full_matrices=False)
    squares, first = s**2, u[:, :rank]
    turned = first.conj().T @ given
    size = np.linalg.norm(cotangent)
    if size == 0.0:
        return np.zeros_like(a)
    # Singular values that differ by less are equal up to rounding.
    clear = 1e3 * eps * s[0]
    least = s[rank] if rank < len(s) else 0.0
    # The span of all left vectors does not change.
    whole = rank == matrix.shape[0] and not triplets
    unclear = not whole and s[rank - 1] - least <= clear
    if unclear or np.linalg.norm(turned.conj().T @ turned - np.eye(rank)) > max(1e-3, 1e3 * eps):
        raise BackendError(
            f"singular values {rank} and {rank + 1} of an unfolding of shape {matrix.shape} are equal up to rounding, "
            "or random projections have not found the leading ones, so that the truncation has no derivative: use "
            "another rank and svd='full', or detach the tensor"
        )
    cotangent = cotangent @ turned.conj().T
    inner = u.conj().T @ cotangent
    gaps = squares[None, :rank] - squares[:, None]
    within = inner[:rank] - inner[:rank].conj().T
    small, tied = np.abs(within) <= 1e3 * eps * size, np.abs(s[None, :rank] - s[:rank, None]) <= clear
    if (tied & ~small).any():
        raise BackendError(
            "this function of a decomposition depends on the signs, phases or basis of singular vectors of equal "
            "singular values, so that it has no derivative: differentiate what the arrays represent, such as "
            "to_tensor(), entries() or norm(), or detach the tensor"
        )
    weights = np.zeros_like(inner)
    weights[:rank] = np.where(tied, 0.0, within) / np.where(tied, 1.0, gaps[:rank])
    weights[rank:] = inner[rank:] / gaps[rank:]
    change = u @ weights
    if u.shape[0] > u.shape[1]:
        change = change + (cotangent - u @ inner) / squares[:rank]
    # Half of the terms within the span are counted twice below.
    change = change - 0.5 * first @ weights[:rank]
    both = change @ (first.conj().T @ a)
    return np.asarray(both + first @ (change.conj().T @ a))
