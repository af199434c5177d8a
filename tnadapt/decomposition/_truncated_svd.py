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

__all__ = [
    "KrylovTriplets",
    "lanczos_pays",
    "lanczos_vectors",
    "leading_triplets",
    "on_host",
    "single_products",
    "truncated_pays",
]


# -- Leading singular vectors on the host from products with single vectors: Golub-Kahan-Lanczos bidiagonalization -----

# Golub & Kahan, "Calculating the singular values and pseudo-inverse of a matrix" (SIAM J. Numer. Anal. 2, 1965). Only
# the right vectors are orthogonalized, which is enough for the leading triplets (Simon & Zha, "Low-rank matrix
# approximation using the Lanczos bidiagonalization process", SIAM J. Sci. Comput. 21, 2000). Without restarts, it needs
# fewer products than ARPACK, and a product with a single vector takes a quarter to an eighth of the time of one with
# four columns: it reads the matrix once, where BLAS first packs a matrix for a block.
#
# In exact arithmetic a single vector finds one copy of a repeated value. Another start looks for what was missed.


# Largest part of the short side that the rank may be: beyond it the full decomposition takes less time.
_HOST_PART = 16
# Most vectors; more than half of the short side take about as long as the full decomposition, if that is not short.
_HOST_MOST, _HOST_SHORT = 1024, 96
# Vectors that are allocated at first.
_ALLOCATED = 32
# A residual of up to this many times epsilon and the largest value is rounding.
_HOST_ROUNDING = 16.0
# Up to this size, or multiple of the rank, the projected matrix is decomposed in full, which takes less time than its
# leading triplets alone.
_SMALL, _MULTIPLE = 32, 8
# A deflated matrix whose norm exceeds the smallest value found by more than this holds a triplet that was missed.
_MISSED, _FIRST, _STEPS = 1e-6, 3, 8
# Relative error that a sum of squares in float32 may have.
_SUMMED = 1e-3
# Up to this number of columns, products with one after the other take less time than a product with all.
_SINGLE = 4


