"""Linear algebra for decompositions: TensorLy on the library of the arrays, and robust norms.

TensorLy has one backend for the whole process. Here it is set for the calling thread only, and restored afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.network import Network
from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError

from ._truncated_svd import leading_triplets, on_host, truncated_pays
from .fits import Claim

__all__ = [
    "OPEN",
    "SVD_METHODS",
    "TENSORLY",
    "Algebra",
    "at_size",
    "no_matrix_is_closer",
    "norm_of",
    "power_of",
    "tensorly_on",
]


# ----------------------------------------------------------------------------------------------------------------------
# Proof that no matrix of a rank is closer to a matrix than its part in a given subspace, computed when asked for

# Let U be the subspace, of r dimensions, ``B = Uᵀ A``, and ``R = A - U B``. For any numbers θ and d for which ::
#
#     θ ≤ λ_min(B Bᵀ) + d     and     θ I - R Rᵀ - R Bᵀ B Rᵀ / d  is positive definite,
#
# ``A Aᵀ`` is at most ``θ I + U (B Bᵀ + (d - θ) I) Uᵀ``, whose second term is positive semidefinite and of rank r. By
# Weyl's inequalities the r largest eigenvalues of ``A Aᵀ`` then have a sum of at most ``|B|² + r d``, and by the
# theorem of Eckart & Young the squared error of every matrix of rank r is at least ``|R|² - r d``. Nothing else is
# assumed of U: a subspace that misses a direction, from whatever start, has no such θ and d.
#
# Positive definite is proved by a bound on the norm of R where that is enough, otherwise by a Cholesky factorization,
# as it succeeds for no matrix with an eigenvalue below minus its rounding (Rump, "Verification of positive
# definiteness", BIT 46, 2006).


# What the claim leaves open, relative to the error, and in units of epsilon relative to the matrix.
OPEN, _ROUNDING = 1e-8, 64.0
# Error of computed singular values, in units of epsilon relative to the largest.
_VALUES = 8.0
# Longest side for a Cholesky factorization, and most elements of a matrix in float64.
_SIDE, _ELEMENTS = 1 << 12, 1 << 25


def no_matrix_is_closer(matrix: np.ndarray, vectors: np.ndarray, epsilon: float) -> bool:
    """Return whether the part of a matrix in a subspace is proved to be its best approximation of that rank.

    Parameters
    ----------
    matrix : ndarray, shape (m, n)
        Real and finite.
    vectors : ndarray, shape (m, rank)
        Columns that span the subspace.
    epsilon : float
        Of the dtype whose rounding counts.

    Returns
    -------
    bool
        True if the relative error of every matrix of that rank is at least that of the part in the subspace, less
        ``1e-8`` times itself and 64 epsilon. False if this is not so, or the proof would need more than a matrix of
        4096 rows or 2^25 elements.
    """
    if matrix.shape[0] * matrix.shape[1] > _ELEMENTS:
        return False
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0:
        return True
    wide = matrix.astype(np.float64) / largest
    u = np.linalg.qr(vectors.astype(np.float64))[0]
    along = u.T @ wide
    rest = wide - u @ along
    error, rounding = float(np.linalg.norm(rest)), _ROUNDING * epsilon * float(np.linalg.norm(wide))
    least = error * (1.0 - OPEN) - rounding
    if not least > 0.0:
        return bool(error <= rounding)
    if epsilon > np.finfo(np.float64).eps:
        # The vectors have the rounding of their dtype: improve them in float64.
        u = np.linalg.qr(wide @ along.T)[0]
        along = u.T @ wide
        rest = wide - u @ along
    # What couples the two parts is rounding for singular vectors. It is left out of the matrix, at its full norm.
    across = np.linalg.qr(along.T)[0]
    coupled = rest @ across
    return _bounded(rest - coupled @ across.T, along, least + float(np.linalg.norm(coupled)))


def _bounded(rest: np.ndarray, along: np.ndarray, least: float) -> bool:
    """Return whether errors below ``least`` are excluded for ``U along + rest``."""
    size, rank = float(np.sum(rest * rest)), len(along)
    margin = (size - least * least) / rank
    if not margin > 0.0:
        return False
    eps, mixed = float(np.finfo(np.float64).eps), along @ rest.T
    values = np.linalg.svd(along, compute_uv=False)
    level = max(0.0, float(values[-1]) - _VALUES * eps * float(values[0])) ** 2 + margin
    if size + float(np.sum(mixed * mixed)) / margin <= level:
        return True
    rows, columns = rest.shape
    if rows > _SIDE:
        return False
    # Rounding: of the products in the Gram matrix, and of its factorization.
    slack = eps * ((columns + rank) * (size + float(np.sum(mixed * mixed)) / margin) + (rows + 2) * rows * level)
    if not level > slack:
        return False
    scaled = mixed / np.sqrt(margin)
    gram = rest @ rest.T
    gram += scaled.T @ scaled
    np.negative(gram, out=gram)
    gram[np.diag_indices(rows)] += level - slack
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return False
    return True


# -- Linear algebra for decompositions: TensorLy on the library of the arrays, and robust norms ------------------------

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
            found = leading_triplets(self.backend, matrix, rank, self.seed)
            if found.converged:
                rows = shape[0] <= shape[1]
                short, left = (matrix, found.u) if rows else (self.backend.matrix_transpose(matrix), found.v)
                # The caller may change the matrix before the proof is asked for.
                kept, host = short if self.settled else short * 1.0, self.backend.to_numpy
                proof = functools.cache(lambda: no_matrix_is_closer(host(kept), host(left), self.eps))
                return found.u, found.s, found.v, proof
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


# -- Frobenius norms in float64 of arrays of any library, real or complex ----------------------------------------------


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


# -- Scaling of updates by powers of two, and of the arrays accordingly, each within its dtype's range -----------------

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
