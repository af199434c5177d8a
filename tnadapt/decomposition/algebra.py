"""What a decomposition asks of linear algebra: TensorLy on the arrays' own library, and a few sums.

TensorLy's backend is one for the whole process. It is set for the calling thread alone, and set back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..backends import Backend
from ..backends.base import Array

__all__ = ["TENSORLY", "Algebra", "tensorly_on"]

# A library here -> its name in TensorLy.
TENSORLY = {"numpy": "numpy", "torch": "pytorch", "jax": "jax", "cupy": "cupy"}

# Matrices whose smaller side is longer are not decomposed whole where a few singular vectors are asked for.
_WHOLE = 1024
_OVERSAMPLES = 10
_POWER_ITERATIONS = 4
_PIECE = 1 << 16


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

    def squares(self, x: Array) -> float:
        """The sum of the squares: taken in the dtype, over pieces of 2**16, which are added up in float64."""
        backend = self.backend
        flat = backend.flatten(x)
        whole = flat.shape[0] // _PIECE * _PIECE
        total = 0.0
        with np.errstate(over="ignore", invalid="ignore"):
            if whole:
                pieces = backend.reshape(flat[:whole], (-1, _PIECE))
                total = float(backend.to_numpy(backend.sum(pieces * pieces, axis=1)).astype(np.float64).sum())
            if whole < flat.shape[0]:
                rest = flat[whole:]
                total += float(backend.to_numpy(backend.sum(rest * rest, axis=0)))
        return total

    def norm(self, x: Array) -> float:
        """The Frobenius norm."""
        return math.sqrt(self.squares(x))

    def columns(self, x: Array) -> np.ndarray:
        """The norm of each column of a matrix, on the host."""
        return np.sqrt(self.backend.to_numpy(self.backend.sum(x * x, axis=0)).astype(np.float64))

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
