"""Sums of Kronecker products, and Hadamard products of CP tensors: the tensors, and decompositions into them."""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.folding import MAX_ORDER
from tnadapt.algebra.products import hadamard_tensor, kron_matvec, kronecker_tensor, rearranged
from tnadapt.argument_checks import checks_arguments, is_sequence
from tnadapt.backends import Array, get_backend
from tnadapt.decomposition import Step, decompose
from tnadapt.decomposition.fits import Callback, Contraction
from tnadapt.errors import BackendError, ShapeError, safe_repr

from . import _requests
from ._cp_decomposition import cp
from ._decomposed import CPTensor, Decomposed, smallest_rank, with_derivative
from ._tensor_chains import TTMatrix, TTTensor, exact_cores

T = TypeVar("T")

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
    Unpacks as ``weights, terms``. Of a single term, ``factors`` are the K arrays, with the weight in the first. One of
    matrices multiplies vectors and matrices, ``product @ x``, without being formed.

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
        backend, arrays = _requests.as_tensors([array for term in listed for array in term], "terms")
        if weights is not None:
            weights = _requests.as_tensor(weights, "weights")[1]
            get_backend(*arrays, weights)
            if tuple(weights.shape) != (len(listed),):
                raise ShapeError(f"weights have shape {tuple(weights.shape)}; expected ({len(listed)},), one per term")
        rest = iter(arrays)
        listed = [[next(rest) for _ in term] for term in listed]
        shapes = [[tuple(map(int, array.shape)) for array in term] for term in listed]
        for number, term_shapes in enumerate(shapes):
            if term_shapes != shapes[0]:
                raise ShapeError(
                    f"term {number} has factors of shapes {term_shapes}; expected {shapes[0]}, like term 0"
                )
        if len({len(shape) for shape in shapes[0]}) > 1:
            raise ShapeError(f"factors of a Kronecker product need the same number of axes; got shapes {shapes[0]}")
        return cls.of(backend, (weights, listed))

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
        return _added(kronecker_tensor(backend, term) for term in self.scaled_terms())

    def entries(self, indices: Any) -> Array:
        backend, places, shapes = self.backend, self.places(indices), self.factor_shapes
        device = backend.device(self.terms[0][0])
        # The digits of each index: one for each factor, the first factor's slowest.
        digits = [np.unravel_index(place, [shape[mode] for shape in shapes]) for mode, place in enumerate(places)]
        flat = [
            backend.constant(np.asarray(np.ravel_multi_index([digit[k] for digit in digits], shape)), device)
            for k, shape in enumerate(shapes)
        ]
        return _added(
            hadamard_tensor(
                [backend.take(backend.flatten(array), place) for array, place in zip(term, flat, strict=True)]
            )
            for term in self.scaled_terms()
        )

    def part(self, *index: int | slice) -> Self:
        """Take a slice; only whole modes, because others are no Kronecker products."""
        return self._whole(index)

    def _simplified(self, other: Decomposed) -> Decomposed:
        if (
            isinstance(other, TTMatrix)
            and list(zip(other.row_sizes, other.col_sizes, strict=True)) == self.factor_shapes
        ):
            reshape = self.backend.reshape
            return _added(TTMatrix([reshape(x, (1, *x.shape, 1)) for x in term]) for term in self.scaled_terms())
        # The Kronecker product of trains has those of their cores.
        return _added(
            TTTensor([kronecker_tensor(self.backend, cores) for cores in zip(*trains, strict=True)])
            for trains in ([exact_cores(self.backend, array) for array in term] for term in self.scaled_terms())
        )

    def _rearranged(self) -> CPTensor:
        """Return the same elements in another order as a CP tensor, whose modes are the elements of each factor."""
        backend = self.backend
        columns = ([backend.reshape(array, (-1, 1)) for array in arrays] for arrays in zip(*self.terms, strict=True))
        return CPTensor(self.weights, [backend.concat(arrays, axis=1) for arrays in columns])

    def _inner(self, other: Self) -> Array:
        return self._rearranged()._inner(other._rearranged())

    def norm(self) -> Array:
        return self._rearranged().norm()

    def __matmul__(self, x: Any) -> Array:
        """Multiply by a vector or a matrix of columns, without forming the product (two axes only)."""
        if len(self.shape) != 2:
            raise ShapeError(f"only a matrix multiplies a vector; this is a tensor of shape {self.shape}")
        x = _requests.numeric(get_backend(x), x, "x")
        return _added(kron_matvec(term, x) for term in self.scaled_terms())

    def _sum(self, other: Self) -> Self:
        return type(self)(None, [*self.scaled_terms(), *other.scaled_terms()])

    def _times(self, number: Any) -> Self:
        return type(self)(None, [[term[0] * number, *term[1:]] for term in self.scaled_terms()])

    def _product(self, other: Self) -> Self:
        pairs = itertools.product(self.scaled_terms(), other.scaled_terms())
        return type(self)(None, [[a * b for a, b in zip(mine, theirs, strict=True)] for mine, theirs in pairs])

    def same_shape(self, other: Decomposed) -> None:
        super().same_shape(other)
        if isinstance(other, KroneckerTensor) and other.factor_shapes != self.factor_shapes:
            raise ShapeError(
                f"the factors have shapes {self.factor_shapes} and {other.factor_shapes}; expected the same ones"
            )


