"""What is done with CP decompositions, under TensorLy's names and keywords."""

from __future__ import annotations

from typing import Any

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.tensorly_calls import call, library_for
from tnadapt.errors import ShapeError

from .. import _modes
from .._checks import as_tensor, mode_of
from .._cp_tensor import CPTensor
from ._keywords import alike, as_cp

__all__ = [
    "cp_flip_sign",
    "cp_mode_dot",
    "cp_norm",
    "cp_normalize",
    "cp_permute_factors",
    "cp_to_tensor",
    "cp_to_unfolded",
    "cp_to_vec",
]


def cp_to_tensor(cp_tensor: Any, mask: Any = None) -> Array:
    """Form the tensor of a CP decomposition.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)
        Weights of shape (r,) or None; factors of shape (d_m, r).
    mask : array, optional
        The tensor is multiplied by it.

    Returns
    -------
    array, shape (d_1, …, d_M)
        Differentiable; ``r prod(d)`` multiply-adds in one matrix product.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> cp_to_tensor((None, [np.ones((2, 1)), np.ones((3, 1))]))
    array([[1., 1., 1.],
           [1., 1., 1.]])
    """
    found = as_cp(cp_tensor).to_tensor()
    return found if mask is None else found * as_tensor(mask, "mask")[1]


def cp_to_unfolded(cp_tensor: Any, mode: int) -> Array:
    """Form the unfolding of a CP decomposition.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)
    mode : int

    Returns
    -------
    array, shape (d_mode, prod of the others)
        As :func:`cp_to_tensor`, and at most one copy.

    Raises
    ------
    ShapeError
        If the parts do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> cp_to_unfolded((None, [np.ones((2, 1)), np.ones((3, 1))]), 1).shape
    (3, 2)
    """
    return _modes.unfold(cp_to_tensor(cp_tensor), mode)


def cp_to_vec(cp_tensor: Any) -> Array:
    """Form the tensor of a CP decomposition as a vector.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)

    Returns
    -------
    array, shape (prod d,)
        As :func:`cp_to_tensor`.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> cp_to_vec((None, [np.ones((2, 1)), np.ones((3, 1))]))
    array([1., 1., 1., 1., 1., 1.])
    """
    return _modes.tensor_to_vec(cp_to_tensor(cp_tensor))


def cp_norm(cp_tensor: Any) -> Array:
    """Compute the Frobenius norm of a CP decomposition without forming its tensor.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)

    Returns
    -------
    array
        Without axes. Costs ``r² sum(d)`` multiply-adds; see :meth:`tnadapt.tensors.CPTensor.norm` for its precision.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> float(cp_norm((None, [np.ones((2, 1)), np.ones((8, 1))])))
    4.0
    """
    return as_cp(cp_tensor).norm()


def cp_normalize(cp_tensor: Any) -> CPTensor:
    """Move the norms of the columns of all factors into the weights.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)

    Returns
    -------
    CPTensor
        The same tensor; a new object.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> weights, factors = cp_normalize((None, [np.array([[3.0], [4.0]]), np.ones((4, 1))]))
    >>> weights
    array([10.])
    """
    return as_cp(cp_tensor).normalized()


def cp_mode_dot(
    cp_tensor: Any, matrix_or_vector: Any, mode: int, keep_dim: bool = False, copy: bool = False
) -> CPTensor:
    """Multiply a CP decomposition by a matrix or a vector along one mode, without forming its tensor.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)
    matrix_or_vector : array, shape (n, d_mode) or (d_mode,)
    mode : int
    keep_dim : bool
        Whether a vector leaves a mode of size 1.
    copy : bool
        Accepted: the result is a new object, and the argument is never changed, in both cases.

    Returns
    -------
    CPTensor
        Without the mode for a vector. Costs ``n d_mode r`` multiply-adds.

    Raises
    ------
    ShapeError
        If the sizes do not match, or a vector is multiplied with the only mode.

    Examples
    --------
    >>> import numpy as np
    >>> found = cp_mode_dot((None, [np.ones((2, 1)), np.ones((3, 1))]), np.ones(2), 0)
    >>> found.to_tensor()
    array([2., 2., 2.])
    """
    backend, factor = as_tensor(matrix_or_vector, "the matrix or vector")
    found = as_cp(cp_tensor, factor)
    (factor,) = alike([factor], "the matrix or vector", found.factors[0])
    place = mode_of(mode, found.shape)
    if len(factor.shape) != 1:
        return found.mode_dot(factor, place)
    if keep_dim:
        return found.mode_dot(backend.reshape(factor, (1, -1)), place)
    if len(found.factors) == 1:
        raise ShapeError("a vector along the only mode gives a number: use cp_to_tensor() and mode_dot()")
    row = _modes.mode_dot(found.factors[place], factor, 0)
    rest = [one for number, one in enumerate(found.factors) if number != place]
    rest[max(0, place - 1)] = rest[max(0, place - 1)] * row
    return CPTensor(found.weights, rest)


