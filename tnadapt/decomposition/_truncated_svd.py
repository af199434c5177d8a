"""Leading singular triplets by block Golub-Kahan-Lanczos bidiagonalization, with residuals at rounding.

Golub, Luk & Overton, "A block Lanczos method for computing the singular values and corresponding singular vectors of a
matrix" (ACM TOMS 7, 1981). All vectors are kept and orthogonalized twice. A block of as many vectors as triplets finds
repeated values. Where the values decay, a few products with the matrix are enough; where they do not, the basis reaches
its limit, and the caller computes the whole decomposition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array

from ._arpack import arpack_pays, arpack_vectors

__all__ = ["KrylovTriplets", "leading_triplets", "on_host", "truncated_pays"]

# A residual of up to this many times epsilon and the largest value is rounding.
_ROUNDING = 8.0
# The final residuals, computed from the vectors, add the rounding of the products.
_ACCEPTED = 64.0
# Blocks at least, and vectors at least, on the host before ARPACK takes over. Its single vectors need fewer products
# with the matrix.
_FIRST = 4, 8
# Below this number of rows and columns, or of elements, LAPACK takes less time than the calls of a few steps.
_SHORT, _FEW = 96, 1 << 16
# Largest part of the short side that the basis may take, and its largest number of vectors.
_PART, _MOST = 4, 512


class KrylovTriplets(NamedTuple):
    """Leading singular triplets.

    Attributes
    ----------
    u : array, shape (m, rank)
    s : ndarray, shape (rank,)
        On the host, float64, in descending order.
    v : array, shape (n, rank)
    converged : bool
        Whether all residuals ``|Aᵀ u - s v|`` are at rounding. The triplets are then singular triplets; that they are
        the leading ones is very likely, and not certain.
    """

    u: Array
    s: np.ndarray
    v: Array
    converged: bool


def truncated_pays(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether :func:`leading_triplets` can be faster than the full SVD of a matrix of this shape."""
    large = min(shape) >= _SHORT or math.prod(shape) >= _FEW
    return large and 4 * rank <= _limit(shape)


