"""Linear algebra for decompositions: TensorLy on the library of the arrays, and robust norms.

TensorLy has one backend for the whole process. Here it is set for the calling thread only, and restored afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError

from ._truncated_svd import leading_triplets, on_host, truncated_pays
from .leading_proof import no_matrix_is_closer
from .optimality import Claim

__all__ = ["SVD_METHODS", "TENSORLY", "Algebra", "tensorly_on"]

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
