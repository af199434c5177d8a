"""Unfolding and folding of a part of the modes, and products, under TensorLy's names and keywords."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from tnadapt.algebra.products import kronecker as kronecker_of
from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError

from .. import _matrix_products, _modes
from .._checks import as_tensor, as_tensors, integer_of, mode_of

__all__ = [
    "batched_outer",
    "fold",
    "khatri_rao",
    "kronecker",
    "multi_mode_dot",
    "partial_fold",
    "partial_tensor_to_vec",
    "partial_unfold",
    "partial_vec_to_tensor",
    "vec_to_tensor",
]


def fold(unfolded_tensor: Any, mode: int, shape: Sequence[int]) -> Array:
    """Undo an unfolding; :func:`tnadapt.tensors.fold` with TensorLy's keywords.

    Parameters
    ----------
    unfolded_tensor : array, shape (d_mode, prod of the others)
    mode : int
    shape : sequence of int
        The shape of the tensor.

    Returns
    -------
    array, shape ``shape``
        At most one copy.

    Raises
    ------
    ShapeError
        If the matrix is not the unfolding of a tensor of that shape.

    Examples
    --------
    >>> import numpy as np
    >>> fold(np.arange(6.0).reshape(3, 2), mode=1, shape=(2, 3))
    array([[0., 2., 4.],
           [1., 3., 5.]])
    """
    return _modes.fold(unfolded_tensor, mode, shape)


def vec_to_tensor(vec: Any, shape: Sequence[int]) -> Array:
    """Undo a vectorization; :func:`tnadapt.tensors.vec_to_tensor` with TensorLy's keywords.

    Parameters
    ----------
    vec : array, shape (prod d,)
    shape : sequence of int

    Returns
    -------
    array, shape ``shape``
        A view where the library allows it.

    Raises
    ------
    ShapeError
        If the vector has another number of elements.

    Examples
    --------
    >>> import numpy as np
    >>> vec_to_tensor(vec=np.arange(4.0), shape=(2, 2))
    array([[0., 1.],
           [2., 3.]])
    """
    return _modes.vec_to_tensor(vec, shape)


def partial_unfold(
    tensor: Any, mode: int = 0, skip_begin: int = 1, skip_end: int = 0, ravel_tensors: bool = False
) -> Array:
    """Unfold each of a batch of tensors.

    Parameters
    ----------
    tensor : array, shape (…, d_1, …, d_M, …)
    mode : int
        The mode that becomes the rows, counted from 0 after the skipped ones.
    skip_begin, skip_end : int
        How many modes to leave at the beginning and at the end.
    ravel_tensors : bool
        Whether to flatten each unfolding.

    Returns
    -------
    array, shape (…, d_mode, prod of the others, …)
        Differentiable; at most one copy.

    Raises
    ------
    ShapeError
        If there is no such mode, or none is left.

    Examples
    --------
    >>> import numpy as np
    >>> partial_unfold(np.zeros((10, 2, 3, 4)), mode=1).shape
    (10, 3, 8)
    >>> partial_unfold(np.zeros((2, 3, 4, 10)), mode=1, skip_begin=0, skip_end=1, ravel_tensors=True).shape
    (24, 10)
    """
    backend, array = as_tensor(tensor)
    begin, middle, end = _parts(tuple(array.shape), skip_begin, skip_end)
    place = mode_of(mode, middle)
    moved = backend.moveaxis(array, len(begin) + place, len(begin))
    rows = (math.prod(middle),) if ravel_tensors else (middle[place], math.prod(middle) // max(1, middle[place]))
    return backend.reshape(moved, (*begin, *rows, *end))


def partial_fold(unfolded: Any, mode: int, shape: Sequence[int], skip_begin: int = 1, skip_end: int = 0) -> Array:
    """Undo :func:`partial_unfold`.

    Parameters
    ----------
    unfolded : array
        The result of :func:`partial_unfold`, flattened or not.
    mode : int
    shape : sequence of int
        The shape of the whole tensor, with the skipped modes.
    skip_begin, skip_end : int

    Returns
    -------
    array, shape ``shape``
        Differentiable; at most one copy.

    Raises
    ------
    ShapeError
        If the number of elements is another one, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> partial_fold(np.zeros((10, 3, 8)), 1, (10, 2, 3, 4)).shape
    (10, 2, 3, 4)
    """
    backend, array = as_tensor(unfolded, "the unfolded tensor")
    sizes = tuple(int(size) for size in shape)
    begin, middle, end = _parts(sizes, skip_begin, skip_end)
    place = mode_of(mode, middle)
    if math.prod(array.shape) != math.prod(sizes):
        raise ShapeError(f"an array of shape {tuple(array.shape)} does not fold to a tensor of shape {sizes}")
    moved = (*begin, middle[place], *middle[:place], *middle[place + 1 :], *end)
    return backend.moveaxis(backend.reshape(array, moved), len(begin), len(begin) + place)


def partial_tensor_to_vec(tensor: Any, skip_begin: int = 1, skip_end: int = 0) -> Array:
    """Flatten each of a batch of tensors.

    Parameters
    ----------
    tensor : array, shape (…, d_1, …, d_M, …)
    skip_begin, skip_end : int
        How many modes to leave at the beginning and at the end.

    Returns
    -------
    array, shape (…, prod d, …)
        Differentiable; a view where the library allows it.

    Raises
    ------
    ShapeError
        If no mode is left.

    Examples
    --------
    >>> import numpy as np
    >>> partial_tensor_to_vec(np.zeros((10, 2, 3, 4))).shape
    (10, 24)
    """
    return partial_unfold(tensor, 0, skip_begin, skip_end, ravel_tensors=True)


def partial_vec_to_tensor(matrix: Any, shape: Sequence[int], skip_begin: int = 1, skip_end: int = 0) -> Array:
    """Undo :func:`partial_tensor_to_vec`.

    Parameters
    ----------
    matrix : array, shape (…, prod d, …)
    shape : sequence of int
        The shape of the whole tensor, with the skipped modes.
    skip_begin, skip_end : int

    Returns
    -------
    array, shape ``shape``
        Differentiable; a view where the library allows it.

    Raises
    ------
    ShapeError
        If the number of elements is another one.

    Examples
    --------
    >>> import numpy as np
    >>> partial_vec_to_tensor(np.zeros((10, 24)), (10, 2, 3, 4)).shape
    (10, 2, 3, 4)
    """
    return partial_fold(matrix, 0, shape, skip_begin, skip_end)


def multi_mode_dot(
    tensor: Any,
    matrix_or_vec_list: Sequence[Any],
    modes: Sequence[int] | None = None,
    skip: int | None = None,
    transpose: bool = False,
) -> Array:
    """Multiply a tensor by several matrices or vectors, one along each mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
    matrix_or_vec_list : sequence of array
        Each of shape (n, d_mode) or (d_mode,).
    modes : sequence of int, optional
        The mode of each; the first modes in order if None.
    skip : int, optional
        Position in the sequence of one that is left out.
    transpose : bool
        Whether to multiply by the conjugate transposes.

    Returns
    -------
    array
        Differentiable. The products that shrink the tensor most come first.

    Raises
    ------
    ShapeError
        If the sizes do not match, or a mode occurs twice.

    Examples
    --------
    >>> import numpy as np
    >>> multi_mode_dot(np.ones((2, 3)), [np.ones(2), np.ones((4, 3))]).shape
    (4,)
    """
    return _modes.multi_mode_dot(tensor, matrix_or_vec_list, modes, skip, transpose)


def khatri_rao(matrices: Sequence[Any], weights: Any = None, skip_matrix: int | None = None, mask: Any = None) -> Array:
    """Compute the column-wise Kronecker product of matrices.

    Parameters
    ----------
    matrices : sequence of array, shape (d_m, r)
    weights : array, shape (r,), optional
        Each column of the result is multiplied by its weight.
    skip_matrix : int, optional
        Position of a matrix that is left out.
    mask : array with prod d elements, optional
        Each row of the result is multiplied by its element.

    Returns
    -------
    array, shape (prod d, r)
        The index of the first matrix varies slowest. One multiplication for each element.

    Raises
    ------
    ShapeError
        If the numbers of columns differ, or the mask has another number of elements.

    Examples
    --------
    >>> import numpy as np
    >>> khatri_rao([np.ones((2, 2)), np.eye(2)], mask=np.array([[1.0, 1.0], [0.0, 0.0]]))
    array([[1., 0.],
           [0., 1.],
           [0., 0.],
           [0., 0.]])
    """
    found = _matrix_products.khatri_rao(matrices, weights, skip_matrix)
    if mask is None:
        return found
    backend, rows = as_tensor(mask, "mask")
    if math.prod(rows.shape) != found.shape[0]:
        raise ShapeError(f"mask has shape {tuple(rows.shape)}; expected {found.shape[0]} elements, one for each row")
    return found * backend.reshape(rows, (-1, 1))


def kronecker(matrices: Sequence[Any], skip_matrix: int | None = None, reverse: bool = False) -> Array:
    """Compute the Kronecker product of matrices.

    Parameters
    ----------
    matrices : sequence of array, shape (n_k, m_k)
    skip_matrix : int, optional
        Position of a matrix that is left out.
    reverse : bool
        Whether to multiply from the last to the first.

    Returns
    -------
    array, shape (prod n, prod m)
        Differentiable. One multiplication for each element, and for those of each smaller product on the way.

    Raises
    ------
    ShapeError
        If there is no matrix.
    BackendError
        If libraries, dtypes or devices are mixed.

    Examples
    --------
    >>> import numpy as np
    >>> kronecker([np.eye(2), np.array([[1.0, 2.0]])], reverse=True)
    array([[1., 0., 2., 0.],
           [0., 1., 0., 2.]])
    """
    _, arrays = as_tensors(matrices, "matrices")
    if skip_matrix is not None:
        del arrays[integer_of("skip_matrix", skip_matrix, 0, len(arrays) - 1)]
    return kronecker_of(arrays[::-1] if reverse else arrays)


def batched_outer(tensors: Sequence[Any]) -> Array:
    """Compute the outer products of the tensors of several batches.

    Parameters
    ----------
    tensors : sequence of array, shape (n, …)
        With the same first size.

    Returns
    -------
    array
        ``n``, then the other sizes one after another. One multiplication for each element.

    Raises
    ------
    ShapeError
        If the first sizes differ.

    Examples
    --------
    >>> import numpy as np
    >>> batched_outer([np.ones((5, 2)), np.ones((5, 3, 4))]).shape
    (5, 2, 3, 4)
    """
    backend, arrays = as_tensors(tensors, "tensors")
    for number, array in enumerate(arrays):
        if not array.shape or array.shape[0] != arrays[0].shape[0]:
            raise ShapeError(
                f"tensor {number} has shape {tuple(array.shape)}; expected the same first size as tensor 0, of shape "
                f"{tuple(arrays[0].shape)}"
            )

    def pair(a: Array, b: Array) -> Array:
        count = a.shape[0]
        product = backend.reshape(a, (count, -1, 1)) * backend.reshape(b, (count, 1, -1))
        return backend.reshape(product, (*a.shape, *b.shape[1:]))

    return functools.reduce(pair, arrays)


def _parts(
    shape: tuple[int, ...], skip_begin: int, skip_end: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    first = integer_of("skip_begin", skip_begin, 0)
    last = len(shape) - integer_of("skip_end", skip_end, 0)
    if first >= last:
        raise ShapeError(f"skip_begin={skip_begin} and skip_end={skip_end} leave no mode of a tensor of shape {shape}")
    return shape[:first], shape[first:last], shape[last:]
