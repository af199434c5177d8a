"""Products and reshapings of tensors: Khatri-Rao, outer, inner and mode products, unfolding and folding."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from tnadapt.algebra.products import khatri_rao as columns_of
from tnadapt.algebra.products import mode_product
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, Backend, get_backend
from tnadapt.errors import ShapeError, safe_repr

from ._requests import alike, as_tensor, as_tensors, integer_of, is_network, mode_of, numeric

# -- Khatri-Rao, outer and inner products ------------------------------------------------------------------------------


def khatri_rao(matrices: Sequence[Any]) -> Array:
    """Compute the column-wise Kronecker product of matrices.

    Parameters
    ----------
    matrices : sequence of array, shape (d_m, r)

    Returns
    -------
    array, shape (prod d, r)
        The index of the first matrix varies slowest, as in TensorLy. Differentiable.

    Raises
    ------
    ShapeError
        If the numbers of columns differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    One multiplication per element of the result, and of each smaller product on the way.

    Examples
    --------
    >>> import numpy as np
    >>> khatri_rao([np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 10.0]])])
    array([[ 1., 20.],
           [ 3., 40.]])
    """
    backend, factors = as_tensors(matrices, "matrices")
    alike(factors, 1, "matrix")
    return columns_of(backend, factors)


def row_khatri_rao(matrices: Sequence[Any]) -> Array:
    """Compute the row-wise Kronecker product of matrices, also called the face-splitting product.

    Parameters
    ----------
    matrices : sequence of array, shape (n, r_m)

    Returns
    -------
    array, shape (n, prod r)
        Row i is the Kronecker product of the rows i. Differentiable.

    Raises
    ------
    ShapeError
        If the numbers of rows differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> row_khatri_rao([np.array([[1.0, 2.0]]), np.array([[1.0, 10.0]])])
    array([[ 1., 10.,  2., 20.]])
    """
    backend, factors = as_tensors(matrices, "matrices")
    alike(factors, 0, "matrix")

    def pair(a: Array, b: Array) -> Array:
        rows, left, right = a.shape[0], a.shape[1], b.shape[1]
        return backend.reshape(backend.reshape(a, (rows, left, 1)) * backend.reshape(b, (rows, 1, right)), (rows, -1))

    return functools.reduce(pair, factors)


def outer(tensors: Sequence[Any]) -> Array:
    """Compute the outer product of tensors.

    Parameters
    ----------
    tensors : sequence of array
        Of any shapes.

    Returns
    -------
    array
        Its shape is the shapes one after another. Differentiable.

    Raises
    ------
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> outer([np.array([1.0, 2.0]), np.array([1.0, 10.0])])
    array([[ 1., 10.],
           [ 2., 20.]])
    """
    backend, arrays = as_tensors(tensors, "tensors")

    def pair(a: Array, b: Array) -> Array:
        product = backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1))
        return backend.reshape(product, (*a.shape, *b.shape))

    return functools.reduce(pair, arrays)


@checks_arguments
def inner(tensor1: Any, tensor2: Any, n_modes: int | None = None) -> Array:
    """Compute the inner product of two tensors, or contract the last modes of one with the first of the other.

    Parameters
    ----------
    tensor1, tensor2 : array or Decomposed
        Of the same shape, or with ``n_modes``, so that the last modes of the first are the first of the second. No
        conjugate is taken, as in TensorLy. Results of decompositions, of any two forms, are contracted over all modes,
        without forming either.
    n_modes : int, optional
        How many modes to contract.

    Returns
    -------
    array
        Without axes, or with the modes that are not contracted. Differentiable.

    Raises
    ------
    ShapeError
        If the shapes do not match.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> float(inner(np.ones((2, 3)), np.ones((2, 3))))
    6.0
    >>> inner(np.ones((2, 3)), np.ones((3, 4)), n_modes=1).shape
    (2, 4)
    """
    for network, other in ((tensor1, tensor2), (tensor2, tensor1)):
        if is_network(network):
            if n_modes not in (None, network.order):
                raise ShapeError(f"a {type(network).__name__} is contracted over all {network.order} modes; form it")
            return network.conj().inner(other)
    backend, first = as_tensor(tensor1, "tensor1")
    _, second = as_tensor(tensor2, "tensor2")
    get_backend(first, second)
    count = len(first.shape) if n_modes is None else integer_of("n_modes", n_modes, 1, len(first.shape))
    kept, shared = tuple(first.shape)[: len(first.shape) - count], tuple(first.shape)[len(first.shape) - count :]
    rest = tuple(second.shape)[count:]
    if tuple(second.shape)[:count] != shared or (n_modes is None and rest):
        raise ShapeError(
            f"tensors of shapes {tuple(first.shape)} and {tuple(second.shape)} do not contract over {count} modes"
        )
    product = backend.matmul(
        backend.reshape(first, (math.prod(kept), math.prod(shared))),
        backend.reshape(second, (math.prod(shared), math.prod(rest))),
    )
    return backend.reshape(product, (*kept, *rest))


# -- Unfolding, folding and mode products, in TensorLy's conventions ---------------------------------------------------

# Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51, 2009), with TensorLy's order of the columns
# of an unfolding: row-major, the last mode fastest.


def unfold(tensor: Any, mode: int) -> Array:
    """Unfold a tensor into a matrix whose rows are one mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
    mode : int
        The mode that becomes the rows; negative ones count from the last.

    Returns
    -------
    array, shape (d_mode, prod of the others)
        The columns are in row-major order of the other modes, as in TensorLy. Differentiable; at most one copy.

    Raises
    ------
    ShapeError
        If there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> unfold(np.arange(8.0).reshape(2, 2, 2), 1)
    array([[0., 1., 4., 5.],
           [2., 3., 6., 7.]])
    """
    backend, tensor = as_tensor(tensor)
    mode = mode_of(mode, tensor.shape)
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (moved.shape[0], math.prod(moved.shape[1:])))


@checks_arguments
def fold(unfolded: Any, mode: int, shape: Sequence[int]) -> Array:
    """Undo :func:`unfold`.

    Parameters
    ----------
    unfolded : array, shape (d_mode, prod of the others)
    mode : int
        The mode that the rows are.
    shape : sequence of int
        The shape of the tensor.

    Returns
    -------
    array, shape ``shape``
        Differentiable; at most one copy.

    Raises
    ------
    ShapeError
        If the matrix is not the unfolding of a tensor of that shape.

    Examples
    --------
    >>> import numpy as np
    >>> tensor = np.arange(8.0).reshape(2, 2, 2)
    >>> bool((fold(unfold(tensor, 1), 1, (2, 2, 2)) == tensor).all())
    True
    """
    backend, matrix = as_tensor(unfolded, "the unfolded tensor")
    shape = tuple(integer_of("a size in shape", size, 0) for size in shape)
    mode = mode_of(mode, shape)
    expected = (shape[mode], math.prod(shape[:mode] + shape[mode + 1 :]))
    if tuple(matrix.shape) != expected:
        raise ShapeError(
            f"the unfolding in mode {mode} of a tensor of shape {shape} has shape {expected}; got {tuple(matrix.shape)}"
        )
    return backend.moveaxis(backend.reshape(matrix, (shape[mode], *shape[:mode], *shape[mode + 1 :])), 0, mode)


@checks_arguments
def mode_dot(tensor: Any, matrix_or_vector: Any, mode: int, transpose: bool = False) -> Array:
    """Multiply a tensor by a matrix or a vector along one mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Results of decompositions have a method of this name instead, which does not form them.
    matrix_or_vector : array, shape (n, d_mode) or (d_mode,)
        Of the tensor's library, dtype and device.
    mode : int
        Negative ones count from the last.
    transpose : bool
        Whether to multiply by the conjugate transpose of a matrix of shape (d_mode, n).

    Returns
    -------
    array
        The tensor with ``n`` elements along that mode, or without that mode for a vector. Differentiable.

    Raises
    ------
    ShapeError
        If the sizes do not match.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    ``unfold(result, mode) = matrix @ unfold(tensor, mode)``: one matrix product of ``n * prod(d)`` multiply-adds.

    Examples
    --------
    >>> import numpy as np
    >>> mode_dot(np.ones((2, 3)), np.array([[1.0, 1.0, 1.0]]), 1)
    array([[3.],
           [3.]])
    >>> mode_dot(np.ones((2, 3)), np.array([1.0, 2.0]), 0)
    array([3., 3., 3.])
    """
    backend, tensor = as_tensor(tensor)
    factor = numeric(get_backend(matrix_or_vector, what="matrix_or_vector"), matrix_or_vector, "matrix_or_vector")
    get_backend(tensor, factor)
    return _product(backend, tensor, factor, mode_of(mode, tensor.shape), transpose)


def as_matrix(backend: Backend, factor: Array, shape: Sequence[int], mode: int, transpose: bool = False) -> Array:
    """Return the matrix that multiplies a mode of a tensor of a shape, of one row for a vector."""
    size = int(shape[mode])
    if len(factor.shape) not in (1, 2):
        raise ShapeError(f"a mode product takes a matrix or a vector; got shape {tuple(factor.shape)}")
    vector = len(factor.shape) == 1
    matrix = backend.reshape(factor, (1, -1)) if vector else factor
    if transpose and not vector:
        matrix = backend.conj(backend.matrix_transpose(matrix))
    if matrix.shape[1] != size:
        raise ShapeError(
            f"shape {tuple(factor.shape)} does not multiply mode {mode} of a tensor of shape {tuple(shape)}: expected "
            f"{size} {'elements' if vector else 'columns'}"
        )
    return matrix


def _product(backend: Backend, tensor: Array, factor: Array, mode: int, transpose: bool) -> Array:
    shape = tuple(tensor.shape)
    product = mode_product(backend, tensor, as_matrix(backend, factor, shape, mode, transpose), mode)
    return backend.reshape(product, shape[:mode] + shape[mode + 1 :]) if len(factor.shape) == 1 else product


@checks_arguments
def multi_mode_dot(
    tensor: Any,
    matrices_or_vectors: Sequence[Any],
    modes: Sequence[int] | None = None,
    transpose: bool = False,
) -> Array:
    """Multiply a tensor by several matrices or vectors, one along each mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
    matrices_or_vectors : sequence of array
        Each as for :func:`mode_dot`.
    modes : sequence of int, optional
        The mode of each; the first modes in order if None.
    transpose : bool
        Whether to multiply by the conjugate transposes.

    Returns
    -------
    array
        Differentiable.

    Raises
    ------
    ShapeError
        If the sizes do not match, or a mode occurs twice.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    The products that shrink the tensor most come first, which costs least.

    Examples
    --------
    >>> import numpy as np
    >>> multi_mode_dot(np.ones((2, 3)), [np.ones((1, 2)), np.ones((1, 3))])
    array([[6.]])
    """
    backend, tensor = as_tensor(tensor)
    factors = list(matrices_or_vectors)
    numbers = list(range(len(factors))) if modes is None else list(modes)
    if len(numbers) != len(factors) or len(factors) > len(tensor.shape):
        raise ShapeError(
            f"{len(factors)} matrices or vectors for the modes {safe_repr(numbers)} of a tensor of shape "
            f"{tuple(tensor.shape)}; expected one for each mode"
        )
    what = "one of matrices_or_vectors"
    pairs = [
        (mode_of(mode, tensor.shape), numeric(get_backend(factor, what=what), factor, what))
        for mode, factor in zip(numbers, factors, strict=True)
    ]
    if len({mode for mode, _ in pairs}) < len(pairs):
        raise ShapeError(f"a mode occurs twice in {safe_repr(numbers)}; multiply the matrices of one mode first")
    get_backend(tensor, *(factor for _, factor in pairs))

    def growth(pair: tuple[int, Array]) -> float:
        mode, factor = pair
        rows = 1 if len(factor.shape) == 1 else factor.shape[1 if transpose else 0]
        return float(rows / max(1, tensor.shape[mode]))

    removed: list[int] = []
    for mode, factor in sorted(pairs, key=growth):
        place = mode - sum(other < mode for other in removed)
        tensor = _product(backend, tensor, factor, place, transpose)
        if len(factor.shape) == 1:
            removed.append(mode)
    return tensor
