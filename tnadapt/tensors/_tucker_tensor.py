"""Tucker tensors: a small core, multiplied by a matrix along each mode."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from tnadapt.algebra.products import kronecker_tensor, tucker_to_tensor
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends.backend import Array
from tnadapt.decomposition.implicit_gradient import Contraction
from tnadapt.errors import ShapeError

from ._block_diagonal import block_diagonal
from ._checks import as_tensors, mode_of, scalar_of
from ._decomposed import Decomposed
from ._matrix_products import row_khatri_rao
from ._modes import mode_dot

__all__ = ["TuckerTensor"]


class _TuckerParts(NamedTuple):
    core: Array
    factors: list[Array]


class TuckerTensor(Decomposed, _TuckerParts):
    """A tensor ``core x_1 factors[0] x_2 factors[1] …``.

    Parameters
    ----------
    core : array, shape (r_1, …, r_M)
    factors : sequence of array, shape (d_m, r_m)

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If a factor does not fit the core.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Unpacks as ``core, factors``, like TensorLy's TuckerTensor. ``a + b``, ``a - b`` and ``a * b`` (element by element)
    are Tucker tensors again, whose ranks are sums and products of ranks.

    Examples
    --------
    >>> import numpy as np
    >>> tucker = TuckerTensor(np.array([[2.0]]), [np.ones((2, 1)), np.ones((3, 1))])
    >>> tucker.to_tensor()
    array([[2., 2., 2.],
           [2., 2., 2.]])
    >>> (tucker + tucker).rank, float(tucker.inner(tucker))
    ((2, 2), 24.0)
    """

    @checks_arguments
    def __new__(cls, core: Any, factors: Sequence[Any]) -> Self:
        backend, (core, *arrays) = as_tensors([core, *factors], "core and factors")
        if len(arrays) != len(core.shape):
            raise ShapeError(f"a core of shape {tuple(core.shape)} needs {len(core.shape)} factors; got {len(arrays)}")
        for mode, factor in enumerate(arrays):
            if len(factor.shape) != 2 or factor.shape[1] != core.shape[mode]:
                raise ShapeError(
                    f"Tucker factor {mode} has shape {tuple(factor.shape)}; expected (size, {core.shape[mode]}), for a "
                    f"core of shape {tuple(core.shape)}"
                )
        return cls.of(backend, (core, arrays))

    __repr__ = Decomposed.__repr__

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(factor.shape[0]) for factor in self.factors)

    @property
    def rank(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.core.shape)

    @property
    def arrays(self) -> list[Array]:
        return [self.core, *self.factors]

    @property
    def contraction(self) -> Contraction:
        ranks, modes = list(range(self.order)), list(range(self.order, 2 * self.order))
        return [ranks, *([mode, rank] for mode, rank in zip(modes, ranks, strict=True))], modes

    def to_tensor(self) -> Array:
        return tucker_to_tensor((self.core, self.factors))

    def entries(self, indices: Any) -> Array:
        backend, places = self.backend, self.places(indices)
        count = len(places[0])
        found = backend.reshape(self.core, (1, *self.core.shape))
        for factor, place in zip(self.factors, places, strict=True):
            rows = backend.take(factor, backend.constant(place, backend.device(factor)), axis=0)
            # Contract the first mode that is left, batched over the elements.
            rest = tuple(found.shape)[2:]
            flat = backend.reshape(found, (found.shape[0], factor.shape[1], -1 if rest else 1))
            found = backend.reshape(backend.matmul(backend.reshape(rows, (count, 1, -1)), flat), (count, *rest))
        return found

    def part(self, *index: int | slice) -> Self:
        slices = self.slices(index)
        return type(self)(self.core, [factor[one] for factor, one in zip(self.factors, slices, strict=True)])

    def inner(self, other: Self) -> Array:
        self.same_shape(other)
        backend = self.backend
        moved = other.core
        for mode, (mine, theirs) in enumerate(zip(self.factors, other.factors, strict=True)):
            moved = mode_dot(moved, backend.matmul(backend.conj(backend.matrix_transpose(mine)), theirs), mode)
        return backend.sum(backend.flatten(backend.conj(self.core) * moved), axis=0)

    def mode_dot(self, matrix: Any, mode: int) -> Self:
        """Multiply by a matrix along one mode, without forming the tensor."""
        number = mode_of(mode, self.shape)
        return type(self)(
            self.core, [mode_dot(one, matrix, 0) if m == number else one for m, one in enumerate(self.factors)]
        )

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, TuckerTensor):
            return NotImplemented
        self.same_shape(other)
        backend = self.backend
        factors = [
            backend.concat([mine, theirs], axis=1) for mine, theirs in zip(self.factors, other.factors, strict=True)
        ]
        return type(self)(block_diagonal(backend, self.core, other.core, range(self.order)), factors)

    def __mul__(self, other: Any) -> Self:
        number = scalar_of(other)
        if number is not None:
            return type(self)(self.core * number, self.factors)
        if not isinstance(other, TuckerTensor):
            return NotImplemented
        self.same_shape(other)
        factors = [row_khatri_rao(pair) for pair in zip(self.factors, other.factors, strict=True)]
        return type(self)(kronecker_tensor(self.backend, [self.core, other.core]), factors)

    def tucker_copy(self) -> Self:
        """Return a copy of the object and its arrays, as the method of this name in TensorLy does."""
        return copy.deepcopy(self)

    def orthogonal(self) -> Self:
        """Return the same tensor with factors that have orthonormal columns, at most as many as rows."""
        backend, core, factors = self.backend, self.core, []
        for mode, factor in enumerate(self.factors):
            q, r = backend.qr(factor)
            factors.append(q)
            core = mode_dot(core, r, mode)
        return type(self)(core, factors).with_outcome(self.outcome)
