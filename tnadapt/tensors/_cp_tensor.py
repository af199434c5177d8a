"""Canonical polyadic (CP) tensors: sums of outer products of vectors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from tnadapt.algebra.products import cp_to_tensor, hadamard_tensor
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.implicit_gradient import Contraction
from tnadapt.decomposition.matrix_truncation import with_value
from tnadapt.errors import ShapeError

from ._checks import alike, as_tensor, as_tensors, integer_of, mode_of, scalar_of
from ._decomposed import Decomposed
from ._matrix_products import row_khatri_rao
from ._modes import mode_dot

__all__ = ["CPTensor"]


class _CPParts(NamedTuple):
    weights: Array | None
    factors: list[Array]


class CPTensor(Decomposed, _CPParts):
    """A tensor ``sum_r weights[r] * outer(factors[0][:, r], …)``.

    Parameters
    ----------
    weights : array, shape (r,), or None
        None stands for ones.
    factors : sequence of array, shape (d_m, r)

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a factor is not a matrix, or the ranks differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Unpacks as ``weights, factors``, like TensorLy's CPTensor. ``a + b``, ``a - b``, ``a * b`` (element by element, with
    a number, or with another CP tensor) are CP tensors again, whose ranks are sums and products of ranks.

    Examples
    --------
    >>> import numpy as np
    >>> cp = CPTensor(None, [np.ones((2, 1)), np.ones((3, 1))])
    >>> (cp + cp).to_tensor()
    array([[2., 2., 2.],
           [2., 2., 2.]])
    >>> float(cp.entry(1, 2)), cp.part(0).shape, float(cp.inner(cp))
    (1.0, (1, 3), 6.0)
    """

    @checks_arguments
    def __new__(cls, weights: Any, factors: Sequence[Any]) -> Self:
        backend, arrays = as_tensors(factors, "factors")
        if weights is not None:
            weights = as_tensor(weights, "weights")[1]
            get_backend(*arrays, weights)
        alike(arrays, 1, "CP factor")
        if weights is not None and tuple(weights.shape) != (arrays[0].shape[1],):
            raise ShapeError(f"CP weights have shape {tuple(weights.shape)}; expected ({arrays[0].shape[1]},)")
        return cls.of(backend, (weights, arrays))

    __repr__ = Decomposed.__repr__

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(factor.shape[0]) for factor in self.factors)

    @property
    def rank(self) -> int:
        return int(self.factors[0].shape[1])

    @property
    def arrays(self) -> list[Array]:
        return [*self.factors] if self.weights is None else [self.weights, *self.factors]

    @property
    def contraction(self) -> Contraction:
        modes = list(range(1, 1 + self.order))
        factors = [[mode, 0] for mode in modes]
        return (factors if self.weights is None else [[0], *factors]), modes

    def scaled_alike(self, other: Self) -> Self:
        if self.weights is None:
            return self
        return self.with_arrays(
            [with_value(self.backend, *pair) for pair in zip(other.arrays, self.normalized().arrays, strict=True)]
        )

    def to_tensor(self) -> Array:
        return cp_to_tensor((self.weights, self.factors))

    def entries(self, indices: Any) -> Array:
        backend = self.backend
        rows = [
            backend.take(factor, backend.constant(place, backend.device(factor)), axis=0)
            for factor, place in zip(self.factors, self.places(indices), strict=True)
        ]
        found = hadamard_tensor(rows)
        return backend.sum(found if self.weights is None else found * self.weights, axis=1)

    def part(self, *index: int | slice) -> Self:
        slices = self.slices(index)
        return type(self)(self.weights, [factor[one] for factor, one in zip(self.factors, slices, strict=True)])

    def inner(self, other: Self) -> Array:
        self.same_shape(other)
        backend = self.backend
        products = [
            backend.matmul(backend.conj(backend.matrix_transpose(mine)), theirs)
            for mine, theirs in zip(self.factors, other.factors, strict=True)
        ]
        found = hadamard_tensor(products)
        if self.weights is not None:
            found = found * backend.reshape(backend.conj(self.weights), (-1, 1))
        if other.weights is not None:
            found = found * other.weights
        return backend.sum(backend.flatten(found), axis=0)

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, CPTensor):
            return NotImplemented
        self.same_shape(other)
        backend = self.backend
        factors = [
            backend.concat([mine, theirs], axis=1) for mine, theirs in zip(self.factors, other.factors, strict=True)
        ]
        weights = None
        if self.weights is not None or other.weights is not None:
            weights = backend.concat([self._weights(backend), other._weights(backend)])
        return type(self)(weights, factors)

    def __mul__(self, other: Any) -> Self:
        number = scalar_of(other)
        if number is not None:
            return type(self)(self._weights(self.backend) * number, self.factors)
        if not isinstance(other, CPTensor):
            return NotImplemented
        self.same_shape(other)
        factors = [row_khatri_rao(pair) for pair in zip(self.factors, other.factors, strict=True)]
        backend = self.backend
        mine, theirs = self._weights(backend), other._weights(backend)
        return type(self)(backend.flatten(backend.reshape(mine, (-1, 1)) * theirs), factors)

    def normalized(self) -> Self:
        """Return the same tensor with factors whose columns have norm 1; the weights hold the norms.

        Columns of zeros stay, and so does the sign of a weight.
        """
        backend = self.backend
        weights, factors = self._weights(backend), []
        for factor in self.factors:
            squares = factor * backend.conj(factor)
            real = backend.xp.real(squares) if backend.is_complex(factor) else squares
            norms = backend.sqrt(backend.sum(real, axis=0))
            factors.append(factor / backend.where(norms > 0.0, norms, norms * 0.0 + 1.0))
            weights = weights * norms
        return type(self)(weights, factors).with_outcome(self.outcome)

    def truncated(self, rank: int) -> Self:
        """Keep the components with the largest norms, in descending order.

        Parameters
        ----------
        rank : int
            How many. Components are not fitted again: pass the result to :func:`tnadapt.tensors.cp` as ``init=`` for
            that.
        """
        keep = integer_of("rank", rank, 1, self.rank)
        backend, unit = self.backend, self.normalized()
        assert unit.weights is not None
        sizes = abs(backend.to_numpy(unit.weights))
        order = sizes.argsort(kind="stable")[::-1][:keep]
        places = backend.constant(order.copy(), backend.device(unit.weights))
        return type(self)(
            backend.take(unit.weights, places), [backend.take(factor, places, axis=1) for factor in unit.factors]
        )

    def mode_dot(self, matrix: Any, mode: int) -> Self:
        """Multiply by a matrix along one mode, without forming the tensor."""
        number = mode_of(mode, self.shape)
        factors = [mode_dot(one, matrix, 0) if m == number else one for m, one in enumerate(self.factors)]
        return type(self)(self.weights, factors)

    def cp_copy(self) -> Self:
        """Return a copy of the object and its arrays, as the method of this name in TensorLy does."""
        return copy.deepcopy(self)

    def _weights(self, backend: Backend) -> Array:
        if self.weights is not None:
            return self.weights
        return backend.zeros((self.rank,), like=self.factors[0]) + 1.0