def _added(terms: Iterable[T]) -> T:
    return functools.reduce(operator.add, terms)


# -- The nearest Kronecker product, and sums of them -------------------------------------------------------------------


@checks_arguments
def kronecker_decomposition(
    tensor: Any,
    shapes: Sequence[Sequence[int]],
    terms: int | None = None,
    *,
    max_error: float | None = None,
    starts: int | None = None,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
) -> KroneckerTensor:
    """Approximate a matrix or tensor by a Kronecker product of K factors, or by a sum of such products.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    shapes : sequence of K shapes
        The shapes of the factors, whose products mode by mode are the tensor's shape: for a matrix of shape (12, 20)
        for example ``[(3, 4), (4, 5)]``.
    terms : int, optional
        Number of products that are added; 1 if neither it nor ``max_error`` is given.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a number of terms.
    starts, random_state, tol, max_iterations, callback
        Of the iteration for K ≥ 3, as for :func:`cp`.

    Returns
    -------
    KroneckerTensor
        Its ``factors`` are the K arrays of a single term; it unpacks as ``weights, terms``. For K = 2 the error is the
        least possible one.

    Raises
    ------
    ShapeError
        If the shapes do not multiply to the tensor's, or the tensor has NaN, infinity or no elements.
    BackendError
        If the tensor is not an array of numbers of a known library, or is traced.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Van Loan & Pitsianis, "Approximation with Kronecker products" (1993): rearranged, a Kronecker product is an outer
    product, and a sum of T products a CP tensor of rank T with the factors as vectors. For K = 2 that is a truncated
    SVD of a matrix with as many rows as the first factor has elements. With ``terms``, it is differentiable
    once it has converged.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.arange(6.0).reshape(2, 3), np.ones((4, 2))
    >>> product = kronecker_decomposition(np.kron(a, b), [(2, 3), (4, 2)])
    >>> left, right = product.factors
    >>> left.shape, right.shape, bool(np.allclose(np.kron(left, right), np.kron(a, b))), product.certified
    ((2, 3), (4, 2), True, True)
    """
    terms = 1 if terms is None and max_error is None else terms
    request = _requests.requested(tensor, terms, max_error, random_state=random_state, what="terms")
    request.refuse_trace("kronecker_decomposition()", "detach the tensor")
    sizes = _shapes(shapes, request.shape)
    backend = request.backend
    most = _requests.useful_rank([math.prod(shape) for shape in sizes])
    count = None if terms is None else min(_requests.integer_of("terms", terms, 1), most)
    source = request.tensor if request.source is None else request.source
    cp_tensor = cp(
        rearranged(backend, source, sizes), count, max_error=max_error, starts=starts,
        random_state=request.seed, tol=tol, max_iterations=max_iterations, callback=callback,
    )  # fmt: skip
    terms_ = [
        [backend.reshape(factor[:, term], shape) for factor, shape in zip(cp_tensor.factors, sizes, strict=True)]
        for term in range(cp_tensor.rank)
    ]
    return KroneckerTensor(cp_tensor.weights, terms_).with_outcome(cp_tensor.outcome)


