"""Tensors of trains, rings and TT matrices, under TensorLy's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.backends.backend import Array

from .. import _modes
from .._tensor_chains import TRTensor, TTTensor
from .._tt_matrix import TTMatrix

__all__ = [
    "tr_to_tensor",
    "tr_to_unfolded",
    "tr_to_vec",
    "tt_matrix_to_matrix",
    "tt_matrix_to_tensor",
    "tt_matrix_to_unfolded",
    "tt_matrix_to_vec",
    "tt_to_tensor",
    "tt_to_unfolded",
    "tt_to_vec",
]


def tt_to_tensor(factors: Sequence[Any]) -> Array:
    """Form the tensor of a tensor train.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m)

    Returns
    -------
    array, shape (d_1, …, d_M)
        Differentiable; products of neighboring cores, smaller ones first.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tt_to_tensor([np.ones((1, 2, 2)), np.ones((2, 3, 1))]).shape
    (2, 3)
    """
    return TTTensor(factors).to_tensor()


def tt_to_unfolded(factors: Sequence[Any], mode: int) -> Array:
    """Form the unfolding of a tensor train.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m)
    mode : int

    Returns
    -------
    array, shape (d_mode, prod of the others)
        As :func:`tt_to_tensor`, and at most one copy.

    Raises
    ------
    ShapeError
        If the cores do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> tt_to_unfolded([np.ones((1, 2, 2)), np.ones((2, 3, 1))], 1).shape
    (3, 2)
    """
    return _modes.unfold(tt_to_tensor(factors), mode)


def tt_to_vec(factors: Sequence[Any]) -> Array:
    """Form the tensor of a tensor train as a vector.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m)

    Returns
    -------
    array, shape (prod d,)
        As :func:`tt_to_tensor`.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tt_to_vec([np.ones((1, 2, 2)), np.ones((2, 3, 1))]).shape
    (6,)
    """
    return _modes.tensor_to_vec(tt_to_tensor(factors))


def tr_to_tensor(factors: Sequence[Any]) -> Array:
    """Form the tensor of a tensor ring.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m), with r_M = r_0

    Returns
    -------
    array, shape (d_1, …, d_M)
        Differentiable; products of neighboring cores, smaller ones first.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tr_to_tensor([np.ones((2, 2, 2)), np.ones((2, 3, 2))]).shape
    (2, 3)
    """
    return TRTensor(factors).to_tensor()


def tr_to_unfolded(factors: Sequence[Any], mode: int) -> Array:
    """Form the unfolding of a tensor ring.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m), with r_M = r_0
    mode : int

    Returns
    -------
    array, shape (d_mode, prod of the others)
        As :func:`tr_to_tensor`, and at most one copy.

    Raises
    ------
    ShapeError
        If the cores do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> tr_to_unfolded([np.ones((2, 2, 2)), np.ones((2, 3, 2))], 1).shape
    (3, 2)
    """
    return _modes.unfold(tr_to_tensor(factors), mode)


def tr_to_vec(factors: Sequence[Any]) -> Array:
    """Form the tensor of a tensor ring as a vector.

    Parameters
    ----------
    factors : sequence of array, shape (r_{m-1}, d_m, r_m), with r_M = r_0

    Returns
    -------
    array, shape (prod d,)
        As :func:`tr_to_tensor`.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tr_to_vec([np.ones((2, 2, 2)), np.ones((2, 3, 2))]).shape
    (6,)
    """
    return _modes.tensor_to_vec(tr_to_tensor(factors))


def tt_matrix_to_tensor(tt_matrix: Sequence[Any]) -> Array:
    """Form the tensor of a TT matrix.

    Parameters
    ----------
    tt_matrix : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)

    Returns
    -------
    array, shape (rows_1, …, rows_M, cols_1, …, cols_M)
        Differentiable; products of neighboring cores, smaller ones first.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tt_matrix_to_tensor([np.ones((1, 2, 3, 1)), np.ones((1, 4, 5, 1))]).shape
    (2, 4, 3, 5)
    """
    return TTMatrix(tt_matrix).to_tensor()


def tt_matrix_to_matrix(tt_matrix: Sequence[Any]) -> Array:
    """Form the matrix of a TT matrix.

    Parameters
    ----------
    tt_matrix : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)

    Returns
    -------
    array, shape (prod rows, prod cols)
        Differentiable.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tt_matrix_to_matrix([np.ones((1, 2, 3, 1)), np.ones((1, 4, 5, 1))]).shape
    (8, 15)
    """
    return TTMatrix(tt_matrix).to_matrix()


def tt_matrix_to_unfolded(tt_matrix: Sequence[Any], mode: int) -> Array:
    """Form the unfolding of a TT matrix.

    Parameters
    ----------
    tt_matrix : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)
    mode : int

    Returns
    -------
    array, shape (d_mode, prod of the others)
        As :func:`tt_matrix_to_tensor`, and at most one copy.

    Raises
    ------
    ShapeError
        If the cores do not fit each other, or there is no such mode.

    Examples
    --------
    >>> import numpy as np
    >>> tt_matrix_to_unfolded([np.ones((1, 2, 3, 1)), np.ones((1, 4, 5, 1))], 1).shape
    (4, 30)
    """
    return _modes.unfold(tt_matrix_to_tensor(tt_matrix), mode)


def tt_matrix_to_vec(tt_matrix: Sequence[Any]) -> Array:
    """Form the tensor of a TT matrix as a vector.

    Parameters
    ----------
    tt_matrix : sequence of array, shape (r_{m-1}, rows_m, cols_m, r_m)

    Returns
    -------
    array, shape (prod rows · prod cols,)
        As :func:`tt_matrix_to_tensor`.

    Raises
    ------
    ShapeError
        If the cores do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> tt_matrix_to_vec([np.ones((1, 2, 3, 1)), np.ones((1, 4, 5, 1))]).shape
    (120,)
    """
    return _modes.tensor_to_vec(tt_matrix_to_tensor(tt_matrix))
