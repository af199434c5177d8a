"""Tensor products: mode products, CP, Tucker, tensor train, Kronecker, Hadamard, as array operations.

The conventions are TensorLy's: factors are ``(size, rank)``, a CP tensor is ``(weights, factors)``, a Tucker tensor
``(core, factors)``, a tensor train a list of ``(r_left, size, r_right)``. TensorLy's CPTensor, TuckerTensor and
TTTensor objects are accepted as they are.

Every contraction ends in one matrix product of the size of its result, which contracts the small dimension; the
intermediate results are small. (An einsum without a path would loop over all indices at once.)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError, safe_repr

from ._contraction_order import cp_groups, train_cut, tucker_last
from .factor_products import cp_in_groups, tucker_in_order, tucker_with_last
from .folding import MAX_ORDER

__all__ = ["LONG", "cp_to_tensor", "kron_matvec", "kronecker", "tt_to_tensor", "tucker_to_tensor"]

#: Rows of a Kronecker product with at least this many elements are long.
LONG = 64


def _several(given: Any, what: str, form: str) -> list[Any]:
    try:
        return list(given)
    except TypeError:
        raise ShapeError(f"{what} takes {form}; got {safe_repr(given)}") from None


def _two(given: Any, what: str, form: str) -> tuple[Any, list[Any]]:
    """Unpack ``(one array, several)``; TensorLy's objects unpack in the same way."""
    parts = _several(given, what, form)
    if len(parts) != 2:
        raise ShapeError(f"{what} is {form}; got {len(parts)} parts")
    return parts[0], _several(parts[1], what, form)


def cp_to_tensor(cp: Any) -> Array:
    """Compute the tensor of a CP (canonical polyadic) decomposition.

    Parameters
    ----------
    cp : (weights, factors)
        ``weights``: array, shape (r,), or None for ones. ``factors``: M arrays, shape (d_m, r).

    Returns
    -------
    array, shape (d_1, …, d_M)
        ``sum_r weights[r] * outer(factors[0][:, r], …)``, in the library, dtype and device of the
        factors; differentiable.

    Raises
    ------
    ShapeError
        If a factor is not a matrix or the ranks differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    The paper's equation (2) with a diagonal core; M = 2 is LoRA's ``A Bᵀ`` (equation 1). Costs
    ``r * prod(d)`` multiply-adds in one matrix product, or a batch of them. Besides the result it needs memory for
    its operands, about ``r * (left + right)`` elements, where left and right are the products of the sizes in either
    half of the modes; less where a batch saves it.

    Examples
    --------
    >>> import numpy as np
    >>> cp_to_tensor((None, [np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])]))
    array([[3., 4.],
           [6., 8.]])
    """
    weights, factors = _two(cp, "a CP tensor", "(weights, factors)")
    if not factors:
        raise ShapeError("a CP tensor needs at least one factor; got none")
    backend = get_backend(*factors, *([] if weights is None else [weights]), what="each array of a CP tensor")
    for mode, factor in enumerate(factors):
        if len(factor.shape) != 2 or factor.shape[1] != factors[0].shape[-1]:
            raise ShapeError(
                f"CP factor {mode} has shape {tuple(factor.shape)}; expected (size, {factors[0].shape[-1]}), "
                "one column per component, like factor 0"
            )
    if weights is not None and tuple(weights.shape) != (factors[0].shape[1],):
        raise ShapeError(f"CP weights have shape {tuple(weights.shape)}; expected ({factors[0].shape[1]},)")
    return cp_tensor(backend, weights, factors)


def cp_tensor(backend: Backend, weights: Array | None, factors: Sequence[Array]) -> Array:
    """:func:`cp_to_tensor` of checked arrays."""
    sizes = [factor.shape[0] for factor in factors]
    left = factors[0] if weights is None else factors[0] * weights
    if len(factors) == 1:
        return backend.sum(left, axis=1)
    return cp_in_groups(backend, [left, *factors[1:]], cp_groups(sizes, left.shape[1]))


