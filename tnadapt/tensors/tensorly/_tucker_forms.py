"""What is done with Tucker decompositions, under TensorLy's names and keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.backends.backend import Array
from tnadapt.errors import ShapeError

from .. import _modes
from .._checks import as_tensor, mode_of
from .._cp_tensor import CPTensor
from .._tucker_tensor import TuckerTensor
from ._keywords import alike, as_tucker

__all__ = ["tucker_mode_dot", "tucker_normalize", "tucker_to_tensor", "tucker_to_unfolded", "tucker_to_vec"]


def tucker_to_tensor(
    tucker_tensor: Any,
    skip_factor: int | None = None,
    transpose_factors: bool = False,
    modes: Sequence[int] | None = None,
) -> Array:
    """Form the tensor of a Tucker decomposition.

    Parameters
    ----------
    tucker_tensor : TuckerTensor or (core, factors)
        Core of shape (r_1, …, r_M); factors of shape (d_m, r_m).
    skip_factor : int, optional
        Position of a factor that is left out.
    transpose_factors : bool
        Whether to multiply by the conjugate transposes.
    modes : sequence of int, optional
        The mode of each factor; the first modes in order if None.

    Returns
    -------
    array, shape (d_1, …, d_M)
        Differentiable; the products that shrink most come first.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tucker_to_tensor((np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))]), skip_factor=0).shape
    (1, 3)
    """
    core, *factors = alike([tucker_tensor[0], *tucker_tensor[1]], "a part of the Tucker tensor")
    return _modes.multi_mode_dot(core, factors, modes, skip_factor, transpose_factors)


def tucker_to_unfolded(
    tucker_tensor: Any, mode: int = 0, skip_factor: int | None = None, transpose_factors: bool = False
) -> Array:
    """Form the unfolding of a Tucker decomposition.

    Parameters
    ----------
    tucker_tensor : TuckerTensor or (core, factors)
    mode : int
    skip_factor, transpose_factors
        As for :func:`tucker_to_tensor`.

    Returns
    -------
    array, shape (d_mode, prod of the others)

    Raises
    ------
    ShapeError
        If the parts do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> tucker_to_unfolded((np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))]), 1).shape
    (3, 2)
    """
    return _modes.unfold(tucker_to_tensor(tucker_tensor, skip_factor, transpose_factors), mode)


def tucker_to_vec(tucker_tensor: Any, skip_factor: int | None = None, transpose_factors: bool = False) -> Array:
    """Form the tensor of a Tucker decomposition as a vector.

    Parameters
    ----------
    tucker_tensor : TuckerTensor or (core, factors)
    skip_factor, transpose_factors
        As for :func:`tucker_to_tensor`.

    Returns
    -------
    array, shape (prod d,)

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tucker_to_vec((np.ones((1, 1)), [np.ones((2, 1)), np.ones((2, 1))]))
    array([1., 1., 1., 1.])
    """
    return _modes.tensor_to_vec(tucker_to_tensor(tucker_tensor, skip_factor, transpose_factors))


def tucker_normalize(tucker_tensor: Any) -> TuckerTensor:
    """Move the norms of the columns of all factors into the core.

    Parameters
    ----------
    tucker_tensor : TuckerTensor or (core, factors)

    Returns
    -------
    TuckerTensor
        The same tensor; a new object.

    Raises
    ------
    ShapeError
        If the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> core, factors = tucker_normalize((np.ones((1, 1)), [np.array([[3.0], [4.0]]), np.ones((4, 1))]))
    >>> core
    array([[10.]])
    """
    given = as_tucker(tucker_tensor)
    core, factors, backend = given.core, [], given.backend
    for mode, factor in enumerate(given.factors):
        unit = CPTensor(None, [factor]).normalized()
        weights = unit.weights
        assert weights is not None
        rank = [1] * len(core.shape)
        rank[mode] = int(weights.shape[0])
        core = core * backend.reshape(weights, rank)
        factors.append(unit.factors[0])
    return TuckerTensor(core, factors).with_outcome(given.outcome)


def tucker_mode_dot(
    tucker_tensor: Any, matrix_or_vector: Any, mode: int, keep_dim: bool = False, copy: bool = False
) -> TuckerTensor:
    """Multiply a Tucker decomposition by a matrix or a vector along one mode, without forming its tensor.

    Parameters
    ----------
    tucker_tensor : TuckerTensor or (core, factors)
    matrix_or_vector : array, shape (n, d_mode) or (d_mode,)
    mode : int
    keep_dim : bool
        Whether a vector leaves a mode of size 1.
    copy : bool
        Accepted: the result is a new object, and the argument is never changed, in both cases.

    Returns
    -------
    TuckerTensor
        Without the mode for a vector. Costs ``n d_mode r_mode`` multiply-adds, and those of the core for a vector.

    Raises
    ------
    ShapeError
        If the sizes do not match, or a vector is multiplied with the only mode.

    Examples
    --------
    >>> import numpy as np
    >>> found = tucker_mode_dot((np.ones((1, 1)), [np.ones((2, 1)), np.ones((3, 1))]), np.ones(2), 0)
    >>> found.to_tensor()
    array([2., 2., 2.])
    """
    backend, factor = as_tensor(matrix_or_vector, "the matrix or vector")
    found = as_tucker(tucker_tensor, factor)
    (factor,) = alike([factor], "the matrix or vector", found.factors[0])
    place = mode_of(mode, found.shape)
    if len(factor.shape) != 1:
        return found.mode_dot(factor, place)
    if keep_dim:
        return found.mode_dot(backend.reshape(factor, (1, -1)), place)
    if len(found.factors) == 1:
        raise ShapeError("a vector along the only mode gives a number: use tucker_to_tensor() and mode_dot()")
    core = _modes.mode_dot(found.core, _modes.mode_dot(found.factors[place], factor, 0), place)
    return TuckerTensor(core, [one for number, one in enumerate(found.factors) if number != place])