def _shapes(shapes: Any, whole: tuple[int, ...]) -> list[tuple[int, ...]]:
    try:
        sizes = [tuple(_requests.integer_of("a size in shapes", size, 1) for size in shape) for shape in shapes]
    except TypeError:
        raise ShapeError(f"shapes must be a list of shapes, one for each factor; got {safe_repr(shapes)}") from None
    if not sizes:
        raise ShapeError("shapes is empty; expected the shape of each factor")
    if any(len(shape) != len(whole) for shape in sizes):
        raise ShapeError(f"the factors of a tensor of shape {whole} need {len(whole)} axes each; got shapes {sizes}")
    product = tuple(math.prod(mode_sizes) for mode_sizes in zip(*sizes, strict=True))
    if product != whole:
        raise ShapeError(f"factors of shapes {sizes} multiply to {product}; expected the tensor's shape {whole}")
    return sizes


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
    parts of both. A sum is a CP tensor.

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

    def _simplified(self, other: Decomposed) -> CPTensor:
        return self.to_cp()

    def _inner(self, other: Self) -> Array:
        return self.to_cp().inner(other.to_cp())

    def _sum(self, other: Self) -> Any:
        return self.to_cp() + other.to_cp()

    def _times(self, number: Any) -> Self:
        return type(self)([self.parts[0] * number, *self.parts[1:]])

    def _product(self, other: Self) -> Self:
        return type(self)([*self.parts, *other.parts])


# -- The Hadamard product nearest to a tensor --------------------------------------------------------------------------


@checks_arguments
def hadamard_decomposition(
    tensor: Any,
    rank: int | None = None,
    parts: int = 2,
    *,
    max_error: float | None = None,
    random_state: Any = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    callback: Callback | None = None,
) -> HadamardTensor:
    """Approximate a matrix or tensor by an element-by-element product of CP tensors, as LoHa does.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real. Lists and integers are converted.
    rank : int, optional
        The rank of each part.
    parts : int
        Number of parts that are multiplied.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a rank: the smallest rank is searched whose fit has no
        larger error.
    random_state : int or Generator, optional
        Seed of the starts.
    tol : float
        The iteration stops when a step reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of steps.
    callback : callable, optional
        Called with the number and the relative error of each step.

    Returns
    -------
    HadamardTensor
        Its ``parts`` are CP tensors.

    Raises
    ------
    ShapeError
        If the tensor has NaN, infinity or no elements, or the rank is out of range.
    BackendError
        If the tensor is not an array of real numbers of a known library, or is traced.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Hyeon-Woo, Ye-Bin & Oh, "FedPara" (arXiv 2108.06098). The problem is not convex: the result is the best of several
    starts, without a guarantee. With ``rank``, it is differentiable once it has converged. For matrices a lower bound
    is reported, as the rank is at most ``rank ** parts``.

    Examples
    --------
    >>> import numpy as np
    >>> tensor = np.outer(np.arange(1.0, 5.0), np.arange(1.0, 4.0)) ** 2
    >>> product = hadamard_decomposition(tensor, 1)
    >>> len(product.parts), product.shape, product.error < 1e-6
    (2, (4, 3), True)
    >>> hadamard_decomposition(tensor, max_error=1e-6).rank
    (1, 1)
    """
    request = _requests.requested(tensor, rank, max_error, random_state=random_state)
    request.refuse_trace("hadamard_decomposition()", "detach the tensor")
    if request.backend.is_complex(request.tensor):
        raise BackendError(
            f"hadamard_decomposition() needs a real tensor; got {request.backend.dtype_name(request.tensor)}: "
            "decompose its real and imaginary parts, or use cp()"
        )
    parts, shape = _requests.integer_of("parts", parts, 1), request.shape
    if len(shape) > MAX_ORDER:
        raise ShapeError(f"the tensor has {len(shape)} modes; hadamard_decomposition() takes at most {MAX_ORDER}")

    def result_of(arrays: Mapping[str, Array]) -> HadamardTensor:
        factors, each = list(arrays.values()), len(shape)
        return HadamardTensor([CPTensor(None, factors[at : at + each]) for at in range(0, len(factors), each)])

    def on_step(step: Step) -> None:
        if callback is not None and step.error is not None:
            callback(step.iteration, step.error)

    def fitted(rank: int) -> HadamardTensor:
        if parts > 64 or rank > math.prod(shape):
            raise ShapeError(f"{parts} parts of rank {rank} are more than a tensor of shape {shape} can use")
        matrix = request.backend.reshape(request.tensor, (shape[0], math.prod(shape[1:])))
        config = Config(rank=rank, order=len(shape), fold=shape, groups=1, format="cp")
        if parts > 1:
            config = config.replace(splits=parts, combine="hadamard", leading="same")
        params, report = decompose(
            [matrix], config, tol=tol, max_iterations=max_iterations, seed=request.seed, progress=on_step
        )
        (group,) = report.groups
        return with_derivative(request, result_of(params), group.converged).with_outcome(group)

    if rank is not None:
        return fitted(_requests.integer_of("rank", rank, 1))
    assert request.max_error is not None
    return smallest_rank(fitted, request.max_error, _requests.useful_rank(shape), shape)