def tucker_to_tensor(tucker: Any) -> Array:
    """Compute the tensor of a Tucker decomposition: ``core x_1 A_1 x_2 A_2 … x_M A_M``.

    Parameters
    ----------
    tucker : (core, factors)
        ``core``: array, shape (r_1, …, r_M). ``factors``: M arrays, shape (d_m, r_m); None for a mode
        without a factor, which keeps the size of the core (partial Tucker).

    Returns
    -------
    array, shape (d_1, …, d_M)
        In the library, dtype and device of the core; differentiable.

    Raises
    ------
    ShapeError
        If the number of factors is not the number of modes, or a factor does not fit the core.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    The paper's equations (2) and (3), with C the core and A_m the plane factors. Modes are expanded one
    after the other, each by matrix products, that of the largest d_m / r_m last; this costs ``prod(d) * r_m``
    multiply-adds and needs memory for its input, ``prod(d) / d_m * r_m`` elements, in addition to the result.

    Examples
    --------
    >>> import numpy as np
    >>> tucker_to_tensor((np.array([[2.0]]), [np.array([[1.0], [2.0]]), None]))
    array([[2.],
           [4.]])
    """
    core, factors = _two(tucker, "a Tucker tensor", "(core, factors)")
    backend = get_backend(
        core, *(factor for factor in factors if factor is not None), what="each array of a Tucker tensor"
    )
    if len(factors) != len(core.shape):
        raise ShapeError(f"a core of shape {tuple(core.shape)} needs {len(core.shape)} factors; got {len(factors)}")
    for mode, factor in enumerate(factors):
        if factor is not None and (len(factor.shape) != 2 or factor.shape[1] != core.shape[mode]):
            raise ShapeError(
                f"Tucker factor {mode} has shape {tuple(factor.shape)}; expected (size, {core.shape[mode]}), "
                f"for a core of shape {tuple(core.shape)}"
            )
    return tucker_tensor(backend, core, factors)


def tucker_tensor(backend: Backend, core: Array, factors: Sequence[Array | None]) -> Array:
    """:func:`tucker_to_tensor` of checked arrays."""
    present = [factor for factor in factors if factor is not None]
    if len(factors) < 2 or len(present) < len(factors):
        return tucker_in_order(backend, core, factors)
    return tucker_with_last(backend, core, present, tucker_last([f.shape[0] for f in present], core.shape))


def tt_to_tensor(cores: Any) -> Array:
    """Compute the tensor of a tensor train.

    Parameters
    ----------
    cores : sequence of array
        M arrays, shape (r_{m-1}, d_m, r_m), with r_0 = r_M = 1.

    Returns
    -------
    array, shape (d_1, …, d_M)
        In the library, dtype and device of the cores; differentiable.

    Raises
    ------
    ShapeError
        If a core does not have three axes, the ranks of neighbors differ, or the train does not begin
        and end with rank 1.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011). The train is contracted
    from both ends; the last matrix product costs ``prod(d) * r`` multiply-adds.

    Examples
    --------
    >>> import numpy as np
    >>> tt_to_tensor([np.ones((1, 2, 3)), np.ones((3, 2, 1))])
    array([[3., 3.],
           [3., 3.]])
    """
    cores = _several(cores, "a tensor train", "a list of cores")
    if not cores:
        raise ShapeError("a tensor train needs at least one core; got none")
    backend = get_backend(*cores, what="one of cores")
    left = 1
    for mode, core in enumerate(cores):
        right = 1 if mode == len(cores) - 1 else "r"
        if len(core.shape) != 3 or core.shape[0] != left or core.shape[2] < 1 or (right == 1 and core.shape[2] != 1):
            raise ShapeError(f"TT core {mode} has shape {tuple(core.shape)}; expected ({left}, size, {right})")
        left = core.shape[2]
    return tt_tensor(backend, cores)


def tt_tensor(backend: Backend, cores: Sequence[Array]) -> Array:
    """:func:`tt_to_tensor` of checked arrays."""
    sizes = [core.shape[1] for core in cores]
    if len(cores) == 1:
        return backend.reshape(cores[0], sizes)
    cut = train_cut(sizes, [core.shape[2] for core in cores[:-1]])
    return backend.reshape(backend.matmul(tt_left(backend, cores[:cut]), tt_right(backend, cores[cut:])), sizes)


def tt_left(backend: Backend, cores: Sequence[Array]) -> Array:
    """Contract the first cores of a train, from its beginning: shape (prod d_m, r)."""
    rows = backend.reshape(cores[0], (-1, cores[0].shape[2]))
    for core in cores[1:]:
        rows = backend.matmul(rows, backend.reshape(core, (core.shape[0], -1)))
        rows = backend.reshape(rows, (-1, core.shape[2]))
    return rows


def tt_right(backend: Backend, cores: Sequence[Array]) -> Array:
    """Contract the last cores of a train, from its end: shape (r, prod d_m)."""
    cols = backend.reshape(cores[-1], (cores[-1].shape[0], -1))
    for core in reversed(cores[:-1]):
        cols = backend.matmul(backend.reshape(core, (-1, core.shape[2])), cols)
        cols = backend.reshape(cols, (core.shape[0], -1))
    return cols


