"""The product of a tensor and a matrix along one mode."""

from __future__ import annotations

import math

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

__all__ = ["mode_product"]


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
