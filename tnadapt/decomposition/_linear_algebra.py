"""What a decomposition asks of linear algebra: TensorLy on the arrays' own library, and a few sums.

TensorLy's backend is one for the whole process. It is set for the calling thread alone, and set back.
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

__all__ = ["TENSORLY", "Algebra", "tensorly_on"]

# A library here -> its name in TensorLy.
TENSORLY = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "cupy": "cupy"}

# Matrices whose smaller side is longer are not decomposed whole where a few singular vectors are asked for.
_WHOLE = 1024
_OVERSAMPLES = 10
_POWER_ITERATIONS = 4
_PIECE = 1 << 20
# Sums of squares within these have lost nothing to numbers whose squares float64 does not hold.
_SAFE = 1e-200, 1e200


@contextlib.contextmanager
def tensorly_on(backend: Backend) -> Iterator[Any]:
    """TensorLy, computing with a library; in this thread, and until the end of the block.

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
    # A thread that has set none follows the process, and is to follow it again.
    follows = own is not None and "backend" not in own.__dict__
    before = tensorly.get_backend()
    tensorly.set_backend(TENSORLY[backend.name], local_threadsafe=True)
    try:
        yield tensorly
    finally:
        # backend_context would set it back for every thread.
        if own is not None and follows:
            del own.backend
        else:
            tensorly.set_backend(before, local_threadsafe=True)


@dataclasses.dataclass(frozen=True)
class Algebra:
    """Linear algebra in one library, dtype and device.

    Attributes
    ----------
    backend : Backend
        One of ``TENSORLY``.
    like : array
        Its dtype and device are those of all arrays.
    svd_method : {"auto", "full", "randomized"}
    seed : int
        Of random projections and starts.
    """

    backend: Backend
    like: Array
    svd_method: str = "auto"
    seed: int = 0

    @property
    def eps(self) -> float:
        """The distance from 1 to the next number of the dtype."""
        return float(np.finfo(self.backend.dtype_name(self.like)).eps)

    @property
    def rng(self) -> np.random.RandomState:
        """A generator, which TensorLy takes; the same numbers each time."""
        return np.random.RandomState(self.seed % (1 << 32))

    def array(self, host: np.ndarray) -> Array:
        """A NumPy array in the library, dtype and device."""
        return self.backend.asarray(np.ascontiguousarray(host), self.backend.dtype_name(self.like), self.device)

    @property
    def device(self) -> Any:
        """Where the arrays live."""
        return self.backend.device(self.like)

    def zeros(self, shape: Sequence[int]) -> Array:
        """Zeros of that shape."""
        return self.backend.zeros(shape, like=self.like)

    @functools.cached_property
    def double(self) -> Algebra:
        """The same in float64: in the library where it has that dtype on the device, else in NumPy."""
        try:
            like = self.backend.astype(self.zeros((1,)), "float64")
        except (BackendError, TypeError):  # JAX without 64-bit numbers; a device of torch without them
            return Algebra(load_backend("numpy"), np.zeros(1), self.svd_method, self.seed)
        return Algebra(self.backend, like, self.svd_method, self.seed)

    def doubled(self, x: Array) -> Array:
        """An array of :attr:`double` with the numbers of x."""
        backend = self.backend
        return backend.astype(x, "float64") if self.double.backend is backend else backend.to_numpy(x).astype("float64")

    def largest(self, x: Array) -> float:
        """The largest magnitude; 0 of nothing but zeros, NaN or infinity where there is one."""
        found = self.backend.largest(x)
        # Some libraries compute as if numbers below the normal ones were zero; the host does not.
        return found if found > self._least else float(np.max(np.abs(self.backend.to_numpy(x)), initial=0.0))

    def scaled(self, x: Array, exponent: int) -> Array:
        """x times ``2 ** exponent``: exact, unless a result leaves the dtype's normal range."""
        if exponent > 0 and self.backend.largest(x) <= self._least:
            return self.array(np.ldexp(self.backend.to_numpy(x), exponent))
        # In steps, as a power of two may itself be outside of the dtype's range.
        for part in (exponent // 3, exponent // 3, exponent - 2 * (exponent // 3)):
            x = x if part == 0 else x * 2.0**part
        return x

    @property
    def _least(self) -> float:
        """Below it, an array may lose digits of its smaller numbers where a library has no subnormal ones."""
        found = np.finfo(self.backend.dtype_name(self.like))
        return float(found.smallest_normal / found.eps)

    def squares(self, x: Array) -> float:
        """The sum of the squares, in float64."""
        double, total = self.double.backend, 0.0
        flat = self.backend.flatten(x)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for start in range(0, flat.shape[0], _PIECE):
                piece = self.doubled(flat[start : start + _PIECE])
                total += float(double.to_numpy(double.sum(piece * piece, axis=0)))
        return total

    def norm(self, x: Array) -> float:
        """The Frobenius norm, of numbers of any size."""
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
        """The norm of each column of a matrix, on the host."""
        double, wide = self.double.backend, self.doubled(x)
        return np.sqrt(np.asarray(double.to_numpy(double.sum(wide * wide, axis=0)), np.float64))

    def randomized(self, shape: Sequence[int], rank: int) -> bool:
        """Whether the leading singular vectors of such a matrix are found by random projections."""
        if self.svd_method != "auto":
            return self.svd_method == "randomized" and rank + _OVERSAMPLES < min(shape)
        return min(shape) > _WHOLE and 4 * (rank + _OVERSAMPLES) < min(shape)

    def svd(self, matrix: Array, rank: int) -> tuple[Array, np.ndarray, Array, bool]:
        """The leading singular triplets of a matrix.

        Parameters
        ----------
        matrix : array, shape (m, n)
        rank : int
            How many, at most ``min(m, n)``.

        Returns
        -------
        u : array, shape (m, rank)
        s : ndarray, shape (rank,)
            On the host, float64.
        v : array, shape (n, rank)
        exact : bool
            False where they come from a random projection (Halko, Martinsson & Tropp, 2011).
        """
        from tensorly.tenalg.svd import svd_interface

        random = self.randomized(matrix.shape, rank)
        settings: dict[str, Any] = {"method": "truncated_svd"}
        if random:
            settings = {
                "method": "randomized_svd", "n_oversamples": _OVERSAMPLES, "n_iter": _POWER_ITERATIONS,
                "random_state": self.rng,
            }  # fmt: skip
        with tensorly_on(self.backend):
            u, s, v = svd_interface(matrix, n_eigenvecs=rank, flip_sign=False, **settings)
        values = self.backend.to_numpy(s).astype(np.float64)
        return u, values, self.backend.matrix_transpose(v), not random
