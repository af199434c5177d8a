"""Linear algebra for decompositions, on the library of the arrays: leading singular vectors, robust norms, scaling.

``Algebra.svd`` computes few triplets of a large matrix by SciPy's ARPACK, random projections by TensorLy, and
everything else by the library's own SVD.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError

from .fits import Claim, no_matrix_is_closer

__all__ = [
    "SVD_METHODS",
    "TENSORLY",
    "Algebra",
    "at_size",
    "leading_triplets",
    "norm_of",
    "on_host",
    "power_of",
    "tensorly_on",
    "truncated_pays",
]


# -- A few singular triplets of a large matrix, by ARPACK --------------------------------------------------------------

# ARPACK (Lehoucq, Sorensen & Yang, 1998) finds eigenvectors of ``Aᵀ A`` from products with single vectors, which are
# computed where the matrix is. The triplets are those of the matrix between these vectors, as squared singular values
# have half of the digits. Single vectors may miss copies of a repeated value: a few more steps, from another start and
# beside the vectors that were found, show them.


# Below this number of rows and columns, or of elements, LAPACK takes less time than the calls of a few steps.
_SHORT, _FEW = 96, 1 << 16
# Largest part of the short side that the rank may be, and the largest rank.
_PART, _MOST = 16, 128
# Steps to the first restart, and restarts that are always allowed. As many steps in total as the short side is long
# take about as much time as the full decomposition.
_STEPS, _RESTARTS = 20, 10
# Residuals of up to this many times epsilon and the largest value are rounding: of ARPACK, and of the triplets.
_CONVERGED, _ACCEPTED = 8.0, 64.0
# A value that exceeds the smallest of the triplets by more than this was missed. Steps of the search for one, and the
# part of it that it may be wrong by.
_MISSED, _SEARCH, _ROUGH = 1e-6, 8, 0.1


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
    residuals of triplets that are returned are at rounding; that these are the leading ones is likely, but not certain.
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
    dtype, device, across = backend.dtype_name(matrix), backend.device(matrix), backend.matrix_transpose(matrix)
    eps, largest = float(np.finfo(dtype).eps), np.finfo(dtype).maxexp - 2

    def product(x: Array, columns: np.ndarray) -> np.ndarray:
        return backend.to_numpy(backend.matmul(x, backend.asarray(columns, dtype, device)))

    # From the row space, which is all of the space that is needed where the rank is no larger.
    start = product(across, rng.standard_normal((int(matrix.shape[0]), 1)))
    size = float(np.max(np.abs(start), initial=0.0))
    if not math.isfinite(size) or size == 0.0:
        return None
    # So that squares neither overflow nor underflow.
    scale = 2.0 ** min(max(-math.frexp(size)[1], -largest), largest)

    def squared(vector: np.ndarray) -> np.ndarray:
        """Multiply by ``Aᵀ A``."""
        return product(across, product(matrix, vector.reshape(-1, 1)) * scale) * scale

    short = int(matrix.shape[1])
    restarts = max(_RESTARTS, short // max(rank + 1, _STEPS - rank))
    right = _eigenvectors(squared, start * scale, rank, _STEPS, restarts, _CONVERGED * eps, rng)
    if right is None:
        return None
    # Rayleigh-Ritz: the singular value decomposition of the matrix between its left and right vectors.
    right = backend.asarray(np.linalg.qr(right[1])[0], dtype, device)
    left = backend.qr(backend.matmul(matrix, right))[0]
    back = backend.matmul(across, left)
    inner = backend.to_numpy(backend.matmul(backend.matrix_transpose(right), back)).astype(np.float64)
    if not np.isfinite(inner).all():
        return None
    turned_right, s, turned_left = np.linalg.svd(inner)
    to_left, to_right = (backend.asarray(np.ascontiguousarray(x), dtype, device) for x in (turned_left.T, turned_right))
    u, v = backend.matmul(left, to_left), backend.matmul(right, to_right)
    host = backend.to_numpy(v)
    rest = backend.to_numpy(backend.matmul(back, to_left)).astype(np.float64) - host * s
    rounding = _ACCEPTED * eps * float(s[0])
    # Vectors of zeros come from ARPACK's own random numbers, which are the same each time from SciPy 1.17 on.
    arbitrary = not _seeded() and s[-1] <= rounding
    if arbitrary or not (np.linalg.norm(rest, axis=0) <= rounding).all():
        return None

    def beside(vector: np.ndarray) -> np.ndarray:
        vector = vector.reshape(-1, 1)
        image = squared(vector - host @ (host.T @ vector))
        return np.asarray(image - host @ (host.T @ image))

    if rank > 1:
        another = np.asarray(rng.standard_normal((short, 1)), start.dtype)
        others = _eigenvectors(beside, another, 1, _SEARCH, _RESTARTS, _ROUGH, rng)
        most = scale * (s[-1] * (1.0 + _MISSED) + rounding)
        if others is not None and math.sqrt(max(0.0, others[0][0])) > most:
            return None
    return u, s, v


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
        values, vectors = eigsh(
            operator, count, which="LA", v0=start[:, 0], ncv=min(size, max(2 * count + 1, steps)), maxiter=restarts,
            tol=tol, **({"rng": rng} if _seeded() else {}),
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


# -- Norms, scaling and singular vectors in one library, dtype and device ----------------------------------------------

# TensorLy has one backend for the whole process. Here it is set for the calling thread only, and restored afterwards.


# Name of a library in tnadapt -> its name in TensorLy.
TENSORLY = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "cupy": "cupy"}

# How leading singular vectors are computed.
SVD_METHODS = ("auto", "full", "randomized")

_OVERSAMPLES = 10
_POWER_ITERATIONS = 4
# Columns for each row from which a matrix is reduced to its triangular factor first, and rows up to which that takes
# less time than a Krylov space, too. With fewer elements, calls take longer than what they compute.
_WIDE, _NARROW, _TINY = 4, 96, 1 << 10
_PIECE = 1 << 20
# As many elements are in the cache when they are read again.
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

    own = getattr(tensorly.backend.BackendManager, "_THREAD_LOCAL_DATA", None)
    # A thread without a backend of its own uses that of the process, and must do so again afterwards.
    follows = own is not None and "backend" not in own.__dict__
    before = tensorly.get_backend()
    tensorly.set_backend(TENSORLY[backend.name], local_threadsafe=True)
    try:
        yield tensorly
    finally:
        # TensorLy's backend_context would restore it for all threads.
        if own is not None and follows:
            del own.backend
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
        return self.backend.asarray(np.ascontiguousarray(host), self.backend.dtype_name(self.like), self.device)

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
        found = self.backend.largest(x)
        # Some libraries flush subnormal numbers to zero; NumPy on the host does not.
        return found if found > self._least else float(np.max(np.abs(self.backend.to_numpy(x)), initial=0.0))

    def scaled(self, x: Array, exponent: int) -> Array:
        """Multiply x by ``2 ** exponent``; exact unless a result leaves the dtype's normal range."""
        if exponent > 0 and self.backend.largest(x) <= self._least:
            return self.array(np.ldexp(self.backend.to_numpy(x), exponent))
        # In three steps, as the power of two itself may be outside of the dtype's range.
        for part in (exponent // 3, exponent // 3, exponent - 2 * (exponent // 3)):
            x = x if part == 0 else x * 2.0**part
        return x

    @property
    def _least(self) -> float:
        """Magnitude below which an array may lose digits in a library that flushes subnormal numbers to zero."""
        found = np.finfo(self.backend.dtype_name(self.like))
        return float(found.smallest_normal / found.eps)

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
        found = math.sqrt(self.double.squares(wide))
        return math.ldexp(found, exponent) if math.frexp(found)[1] + exponent <= 1024 else math.inf

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
                # The caller may change the matrix before the proof is asked for.
                kept, host = short if self.settled else short * 1.0, self.backend.to_numpy
                proof = functools.cache(lambda: no_matrix_is_closer(host(kept), host(left), self.eps))
                return *triplets, proof
        random = self.randomized(shape, rank)
        u, s, v = self._random_svd(matrix, rank) if random else self.backend.svd(matrix)
        values = self.backend.to_numpy(s[:rank]).astype(np.float64)
        return u[:, :rank], values, self.backend.matrix_transpose(v[:rank, :]), not random

    def left(self, matrix: Array, rank: int) -> tuple[Array, Claim]:
        """Compute the leading left singular vectors of a matrix, and whether they are known to be exact."""
        shape = tuple(int(size) for size in matrix.shape)
        narrow = shape[0] <= _NARROW and _WIDE * shape[0] <= shape[1]
        lanczos = self.svd_method == "auto" and truncated_pays(shape, rank) and not narrow
        if lanczos or self.randomized(shape, rank):
            u, _, _, exact = self.svd(matrix, rank)
            return u, exact
        return self.all_left(matrix)[0][:, :rank], True

    def all_left(self, matrix: Array) -> tuple[Array, Array]:
        """Compute all left singular vectors of a matrix, and the values.

        Those of a wide matrix ``A = L Q`` are those of L, so that neither Q nor right vectors are formed.
        """
        if not on_host(self.backend, matrix):
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


# -- Scaling of updates by powers of two, and of their arrays accordingly ----------------------------------------------

# An update may have numbers near the limits of a dtype's range although none of its arrays has to.


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
    found = dict(arrays)
    if exponent == 0:
        return found
    for prefixes in network.prefixes:
        first = prefixes[-1] + network.splits[-1].zero
        names = [prefix + name for prefix, split in zip(prefixes, network.splits, strict=True) for name in split.shapes]
        left = exponent
        for name in [first, *(name for name in names if name != first)]:
            share = _within(algebra, found[name], left)
            found[name], left = algebra.scaled(found[name], share), left - share
        found[first] = algebra.scaled(found[first], left)
    return found


def _within(algebra: Algebra, array: Array, exponent: int) -> int:
    """Return as much of an exponent as keeps an array's largest number well within the dtype's normal range."""
    largest = algebra.largest(array)
    if largest == 0.0 or not math.isfinite(largest):
        return exponent
    kind = np.finfo(algebra.backend.dtype_name(algebra.like))
    now = math.frexp(largest)[1]
    # Keep a margin at the lower end for the digits of smaller numbers.
    least, most = kind.minexp + 2 * kind.nmant, kind.maxexp - 1
    return max(min(exponent, most - now), least - now) if least <= now <= most else 0
