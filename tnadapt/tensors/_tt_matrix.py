"""Matrices in tensor-train format: chains of cores of four axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError

from ._checks import as_tensors, numeric, scalar_of
from ._decomposed import Decomposed
from ._tensor_chains import TTTensor

__all__ = ["TTMatrix"]


class TTMatrix(Decomposed, tuple[Array, ...]):
    """A matrix whose rows and columns are both divided into modes.

    ``matrix[i_1 … i_M, j_1 … j_M] = cores[0][0, i_1, j_1, :] @ … @ cores[-1][:, i_M, j_M, 0]``.

    Parameters
    ----------
    cores : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)
        With ``r_0 = r_M = 1``.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a core does not have four axes, neighbors differ in rank, or the ends have a rank other than 1.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Oseledets, "Approximation of 2^d × 2^d matrices using tensor decomposition" (SIAM J. Matrix Anal. 31, 2010).
    Behaves as the list of its cores, like TensorLy's TTMatrix. ``shape`` is that of the matrix; ``to_tensor`` gives the
    modes ``(rows_1, …, rows_M, cols_1, …, cols_M)``, like TensorLy.

    Examples
    --------
    >>> import numpy as np
    >>> identity = TTMatrix([np.eye(2)[None, :, :, None], np.eye(3)[None, :, :, None]])
    >>> bool((identity.to_matrix() == np.eye(6)).all()), identity @ np.arange(6.0)
    (True, array([0., 1., 2., 3., 4., 5.]))
    """

    def __new__(cls, cores: Sequence[Any]) -> Self:
        backend, arrays = as_tensors(cores, "cores")
        left = 1
        for number, core in enumerate(arrays):
            right = 1 if number == len(arrays) - 1 else "r"
            if len(core.shape) != 4 or core.shape[0] != left or (right == 1 and core.shape[3] != 1):
                raise ShapeError(
                    f"core {number} of a TT matrix has shape {tuple(core.shape)}, not ({left}, rows, cols, {right})"
                )
            left = int(core.shape[3])
        return cls.of(backend, arrays)

    __repr__ = Decomposed.__repr__

    @property
    def factors(self) -> list[Array]:
        """The cores, as TensorLy calls them."""
        return list(self)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """How the rows are divided into modes."""
        return tuple(int(core.shape[1]) for core in self)

    @property
    def col_sizes(self) -> tuple[int, ...]:
        """How the columns are divided into modes."""
        return tuple(int(core.shape[2]) for core in self)

    @property
    def shape(self) -> tuple[int, ...]:
        return math.prod(self.row_sizes), math.prod(self.col_sizes)

    @property
    def rank(self) -> tuple[int, ...]:
        return (*(int(core.shape[0]) for core in self), int(self[-1].shape[3]))

    @property
    def arrays(self) -> list[Array]:
        return list(self)

    def train(self) -> TTTensor:
        """Return the tensor train whose mode m is the rows and columns m, merged."""
        backend = self.backend
        return TTTensor([backend.reshape(core, (core.shape[0], -1, core.shape[3])) for core in self])

    def _from(self, train: TTTensor) -> Self:
        backend, sizes = self.backend, list(zip(self.row_sizes, self.col_sizes, strict=True))
        return type(self)(
            [
                backend.reshape(core, (core.shape[0], *size, core.shape[2]))
                for core, size in zip(train, sizes, strict=True)
            ]
        )

    def to_tensor(self) -> Array:
        backend, order = self.backend, len(self)
        merged = backend.reshape(
            self.train().to_tensor(), [one for pair in zip(self.row_sizes, self.col_sizes, strict=True) for one in pair]
        )
        return backend.permute_dims(merged, [*range(0, 2 * order, 2), *range(1, 2 * order, 2)])

    def to_matrix(self) -> Array:
        """Form the matrix."""
        return self.backend.reshape(self.to_tensor(), self.shape)

    def entries(self, indices: Any) -> Array:
        rows, cols = self.places(indices)
        split = zip(
            np.unravel_index(rows, self.row_sizes), np.unravel_index(cols, self.col_sizes), self.col_sizes, strict=True
        )
        return self.train().entries(np.stack([row * size + col for row, col, size in split], axis=1))

    def part(self, *index: int | slice) -> Self:
        """Take a slice; only whole rows or columns, because others do not divide into modes."""
        if any(one != slice(0, size, 1) for one, size in zip(self.slices(index), self.shape, strict=True)):
            raise ShapeError(
                "a part of a TT matrix does not divide into its modes: take entries, or multiply by unit vectors"
            )
        return self

    def inner(self, other: Self) -> Array:
        self.same_shape(other)
        return self.train().inner(other.train())

    def norm(self) -> Array:
        return self.train().norm()

    @property
    def T(self) -> Self:  # noqa: N802 - the name in every library
        """The transposed matrix."""
        return type(self)([self.backend.permute_dims(core, (0, 2, 1, 3)) for core in self])

    def __matmul__(self, other: Any) -> Any:
        """Multiply by a vector, a matrix of columns, or another TT matrix, without forming this one."""
        backend = self.backend
        if isinstance(other, TTMatrix):
            return self._times(other)
        x = numeric(get_backend(other), other, "the vector or matrix")
        get_backend(self[0], x)
        if len(x.shape) not in (1, 2) or x.shape[0] != self.shape[1]:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected ({self.shape[1]},) or ({self.shape[1]}, batch)")
        batch = math.prod(x.shape[1:])
        # State: (r, columns that are left, rows that are done × batch).
        state = backend.reshape(x, (1, self.shape[1], batch))
        for core in self:
            left, rows, cols, right = (int(size) for size in core.shape)
            rest = math.prod(state.shape[1:2]) // cols
            state = backend.reshape(state, (left, cols, rest * int(state.shape[2])))
            matrix = backend.reshape(backend.permute_dims(core, (3, 1, 0, 2)), (right * rows, left * cols))
            state = backend.matmul(matrix, backend.reshape(state, (left * cols, -1)))
            # (r', rows, rest, done): the new rows go behind those that are done, before the batch.
            done = int(state.shape[1]) // (rest * batch)
            state = backend.reshape(state, (right, rows, rest, done, batch))
            state = backend.reshape(backend.permute_dims(state, (0, 2, 3, 1, 4)), (right, rest, done * rows * batch))
        return backend.reshape(state, (self.shape[0], *x.shape[1:]))

    def _times(self, other: TTMatrix) -> TTMatrix:
        if other.row_sizes != self.col_sizes:
            raise ShapeError(f"columns in modes {self.col_sizes} do not multiply rows in modes {other.row_sizes}")
        backend, cores = self.backend, []
        for a, b in zip(self, other, strict=True):
            (left_a, rows, inner, right_a), (left_b, _, cols, right_b) = a.shape, b.shape
            one = backend.reshape(backend.permute_dims(a, (0, 1, 3, 2)), (left_a * rows * right_a, inner))
            two = backend.reshape(backend.permute_dims(b, (1, 0, 2, 3)), (inner, left_b * cols * right_b))
            both = backend.reshape(backend.matmul(one, two), (left_a, rows, right_a, left_b, cols, right_b))
            both = backend.permute_dims(both, (0, 3, 1, 4, 2, 5))
            cores.append(backend.reshape(both, (left_a * left_b, rows, cols, right_a * right_b)))
        return TTMatrix(cores)

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, TTMatrix):
            return NotImplemented
        self._same_modes(other)
        return self._from(self.train() + other.train())

    def __mul__(self, other: Any) -> Self:
        number = scalar_of(other)
        if number is not None:
            return type(self)([self[0] * number, *self[1:]])
        if not isinstance(other, TTMatrix):
            return NotImplemented
        self._same_modes(other)
        return self._from(self.train() * other.train())

    def round(self, rank: int | Sequence[int] | None = None, *, max_error: float | None = None) -> Self:
        """Reduce the ranks, as :meth:`TTTensor.round` does."""
        return self._from(self.train().round(rank, max_error=max_error))

    def _same_modes(self, other: TTMatrix) -> None:
        if (self.row_sizes, self.col_sizes) != (other.row_sizes, other.col_sizes):
            raise ShapeError(
                f"the matrices divide into {self.row_sizes} × {self.col_sizes} and {other.row_sizes} × "
                f"{other.col_sizes}; expected the same modes"
            )
