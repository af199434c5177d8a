"""Sparse tensors: the products with the nonzero elements that CP and Tucker decompositions take, without forming zeros.

The zeros are values, as in every sparse array, and not missing. Everything is computed on the host in double precision.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.errors import BackendError, ShapeError

# Elements of a piece of a product.
_PIECE = 1 << 22
# Up to this many elements, a dense SVD or residual takes less time or has more digits.
_SMALL = 1 << 20
# Such a residual is formed if its square is below this part of the tensor's.
_NEAR = 1e-4
# Squares of values stay in the range of float64 if the largest is between these.
_LEAST, _MOST = 1e-140, 1e140
# A key of several indices stays below this.
_LARGEST_KEY = 1 << 62


class SparseTensor:
    """The nonzero elements of a tensor.

    Parameters
    ----------
    places : sequence of ndarray of int, shape (n,)
        For each mode, the index of each element; elements of equal indices are added.
    values : ndarray, shape (n,)
    shape : sequence of int

    Attributes
    ----------
    dtype : dtype
        Of results: float32 and complex64 are kept, integers become float64.
    """

    def __init__(self, places: Sequence[np.ndarray], values: np.ndarray, shape: Sequence[int]) -> None:
        self.shape = tuple(map(int, shape))
        single = values.dtype.kind in "fc" and values.dtype.itemsize <= (4 if values.dtype.kind == "f" else 8)
        wide = np.dtype(np.complex128 if values.dtype.kind == "c" else np.float64)
        self.dtype = np.dtype(np.complex64 if wide.kind == "c" else np.float32) if single else wide
        numbers, first = _numbered(places, self.shape)
        narrow = np.int32 if max(self.shape) < 1 << 31 else np.int64
        self.places = [np.asarray(place[first], narrow) for place in places]
        self.values = np.zeros(len(first), wide)
        np.add.at(self.values, numbers, values)
        self.norm = float(np.linalg.norm(self.values))
        self._unfoldings = dict[int, tuple[Any, dict[int, np.ndarray]]]()

    def dense(self) -> np.ndarray:
        """Form the tensor, in the dtype of results."""
        tensor = np.zeros(self.shape, self.dtype)
        tensor[tuple(self.places)] = self.values
        return tensor

    def __mul__(self, number: float) -> SparseTensor:
        """Multiply by a number."""
        product = copy.copy(self)
        product.values, product.norm = self.values * number, self.norm * number
        product._unfoldings = {mode: (matrix * number, at) for mode, (matrix, at) in self._unfoldings.items()}
        return product

    def _unfolding(self, mode: int) -> tuple[Any, dict[int, np.ndarray]]:
        """Return the columns of an unfolding that are not zero as a CSR array, and their index in each other mode."""
        from scipy.sparse import csr_array

        if mode not in self._unfoldings:
            others = [m for m in range(len(self.shape)) if m != mode]
            numbers, first = _numbered([self.places[m] for m in others], [self.shape[m] for m in others])
            matrix = csr_array((self.values, (self.places[mode], numbers)), shape=(self.shape[mode], len(first)))
            self._unfoldings[mode] = matrix, {m: self.places[m][first] for m in others}
        return self._unfoldings[mode]

    def product(self, matrices: Sequence[np.ndarray] | Mapping[int, np.ndarray], mode: int) -> np.ndarray:
        """Multiply the unfolding of a mode by the Khatri-Rao product of the other modes' matrices, of n columns each:
        shape (d_mode, n).
        """
        matrix, columns = self._unfolding(mode)
        width = matrices[next(iter(columns))].shape[1]
        product = np.empty((self.shape[mode], width), np.result_type(matrix.dtype, *(matrices[m] for m in columns)))
        step = max(1, _PIECE // max(1, matrix.shape[1]))
        for first in range(0, width, step):
            piece = slice(first, first + step)
            rows = (np.take(matrices[m][:, piece], place, axis=0) for m, place in columns.items())
            product[:, piece] = matrix @ functools.reduce(np.multiply, rows)
        return product

    def projected(self, factors: Mapping[int, np.ndarray], left_out: int | None = None) -> np.ndarray:
        """Multiply all modes but one by the conjugate transposes of their factors, of shape (d_m, r_m)."""
        mode = 0 if left_out is None else left_out
        ranks = [factors[m].shape[1] for m in range(len(self.shape)) if m != mode]
        indices = iter(np.unravel_index(np.arange(math.prod(ranks)), ranks))
        product = self.product(
            {m: factors[m].conj()[:, next(indices)] for m in range(len(self.shape)) if m != mode}, mode
        )
        if left_out is None:
            product = factors[mode].conj().T @ product
        return np.moveaxis(product.reshape(-1, *ranks), 0, mode)

    def matrix_triplets(self, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute leading singular triplets of a matrix."""
        u, s, nonzero = self._triplets(0, rank, seed)
        vh = np.zeros((len(s), self.shape[1]), nonzero.dtype)
        vh[:, self._unfolding(0)[1][1]] = nonzero
        return u, s, vh

    def _triplets(self, mode: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compute leading singular triplets of an unfolding without its columns of zeros."""
        from scipy.sparse.linalg import svds

        matrix = self._unfolding(mode)[0]
        if rank >= min(matrix.shape) or math.prod(matrix.shape) <= _SMALL:
            u, s, vh = np.linalg.svd(matrix.toarray(), full_matrices=False)
        else:
            start = np.random.default_rng(seed).standard_normal(min(matrix.shape)).astype(matrix.dtype)
            u, s, vh = svds(matrix, rank, v0=start)
            u, s, vh = u[:, ::-1], s[::-1], vh[::-1]
        return u[:, :rank], s[:rank], vh[:rank]

    def left(self, mode: int, rank: int, seed: int) -> np.ndarray:
        """Return leading left singular vectors of an unfolding; where it has fewer, others orthogonal to them."""
        size = self.shape[mode]
        if rank == size:
            return np.eye(size, dtype=self.values.dtype)
        u = self._triplets(mode, rank, seed)[0]
        if u.shape[1] < rank:
            rest = np.random.default_rng(seed).standard_normal((size, rank - u.shape[1]))
            u = np.linalg.qr(np.concatenate([u, rest], axis=1))[0]
        return u

    def distance(
        self, entries: Callable[[np.ndarray], np.ndarray], norm: float, form: Callable[[], np.ndarray]
    ) -> float:
        """Compute the Frobenius distance from a tensor, given its elements, its norm and a function that forms it.

        It is the root of a difference: unless the tensor is small, below 1e-8 of the norms it is rounding.
        """
        square, step = norm * norm, _PIECE >> 6
        for first in range(0, len(self.values), step):
            piece = slice(first, first + step)
            fitted = entries(np.stack([place[piece] for place in self.places], axis=1)).astype(self.values.dtype)
            square += float(np.linalg.norm(self.values[piece] - fitted) ** 2 - np.linalg.norm(fitted) ** 2)
        if square <= _NEAR * self.norm**2 and math.prod(self.shape) <= _SMALL:
            formed = np.array(form(), self.values.dtype)
            formed[tuple(self.places)] -= self.values
            return float(np.linalg.norm(formed))
        return math.sqrt(max(square, 0.0))  # of NaN, NaN


def _numbered(places: Sequence[np.ndarray], shape: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Number distinct tuples of indices: return the number of each tuple, and where each number occurs first."""
    keys, size = np.zeros(len(places[0]), np.int64), 1
    for place, d in zip(places, shape, strict=True):
        if size * d >= _LARGEST_KEY:
            keys = np.unique(keys, return_inverse=True)[1]
            size = len(keys)
        keys, size = keys * d + place, size * d
    _, first, numbers = np.unique(keys, return_index=True, return_inverse=True)
    return numbers, first


def sparse_tensor(array: Any) -> SparseTensor | None:
    """Return a sparse array of SciPy, or an object with ``coords``, ``data`` and ``shape``, as pydata's COO has; None
    for anything else.

    Raises
    ------
    BackendError
        If it does not hold numbers, what it does not hold is not zero, or it is torch's.
    ShapeError
        If it has no elements, NaN, infinity or numbers whose squares overflow, or indices outside of its shape.
    """
    library = type(array).__module__.partition(".")[0]
    if library == "torch" and str(getattr(array, "layout", "")).startswith("torch.sparse"):
        raise BackendError(
            "a sparse tensor of torch is not read: after x = x.coalesce(), give cp() or tucker() "
            "scipy.sparse.coo_array((x.values(), tuple(x.indices())), x.shape), or pass x.to_dense()"
        )
    if library in ("scipy", "sparse") and hasattr(array, "tocoo"):
        array = array.tocoo()
    coordinates = getattr(array, "coords", None)
    if not isinstance(coordinates, (tuple, list, np.ndarray)) or not isinstance(array.data, np.ndarray):
        return None
    values = array.data
    shape, places = tuple(array.shape), [np.asarray(place) for place in coordinates]
    if values.dtype.kind not in "biufc":
        raise BackendError(f"the tensor must hold numbers; got the dtype {values.dtype}")
    if np.any(getattr(array, "fill_value", 0) != 0):
        raise BackendError(
            f"the elements that a sparse tensor does not hold must be zero; got fill_value={array.fill_value}"
        )
    if not math.prod(shape):
        raise ShapeError(f"the tensor has shape {shape}, so there is nothing to decompose")
    if len(places) != len(shape) or any(
        place.shape != values.shape or place.dtype.kind not in "iu" for place in places
    ):
        raise ShapeError(
            f"a sparse tensor of shape {shape} with {len(values)} elements needs as many integers for each mode; got "
            f"coordinates of {', '.join(f'{place.dtype} of shape {place.shape}' for place in places)}"
        )
    for mode, (place, size) in enumerate(zip(places, shape, strict=True)):
        if len(place) and not 0 <= place.min() <= place.max() < size:
            raise ShapeError(
                f"coordinates of mode {mode} must be from 0 to {size - 1}; got {place.min()} to {place.max()}"
            )
    check_range(float(np.max(np.abs(values), initial=0.0)), "a sparse tensor")
    return SparseTensor(places, values, shape)


def check_range(largest: float, what: str) -> None:
    """Raise a ShapeError if the largest magnitude of a tensor is NaN or infinity, or its square is out of range."""
    if not math.isfinite(largest):
        raise ShapeError(f"the tensor holds {'NaN' if math.isnan(largest) else 'infinity'}, so it cannot be decomposed")
    if largest and not _LEAST <= largest <= _MOST:
        raise ShapeError(
            f"the largest value of {what} must be from {_LEAST} to {_MOST}, so that squares neither overflow nor "
            f"vanish; got {largest:g}: decompose a multiple of it"
        )
