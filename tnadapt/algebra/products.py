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

from tnadapt.backends import Array, Backend, get_backend
from tnadapt.errors import ShapeError, safe_repr

from .folding import MAX_ORDER

# -- Which modes a product of factors joins last: the order that a cost model finds cheapest ---------------------------

# The last matrix product writes the whole result in any order. The orders differ in its operands, which are expanded
# from the factors first. The model counts the elements that are written for them. A multiply-add of a matrix product
# costs a small part of an element, a row of a product with broadcasting as much as sixteen, each matrix of a batch as
# much as three hundred. All are plain integers, and nothing is cached: compilers trace these functions.


_ROW = 16
_MATRIX = 300
#: Multiply-adds that cost as much as an element.
_ARITHMETIC = 16
# Libraries multiply long by small faster than small by long: these elements of a wide result cost one more.
_WIDE = 8
# Libraries multiply matrices with fewer columns far below their speed, so a batch of these does not pay.
_NARROW = 32


def _expanded(elements: int, row: int) -> int:
    """Return the cost of a product with broadcasting whose innermost loops have ``row`` elements."""
    return elements + _ROW * elements // max(row, 1)


def cp_groups(sizes: Sequence[int], rank: int) -> tuple[int, int]:
    """Return how the modes of a CP tensor are grouped: a batch of matrices, their rows, their columns.

    Parameters
    ----------
    sizes : sequence of int
        At least two.
    rank : int

    Returns
    -------
    first, second : int
        ``sizes[:first]`` is the batch, with ``first = 0`` for a single matrix; ``sizes[second:]`` are the columns.

    Notes
    -----
    A batch expands only the smaller operand of the last product: it pays where a mode in the middle is long, and where
    there are many modes.

    Examples
    --------
    >>> cp_groups([2000, 40, 10], 8), cp_groups([10, 40, 2000], 8), cp_groups([10, 2000, 40], 8)
    ((0, 1), (0, 2), (1, 2))
    """
    chosen, least = (0, 1), -1
    for second in range(len(sizes) - 1, 0, -1):
        width = math.prod(sizes[second:])
        right = _expanded(rank * width, sizes[-1]) if second < len(sizes) - 1 else 0
        for first in range(second if width >= _NARROW else 1):
            height, batch = math.prod(sizes[first:second]), math.prod(sizes[:first])
            cost = right + (_expanded(rank * height, rank) if second - first > 1 else 0)
            if width > height:
                cost += batch * height * width // _WIDE
            if first:
                cost += _expanded(rank * batch * width, width) + _MATRIX * batch
            if least < 0 or cost < least:
                chosen, least = (first, second), cost
    return chosen


def tucker_last(sizes: Sequence[int], ranks: Sequence[int]) -> int:
    """Return the mode of a Tucker tensor that is expanded last; the last one of ties.

    Parameters
    ----------
    sizes, ranks : sequence of int
        Of the tensor and of its core.

    Returns
    -------
    int

    Notes
    -----
    A mode in the middle needs a batch of matrix products, one per index of the modes before it.

    Examples
    --------
    >>> tucker_last([64, 64, 64], [4, 4, 4]), tucker_last([10, 2000, 40], [4, 4, 4])
    (2, 1)
    """
    chosen, least = len(sizes) - 1, -1
    for mode in range(len(sizes) - 1, -1, -1):
        before, after = math.prod(sizes[:mode]), math.prod(sizes[mode + 1 :])
        middle = 0 < mode < len(sizes) - 1
        if middle and after < _NARROW:
            continue
        cost = ranks[mode] * before * after * (_ARITHMETIC + sizes[mode]) + (_ARITHMETIC * _MATRIX * before) * middle
        if least < 0 or cost < least:
            chosen, least = mode, cost
    return chosen


