"""Sums of Kronecker products."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from tnadapt.algebra.products import hadamard_tensor, kron_matvec, kronecker_tensor
from tnadapt.argument_checks import checks_arguments, is_sequence
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.implicit_gradient import Contraction
from tnadapt.errors import ShapeError, safe_repr

from ._checks import as_tensor, as_tensors, numeric, scalar_of
from ._decomposed import CPTensor, Decomposed

__all__ = [
    "HadamardTensor",
    "KroneckerTensor",
]


# -- Sums of Kronecker products ----------------------------------------------------------------------------------------


class _KroneckerParts(NamedTuple):
    weights: Array | None
    terms: list[list[Array]]


class KroneckerTensor(Decomposed, _KroneckerParts):
    """A sum of Kronecker products ``sum_t weights[t] * kronecker(terms[t])``.

    Parameters
    ----------
    weights : array, shape (T,), or None
        None stands for ones.
    terms : sequence of sequence of array
        T terms of K factors each; factor k has the same shape in every term.

    Attributes
    ----------
    outcome : FitOutcome or None
        How a decomposition found it.

    Raises
    ------
    ShapeError
        If the terms differ in shape.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Unpacks as ``weights, terms``. Of a single term, ``factors`` are the K arrays, with the weight in the first.

    Examples
    --------
    >>> import numpy as np
    >>> product = KroneckerTensor(None, [[np.eye(2), np.ones((1, 3))]])
    >>> product.to_tensor()
    array([[1., 1., 1., 0., 0., 0.],
           [0., 0., 0., 1., 1., 1.]])
    >>> product @ np.ones(6), product.shape
    (array([3., 3.]), (2, 6))
    """

    @checks_arguments
    def __new__(cls, weights: Any, terms: Sequence[Sequence[Any]]) -> Self:
        listed = [list(term) for term in terms]
        flat = [array for term in listed for array in term]
        backend, arrays = as_tensors(flat, "terms")
        if weights is not None:
            weights = as_tensor(weights, "weights")[1]
            get_backend(*arrays, weights)
            if tuple(weights.shape) != (len(listed),):
                raise ShapeError(f"weights have shape {tuple(weights.shape)}; expected ({len(listed)},), one per term")
        shapes = [tuple(int(size) for size in array.shape) for array in arrays]
        count = len(listed[0])
        for number, term in enumerate(listed):
            own = shapes[number * len(term) : (number + 1) * len(term)]
            if len(term) != count or own != shapes[:count]:
                raise ShapeError(f"term {number} has factors of shapes {own}; expected {shapes[:count]}, like term 0")
        if len({len(shape) for shape in shapes[:count]}) > 1:
            raise ShapeError(
                f"factors of a Kronecker product need the same number of axes; got shapes {shapes[:count]}"
            )
        return cls.of(backend, (weights, [arrays[k * count : (k + 1) * count] for k in range(len(listed))]))

    __repr__ = Decomposed.__repr__

    @property
    def factors(self) -> list[Array]:
        """The factors of a single term, with its weight in the first."""
        if len(self.terms) != 1:
            raise ShapeError(f"a sum of {len(self.terms)} Kronecker products has no single list of factors: use terms")
        return self.scaled_terms()[0]

    @property
    def factor_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each of the K factors."""
        return [tuple(int(size) for size in array.shape) for array in self.terms[0]]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(sizes) for sizes in zip(*self.factor_shapes, strict=True))

    @property
    def rank(self) -> int:
        """Number of terms."""
        return len(self.terms)

    @property
    def arrays(self) -> list[Array]:
        flat = [array for term in self.terms for array in term]
        return flat if self.weights is None else [self.weights, *flat]

    def scaled_terms(self) -> list[list[Array]]:
        """Return the terms with each weight in the first factor."""
        if self.weights is None:
            return [list(term) for term in self.terms]
        return [[term[0] * self.weights[t], *term[1:]] for t, term in enumerate(self.terms)]

    def to_tensor(self) -> Array:
        backend = self.backend
        products = [kronecker_tensor(backend, term) for term in self.scaled_terms()]
        found = products[0]
        for product in products[1:]:
            found = found + product
        return found

    def entries(self, indices: Any) -> Array:
        backend, places, shapes = self.backend, self.places(indices), self.factor_shapes
        # The digits of each index: one for each factor, the first factor's slowest.
        digits = [np.unravel_index(place, [shape[mode] for shape in shapes]) for mode, place in enumerate(places)]
        found: Array = None
        for term in self.scaled_terms():
            values = []
            for k, array in enumerate(term):
                flat = np.ravel_multi_index([digit[k] for digit in digits], shapes[k])
                vector = backend.flatten(array)
                values.append(backend.take(vector, backend.constant(np.asarray(flat), backend.device(vector))))
            product = hadamard_tensor(values)
            found = product if found is None else found + product
        return found

    def part(self, *index: int | slice) -> Self:
        """Take a slice that is a Kronecker product: whole modes, or a range that one index of the first factor has."""
        terms = [list(term) for term in self.scaled_terms()]
        for mode, (one, size) in enumerate(zip(self.slices(index), self.shape, strict=True)):
            inner = math.prod(shape[mode] for shape in self.factor_shapes[1:])
            if one == slice(0, size, 1):
                continue
            if one.step != 1 or one.start % inner or one.stop % inner:
                raise ShapeError(
                    f"the slice {one} of mode {mode} is no Kronecker product: use multiples of {inner} as bounds, "
                    "or take entries"
                )
            cut = (*[slice(None)] * mode, slice(one.start // inner, one.stop // inner))
            for term in terms:
                term[0] = term[0][cut]
        return type(self)(None, terms)

    def inner(self, other: Self) -> Array:
        self._same_factors(other)
        backend = self.backend
        found: Array = None
        for mine in self.scaled_terms():
            for theirs in other.scaled_terms():
                parts = [
                    backend.sum(backend.flatten(backend.conj(a) * b), axis=0) for a, b in zip(mine, theirs, strict=True)
                ]
                product = hadamard_tensor(parts)
                found = product if found is None else found + product
        return found

    def __matmul__(self, x: Any) -> Array:
        """Multiply by a vector or a matrix of columns, without forming the product (two axes only)."""
        if len(self.shape) != 2:
            raise ShapeError(f"only a matrix multiplies a vector; this is a tensor of shape {self.shape}")
        x = numeric(get_backend(x), x, "x")
        found: Array = None
        for term in self.scaled_terms():
            product = kron_matvec(term, x)
            found = product if found is None else found + product
        return found

    def __add__(self, other: Any) -> Self:
        if not isinstance(other, KroneckerTensor):
            return NotImplemented
        self._same_factors(other)
        return type(self)(None, [*self.scaled_terms(), *other.scaled_terms()])

    def __mul__(self, other: Any) -> Self:
        number = scalar_of(other)
        if number is not None:
            return type(self)(None, [[term[0] * number, *term[1:]] for term in self.scaled_terms()])
        if not isinstance(other, KroneckerTensor):
            return NotImplemented
        self._same_factors(other)
        pairs = [(mine, theirs) for mine in self.scaled_terms() for theirs in other.scaled_terms()]
        return type(self)(None, [[a * b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])

    def _same_factors(self, other: KroneckerTensor) -> None:
        self.same_shape(other)
        if other.factor_shapes != self.factor_shapes:
            raise ShapeError(
                f"the factors have shapes {self.factor_shapes} and {other.factor_shapes}; expected the same ones"
            )


# -- Element-by-element products of CP tensors, such as LoHa's updates -------------------------------------------------


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