def cp_flip_sign(cp_tensor: Any, mode: int = 0, func: Any = None) -> CPTensor:
    """Make the mean of each column positive, in all modes but one, which takes the signs.

    Parameters
    ----------
    cp_tensor : CPTensor or (weights, factors)
    mode : int
        The mode that takes the signs.
    func : callable, optional
        Its sign is made positive, instead of the mean; called with a factor and ``axis=0``.

    Returns
    -------
    CPTensor
        The same tensor; a new object. Computed by TensorLy.

    Raises
    ------
    ShapeError
        If the parts do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> cp_flip_sign((None, [np.ones((2, 1)), -np.ones((3, 1))])).factors[0]
    array([[-1.],
           [-1.]])
    """
    given = as_cp(cp_tensor)
    library, theirs = _theirs(given)
    found = call(library, "cp_tensor.cp_flip_sign", theirs, mode=mode_of(mode, given.shape), func=func)
    return _ours(library, given, found).with_outcome(given.outcome)


def cp_permute_factors(ref_cp_tensor: Any, tensors_to_permute: Any) -> tuple[Any, list[Any]]:
    """Order the components of CP decompositions like those of another one.

    Parameters
    ----------
    ref_cp_tensor : CPTensor or (weights, factors)
    tensors_to_permute : CPTensor, (weights, factors), or list of CPTensor
        Of the same shape and rank.

    Returns
    -------
    permuted : CPTensor or list of CPTensor
        New objects, whose components are the most similar ones to those of the reference. Computed by TensorLy.
    permutations : list of array of int

    Raises
    ------
    ShapeError
        If the parts do not fit each other, or shapes and ranks differ.

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_cp
    >>> one = random_cp((3, 4, 5), 2, random_state=0)
    >>> turned = CPTensor(one.weights[::-1], [factor[:, ::-1] for factor in one.factors])
    >>> permuted, permutations = cp_permute_factors(one, turned)
    >>> bool((permuted.factors[0] == one.factors[0]).all()), permutations[0].tolist()
    (True, [1, 0])
    """
    several = isinstance(tensors_to_permute, list)
    given = [as_cp(one) for one in (tensors_to_permute if several else [tensors_to_permute])]
    reference = as_cp(ref_cp_tensor)
    for one in given:
        if (one.shape, one.rank) != (reference.shape, reference.rank):
            raise ShapeError(
                f"shape {one.shape} and rank {one.rank} do not compare with the reference's, {reference.shape} and "
                f"{reference.rank}"
            )
    library, theirs = _theirs(reference)
    found, permutations = call(library, "cp_tensor.cp_permute_factors", theirs, [_theirs(one)[1] for one in given])
    listed = found if isinstance(found, list) else [found]
    permuted = [_ours(library, one, new).with_outcome(one.outcome) for one, new in zip(given, listed, strict=True)]
    return (permuted if several else permuted[0]), list(permutations)


def _theirs(given: CPTensor) -> tuple[Backend, Any]:
    """Return a library that TensorLy computes with, and a copy for it."""
    backend, library = given.backend, library_for(given.backend)
    factors = list(given.cp_copy().factors)
    weights = backend.zeros((given.rank,), like=factors[0]) + 1.0 if given.weights is None else given.weights
    if library is not backend:
        weights, factors = backend.to_numpy(weights), [backend.to_numpy(one) for one in factors]
    return library, call(library, "cp_tensor.CPTensor", (weights, factors))


def _ours(library: Backend, given: CPTensor, found: Any) -> CPTensor:
    weights, factors = found
    backend = given.backend
    if library is backend:
        return CPTensor(weights, list(factors))
    kind, device = backend.dtype_name(given.factors[0]), backend.device(given.factors[0])
    return CPTensor(backend.asarray(weights, kind, device), [backend.asarray(one, kind, device) for one in factors])
