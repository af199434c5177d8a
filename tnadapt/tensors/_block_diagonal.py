"""Block-diagonal joins of arrays, from which sums of networks are made."""

from __future__ import annotations

from collections.abc import Collection

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

__all__ = ["block_diagonal"]


def block_diagonal(backend: Backend, a: Array, b: Array, axes: Collection[int]) -> Array:
    """Join two arrays so that along some axes each has its own block, with zeros elsewhere.

    Parameters
    ----------
    backend : Backend
    a, b : array
        With the same sizes along the other axes.
    axes : collection of int
        The axes that are joined.

    Returns
    -------
    array

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.backends import get_backend
    >>> block_diagonal(get_backend(np.ones(1)), np.ones((1, 2)), np.ones((1, 1)), [0, 1])
    array([[1., 1., 0.],
           [0., 0., 1.]])
    """
    first, second = a, b
    for axis in sorted(axes):
        before = [int(size) for size in first.shape]
        after = [int(size) for size in second.shape]
        extra, own = before.copy(), after.copy()
        extra[axis], own[axis] = int(b.shape[axis]), int(a.shape[axis])
        first = backend.concat([first, backend.zeros(extra, like=a)], axis=axis)
        second = backend.concat([backend.zeros(own, like=a), second], axis=axis)
    return first + second
