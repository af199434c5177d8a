"""Truncation of a matrix to its leading singular triplets, by a number of them or by the error that is allowed.

By :meth:`Algebra.svd`, which computes no more triplets than are asked for, and inside a trace by the library's own SVD.
Where derivatives are recorded, the triplets are the same, and their derivative is that of singular vectors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.algebra.products import rearranged
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
    "lower_bound",
    "with_value",
]


# -- Truncation of a matrix to its leading singular triplets, by a number of them or by the error that is allowed ------


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


# -- Lower bounds on the error of a fit, from the ranks that a network cannot exceed -----------------------------------

# A tensor of a format has unfoldings of limited rank, and the distance of an unfolding to the nearest matrix of that
# rank is known (Eckart & Young). The largest of these distances is a bound. A fit that meets it is optimal, whatever
# method found it. Bounds are computed in float64 for updates of any dtype, and only from whole rows of the first mode,
# which contain no padding.


# Unfoldings with a longer smaller side are skipped, and tensors with more elements.
_SIDE = 512
_ELEMENTS = 1 << 25
# Columns per matrix product when a Gram matrix is summed.
_BLOCK = 1 << 10


def lower_bound(algebra: Algebra, network: Network, vec: Array) -> float:
    """Return a lower bound on the distance of a network from a vector, over all arrays; 0 if none is known.

    Parameters
    ----------
    algebra : Algebra
    network : Network
    vec : array, shape (size,)

    Returns
    -------
    float
        Reduced by the possible rounding error. The vector's largest magnitude must be near 1, as its elements are
        squared.
    """
    if network.size > _ELEMENTS:
        return 0.0
    return max((_beyond(algebra, matrix, rank) for matrix, rank in _unfoldings(algebra, network, vec)), default=0.0)


def _unfoldings(algebra: Algebra, network: Network, vec: Array) -> Iterator[tuple[Array, int]]:
    """Yield unfoldings of the vector, and the maximum rank of the network's."""
    backend, sizes = algebra.backend, network.sizes
    rest = math.prod(sizes[1:])
    rows = network.size // rest
    if not rows:
        return
    tensor = backend.reshape(vec[: rows * rest], (rows, *sizes[1:]))
    if len(network.splits) == 1:
        yield from _of_format(algebra, network, tensor)
    elif network.kronecker:
        inner = [split.sizes for split in network.splits]
        if rows != sizes[0] or any(math.prod(s[m] for s in inner) != d for m, d in enumerate(sizes)):
            return
        outer = rearranged(backend, tensor, inner)
        # Of two splits, one unfolding is the other transposed.
        for k in range(len(inner) if len(inner) > 2 else 1):
            yield _matrix(algebra, outer, [k]), network.terms
    elif len(sizes) == 2:
        # The rank of a Hadamard product is at most the product of the factors' ranks.
        yield tensor, network.terms * math.prod(split.unfolding_rank([0]) for split in network.splits)


def _of_format(algebra: Algebra, network: Network, tensor: Array) -> Iterator[tuple[Array, int]]:
    for modes, rank in network.splits[0].bounded_unfoldings():
        yield _matrix(algebra, tensor, modes), network.terms * rank


def _matrix(algebra: Algebra, tensor: Array, modes: list[int]) -> Array:
    """Unfold a tensor with some modes as rows and the others as columns."""
    others = [mode for mode in range(len(tensor.shape)) if mode not in modes]
    rows = math.prod(tensor.shape[mode] for mode in modes)
    turned = algebra.backend.permute_dims(tensor, [*modes, *others])
    return algebra.backend.reshape(turned, (rows, math.prod(tensor.shape) // rows))


def _beyond(algebra: Algebra, matrix: Array, rank: int) -> float:
    """Return a lower bound on the norm of the singular values after the first ``rank``; 0 if the matrix is skipped."""
    backend, double = algebra.backend, algebra.double
    short = min(matrix.shape)
    if rank >= short or short > _SIDE:
        return 0.0
    if matrix.shape[0] > matrix.shape[1]:
        matrix = backend.matrix_transpose(matrix)
    gram = np.zeros((short, short))
    for start in range(0, matrix.shape[1], _BLOCK):
        block = algebra.doubled(matrix[:, start : start + _BLOCK])
        gram += double.backend.to_numpy(double.backend.matmul(block, double.backend.matrix_transpose(block)))
    values = np.linalg.eigvalsh(gram)[: short - rank]
    # An entry of a block's Gram matrix is a sum of _BLOCK products, whose error is typically eps * sqrt(_BLOCK); four
    # times that is allowed. The error of the eigenvalues is at most `short` times as large.
    slack = 4.0 * short * math.sqrt(_BLOCK) * double.eps * float(np.trace(gram))
    return math.sqrt(max(0.0, float(values.sum()) - slack))
