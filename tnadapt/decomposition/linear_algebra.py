"""Linear algebra for decompositions, on the library of the arrays: singular vectors, truncation, norms and scaling.

``Algebra.svd`` computes a few triplets of a large matrix by SciPy's ARPACK, random projections by TensorLy, and
everything else by the library's own SVD.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends import Array, Backend, load_backend
from tnadapt.errors import BackendError

from .fits import Claim, no_matrix_is_closer

# -- A few singular triplets of a large matrix, by block iteration or by ARPACK ----------------------------------------

# A block of random vectors is multiplied by the matrix and its transpose in turn (subspace iteration; Halko, Martinsson
# & Tropp, 2011). What the first product has in the vectors beyond the rank, and not in the others, tells whether these
# span all (ibid., section 4.3). Each later product shows the residual of the triplets before it, which bounds that of
# its own. Where the values decay too slowly for that, ARPACK (Lehoucq, Sorensen & Yang, 1998) finds eigenvectors of
# ``Aᵀ A`` from products with single vectors, which are computed where the matrix is. The triplets are then computed
# from the matrix between these vectors, because squared singular values have only half of the digits. Single vectors
# may miss copies of a repeated value: a few more steps, from another start and orthogonal to the vectors found so far,
# reveal them.


# With fewer rows and columns, or elements, LAPACK takes less time than the calls of a few steps.
_SHORT, _FEW = 96, 1 << 16
# Maximum rank, as a fraction of the shorter side and absolutely.
_PART, _MOST = 16, 128
# Vectors of a block beyond the rank, and passes that take as much time as ARPACK.
_MORE, _PASSES = 8, 7
# Where the last value of the first product is more than this part of the last that is wanted, ARPACK is faster. Vectors
# beyond the rank are dropped where the others alone gain this part of the digits in a pass.
_SLOW, _GAINED = 0.1, 0.7
# A norm is at most this many times what random vectors show of it.
_SURE = 3.0
# Steps to the first restart beyond the rank, of four or more, in single and in double precision, and restarts that are
# always allowed. As many steps in total as the short side is long take about as much time as the full decomposition.
_STEPS, _LEAST, _RESTARTS = (8, 16), 4, 10
# Residuals of up to this many times epsilon and the largest value are rounding: of ARPACK, and of the triplets.
_CONVERGED, _ACCEPTED = 8.0, 64.0
# A value that exceeds the smallest of the triplets by more than this was missed. Steps of the search for one to the
# first restart, and the part of its square that it may be wrong by.
_MISSED, _SEARCH, _ROUGH = 1e-6, 5, 0.03
# Bytes of rows that are still in the cache when they are multiplied for the second time.
_TWICE = 1 << 19


def truncated_pays(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether :func:`leading_triplets` can be faster than the full SVD of a matrix of this shape."""
    large = min(shape) >= _SHORT or math.prod(shape) >= _FEW
    return large and rank <= min(_MOST, min(shape) // _PART)


def leading_triplets(backend: Backend, matrix: Array, rank: int, seed: int) -> tuple[Array, np.ndarray, Array] | None:
    """Compute the leading singular triplets of a real matrix.

    Parameters
    ----------
    backend : Backend
    matrix : array, shape (m, n)
    rank : int
        Less than m and n.
    seed : int
        Seed of the start.

    Returns
    -------
    u : array, shape (m, rank)
    s : ndarray, shape (rank,)
        On the host, float64, in descending order.
    v : array, shape (n, rank)

    Notes
    -----
    None if they do not converge in less time than the full decomposition takes, or if larger values were missed. The
    residuals of triplets that are returned are at rounding: those from ARPACK are computed, those of the block bounded
    by the pass before and by what random vectors show of the rest. That these are the leading ones is likely, but not
    certain.
    """
    if matrix.shape[0] < matrix.shape[1]:
        triplets = leading_triplets(backend, backend.matrix_transpose(matrix), rank, seed)
        return None if triplets is None else triplets[::-1]
    if backend.name != "numpy" and on_host(backend, matrix):
        # Eager libraries dispatch, or compile, each of many small operations.
        numpy, dtype, device = load_backend("numpy"), backend.dtype_name(matrix), backend.device(matrix)
        triplets = leading_triplets(numpy, backend.to_numpy(matrix), rank, seed)
        if triplets is None:
            return None
        u, v = (backend.asarray(np.ascontiguousarray(vectors), dtype, device) for vectors in triplets[::2])
        return u, triplets[1], v
    if backend.name == "numpy" and not (matrix.flags.c_contiguous or matrix.flags.f_contiguous):
        matrix = np.ascontiguousarray(matrix)
    rng = np.random.default_rng(seed)
    start, largest, triplets = _subspace(backend, matrix, rank, rng)
    if triplets is not None or not 0.0 < largest < math.inf:
        return triplets
    info, short = np.finfo(backend.dtype_name(matrix)), int(matrix.shape[1])
    # Scaled so that squares neither overflow nor underflow.
    scale = 2.0 ** min(max(-math.frexp(largest)[1], 2 - info.maxexp), info.maxexp - 2)
    squared, eps = _squared(backend, matrix, scale), float(info.eps)
    # The start is in the row space: if the rank is no larger than its dimension, it is all that is needed.
    space = min(short, max(2 * rank + 1, max(rank, _LEAST) + _STEPS[eps < 1e-10]))
    restarts = max(_RESTARTS, short // max(1, space - rank))
    pairs = _eigenvectors(squared, start, rank, space, restarts, _CONVERGED * eps, rng)
    ritz = None if pairs is None else _rayleigh_ritz(backend, matrix, np.linalg.qr(pairs[1])[0])
    if ritz is None:
        return None
    u, s, v, residual = ritz
    rounding = _ACCEPTED * eps * float(s[0])
    # Vectors of zeros come from ARPACK's own random numbers, which are the same each time from SciPy 1.17 on.
    arbitrary = not _seeded() and s[-1] <= rounding
    if arbitrary or not residual <= rounding:
        return None
    if rank == 1:
        return u, s, v
    known = backend.to_numpy(v)

    def deflated(vector: np.ndarray) -> np.ndarray:
        """Multiply by ``Aᵀ A`` without its part along the right vectors."""
        image = squared(vector - known @ (known.T @ vector))
        return np.asarray(image - known @ (known.T @ image))

    another = np.asarray(rng.standard_normal(short), start.dtype)
    largest_left = _eigenvectors(deflated, another, 1, min(short, _SEARCH), _RESTARTS, _ROUGH, rng)
    limit = scale * (s[-1] * (1.0 + _MISSED) + rounding)
    missed = largest_left is not None and math.sqrt(max(0.0, largest_left[0][0])) > limit
    return None if missed else (u, s, v)


def _subspace(
    backend: Backend, matrix: Array, rank: int, rng: np.random.Generator
) -> tuple[np.ndarray, float, tuple[Array, np.ndarray, Array] | None]:
    """Return a nearly leading right vector, about the largest value, and the triplets where a few passes yield them."""
    dtype, device = backend.dtype_name(matrix), backend.device(matrix)

    def rotated(basis: Array, rotation: np.ndarray) -> Array:
        return backend.matmul(basis, backend.asarray(np.ascontiguousarray(rotation), dtype, device))

    def factored(image: Array) -> tuple[Array, np.ndarray, float]:
        basis, triangle = backend.qr(image)
        host = backend.to_numpy(triangle).astype(np.float64)
        return basis, host, float(np.max(np.abs(host)))

    sides, short = (matrix, backend.matrix_transpose(matrix)), int(matrix.shape[1])
    rounding = _ACCEPTED * float(np.finfo(dtype).eps)
    some, wide = (min(rank + more, short) for more in (_MORE // 2, _MORE))
    bound, residual, beyond, last = math.inf, math.inf, 0.0, 0.0
    block = backend.asarray(rng.standard_normal((short, wide)), dtype, device)
    with np.errstate(over="ignore", invalid="ignore"):
        basis, host, largest = factored(_multiplied(backend, matrix, block))
        if not 0.0 < largest < math.inf:
            return np.zeros(0), largest, None
        # What the vectors beyond some show outside of the space of these.
        outside = _SURE * float(np.linalg.norm(host[some:] / largest)) * largest / math.sqrt(max(1, wide - some))
        if wide == rank + _MORE and outside <= rounding * largest:
            basis, bound = basis[:, :some], outside
        else:
            to_left, values, _ = np.linalg.svd(host)
            if values[-1] > _SLOW * values[rank - 1]:
                leading = backend.sum(rotated(basis, to_left[:, :rank]), axis=1)
                return backend.to_numpy(backend.matmul(sides[1], leading)) / largest, largest, None
        image = _multiplied(backend, sides[1], basis)
    for passes in range(2, _PASSES + 1):
        following, host, largest = factored(image)
        if not 0.0 < largest < math.inf:
            break
        to_after, values, to_before = np.linalg.svd(host)
        s, largest = values[:rank], float(values[0])
        if len(values) > rank:
            beyond, last = values[rank], values[-1]
        alone, falls = (x / s[-1] if s[-1] else 0.0 for x in (beyond, last))
        before, after = rotated(basis, to_before[:rank].T), rotated(following, to_after)
        left, right = (after[:, :rank], before) if passes % 2 else (before, after[:, :rank])
        if passes > 2:
            # The residual of the triplets before these, turned by what is outside of them.
            bound = residual * min(1.0, _SURE * alone or 1.0)
        if bound <= rounding * largest:
            return np.zeros(0), largest, (left, s, right)
        # In a pass the residual falls by about this factor, of which the block's last value tells too little.
        if min(residual, largest) * (1.5 * falls) ** (_PASSES - passes) > rounding * largest:
            return backend.to_numpy(right).sum(axis=1), largest, None
        if alone <= falls**_GAINED:
            after, last = after[:, :rank], beyond
        # One equation of the triplets holds by their definition, up to rounding; this is the other one.
        basis, image = after, _multiplied(backend, sides[passes % 2], after)
        rest = backend.to_numpy(image[:, :rank]).astype(np.float64) - backend.to_numpy(before) * s
        residual = largest * float(np.max(np.linalg.norm(rest / largest, axis=0)))
    return np.zeros(0), largest, None


def _multiplied(backend: Backend, matrix: Array, block: Array) -> Array:
    """Return the product of a matrix and some vectors; BLAS takes less time if the matrix is read row by row."""
    transposed = backend.matrix_transpose
    if backend.name == "numpy" and not matrix.flags.c_contiguous:
        return transposed(backend.matmul(transposed(block), transposed(matrix)))
    return backend.matmul(matrix, block)


def _squared(backend: Backend, matrix: Array, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return the product of a vector on the host with ``Aᵀ A`` and the square of a scale, computed row by row."""
    dtype, device, count = backend.dtype_name(matrix), backend.device(matrix), int(matrix.shape[0])
    cached = backend.name == "numpy" and matrix.flags.c_contiguous
    rows = max(1, _TWICE // matrix[:1].nbytes) if cached else count
    parts = [matrix[top : top + rows] for top in range(0, count, rows)]

    def squared(vector: np.ndarray) -> np.ndarray:
        column = backend.asarray(vector, dtype, device)
        return backend.to_numpy(sum((part @ column * scale) @ part for part in parts) * scale)

    return squared


def _rayleigh_ritz(
    backend: Backend, matrix: Array, vectors: np.ndarray
) -> tuple[Array, np.ndarray, Array, float] | None:
    """Return a matrix's singular triplets in the span of right vectors, and the largest norm of ``Aᵀ u - s v``."""
    dtype, device, across = backend.dtype_name(matrix), backend.device(matrix), backend.matrix_transpose(matrix)
    right = backend.asarray(vectors, dtype, device)
    left = backend.qr(_multiplied(backend, matrix, right))[0]
    back = _multiplied(backend, across, left)
    inner = backend.to_numpy(backend.matmul(backend.matrix_transpose(right), back)).astype(np.float64)
    if not np.isfinite(inner).all():
        return None
    turned_right, s, turned_left = np.linalg.svd(inner)
    to_left, to_right = (backend.asarray(np.ascontiguousarray(x), dtype, device) for x in (turned_left.T, turned_right))
    u, v = backend.matmul(left, to_left), backend.matmul(right, to_right)
    rest = backend.to_numpy(backend.matmul(back, to_left)).astype(np.float64) - backend.to_numpy(v) * s
    return u, s, v, float(np.max(np.linalg.norm(rest, axis=0)))


def _eigenvectors(
    product: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    count: int,
    steps: int,
    restarts: int,
    tol: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the largest eigenvalues of a symmetric product, ascending, and their vectors, if they converge."""
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    size = len(start)
    operator = LinearOperator((size, size), matvec=product, dtype=start.dtype)
    try:
        # OpenBLAS's kernels may set the flag of an invalid operation: see NumpyBackend.matmul.
        with np.errstate(invalid="ignore"):
            values, vectors = eigsh(
                operator, count, which="LA", v0=start, ncv=steps, maxiter=restarts, tol=tol,
                **({"rng": rng} if _seeded() else {}),
            )  # fmt: skip
    except ArpackError:
        return None
    return values, vectors


@functools.cache
def _seeded() -> bool:
    """Return whether ARPACK takes a random generator."""
    from scipy.sparse.linalg import eigsh

    return "rng" in inspect.signature(eigsh).parameters


def on_host(backend: Backend, x: Array) -> bool:
    """Return whether an array is in the memory that NumPy uses."""
    return "cpu" in str(backend.device(x)).lower()


def double_on_host(backend: Backend, x: Array) -> np.ndarray:
    """Return an array in NumPy, in double precision, real or complex."""
    host = np.asarray(backend.to_numpy(x))
    return host.astype(np.result_type(host.dtype, np.float64))


def arrays_on_host(backend: Backend, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
    """Return arrays in NumPy, in double precision, real or complex."""
    return {name: double_on_host(backend, array) for name, array in arrays.items()}


# -- Norms, scaling and singular vectors in one library, dtype and device ----------------------------------------------

# TensorLy has one backend for the whole process. Here it is set for the calling thread only, and restored afterwards.


# Name of a library in tnadapt -> its name in TensorLy.
TENSORLY = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "cupy": "cupy"}

# How leading singular vectors are computed.
SVD_METHODS = ("auto", "full", "randomized")

_OVERSAMPLES = 10
_POWER_ITERATIONS = 4
# Columns per row from which a matrix is first reduced to its triangular factor, and rows up to which that also takes
# less time than a Krylov space. With fewer elements, overhead dominates.
_WIDE, _NARROW, _TINY = 4, 96, 1 << 10
_PIECE = 1 << 20
# Up to this many elements are still in the cache when they are read again.
_CACHED = 1 << 15
# A sum of squares in this range has lost nothing to overflow or underflow of its terms.
_SAFE = 1e-200, 1e200


@contextlib.contextmanager
def tensorly_on(backend: Backend) -> Iterator[Any]:
    """Yield TensorLy with a library as its backend, in this thread and until the end of the block.

    Parameters
    ----------
    backend : Backend
        One of ``TENSORLY``.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> with tensorly_on(get_backend(np.zeros(1))) as tensorly:
    ...     tensorly.get_backend()
    'numpy'
    """
    import tensorly

    thread_data = getattr(tensorly.backend.BackendManager, "_THREAD_LOCAL_DATA", None)
    # A thread without a backend of its own uses that of the process, and must do so again afterwards.
    follows = thread_data is not None and "backend" not in thread_data.__dict__
    before = tensorly.get_backend()
    tensorly.set_backend(TENSORLY[backend.name], local_threadsafe=True)
    try:
        yield tensorly
    finally:
        # TensorLy's backend_context would restore it for all threads.
        if thread_data is not None and follows:
            del thread_data.backend
        else:
            tensorly.set_backend(before, local_threadsafe=True)


def _squares(flat: np.ndarray) -> float:
    """Compute the sum of the squares of a vector in float64."""
    total = 0.0
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(flat), _CACHED):
            piece = flat[start : start + _CACHED].astype(np.float64)
            total += float(piece @ piece)
    return total


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


@dataclasses.dataclass(frozen=True)
class Algebra:
    """Linear algebra in one library, dtype and device.

    Attributes
    ----------
    backend : Backend
        One of ``TENSORLY``.
    like : array
        Defines the dtype and device of all arrays.
    svd_method : {"auto", "full", "randomized"}
    seed : int
        Seed of random projections and starts.
    settled : bool
        Whether nobody else can change matrices after a call; otherwise what a proof needs is copied.
    """

    backend: Backend
    like: Array
    svd_method: str = "auto"
    seed: int = 0
    settled: bool = False

    @functools.cached_property
    def plain(self) -> bool:
        """Whether matrices have the library's own SVD: inside traces, complex, or in a library without TensorLy."""
        traced = not self.backend.is_concrete(self.like)
        return traced or self.backend.is_complex(self.like) or self.backend.name not in TENSORLY

    @property
    def eps(self) -> float:
        """Machine epsilon of the dtype."""
        return float(np.finfo(self.backend.dtype_name(self.like)).eps)

    @property
    def rng(self) -> np.random.RandomState:
        """A new generator for TensorLy, with the same numbers each time."""
        return np.random.RandomState(self.seed % (1 << 32))

    def array(self, host: np.ndarray) -> Array:
        """Convert a NumPy array to this library, dtype and device."""
        return self.backend.asarray(np.asarray(host, order="C"), self.backend.dtype_name(self.like), self.device)

    def arrays(self, host: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Convert several NumPy arrays."""
        return {name: self.array(array) for name, array in host.items()}

    @property
    def device(self) -> Any:
        """Device of the arrays."""
        return self.backend.device(self.like)

    def zeros(self, shape: Sequence[int]) -> Array:
        """Return zeros of that shape."""
        return self.backend.zeros(shape, like=self.like)

    @functools.cached_property
    def double(self) -> Algebra:
        """This algebra in float64: in the same library if it supports float64 on the device, otherwise in NumPy."""
        try:
            like = self.backend.astype(self.zeros((1,)), "float64")
        except (BackendError, TypeError):  # JAX with 64-bit numbers disabled; a torch device without float64
            return Algebra(load_backend("numpy"), np.zeros(1), self.svd_method, self.seed)
        return Algebra(self.backend, like, self.svd_method, self.seed)

    def doubled(self, x: Array) -> Array:
        """Convert x to an array of :attr:`double`."""
        backend = self.backend
        return backend.astype(x, "float64") if self.double.backend is backend else backend.to_numpy(x).astype("float64")

    def largest(self, x: Array) -> float:
        """Return the largest magnitude; 0 if all elements are zero, NaN or infinity if there is one."""
        largest = self.backend.largest(x)
        # Some libraries flush subnormal numbers to zero; NumPy on the host does not.
        return largest if largest > self._least else float(np.max(np.abs(self.backend.to_numpy(x)), initial=0.0))

    def scaled(self, x: Array, exponent: int) -> Array:
        """Multiply x by ``2 ** exponent``; exact unless a result leaves the dtype's normal range."""
        tiny = exponent > 0 and not self.backend.differentiates(x) and self.backend.largest(x) <= self._least
        x = self.backend.to_numpy(x) if tiny else x
        # In three steps, as the power of two itself may be outside of the dtype's range.
        for part in (exponent // 3, exponent // 3, exponent - 2 * (exponent // 3)):
            x = x if part == 0 else x * 2.0**part
        return self.array(x) if tiny else x

    @property
    def _least(self) -> float:
        """Magnitude below which an array may lose digits in a library that flushes subnormal numbers to zero."""
        info = np.finfo(self.backend.dtype_name(self.like))
        return float(info.smallest_normal / info.eps)

    def squares(self, x: Array) -> float:
        """Compute the sum of the squares in float64."""
        if on_host(self.backend, x):
            return _squares(self.backend.to_numpy(x).reshape(-1))
        double, total = self.double.backend, 0.0
        flat = self.backend.flatten(x)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for start in range(0, flat.shape[0], _PIECE):
                piece = self.doubled(flat[start : start + _PIECE])
                total += float(double.to_numpy(double.sum(piece * piece, axis=0)))
        return total

    def norm(self, x: Array) -> float:
        """Compute the Frobenius norm for numbers of any magnitude."""
        total = self.squares(x)
        if _SAFE[0] < total < _SAFE[1]:
            return math.sqrt(total)
        largest = self.largest(x)
        if largest == 0.0 or not math.isfinite(largest):
            return largest
        exponent = math.frexp(largest)[1]
        wide = self.double.scaled(self.doubled(x), -exponent)
        scaled_norm = math.sqrt(self.double.squares(wide))
        return math.ldexp(scaled_norm, exponent) if math.frexp(scaled_norm)[1] + exponent <= 1024 else math.inf

    def columns(self, x: Array) -> np.ndarray:
        """Compute the norm of each column of a matrix; returned on the host."""
        double, wide = self.double.backend, self.doubled(x)
        return np.sqrt(np.asarray(double.to_numpy(double.sum(wide * wide, axis=0)), np.float64))

    def randomized(self, shape: Sequence[int], rank: int) -> bool:
        """Return whether :meth:`svd` of a matrix of this shape uses random projections."""
        return self.svd_method == "randomized" and rank + _OVERSAMPLES < min(shape)

    def svd(self, matrix: Array, rank: int) -> tuple[Array, np.ndarray, Array, Claim]:
        """Compute the leading singular triplets of a matrix.

        Parameters
        ----------
        matrix : array, shape (m, n)
        rank : int
            Number of triplets, at most ``min(m, n)``.

        Returns
        -------
        u : array, shape (m, rank)
        s : ndarray, shape (rank,)
            On the host, float64.
        v : array, shape (n, rank)
        exact : bool or function that returns one
            Whether no matrix of that rank is known to be closer. True for the full decomposition; False for random
            projections (Halko, Martinsson & Tropp, 2011); a claim that is proved when it is needed for triplets from
            a Krylov space.
        """
        shape = tuple(int(size) for size in matrix.shape)
        real = not self.backend.is_complex(matrix)
        if self.svd_method == "auto" and real and truncated_pays(shape, rank):
            triplets = leading_triplets(self.backend, matrix, rank, self.seed)
            if triplets is not None:
                rows = shape[0] <= shape[1]
                short, left = (matrix, triplets[0]) if rows else (self.backend.matrix_transpose(matrix), triplets[2])
                # The caller may change the matrix before the proof is requested.
                kept, host = short if self.settled else short * 1.0, self.backend.to_numpy
                eps = self.eps  # not self, which would keep a whole tensor alive
                proof = functools.cache(lambda: no_matrix_is_closer(host(kept), host(left), eps))
                return *triplets, proof
        random = self.randomized(shape, rank)
        u, s, v = self._random_svd(matrix, rank) if random else self.backend.svd(matrix)
        values = self.backend.to_numpy(s[:rank]).astype(np.float64)
        return u[:, :rank], values, self.backend.matrix_transpose(v[:rank, :]), not random

    def truncated(self, matrix: Array, rank: int) -> Triplets:
        """Return at most ``rank`` triplets of a matrix, with their derivative if it is recorded; also inside traces."""
        backend, rank = self.backend, min(rank, *(int(size) for size in matrix.shape))
        if self._recorded(matrix):
            triplets = self.truncated(backend.detached(matrix), rank)
            u = self._with_derivative(matrix, triplets.u, triplets=True)
            rest = backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix)
            sizes = backend.sum(rest * backend.conj(triplets.vh), axis=1)
            # A real array in the dtype of the vectors.
            sizes = (sizes + backend.conj(sizes)) * 0.5 if backend.is_complex(sizes) else sizes
            s = with_value(backend, triplets.s, sizes)
            vh = rest / backend.reshape(backend.where(abs(s) > 0.0, s, s * 0.0 + 1.0), (-1, 1))
            return Triplets(u, s, with_value(backend, triplets.vh, vh), triplets.exact)
        if self.plain:
            u, s, vh = backend.svd(matrix)
            # The singular values of a complex matrix are real, but multiply complex vectors.
            s = backend.astype(s[:rank], backend.dtype_name(u))
            return Triplets(u[:, :rank], s, vh[:rank, :], True)
        u, values, v, exact = self.svd(matrix, rank)
        return Triplets(u, self.array(values), backend.matrix_transpose(v), exact)

    def left(self, matrix: Array, rank: int) -> tuple[Array, Claim]:
        """Return at most ``rank`` leading left vectors, and whether they are known to be exact; also inside traces."""
        backend = self.backend
        if self._recorded(matrix):
            u, exact = self.left(backend.detached(matrix), rank)
            return self._with_derivative(matrix, u), exact
        shape = tuple(int(size) for size in matrix.shape)
        rank = min(rank, *shape)
        if self.plain:
            return backend.svd(matrix)[0][:, :rank], True
        narrow = shape[0] <= _NARROW and _WIDE * shape[0] <= shape[1]
        krylov = self.svd_method == "auto" and truncated_pays(shape, rank) and not narrow
        if krylov or self.randomized(shape, rank):
            u, _, _, exact = self.svd(matrix, rank)
            return u, exact
        return self.all_left(matrix)[0][:, :rank], True

    def all_left(self, matrix: Array) -> tuple[Array, Array]:
        """Compute all left singular vectors of a matrix, and the values.

        Those of a wide matrix ``A = L Q`` are those of L, so that neither Q nor right vectors are formed.
        """
        if self.plain or not on_host(self.backend, matrix):
            return self.backend.svd(matrix)[:2]
        host = self.backend.to_numpy(matrix)
        if _WIDE * host.shape[0] <= host.shape[1] and host.size >= _TINY:
            host = np.asarray(np.linalg.qr(host.T, mode="r")).T
        u, s, _ = np.linalg.svd(host, full_matrices=False)
        return (u, s) if self.backend.name == "numpy" else (self.array(u), self.array(s))

    def _random_svd(self, matrix: Array, rank: int) -> Any:
        from tensorly.tenalg.svd import svd_interface

        with tensorly_on(self.backend):
            return svd_interface(
                matrix, n_eigenvecs=rank, flip_sign=False, method="randomized_svd", n_oversamples=_OVERSAMPLES,
                n_iter=_POWER_ITERATIONS, random_state=self.rng,
            )  # fmt: skip

    def _recorded(self, matrix: Array) -> bool:
        return self.backend.is_concrete(matrix) and self.backend.differentiates(matrix)

    def _with_derivative(self, matrix: Array, u: Array, triplets: bool = False) -> Array:
        """Return leading left singular vectors of a matrix with the derivative of :func:`_pulled_back`."""
        backend, dtype = self.backend, self.backend.dtype_name(matrix)
        host = backend.to_numpy(u)

        def pullback(x: Array, cotangents: Sequence[Array]) -> Array:
            gradient = _pulled_back(backend.to_numpy(x), host, backend.to_numpy(cotangents[0]), triplets)
            return backend.asarray(gradient, dtype, backend.device(x))

        return backend.with_pullback(matrix, [u], pullback)[0]


# -- The derivative of singular vectors ----------------------------------------------------------------------------


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


def with_value(backend: Backend, value: Array, array: Array) -> Array:
    """Return an array with the derivative of another one, which differs from it by rounding."""
    return value + (array - backend.detached(array))


def _pulled_back(matrix: np.ndarray, leading: np.ndarray, cotangent: np.ndarray, triplets: bool) -> np.ndarray:
    """Return the gradient with respect to a matrix, given that with respect to its leading left singular vectors."""
    # With ``A Aᴴ = U diag(λ) Uᴴ``, the vectors change by ``du_j = Σ_k u_k (u_kᴴ d(A Aᴴ) u_j) / (λ_j - λ_k)`` over all
    # k ≠ j. If a function does not depend on the basis of their span, the terms of k within the span vanish.
    eps = float(np.finfo(matrix.dtype).eps)
    wide = np.complex128 if np.iscomplexobj(matrix) else np.float64
    a, basis, cotangent = matrix.astype(wide), leading.astype(wide), cotangent.astype(wide)
    rank = basis.shape[1]
    u, s, _ = np.linalg.svd(a, full_matrices=False)
    squares, first = s**2, u[:, :rank]
    turned = first.conj().T @ basis
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
    # The terms within the span are counted twice below: leave half of them out.
    change = change - 0.5 * first @ weights[:rank]
    both = change @ (first.conj().T @ a)
    return np.asarray(both + first @ (change.conj().T @ a))


# -- Norms of arrays of any library, and scaling of updates and their arrays by powers of two --------------------------


def refuse_trace(backend: Backend, tensor: Array, what: str, way: str) -> None:
    """Raise a BackendError inside a trace, where the values that a solver needs are unknown."""
    if not backend.is_concrete(tensor):
        raise BackendError(
            f"{what} iterates until it converges, which takes the values of the tensor, and they are unknown "
            f"inside a trace (jax.jit, jax.grad, torch.func, torch.compile): {way}"
        )


def epsilon_of(backend: Backend, x: Array) -> float:
    """Return the machine epsilon of an array's dtype."""
    return float(np.finfo(backend.dtype_name(x)).eps)


def norm_of(backend: Backend, x: Array) -> float:
    """Compute the Frobenius norm for numbers of any magnitude, in float64.

    Parameters
    ----------
    backend : Backend
    x : array
        Real or complex; detached from any gradient.

    Returns
    -------
    float

    Examples
    --------
    >>> from tnadapt.backends import get_backend
    >>> norm_of(get_backend(np.ones(1)), np.array([3.0, 4.0j]))
    5.0
    """
    if backend.is_complex(x):
        parts = backend.to_numpy(x)
        return math.hypot(float(np.linalg.norm(parts.real)), float(np.linalg.norm(parts.imag)))
    x = backend.detached(x)
    if backend.name not in TENSORLY:
        backend, x = load_backend("numpy"), backend.to_numpy(x)
    return Algebra(backend, x).norm(x)


# An update may have numbers near the limits of a dtype's range even though its arrays need not.


def power_of(algebra: Algebra, x: Array) -> int:
    """Return the exponent of the power of two nearest to the root mean square of a vector.

    For ``x`` times ``2 ** k`` it is exactly k larger, at any magnitude.
    """
    largest = algebra.largest(x)
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    first = math.frexp(largest)[1]
    return first + round(math.log2(algebra.norm(algebra.scaled(x, -first)) / math.sqrt(x.shape[0])))


def at_size(algebra: Algebra, network: Network, arrays: Mapping[str, Array], exponent: int) -> dict[str, Array]:
    """Scale the arrays of a network so that its tensor is multiplied by ``2 ** exponent``.

    Parameters
    ----------
    algebra : Algebra
        Algebra of the arrays.
    network : Network
        Linear in each array.
    arrays : mapping of str to array
        With the names of the network's arrays.
    exponent : int

    Returns
    -------
    dict of str to array
        In each term, the array that starts at zero takes the factor, as far as it stays in the dtype's normal range;
        the others take the rest. If no array can take it (a single array, of an update outside of that range), the
        first one takes it all the same and is rounded to the dtype.
    """
    scaled = dict(arrays)
    if exponent == 0:
        return scaled
    for prefixes in network.prefixes:
        first = prefixes[-1] + network.splits[-1].zero
        names = [prefix + name for prefix, split in zip(prefixes, network.splits, strict=True) for name in split.shapes]
        left = exponent
        for name in [first, *(name for name in names if name != first)]:
            share = _within(algebra, scaled[name], left)
            scaled[name], left = algebra.scaled(scaled[name], share), left - share
        scaled[first] = algebra.scaled(scaled[first], left)
    return scaled


def _within(algebra: Algebra, array: Array, exponent: int) -> int:
    """Return as much of an exponent as keeps an array's largest number well within the dtype's normal range."""
    largest = algebra.largest(array)
    if largest == 0.0 or not math.isfinite(largest):
        return exponent
    info = np.finfo(algebra.backend.dtype_name(algebra.like))
    now = math.frexp(largest)[1]
    # Keep a margin at the lower end for the digits of smaller numbers.
    least, most = info.minexp + 2 * info.nmant, info.maxexp - 1
    return max(min(exponent, most - now), least - now) if least <= now <= most else 0
