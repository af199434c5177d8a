"""The rearrangement of Van Loan and Pitsianis, for any number of splits and modes.

It turns a Kronecker product of K tensors into the outer product of their vectors, so that the nearest Kronecker product
is a nearest tensor of rank one. Van Loan & Pitsianis, "Approximation with Kronecker products" (1993).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array

__all__ = ["contracted", "padded_to", "rearranged"]


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
    found = backend.reshape(tensor, [sizes[k][mode] for k, mode in digits])
    found = backend.permute_dims(found, sorted(range(len(digits)), key=lambda place: digits[place]))
    return backend.reshape(found, [math.prod(split) for split in sizes])


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
    found = backend.reshape(tensor, (math.prod(shape[:kept]), math.prod(shape[kept:])))
    if left is not None:
        found = backend.matmul(backend.reshape(left, (1, -1)), found)
    found = backend.reshape(found, (shape[kept], math.prod(shape[kept + 1 :])))
    if right is not None:
        found = backend.matmul(found, backend.reshape(right, (-1, 1)))
    return backend.reshape(found, sizes)


def _outer(backend: Backend, tensors: Sequence[Array]) -> Array | None:
    """Return the outer product of all tensors as a vector; None if there are no tensors."""

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
