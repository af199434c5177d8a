"""Truncation of a matrix to its leading singular triplets, by a number of them or by the error that is allowed.

Differentiable and traceable where only the library's own operations may run, by its SVD. Elsewhere by
:meth:`Algebra.svd`, which computes no more triplets than are asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, safe_repr

from ._linear_algebra import SVD_METHODS, TENSORLY, Algebra
from .known_later import LazyProof

__all__ = ["Leading", "MatrixTruncation", "Triplets", "kept"]


class Leading(NamedTuple):
    """The leading left singular vectors of a matrix.

    Attributes
    ----------
    u : array, shape (m, r)
    exact : bool or LazyProof
        Whether these are known to be the leading ones.
    """

    u: Array
    exact: bool | LazyProof


class Triplets(NamedTuple):
    """The leading singular triplets of a matrix.

    Attributes
    ----------
    u : array, shape (m, r)
    s : array, shape (r,)
    vh : array, shape (r, n)
    exact : bool or LazyProof
        Whether these are known to be the leading ones.
    """

    u: Array
    s: Array
    vh: Array
    exact: bool | LazyProof


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
        plain = backend.differentiates(like) or backend.is_complex(like) or backend.name not in TENSORLY
        self.algebra = None if plain else Algebra(backend, like, svd, seed, settled)

    def to_rank(self, matrix: Array, rank: int) -> Triplets:
        """Return at most ``rank`` triplets."""
        rank = min(rank, *(int(size) for size in matrix.shape))
        if self.algebra is None:
            return self._cut(*self.backend.svd(matrix), rank)
        u, values, v, exact = self.algebra.svd(matrix, rank)
        return Triplets(u, self.algebra.array(values), self.backend.matrix_transpose(v), exact)

    def left_to_rank(self, matrix: Array, rank: int) -> Leading:
        """Return at most ``rank`` left vectors."""
        rank = min(rank, *(int(size) for size in matrix.shape))
        if self.algebra is None:
            return Leading(self.backend.svd(matrix)[0][:, :rank], True)
        return Leading(*self.algebra.left(matrix, rank))

    def left_to_loss(self, matrix: Array, loss: float) -> Leading:
        """Return as many left vectors as are needed for an error of at most ``loss``; not inside a trace."""
        u, s = self.backend.svd(matrix)[:2] if self.algebra is None else self.algebra.all_left(matrix)
        return Leading(u[:, : kept(self.backend.to_numpy(s), int(s.shape[0]), loss)], True)

    def _cut(self, u: Array, s: Array, vh: Array, rank: int) -> Triplets:
        # The singular values of a complex matrix are real, but multiply complex vectors.
        return Triplets(u[:, :rank], self.backend.astype(s[:rank], self.backend.dtype_name(u)), vh[:rank, :], True)
