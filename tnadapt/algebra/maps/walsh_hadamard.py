"""The fast Walsh–Hadamard transform H."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend
from tnadapt.backends.backend import Array, FixedArrays
from tnadapt.errors import ShapeError, integer

__all__ = ["fwht"]

# Radix 16: one pass over memory does four butterfly stages as a product with a small matrix.
_RADIX_BITS = 4
# Rows per product. OpenBLAS splits larger products among threads, which takes up to fourteen times as long.
_ROWS = 1 << 11


def fwht(x: Array, axis: int = -1, normalize: bool = True) -> Array:
    """Compute the fast Walsh–Hadamard transform along one axis, in natural (Hadamard) order.

    Parameters
    ----------
    x : array, any shape
        Real floating dtype; the length of the axis is a power of two (1 is allowed).
    axis : int
        The axis to transform; the others are a batch.
    normalize : bool
        True for the orthonormal transform (which is its own inverse), False for entries of 1 and -1.

    Returns
    -------
    array, the shape of x
        ``H x`` in the library, dtype and device of x. Differentiable; the gradient is the same transform.
        Half precision is computed in float32 and rounded once.

    Raises
    ------
    ShapeError
        If the axis does not exist or its length is not a power of two.
    BackendError
        If x is not an array of a known library or not real floating.

    Notes
    -----
    ``H_{2n} = [[H_n, H_n], [H_n, -H_n]]``; the paper's Walsh–Hadamard matrix of appendix A.6. Costs
    ``n log2 n`` additions, and as much additional memory as x. With a compiled kernel (NumPy arrays and torch
    tensors on the CPU, with the extra ``fast``) it takes two passes over memory for n up to 2**26, otherwise
    ``log16 n`` passes.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    >>> fwht(np.array([1.0, 2.0, 3.0, 4.0]), normalize=False)
    array([10., -2., -4.,  0.])
    """
    backend = get_backend(x)
    backend.require_float(x, "the input of fwht")
    ndim = len(x.shape)
    if ndim == 0:
        raise ShapeError("fwht has no axis to transform in an array of shape ()")
    if type(axis) is not int or not -ndim <= axis < ndim:
        axis = integer(f"axis, in an array of shape {tuple(x.shape)},", axis, -ndim, ndim - 1, ShapeError)
    length = x.shape[axis]
    if length < 1 or length & (length - 1):
        raise ShapeError(
            f"fwht needs a length that is a power of two; axis {axis} of shape {tuple(x.shape)} has {length}: "
            f"pad it with zeros to {1 << (length - 1).bit_length() if length > 1 else 1}"
        )
    return _fwht_along(backend, x, axis, normalize)


def fwht_last(backend: Backend, x: Array, normalize: bool = True) -> Array:
    """:func:`fwht` of a validated array along its last axis."""
    return _fwht_along(backend, x, -1, normalize)


def _fwht_along(backend: Backend, x: Array, axis: int, normalize: bool) -> Array:
    axis = axis - len(x.shape) if axis >= 0 else axis
    kind = backend.dtype_name(x)
    if kind in ("float16", "bfloat16"):
        return backend.astype(_fwht_along(backend, backend.astype(x, "float32"), axis, normalize), kind)
    length = x.shape[axis]
    if length == 1 or math.prod(x.shape) == 0:
        return x

    def plain(x: Array) -> Array:
        return backend.moveaxis(fwht_plain(backend, backend.moveaxis(x, axis, -1), normalize), -1, axis)

    found = backend.fwht(x, 1.0 / math.sqrt(length) if normalize else 1.0, axis, plain)
    return plain(x) if found is None else found


def fwht_plain(backend: Backend, x: Array, normalize: bool = True) -> Array:
    """Compute :func:`fwht_last` by matrix products of the library: the reference implementation for every kernel.

    For float32 and float64 and a batch that is not empty.
    """
    kind = backend.dtype_name(x)
    shape = x.shape
    length = shape[-1]
    bits = length.bit_length() - 1
    batch = tuple(shape[:-1])
    # The axis is seen as base-16 digits of the position. Each step transforms the leading digit and moves it to the
    # end; after the last step the digits are in order again. The last small matrix includes the scale.
    while bits:
        step = min(_RADIX_BITS, bits)
        bits -= step
        key = (step, length if normalize and not bits else 1)
        matrix = _small_matrices.on(backend, key, like=x, dtype=kind)
        rows = min(length >> step, _ROWS)
        x = backend.reshape(x, (*batch, 1 << step, (length >> step) // rows, rows))
        x = backend.precise_matmul(backend.moveaxis(x, -3, -1), matrix)
    return backend.reshape(x, shape)


class _SmallMatrices(FixedArrays):
    """Hadamard matrices of up to 16 rows, divided by the square root of a length: keys are (bits, length)."""

    def make(self, key: Any) -> np.ndarray:
        bits, length = key
        matrix = np.ones((1, 1))
        for _ in range(bits):
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
        return matrix / math.sqrt(length)


_small_matrices = _SmallMatrices()
