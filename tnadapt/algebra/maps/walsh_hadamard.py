"""The fast Walsh–Hadamard transform H."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.argument_checks import flag
from tnadapt.backends import Backend, get_backend, known_backend
from tnadapt.backends.backend import FLOAT_DTYPES, Array
from tnadapt.backends.fixed_arrays import FixedArrays
from tnadapt.errors import ShapeError, integer

__all__ = ["fwht"]

# Radix 16: one pass over memory does four butterfly stages as a product with a small matrix.
_RADIX_BITS = 4
# Rows per product. OpenBLAS splits larger products among threads, which takes up to fourteen times as long.
_ROWS = 1 << 11
_LAST = -1
_HALF = ("float16", "bfloat16")


def fwht(x: Array, axis: int = -1, normalize: bool = True, *, out: Array | None = None) -> Array:
    """Compute the fast Walsh–Hadamard transform along one axis, in natural (Hadamard) order.

    Parameters
    ----------
    x : array, any shape
        Real floating dtype; the length of the axis is a power of two (1 is allowed).
    axis : int
        The axis to transform; the others are a batch.
    normalize : bool
        True for the orthonormal transform (which is its own inverse), False for entries of 1 and -1.
    out : array, optional
        Receives the result, and is returned; of the library, shape, dtype and device of x. It may be x itself, or have
        no memory in common with x. No derivatives are recorded through it. NumPy, torch and CuPy only.

    Returns
    -------
    array, the shape of x
        ``H x`` in the library, dtype and device of x. Differentiable without ``out``; the gradient is the same
        transform. Half precision is computed in float32 and rounded once.

    Raises
    ------
    ShapeError
        If the axis does not exist or its length is not a power of two, or ``out`` has another shape.
    BackendError
        If x is not an array of a known library or not real floating; if ``out`` cannot be written to, is of another
        library, dtype or device, or is given where derivatives are recorded.

    Notes
    -----
    ``H_{2n} = [[H_n, H_n], [H_n, -H_n]]``; the paper's Walsh–Hadamard matrix of appendix A.6. Costs
    ``n log2 n`` additions, and as much additional memory as x. Finding new memory for a large result takes about as
    long as a copy; ``out`` saves it where a compiled kernel runs and both arrays are contiguous. With a compiled kernel
    (NumPy arrays and torch tensors on the CPU, with the extra ``fast``) the transform takes two passes over memory for
    n up to 2**26, otherwise ``log16 n`` passes.

    Examples
    --------
    >>> import numpy as np
    >>> fwht(np.array([1.0, 0.0, 0.0, 0.0]))
    array([0.5, 0.5, 0.5, 0.5])
    >>> fwht(np.array([1.0, 2.0, 3.0, 4.0]), normalize=False)
    array([10., -2., -4.,  0.])
    >>> x = np.array([1.0, 2.0, 3.0, 4.0])
    >>> fwht(x, out=x) is x
    True
    """
    # This also runs on small arrays, whose transform takes less than a microsecond: each attribute is read once.
    backend = known_backend(type(x)) or get_backend(x, what="x")
    if out is not None:
        get_backend(out, what="out")
        get_backend(x, out)
    if normalize is not True and normalize is not False:
        normalize = flag("normalize", normalize)  # type: ignore[unreachable]
    if out is None and axis is _LAST:  # of equal integers as small as this there is only one
        found = backend.fwht_at_once(x, normalize)
        if found is not None:
            return found
    kind, shape = backend.dtype_name(x), x.shape
    if kind not in FLOAT_DTYPES:
        backend.require_float(x, "x, the input of fwht,")
    ndim = len(shape)
    if type(axis) is not int or not -ndim <= axis < ndim:
        axis = _checked_axis(shape, axis)
    length = shape[axis]
    if length < 1 or length & (length - 1):
        raise ShapeError(
            f"fwht needs a length that is a power of two; axis {axis} of x, of shape {tuple(shape)}, has {length}: "
            f"pad it with zeros to {1 << (length - 1).bit_length() if length > 1 else 1}"
        )
    axis = axis - ndim if axis >= 0 else axis
    if out is None:
        return _fwht_along(backend, x, kind, axis, normalize)
    if tuple(out.shape) != tuple(shape):
        raise ShapeError(f"out has shape {tuple(out.shape)}; expected that of the input, {tuple(shape)}")
    if kind in _HALF or length == 1 or not backend.fwht_into(x, _scale(length, normalize), axis, out):
        backend.write(out, _fwht_along(backend, x, kind, axis, normalize))
    return out


def fwht_last(backend: Backend, x: Array, normalize: bool = True) -> Array:
    """:func:`fwht` of a validated array along its last axis."""
    return _fwht_along(backend, x, backend.dtype_name(x), -1, normalize)


def _checked_axis(shape: Sequence[int], axis: Any) -> int:
    ndim = len(shape)
    if ndim == 0:
        raise ShapeError("x has shape (), which has no axis for fwht to transform")
    return integer(f"axis, in an array of shape {tuple(shape)},", axis, -ndim, ndim - 1, ShapeError)


def _scale(length: int, normalize: bool) -> float:
    return 1.0 / math.sqrt(length) if normalize else 1.0


def _fwht_along(backend: Backend, x: Array, kind: str, axis: int, normalize: bool) -> Array:
    """Transform along an axis that is counted from the last."""
    if kind in _HALF:
        return backend.astype(_fwht_along(backend, backend.astype(x, "float32"), "float32", axis, normalize), kind)
    shape = x.shape
    length = shape[axis]
    if length == 1 or 0 in shape:
        return x

    def plain(x: Array) -> Array:
        return backend.moveaxis(fwht_plain(backend, backend.moveaxis(x, axis, -1), normalize), -1, axis)

    found = backend.fwht(x, _scale(length, normalize), axis, plain)
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