def train_cut(sizes: Sequence[int], bonds: Sequence[int]) -> int:
    """Return where a tensor train is cut into the two operands of its last product; the last cut of ties.

    Parameters
    ----------
    sizes : sequence of int
        At least two.
    bonds : sequence of int
        The ranks between neighbors, one fewer than sizes.

    Returns
    -------
    int
        Between 1 and the number of modes less one.

    Notes
    -----
    The last one of ties makes the left matrix the long one.

    Examples
    --------
    >>> train_cut([8, 8, 8, 8], [4, 4, 4]), train_cut([8, 8, 8, 8], [4, 50, 2])
    (2, 3)
    """
    chosen, least = len(sizes) - 1, -1
    for cut in range(len(sizes) - 1, 0, -1):
        left, right = math.prod(sizes[:cut]), math.prod(sizes[cut:])
        cost = bonds[cut - 1] * (_ARITHMETIC * (left + right) + left * right)
        if least < 0 or cost < least:
            chosen, least = cut, cost
    return chosen


# -- Products in a chosen order of contraction, of checked factors -----------------------------------------------------


def cp_in_groups(backend: Backend, factors: Sequence[Array], groups: tuple[int, int]) -> Array:
    """Compute the tensor of CP factors by a matrix product whose batch, rows and columns are groups of modes.

    The groups are those of :func:`._contraction_order.cp_groups`; all of them give the same tensor.
    """
    (first, second), rank = groups, factors[0].shape[1]
    rows = khatri_rao(backend, factors[first:second])
    columns = factors[second:]
    if first or len(columns) > 1:
        # In this layout the innermost loops are as long as the last factor's rows, not just its rank.
        cols = row_wise_khatri_rao(backend, [_laid_out(backend, factor) for factor in columns])
    else:
        cols = backend.matrix_transpose(columns[0])
    if first:
        batch = khatri_rao(backend, factors[:first])
        cols = backend.reshape(batch, (-1, rank, 1)) * backend.reshape(cols, (1, rank, -1))
        rows = backend.reshape(rows, (1, -1, rank))
    return backend.reshape(backend.matmul(rows, cols), [factor.shape[0] for factor in factors])


def _laid_out(backend: Backend, factor: Array) -> Array:
    """Return the transpose of a matrix with its elements moved into C order."""
    return backend.reshape(backend.flatten(backend.matrix_transpose(factor)), (factor.shape[1], factor.shape[0]))


def khatri_rao(backend: Backend, factors: Sequence[Array]) -> Array:
    """Compute the column-wise Kronecker product of (d_m, r) factors: shape (prod d_m, r)."""

    def pair(a: Array, b: Array) -> Array:
        rank = a.shape[1]
        product = backend.reshape(a, (-1, 1, rank)) * backend.reshape(b, (1, -1, rank))
        return backend.reshape(product, (a.shape[0] * b.shape[0], rank))

    return functools.reduce(pair, factors)


def row_wise_khatri_rao(backend: Backend, arrays: Sequence[Array]) -> Array:
    """Compute the row-wise Kronecker product of matrices: L of an elementwise product from the L of its factors.

    Of transposed factors, (r, d_m), it is the transpose of :func:`khatri_rao`.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> a, b = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 10.0], [1.0, 10.0]])
    >>> row_wise_khatri_rao(get_backend(a), [a, b])
    array([[ 1., 10.,  2., 20.],
           [ 3., 30.,  4., 40.]])
    """

    def pair(a: Array, b: Array) -> Array:
        (rows, m), n = a.shape, b.shape[1]
        product = backend.reshape(a, (rows, m, 1)) * backend.reshape(b, (rows, 1, n))
        return backend.reshape(product, (rows, m * n))

    return functools.reduce(pair, arrays)


def tucker_with_last(backend: Backend, core: Array, factors: Sequence[Array], last: int) -> Array:
    """Compute the tensor of a core and factors, of which one is applied after all others."""
    if last == len(factors) - 1:
        return tucker_in_order(backend, core, factors)
    core = tucker_in_order(backend, core, [None if m == last else factor for m, factor in enumerate(factors)])
    sizes = [factor.shape[0] for factor in factors]
    batch = (math.prod(sizes[:last]),) if last else ()
    core = backend.reshape(core, (*batch, core.shape[last], math.prod(sizes[last + 1 :])))
    factor = backend.reshape(factors[last], (*(1 for _ in batch), *factors[last].shape))
    return backend.reshape(backend.matmul(factor, core), sizes)


