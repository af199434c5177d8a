"""Products of matrices and tensors that are not mode products: Khatri-Rao, outer, inner, and general networks."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from tnadapt.algebra.factor_products import khatri_rao as columns_of
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError, safe_repr

from ._checks import alike, as_tensor, as_tensors, integer_of

__all__ = ["contract", "inner", "khatri_rao", "outer", "row_khatri_rao"]


def khatri_rao(matrices: Sequence[Any], weights: Any = None, skip_matrix: int | None = None) -> Array:
    """Compute the column-wise Kronecker product of matrices.

    Parameters
    ----------
    matrices : sequence of array, shape (d_m, r)
    weights : array, shape (r,), optional
        Each column of the result is multiplied by its weight.
    skip_matrix : int, optional
        Position of a matrix that is left out.

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
    if skip_matrix is not None:
        del factors[integer_of("skip_matrix", skip_matrix, 0, len(factors) - 1)]
        get_backend(*factors)
    alike(factors, 1, "matrix")
    if weights is not None:
        _, scales = as_tensor(weights, "weights")
        if tuple(scales.shape) != (factors[0].shape[1],):
            raise ShapeError(f"weights have shape {tuple(scales.shape)}; expected ({factors[0].shape[1]},)")
        factors[0] = factors[0] * scales
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
    tensor1, tensor2 : array
        Of the same shape, or with ``n_modes``, so that the last modes of the first are the first of the second. No
        conjugate is taken, as in TensorLy.
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
    backend, one = as_tensor(tensor1, "tensor1")
    _, other = as_tensor(tensor2, "tensor2")
    get_backend(one, other)
    count = len(one.shape) if n_modes is None else integer_of("n_modes", n_modes, 1, len(one.shape))
    kept, shared = tuple(one.shape)[: len(one.shape) - count], tuple(one.shape)[len(one.shape) - count :]
    rest = tuple(other.shape)[count:]
    if tuple(other.shape)[:count] != shared or (n_modes is None and rest):
        raise ShapeError(
            f"tensors of shapes {tuple(one.shape)} and {tuple(other.shape)} do not contract over {count} modes"
        )
    product = backend.matmul(
        backend.reshape(one, (math.prod(kept), math.prod(shared))),
        backend.reshape(other, (math.prod(shared), math.prod(rest))),
    )
    return backend.reshape(product, (*kept, *rest))


@checks_arguments
def contract(equation: str, *tensors: Any, optimize: Any = "auto") -> Array:
    """Contract a network of tensors, in an order that opt_einsum finds.

    Parameters
    ----------
    equation : str
        As for ``numpy.einsum``, such as ``"ij,jk,kl->il"``.
    *tensors : array
        Of one library, dtype and device.
    optimize : str or path finder
        How opt_einsum searches the order of the contractions. A ``cotengra.HyperOptimizer()`` works, too.

    Returns
    -------
    array
        Differentiable if its library is.

    Raises
    ------
    ShapeError
        If the equation does not fit the shapes.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Smith & Gray, "opt_einsum" (JOSS 3, 2018). Cost and memory are those of the path: see
    ``opt_einsum.contract_path``. The paths of the last 256 equations and shapes are kept.

    Examples
    --------
    >>> import numpy as np
    >>> contract("ij,jk->ik", np.ones((2, 3)), np.ones((3, 2)))
    array([[3., 3.],
           [3., 3.]])
    """
    import opt_einsum

    _, arrays = as_tensors(tensors, "tensors")
    try:
        if isinstance(optimize, str):
            return _expression(equation, tuple(tuple(array.shape) for array in arrays), optimize)(*arrays)
        return opt_einsum.contract(equation, *arrays, optimize=optimize)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        shapes = ", ".join(str(tuple(array.shape)) for array in arrays)
        raise ShapeError(
            f"the equation {safe_repr(equation)} does not fit tensors of shapes {shapes}, or "
            f"optimize={safe_repr(optimize)} is no path: {str(error)[:200]}"
        ) from None


@functools.lru_cache(maxsize=256)
def _expression(equation: str, shapes: tuple[tuple[int, ...], ...], optimize: str) -> Any:
    """Return the contraction of tensors of these shapes. Searching its path may take longer than contracting."""
    import opt_einsum

    return opt_einsum.contract_expression(equation, *shapes, optimize=optimize)
