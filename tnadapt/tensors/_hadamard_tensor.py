"""Element-by-element products of CP tensors, such as LoHa's updates."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from tnadapt.algebra.products import hadamard_tensor
from tnadapt.argument_checks import is_sequence
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.implicit_gradient import Contraction
from tnadapt.errors import ShapeError, safe_repr

from ._checks import scalar_of
from ._cp_tensor import CPTensor
from ._decomposed import Decomposed

__all__ = ["HadamardTensor"]


class _HadamardParts(NamedTuple):
    parts: list[CPTensor]


class HadamardTensor(Decomposed, _HadamardParts):
    """A product, element by element, of CP tensors of one shape.

    Parameters
    ----------
    parts : sequence of CPTensor

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If the parts differ in shape.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Hyeon-Woo, Ye-Bin & Oh, "FedPara" (arXiv 2108.06098): with two matrices of rank r, the product has rank up to r².
    ``to_cp()`` gives the same tensor as one CP tensor, whose rank is the product of the ranks. ``a * b`` has the
    parts of both. A sum has no such form: add the CP tensors.

    Examples
    --------
    >>> import numpy as np
    >>> part = CPTensor(None, [np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])])
    >>> product = HadamardTensor([part, part])
    >>> product.to_tensor()
    array([[ 9., 16.],
           [36., 64.]])
    >>> product.rank, product.to_cp().rank
    ((1, 1), 1)
    """

    def __new__(cls, parts: Sequence[CPTensor]) -> Self:
        listed = list(parts) if is_sequence(parts) else []
        if not listed or not all(isinstance(part, CPTensor) for part in listed):
            raise ShapeError(f"parts must be a list of CP tensors; got {safe_repr(parts)}")
        for part in listed[1:]:
            listed[0].same_shape(part)
        return cls.of(get_backend(*(array for part in listed for array in part.arrays)), (listed,))

    __repr__ = Decomposed.__repr__

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def rank(self) -> tuple[int, ...]:
        return tuple(part.rank for part in self.parts)

    @property
    def arrays(self) -> list[Array]:
        return [array for part in self.parts for array in part.arrays]

    @property
    def contraction(self) -> Contraction:
        modes, arrays = list(range(self.order)), list[list[int]]()
        for number, part in enumerate(self.parts, self.order):
            arrays += ([] if part.weights is None else [[number]]) + [[mode, number] for mode in modes]
        return arrays, modes

    def to_tensor(self) -> Array:
        return hadamard_tensor([part.to_tensor() for part in self.parts])

    def to_cp(self) -> CPTensor:
        """Return the same tensor as one CP tensor."""
        return functools.reduce(lambda a, b: a * b, self.parts)

    def entries(self, indices: Any) -> Array:
        return hadamard_tensor([part.entries(indices) for part in self.parts])

    def part(self, *index: int | slice) -> Self:
        return type(self)([part.part(*index) for part in self.parts])

    def inner(self, other: Self) -> Array:
        self.same_shape(other)
        return self.to_cp().inner(other.to_cp())

    def __add__(self, other: Any) -> Self:
        return NotImplemented

    def __mul__(self, other: Any) -> Self:
        number = scalar_of(other)
        if number is not None:
            return type(self)([self.parts[0] * number, *self.parts[1:]])
        if not isinstance(other, HadamardTensor):
            return NotImplemented
        return type(self)([*self.parts, *other.parts])