def tucker_in_order(backend: Backend, core: Array, factors: Sequence[Array | None]) -> Array:
    """Compute the tensor of a core and factors, which are applied first to last: the reference implementation."""
    sizes = [core.shape[m] if factor is None else factor.shape[0] for m, factor in enumerate(factors)]
    # Each step contracts the leading mode and appends the result as the last one: after M steps the modes are in order
    # again, and no axes had to be permuted.
    shape = list(core.shape)
    for factor, size in zip(factors, sizes, strict=True):
        rank = shape.pop(0)
        rest = backend.matrix_transpose(backend.reshape(core, (rank, math.prod(shape))))
        core = rest if factor is None else backend.matmul(rest, backend.matrix_transpose(factor))
        shape.append(size)
    return backend.reshape(core, sizes)


# -- Public products: CP, Tucker, tensor train, Kronecker, Hadamard ----------------------------------------------------


#: Rows of a Kronecker product with at least this many elements are long.
LONG = 64


def _several(given: Any, what: str, form: str) -> list[Any]:
    try:
        return list(given)
    except TypeError:
        raise ShapeError(f"{what} takes {form}; got {safe_repr(given)}") from None


def _two(given: Any, what: str, form: str) -> tuple[Any, list[Any]]:
    """Unpack a pair of one array and a sequence of arrays, or TensorLy's objects, which unpack in the same way."""
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


def kronecker(*arrays: Any) -> Array:
    """Compute the Kronecker product of K arrays with the same number of axes.

    Parameters
    ----------
    *arrays : array, shape (d_k1, …, d_kM), or one sequence of these
        All with the same number of axes.

    Returns
    -------
    array, shape (prod_k d_k1, …, prod_k d_kM)
        As ``numpy.kron`` applied in turn: in each mode the first array's index varies slowest. In the
        library, dtype and device of the arrays; differentiable.

    Raises
    ------
    ShapeError
        If there are no arrays, one of them is none, or their numbers of axes differ.
    BackendError
        If libraries, dtypes or devices are mixed.

    Notes
    -----
    The paper's ``⊗`` over the splits k = 1 … K in equation (2). Costs one multiplication per element of
    the result and of each smaller product on the way.

    Examples
    --------
    >>> import numpy as np
    >>> kronecker(np.array([1.0, 2.0]), np.array([1.0, 10.0]))
    array([ 1., 10.,  2., 20.])
    """
    if len(arrays) == 1 and not hasattr(arrays[0], "shape"):
        arrays = tuple(_several(arrays[0], "a Kronecker product", "arrays, or a list of arrays"))
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
    # Products with short rows are slow, and long rows should be multiplied last, which writes less.
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


# -- Unfoldings, and the product of a tensor and a matrix along one mode -----------------------------------------------