def kronecker(arrays: Sequence[Array]) -> Array:
    """Compute the Kronecker product of K arrays with the same number of axes.

    Parameters
    ----------
    arrays : sequence of array, shape (d_k1, …, d_kM)
        All with the same number of axes.

    Returns
    -------
    array, shape (prod_k d_k1, …, prod_k d_kM)
        As ``numpy.kron`` applied in turn: in each mode the first array's index varies slowest. In the
        library, dtype and device of the arrays; differentiable.

    Raises
    ------
    ShapeError
        If there are no arrays, or their numbers of axes differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    The paper's ``⊗`` over the splits k = 1 … K in equation (2). Costs one multiplication per element of
    the result and of each smaller product on the way.

    Examples
    --------
    >>> import numpy as np
    >>> kronecker([np.array([1.0, 2.0]), np.array([1.0, 10.0])])
    array([ 1., 10.,  2., 20.])
    """
    arrays = _several(arrays, "a Kronecker product", "a list of arrays")
    if not arrays:
        raise ShapeError("a Kronecker product needs at least one array; got none")
    backend = get_backend(*arrays, what="one of arrays")
    order = arrays[0].ndim
    for array in arrays:  # a generator would take as long as a small product
        if array.ndim != order:
            shapes = ", ".join(str(tuple(each.shape)) for each in arrays)
            raise ShapeError(f"a Kronecker product needs arrays with the same number of axes; got shapes {shapes}")
    if order > MAX_ORDER:
        raise ShapeError(f"a Kronecker product takes arrays of at most {MAX_ORDER} axes; got {order}")
    return kronecker_tensor(backend, arrays)


def kronecker_tensor(backend: Backend, arrays: Sequence[Array]) -> Array:
    """:func:`kronecker` of checked arrays."""
    if len(arrays) == 2:
        return backend.kron(arrays[0], arrays[1])
    *others, right = arrays
    # Products with short rows are slow; once the rows are long, multiplying the others first writes less.
    while others and (not right.ndim or right.shape[-1] < LONG):
        right = backend.kron(others.pop(), right)
    return backend.kron(kronecker_tensor(backend, others), right) if others else right


def kron_matvec(matrices: Sequence[Array], x: Array) -> Array:
    """Compute ``kronecker(matrices) @ x`` without forming the Kronecker product.

    Parameters
    ----------
    matrices : sequence of array, shape (rows_k, cols_k)
        K matrices.
    x : array, shape (prod cols_k,) or (prod cols_k, batch)
        The vector, or a batch of vectors as columns.

    Returns
    -------
    array, shape (prod rows_k,) or (prod rows_k, batch)
        In the library, dtype and device of the inputs; differentiable.

    Raises
    ------
    ShapeError
        If one of the matrices is not a matrix, or x does not fit.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    ``vec(A X Bᵀ) = (A ⊗ B) vec(X)``, one matrix product per factor: for K factors of n² it costs
    ``K n^(K+1)`` multiply-adds per column, where the full product costs ``n^(2K)``.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([[1.0, 1.0]])
    >>> kron_matvec([a, b], np.array([1.0, 2.0, 3.0, 4.0]))
    array([7., 3.])
    """
    matrices = _several(matrices, "kron_matvec", "a list of matrices")
    if not matrices:
        raise ShapeError("kron_matvec needs at least one matrix; got none")
    get_backend(x, what="x")
    backend = get_backend(x, *matrices, what="one of matrices")
    for k, matrix in enumerate(matrices):
        if len(matrix.shape) != 2:
            raise ShapeError(f"matrix {k} of kron_matvec has shape {tuple(matrix.shape)}; expected (rows, cols)")
    cols = [matrix.shape[1] for matrix in matrices]
    if len(x.shape) not in (1, 2) or x.shape[0] != math.prod(cols):
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; expected ({math.prod(cols)},) or ({math.prod(cols)}, batch) "
            f"for matrices of {cols} columns"
        )
    # This is a Tucker product whose last mode, the batch, has no factor.
    core = backend.reshape(x, (*cols, math.prod(x.shape[1:])))
    product = tucker_tensor(backend, core, [*matrices, None])
    return backend.reshape(product, (math.prod(m.shape[0] for m in matrices), *x.shape[1:]))


def hadamard_tensor(arrays: Sequence[Array]) -> Array:
    """Compute the elementwise product of arrays of the same shape."""
    return functools.reduce(lambda a, b: a * b, arrays)