def lanczos_pays(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether :func:`lanczos_vectors` can be faster than the full SVD."""
    return _HOST_PART * rank <= min(shape)


def lanczos_vectors(
    matrix: np.ndarray, rank: int, start: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray] | None, bool]:
    """Compute the leading singular vectors of a matrix.

    Parameters
    ----------
    matrix : ndarray, shape (m, n), m >= n
        Finite, of a magnitude whose squares neither overflow nor underflow.
    rank : int
    start : ndarray, shape (n,)

    Returns
    -------
    (ndarray of shape (m, rank), ndarray of shape (n, rank)), or None
        Left and right vectors; orthonormal, but for the rounding on the left ones of small values. None if they do not
        converge in less time than the full decomposition, or some were missed.
    bool
        Whether some were missed, as values are repeated or the start was orthogonal to a vector.
    """
    run = _Bidiagonalization(matrix, start)
    most = min(_HOST_MOST, max(matrix.shape[1] // 2, min(matrix.shape[1], _HOST_SHORT)))
    tolerance = _HOST_ROUNDING * float(np.finfo(matrix.dtype).eps)
    check, before = min(rank + 1, most), (0, 0.0)
    while True:
        run.step()
        size = len(run.alphas)
        if not math.isfinite(run.alphas[-1]) or not math.isfinite(run.betas[-1]):
            return None, False
        ended = run.betas[-1] <= tolerance * max(run.alphas)  # the space is invariant
        if ended and size < rank:
            return None, True
        if size < check and not ended:
            continue
        left, s, right = _leading(run.alphas, run.betas, rank)
        residual = float(np.max(np.abs(left[-1]))) * run.betas[-1]
        if residual <= tolerance * s[0]:
            break
        if ended or size >= most:
            return None, ended
        check = min(most, size + _steps_left(before, (size, residual), tolerance * float(s[0])))
        before = size, residual
    vt = np.asarray(right.T, matrix.dtype) @ run.rights[:size]
    if rank > 1 and _misses(matrix, vt, s, run.squares):
        return None, True
    return ((np.asarray(left.T, matrix.dtype) @ run.lefts[:size]).T, vt.T), False


def single_products(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Compute ``matrix @ columns``, by one column after the other where this is faster."""
    count = columns.shape[1]
    if count > _SINGLE or not (matrix.flags.c_contiguous or matrix.flags.f_contiguous):
        return np.asarray(matrix @ columns)
    made = np.empty((count, matrix.shape[0]), matrix.dtype)
    for place in range(count):
        np.matmul(matrix, np.ascontiguousarray(columns[:, place]), out=made[place])
    return made.T


class _Bidiagonalization:
    """``A V = U B`` with an upper bidiagonal matrix B of ``alphas`` and ``betas``; vectors are rows here."""

    def __init__(self, matrix: np.ndarray, start: np.ndarray) -> None:
        self.matrix, self.alphas, self.betas = matrix, list[float](), list[float]()
        most = min(_ALLOCATED, matrix.shape[1] + 1)
        self.lefts, self.rights = (np.empty((most, size), matrix.dtype) for size in matrix.shape)
        self.rights[0] = start / _norm(start)
        self.negligible = float(np.finfo(matrix.dtype).eps) ** 2

    @property
    def squares(self) -> float:
        """Sum of the squares of B: a lower bound on that of A."""
        return float(np.dot(self.alphas, self.alphas) + np.dot(self.betas[:-1], self.betas[:-1]))

    def step(self) -> None:
        """Add a vector to U, and the next one to V."""
        size = len(self.alphas) + 1
        if size == len(self.rights):
            self.rights = np.concatenate([self.rights, np.empty_like(self.rights)])
            self.lefts = np.concatenate([self.lefts, np.empty_like(self.lefts)])
        basis, left = self.rights[:size], self.lefts[size - 1]
        np.matmul(self.matrix, basis[-1], out=left)
        if self.betas:
            left -= self.lefts[size - 2] * self.betas[-1]
        alpha = _norm(left)
        if alpha <= self.negligible * max(self.alphas, default=0.0):
            alpha = 0.0  # of an invariant space; its square may have underflowed
        left *= 1.0 / alpha if alpha > 0.0 else 0.0
        right = left @ self.matrix
        length = _norm(right)
        right -= basis[-1] * alpha
        # What is along the others is rounding; what is left after cancellation may again be.
        right -= (basis @ right) @ basis
        beta = _norm(right)
        if beta < 0.1 * length:
            right -= (basis @ right) @ basis
            beta = _norm(right)
        np.multiply(right, 1.0 / beta if beta > 0.0 else 0.0, out=self.rights[size])
        self.alphas.append(alpha)
        self.betas.append(beta)


def _norm(x: np.ndarray) -> float:
    return math.sqrt(float(x @ x))


def _leading(alphas: list[float], betas: list[float], rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the leading left vectors, values and right vectors of a bidiagonal matrix."""
    size = len(alphas)
    if size <= max(_SMALL, _MULTIPLE * rank):
        left, s, right = np.linalg.svd(np.diag(alphas) + np.diag(betas[:-1], 1))
        return left[:, :rank], s[:rank], right[:rank].T
    from scipy.linalg import eigh_tridiagonal

    # The vectors of [[0, B], [Bᵀ, 0]] with interleaved rows: right, left, right, …
    between = np.empty(2 * size - 1)
    between[::2], between[1::2] = alphas, betas[:-1]
    _, both = eigh_tridiagonal(
        np.zeros(2 * size), between, select="i", select_range=(2 * size - rank, 2 * size - 1), check_finite=False
    )
    # Each half is orthonormal up to rounding over the gaps between values: make both so, with B right = left s.
    right = np.linalg.qr(both[::2])[0]
    product = between[::2, None] * right
    product[:-1] += between[1::2, None] * right[1:]
    left, inner = np.linalg.qr(product)
    turn, s, back = np.linalg.svd(inner)
    return left @ turn, s, right @ back.T


def _steps_left(before: tuple[int, float], now: tuple[int, float], target: float) -> int:
    """Return after how many steps to look again, from how the residual has decreased."""
    passed, most = now[0] - before[0], max(2, now[0] // 2)
    if not before[1] > now[1] > 0.0:
        return max(1, most // 2)
    needed = math.log(now[1] / target) * passed / math.log(before[1] / now[1])
    return max(1, min(most, int(0.9 * needed)))


def _misses(matrix: np.ndarray, vt: np.ndarray, s: np.ndarray, squares: float = 0.0) -> bool:
    """Return whether a value larger than the smallest one that was found seems to be missing.

    ``squares`` is a lower bound on the sum of the squares of all values.
    """
    eps = float(np.finfo(matrix.dtype).eps)
    limit = float(s[-1]) * (1.0 + _MISSED) + 64.0 * eps * float(s[0])
    # No value is larger than the norm of what is left.
    most = float(np.sum(s * s)) + limit * limit
    if squares <= most:
        flat = matrix.ravel(order="K")
        if float(flat @ flat) * (1.0 + _SUMMED) <= most:
            return False
    return _exceeds(matrix, vt, limit)


def _exceeds(matrix: np.ndarray, vt: np.ndarray, limit: float) -> bool:
    """Return whether the norm of a matrix beside some right vectors is seen to exceed a limit, in a few steps."""
    # Another start than the one that may have missed a direction.
    v = np.asarray(np.random.default_rng(0).standard_normal(matrix.shape[1]), matrix.dtype)
    v -= (vt @ v) @ vt
    alphas, betas = list[float](), list[float]()
    beta, left = _norm(v), np.zeros(matrix.shape[0], matrix.dtype)
    for step in range(_STEPS):
        if not beta > 0.0:
            break
        v *= 1.0 / beta
        left = matrix @ v - left * (beta if step else 0.0)
        alpha = _norm(left)
        if not alpha > 0.0:
            break
        left *= 1.0 / alpha
        v = left @ matrix - v * alpha
        v -= (vt @ v) @ vt
        beta = _norm(v)
        alphas.append(alpha)
        betas.append(beta)
        if step + 1 >= _FIRST:
            last, found, _ = _leading(alphas, betas, 1)
            # The largest value of the space is above the limit, or near a value below it.
            if not found[0] + beta * abs(last[-1, 0]) > limit:
                return False
            if found[0] > limit:
                return True
    return bool(alphas and _leading(alphas, betas, 1)[1][0] > limit)


# -- Leading singular triplets by Golub-Kahan-Lanczos bidiagonalization, with residuals at rounding --------------------


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