def unfolded(backend: Backend, tensor: Array, mode: int) -> Array:
    """Unfold a tensor: one mode as rows, the others in order as columns."""
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (tensor.shape[mode], math.prod(tensor.shape) // tensor.shape[mode]))


def mode_product(backend: Backend, tensor: Array, matrix: Array, mode: int) -> Array:
    """Multiply a tensor by a matrix along one mode, in one matrix product and without moving axes.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    matrix : array, shape (n, d_mode)
    mode : int
        From 0.

    Returns
    -------
    array
        With n elements along that mode; differentiable.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> mode_product(get_backend(np.ones(1)), np.ones((2, 3)), np.ones((1, 3)), 1)
    array([[3.],
           [3.]])
    """
    shape = [int(size) for size in tensor.shape]
    before, size, after = math.prod(shape[:mode]), shape[mode], math.prod(shape[mode + 1 :])
    if after == 1:
        product = backend.matmul(backend.reshape(tensor, (before, size)), backend.matrix_transpose(matrix))
    elif before == 1:
        product = backend.matmul(matrix, backend.reshape(tensor, (size, after)))
    else:
        product = backend.matmul(matrix, backend.reshape(tensor, (before, size, after)))
    return backend.reshape(product, (*shape[:mode], int(matrix.shape[0]), *shape[mode + 1 :]))


# -- The rearrangement of Van Loan and Pitsianis, for any number of splits and modes -----------------------------------

# It turns a Kronecker product of K tensors into the outer product of their vectors, so that the nearest Kronecker
# product is a nearest tensor of rank one. Van Loan & Pitsianis, "Approximation with Kronecker products" (1993).


def rearranged(backend: Backend, tensor: Array, sizes: Sequence[Sequence[int]]) -> Array:
    """Rearrange a tensor so that Kronecker products of splits of these sizes become outer products.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
        Padded with zeros where the product of the splits' sizes is larger.
    sizes : sequence of sequence of int
        ``(s_k1 … s_kM)`` of each of the K splits.

    Returns
    -------
    array, shape (p_1, …, p_K)
        With ``p_k = prod_m s_km``.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> a, b = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])
    >>> rearranged(get_backend(a), np.kron(a, b), [a.shape, b.shape])
    array([[3., 4.],
           [6., 8.]])
    """
    order, splits = len(sizes[0]), len(sizes)
    tensor = padded_to(backend, tensor, [math.prod(split[mode] for split in sizes) for mode in range(order)])
    # One axis per (mode, split). Axes of length 1 are left out: NumPy allows at most 64 axes, and a tensor with more
    # than 64 axes of length 2 or more fits in no memory.
    digits = [(k, mode) for mode in range(order) for k in range(splits) if sizes[k][mode] > 1]
    split_digits = backend.reshape(tensor, [sizes[k][mode] for k, mode in digits])
    split_digits = backend.permute_dims(split_digits, sorted(range(len(digits)), key=lambda place: digits[place]))
    return backend.reshape(split_digits, [math.prod(split) for split in sizes])


def contracted(backend: Backend, tensor: Array, splits: Sequence[Array | None], sizes: Sequence[int]) -> Array:
    """Contract a rearranged tensor with the vectors of all splits but one.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (p_1, …, p_K)
    splits : sequence of array or None
        Each of any shape with p_k elements; None for the split that is left out.
    sizes : sequence of int
        Shape of the result.

    Returns
    -------
    array
    """
    kept = next(k for k, split in enumerate(splits) if split is None)
    shape = [int(size) for size in tensor.shape]
    left, right = (_outer(backend, [s for s in part if s is not None]) for part in (splits[:kept], splits[kept:]))
    matrix = backend.reshape(tensor, (math.prod(shape[:kept]), math.prod(shape[kept:])))
    if left is not None:
        matrix = backend.matmul(backend.reshape(left, (1, -1)), matrix)
    matrix = backend.reshape(matrix, (shape[kept], math.prod(shape[kept + 1 :])))
    if right is not None:
        matrix = backend.matmul(matrix, backend.reshape(right, (-1, 1)))
    return backend.reshape(matrix, sizes)


def _outer(backend: Backend, tensors: Sequence[Array]) -> Array | None:
    """Return the outer product of all tensors as a vector, or None if there are no tensors."""

    def pair(a: Array, b: Array) -> Array:
        return backend.flatten(backend.reshape(a, (-1, 1)) * backend.reshape(b, (1, -1)))

    vectors = [backend.flatten(tensor) for tensor in tensors]
    return functools.reduce(pair, vectors) if vectors else None


def padded_to(backend: Backend, tensor: Array, sizes: Sequence[int]) -> Array:
    """Pad a tensor with zeros at the end of every mode, up to these sizes."""
    for mode, size in enumerate(sizes):
        missing = size - tensor.shape[mode]
        if missing:
            shape = [*tensor.shape[:mode], missing, *tensor.shape[mode + 1 :]]
            tensor = backend.concat([tensor, backend.zeros(shape, like=tensor)], axis=mode)
    return tensor
