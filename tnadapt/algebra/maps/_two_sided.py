"""Base class of transforms of the rows and columns of a matrix: sums of products ``L X Rᵀ``."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.backends.fixed_arrays import FixedArrays

from ._by_rows import ByRows
from ._map import Map
from ._side_matrix import SideMatrix

__all__ = ["TwoSided"]


class TwoSided(ByRows):
    """``Y = sum_t L_t X R_tᵀ``. A subclass names the matrices in :attr:`side_keys`, as keys of
    :attr:`matrices`.

    Attributes
    ----------
    matrices : FixedArrays
        Shared by all maps of a class, because maps of equal sizes have equal matrices. They are not digested: they
        depend on sizes and settings only, and the last bits of sines and cosines differ between machines.
    """

    matrices: FixedArrays

    @property
    def shape_in(self) -> tuple[int, int]:
        """Rows and columns of X."""
        return self.shape

    @property
    def side_keys(self) -> Sequence[tuple[Hashable, Hashable]]:
        """Keys of ``L_t``, of shape (rows of Y, rows of X), and of ``R_t``, likewise for columns."""
        raise self._lacks("side_keys")

    def sides(self) -> Sequence[tuple[Map, Map]]:
        into, out = self.shape_in, self.shape
        return [
            (
                SideMatrix(self.matrices, left, into[0], out[0]),
                SideMatrix(self.matrices, right, into[1], out[1]),
            )
            for left, right in self.side_keys
        ]

    def _rows(self, backend: Backend, x: Array, first: int, last: int) -> Array:
        """Compute some rows of Y, flattened."""
        batch = tuple(x.shape[:-1])
        x = backend.reshape(x, (*batch, *self.shape_in))
        found = None
        for left, right in self.side_keys:
            some = self._side(backend, left, x)[first:last, :]
            part = backend.precise_matmul(
                some, backend.precise_matmul(x, backend.matrix_transpose(self._side(backend, right, x)))
            )
            found = part if found is None else found + part
        return backend.reshape(found, (*batch, (last - first) * self.shape[1]))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        batch = tuple(y.shape[:-1])
        y = backend.reshape(y, (*batch, *self.shape))
        found = None
        for left, right in self.side_keys:
            back = backend.precise_matmul(backend.matrix_transpose(self._side(backend, left, y)), y)
            part = backend.precise_matmul(back, self._side(backend, right, y))
            found = part if found is None else found + part
        return backend.reshape(found, (*batch, self.n_in))

    def _side(self, backend: Backend, key: Hashable, like: Array) -> Array:
        return self.matrices.on(backend, key, like, backend.dtype_name(like))

    def cost(self) -> int:
        (rows, cols), (rows_in, cols_in) = self.shape, self.shape_in
        return len(self.side_keys) * (rows_in * cols_in * cols + rows * rows_in * cols)
