"""Leading singular triplets by Golub-Kahan-Lanczos bidiagonalization, with residuals at rounding.

On the host with single vectors, which take the fewest and the fastest products. On a device, and where single vectors
miss copies of a repeated value, with blocks of as many vectors as triplets (Golub, Luk & Overton, "A block Lanczos
method for computing the singular values and corresponding singular vectors of a matrix", ACM TOMS 7, 1981); all vectors
are kept and orthogonalized twice. Where the values hardly decay, the basis reaches its limit, and the caller computes
the whole decomposition.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array

from ._lanczos import lanczos_pays, lanczos_vectors, single_products

__all__ = ["KrylovTriplets", "leading_triplets", "on_host", "truncated_pays"]

# A residual of up to this many times epsilon and the largest value is rounding.
_ROUNDING = 8.0
# The final residuals, computed from the vectors, add the rounding of the products.
_ACCEPTED = 64.0
# Below this number of rows and columns, or of elements, LAPACK takes less time than the calls of a few steps.
_SHORT, _FEW = 96, 1 << 16
# Largest part of the short side that the basis may take, and its largest number of vectors.
_PART, _MOST = 4, 512
# Part of the dtype's exponents within which norms by sums of squares are right.
_SAFE = 0.25


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
        the leading ones is likely, but not certain.
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
    rng = np.random.default_rng(seed)
    if backend.name == "numpy" and lanczos_pays(matrix.shape, rank):
        pair, missed = _by_single_vectors(matrix, rank, rng, start)
        if pair is not None or not missed:
            return _checked(backend, matrix, pair, rank)
    drawn = rng.standard_normal((int(matrix.shape[0]), rank)) if start is None else start
    first = backend.asarray(drawn, backend.dtype_name(matrix), backend.device(matrix))
    if start is None:
        # In the row space, which is all of the space that is needed where the rank is no larger.
        first = backend.matmul(backend.matrix_transpose(matrix), backend.qr(first)[0])
    return _checked(backend, matrix, _bidiagonalized(backend, matrix, backend.qr(first)[0], rank), rank)


def _by_single_vectors(
    matrix: np.ndarray, rank: int, rng: np.random.Generator, start: np.ndarray | None
) -> tuple[tuple[np.ndarray, np.ndarray] | None, bool]:
    """Return left and right vectors if they were found, and whether some were missed, which blocks may find."""
    if not (matrix.flags.c_contiguous or matrix.flags.f_contiguous):
        matrix = np.ascontiguousarray(matrix)
    first = rng.standard_normal(len(matrix)) if start is None else start.sum(axis=1)
    first = np.ascontiguousarray(first, matrix.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        seen = first @ matrix if start is None else matrix @ first
    size = float(np.max(np.abs(seen), initial=0.0))
    if not math.isfinite(size) or size == 0.0:
        return None, size == 0.0
    exponent, most = math.frexp(size)[1], np.finfo(matrix.dtype).maxexp * _SAFE
    if abs(exponent) > most:
        matrix, seen = np.ldexp(matrix, -exponent), np.ldexp(seen, -exponent)
    return lanczos_vectors(matrix, rank, seen if start is None else first)


def _checked(backend: Backend, matrix: Array, pair: tuple[Array, Array] | None, rank: int) -> KrylovTriplets:
    """Return triplets from approximate vectors of which ``A v = u s`` holds; converged if ``Aᵀ u = v s`` does, too.

    The right vectors are orthonormal; the left ones may have the rounding of large values on those of small ones.
    """
    if pair is None:
        return _unconverged(matrix, rank)
    left, right = backend.qr(pair[0])[0], pair[1]
    across = _product(backend, backend.matrix_transpose(matrix), left)
    small = _host(backend, backend.matmul(backend.matrix_transpose(right), across))
    if not np.isfinite(small).all():
        return _unconverged(matrix, rank)
    turned_right, s, turned_left = np.linalg.svd(small)
    kind, device = backend.dtype_name(matrix), backend.device(matrix)
    to_left, to_right = (backend.asarray(np.ascontiguousarray(x), kind, device) for x in (turned_left.T, turned_right))
    u, v = backend.matmul(left, to_left), backend.matmul(right, to_right)
    rest = _host(backend, backend.matmul(across, to_left)) - _host(backend, v) * s
    limit = _ACCEPTED * float(np.finfo(kind).eps) * float(s[0])
    return KrylovTriplets(u, s, v, bool((np.linalg.norm(rest, axis=0) <= limit).all()))


def _unconverged(matrix: Array, rank: int) -> KrylovTriplets:
    return KrylovTriplets(matrix[:, :rank], np.full(rank, np.nan), matrix[:rank, :].T, False)


def _product(backend: Backend, matrix: Array, columns: Array) -> Array:
    return single_products(matrix, columns) if backend.name == "numpy" else backend.matmul(matrix, columns)


def on_host(backend: Backend, x: Array) -> bool:
    """Return whether an array is in the memory that NumPy uses."""
    return "cpu" in str(backend.device(x)).lower()


def _bidiagonalized(backend: Backend, matrix: Array, v: Array, rank: int) -> tuple[Array, Array] | None:
    """Return left and right singular vectors from a Krylov space of blocks, if they converge."""
    eps = float(np.finfo(backend.dtype_name(matrix)).eps)
    width = int(v.shape[1])
    limit = _limit(matrix.shape)
    across = backend.matrix_transpose(matrix)
    u, corner = backend.qr(backend.matmul(matrix, v))
    lefts, rights = u, v
    inner = np.zeros((limit + width, limit + width))  # lefts' A rights: upper bidiagonal by blocks
    inner[:width, :width] = _host(backend, corner)
    step, check = 1, 1
    while True:
        after, coupling = _orthonormal(backend, backend.matmul(across, u), rights)
        beyond, size = _host(backend, coupling), rights.shape[1]
        full = size + width > limit
        if step == check or full:
            if not (np.isfinite(inner).all() and np.isfinite(beyond).all()):
                return None
            left, s, right = np.linalg.svd(inner[:size, :size])
            residuals = np.linalg.norm(beyond @ left[size - width :, :rank], axis=0)
            converged = bool((residuals <= _ROUNDING * eps * s[0]).all())
            if converged:
                turned = [np.ascontiguousarray(one) for one in (left[:, :rank], right[:rank].T)]
                kind, device = backend.dtype_name(matrix), backend.device(matrix)
                u, v = (
                    backend.matmul(basis, backend.asarray(one, kind, device))
                    for basis, one in zip((lefts, rights), turned, strict=True)
                )
                return u, backend.qr(v)[0]
            if full:
                return None
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