def _limit(shape: tuple[int, ...]) -> int:
    return min(_MOST, min(shape) // _PART)


def leading_triplets(
    backend: Backend, matrix: Array, rank: int, seed: int, start: np.ndarray | None = None
) -> KrylovTriplets:
    """Compute the leading singular triplets of a real matrix.

    Parameters
    ----------
    backend : Backend
    matrix : array, shape (m, n)
        Finite. On the host, all libraries compute in NumPy: eager libraries compile or dispatch each of the many small
        operations on a basis that grows.
    rank : int
    seed : int
        Seed of the start.
    start : ndarray, shape (min(m, n), block), optional
        First block, of the short side; random by default, multiplied by the matrix once.
    """
    if backend.name != "numpy" and on_host(backend, matrix):
        numpy, kind, device = load_backend("numpy"), backend.dtype_name(matrix), backend.device(matrix)
        found = leading_triplets(numpy, backend.to_numpy(matrix), rank, seed, start)
        return found._replace(
            u=backend.asarray(np.ascontiguousarray(found.u), kind, device),
            v=backend.asarray(np.ascontiguousarray(found.v), kind, device),
        )
    if matrix.shape[0] < matrix.shape[1]:
        u, s, v, converged = leading_triplets(backend, backend.matrix_transpose(matrix), rank, seed, start)
        return KrylovTriplets(v, s, u, converged)
    drawn = np.random.default_rng(seed).standard_normal((int(matrix.shape[0]), rank)) if start is None else start
    first = backend.asarray(drawn, backend.dtype_name(matrix), backend.device(matrix))
    if start is None:
        # In the row space, which is all of the space that is needed where the rank is no larger.
        first = backend.matmul(backend.matrix_transpose(matrix), backend.qr(first)[0])
    host = backend.name == "numpy" and arpack_pays(matrix.shape, rank)
    steps = min(max(_FIRST[0], _FIRST[1] // rank), _limit(matrix.shape) // rank) if host else None
    vectors, values, converged = _bidiagonalized(backend, matrix, backend.qr(first)[0], rank, steps)
    if host and not converged and np.isfinite(values).all():
        again = arpack_vectors(matrix, rank, np.ascontiguousarray(vectors.sum(axis=1)), values)
        if again is None:
            return KrylovTriplets(vectors, values, vectors, False)
        vectors, converged = again, True
    # With exact products of the vectors, u s is A v to rounding.
    q, r = backend.qr(backend.matmul(matrix, vectors))
    small = _host(backend, r)
    if not np.isfinite(small).all():
        return KrylovTriplets(q, values, vectors, False)
    left, s, right = np.linalg.svd(small)
    turned = [backend.asarray(one, backend.dtype_name(matrix), backend.device(matrix)) for one in (left, right.T)]
    u, v = backend.matmul(q, turned[0]), backend.matmul(vectors, turned[1])
    if converged:
        rest = backend.matmul(backend.matrix_transpose(matrix), u) - v * backend.asarray(
            s, backend.dtype_name(matrix), backend.device(matrix)
        )
        eps = float(np.finfo(backend.dtype_name(matrix)).eps)
        converged = bool((np.linalg.norm(_host(backend, rest), axis=0) <= _ACCEPTED * eps * s[0]).all())
    return KrylovTriplets(u, s, v, converged)


def on_host(backend: Backend, x: Array) -> bool:
    """Return whether an array is in the memory that NumPy uses."""
    return "cpu" in str(backend.device(x)).lower()


def _bidiagonalized(
    backend: Backend, matrix: Array, v: Array, rank: int, most: int | None
) -> tuple[Array, np.ndarray, bool]:
    """Return right singular vectors and values from a Krylov space of at most so many blocks, and if they converged."""
    eps = float(np.finfo(backend.dtype_name(matrix)).eps)
    width = int(v.shape[1])
    limit = _limit(matrix.shape) if most is None else most * width
    across = backend.matrix_transpose(matrix)
    u, corner = backend.qr(backend.matmul(matrix, v))
    lefts, rights = u, v
    inner = np.zeros((limit + width, limit + width))  # lefts' A rights: upper bidiagonal by blocks
    inner[:width, :width] = _host(backend, corner)
    step, check = 1, 1
    while True:
        after, coupling = _orthonormal(backend, backend.matmul(across, u), rights)
        beyond, size = _host(backend, coupling), rights.shape[1]
        full = size + width > limit if most is None else step >= most
        if step == check or full:
            if not (np.isfinite(inner).all() and np.isfinite(beyond).all()):
                return rights[:, :rank], np.full(rank, np.nan), False
            left, s, right = np.linalg.svd(inner[:size, :size])
            residuals = np.linalg.norm(beyond @ left[size - width :, :rank], axis=0)
            converged = bool((residuals <= _ROUNDING * eps * s[0]).all())
            # A block whose residuals are still far from rounding needs many steps.
            full |= most is not None and width > 1 and bool(residuals.max() > math.sqrt(eps) * s[0])
            if converged or full:
                chosen = backend.asarray(
                    np.ascontiguousarray(right[:rank].T), backend.dtype_name(matrix), backend.device(matrix)
                )
                return backend.qr(backend.matmul(rights, chosen))[0], s[:rank], converged
            check += max(1, step // 3)
        # The part of A v along the last u is known; both are removed along the whole basis, twice.
        u, corner = _orthonormal(backend, backend.matmul(matrix, after), lefts)
        inner[size - width : size, size : size + width] = beyond.T
        inner[size : size + width, size : size + width] = _host(backend, corner)
        lefts, rights = backend.concat([lefts, u], axis=1), backend.concat([rights, after], axis=1)
        step += 1


def _orthonormal(backend: Backend, block: Array, basis: Array) -> tuple[Array, Array]:
    """Return an orthonormal basis of the part of a block that is orthogonal to a basis, and that part's coordinates."""
    along = backend.matrix_transpose(basis)
    q, first = backend.qr(block - backend.matmul(basis, backend.matmul(along, block)))
    # Where a column vanished, the first result is any vector: it must be made orthogonal to the basis, too.
    q, second = backend.qr(q - backend.matmul(basis, backend.matmul(along, q)))
    return q, backend.matmul(second, first)


def _host(backend: Backend, x: Array) -> np.ndarray:
    return backend.to_numpy(x).astype(np.float64)
