"""The NumPy backend, with its kernels: the array API through array-api-compat, NumPy 1.26 and 2 alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import array_api_compat.numpy as namespace
import numpy as np

from tnadapt.errors import BackendError, safe_repr

from . import (
    CALLED_AT_ONCE,
    FFT_DTYPES,
    LEAST_FASTFOOD,
    Array,
    Backend,
    Map,
    dft2_in_chunks,
    kron_by_rows,
    kron_plain,
    short_rows,
)
from ._kernels import kernels

# Rows of up to this length are slow in products with broadcasting.
_SHORT = 256
# For smaller results, additional operations do not pay off.
_FEW = 1 << 14
# Types whose elements a kernel may access.
_PLAIN = (np.ndarray, np.memmap)


class NumpyBackend(Backend):
    """NumPy arrays on the host."""

    name = "numpy"
    types = (np.ndarray,)

    def __init__(self) -> None:
        super().__init__(namespace)

    def owns(self, x: Any) -> bool:
        # `*` of np.matrix is a matrix product, and a masked array hides elements: neither behaves as the standard says.
        return isinstance(x, np.ndarray) and not isinstance(x, (np.matrix, np.ma.MaskedArray))

    def dtype_name(self, x: Array) -> str:
        return _dtype_name(x.dtype)

    def device(self, x: Array) -> Any:
        return "cpu"

    def asarray(self, array: np.ndarray, dtype: str | None = None, device: Any = None) -> Array:
        if device is not None and (not isinstance(device, str) or device != "cpu"):
            raise BackendError(f"numpy arrays live on 'cpu'; got device {safe_repr(device)}")
        return np.array(array, dtype=None if dtype is None else self.dtype(dtype))

    def largest(self, x: Array) -> float:
        # Without allocating an array of magnitudes.
        if x.size == 0 or x.dtype.kind == "c":
            return super().largest(x)
        return float(np.maximum(np.max(x), -np.min(x)))

    def all_finite(self, x: Array) -> bool:
        # One pass; the sum of squares of finite numbers may overflow.
        if x.dtype.kind == "f" and (x.flags.c_contiguous or x.flags.f_contiguous):
            flat = x.ravel(order="K")
            with np.errstate(all="ignore"):
                if math.isfinite(np.dot(flat, flat)):
                    return True
        return super().all_finite(x)

    def constant(self, array: np.ndarray, device: Any) -> Array:
        return array

    # Without array-api-compat's checks, which take longer than these operations on small arrays.

    def reshape(self, x: Array, shape: Sequence[int]) -> Array:
        return x.reshape(tuple(shape))

    def matrix_transpose(self, x: Array) -> Array:
        return x.swapaxes(-1, -2)

    def solve(self, a: Array, b: Array) -> Array:
        return np.linalg.solve(a, b)

    def split(self, x: Array, sizes: Sequence[int]) -> list[Array]:
        return np.split(x, np.cumsum(sizes)[:-1].tolist())

    def matmul(self, a: Array, b: Array) -> Array:
        product = thin_product(a, b)
        if product is not None:
            return product
        # OpenBLAS's kernels for short vectors may read past their end, and the values there may set the flag of an
        # invalid operation: a warning (or an error, if warnings are errors) about a correct product.
        with np.errstate(invalid="ignore"):
            return a @ b

    def kron(self, a: Array, b: Array) -> Array:
        return (kron_by_rows if short_rows(a.shape, b.shape, _SHORT, _FEW) else kron_plain)(self, a, b)

    def lacks(self, x: Array) -> frozenset[str]:
        compiled = {"fwht": "walsh", "fastfood": "fastfood"}
        return frozenset({"gradient", "shuffle", *(name for name, part in compiled.items() if kernels(part) is None)})

    def at_once(self, x: Array) -> int:
        return CALLED_AT_ONCE

    def fwht(self, x: Array, scale: float, axis: int, fallback: Map) -> Array | None:
        # Other subclasses may redefine operations or attach metadata, which a kernel would ignore.
        compiled = kernels("walsh") if type(x) in _PLAIN else None
        return None if compiled is None else compiled.transform(x, scale, axis)

    def fwht_at_once(self, x: Array, normalize: bool) -> Array | None:
        compiled = kernels("walsh") if type(x) is np.ndarray else None
        return None if compiled is None else compiled.transform_at_once(x, normalize)

    def fwht_into(self, x: Array, scale: float, axis: int, out: Array) -> bool:
        # Strided rows, or overlapping memory, would need a copy anyway.
        if not (type(x) in _PLAIN and type(out) in _PLAIN and _in_order(x) and _in_order(out) and out.flags.writeable):
            return False
        compiled = kernels("walsh")
        if compiled is None or (x is not out and np.may_share_memory(x, out) and _address(x) != _address(out)):
            return False
        compiled.transform_into(x, out, scale, axis)
        return True

    def write(self, out: Array, x: Array) -> None:
        if not out.flags.writeable:
            raise BackendError("the array for the result is read-only: give one that can be written to")
        np.copyto(out, x)

    def fastfood(self, x: Array, f: Any, adjoint: bool) -> Array | None:
        compiled = kernels("fastfood") if type(x) in _PLAIN and x.size and f.padded >= LEAST_FASTFOOD else None
        if compiled is None or not compiled.takes(x.dtype, f.padded, adjoint):
            return None
        return compiled.linear(x, f, adjoint)

    def dft2(self, x: Array, fallback: Map) -> Array | None:
        ours = type(x) in _PLAIN and self.dtype_name(x) in FFT_DTYPES and x.size > 0
        return dft2_in_chunks(self.xp, x, np.empty_like) if ours else None


def _address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])


def _in_order(x: np.ndarray) -> bool:
    return bool(x.flags.c_contiguous and x.flags.aligned)


@functools.cache
def _dtype_name(dtype: Any) -> str:
    # Formatting a dtype takes NumPy longer than transforming a thousand numbers.
    return str(dtype)


# -- Matrix products with a small inner dimension, computed in blocks of the result ------------------------------------

# BLAS fills the result with zeros and then adds to it. With a small inner dimension, memory bandwidth dominates, and
# BLAS makes three passes over the result. Computing one cached block at a time makes one pass; OpenBLAS also has
# kernels for small products, which neither fill nor pack. The reference implementation is ``a @ b``.


# With a larger inner dimension, arithmetic dominates; a result with fewer elements stays in the cache anyway.
_THIN = 16
_LEAST = 1 << 20
# Elements of a block; its minimum number of columns; and the minimum width of the result.
_BLOCK = 1 << 15
_COLUMNS = 1 << 10
_LEAST_COLUMNS = 1 << 9


def thin_product(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """Compute ``a @ b`` of two matrices; None if NumPy's product is as fast.

    Parameters
    ----------
    a : ndarray, shape (n, r)
    b : ndarray, shape (r, m)
        float32 or float64, both of the same dtype.

    Returns
    -------
    ndarray of shape (n, m), or None

    Notes
    -----
    In addition to the result it needs memory for copies of a and b if they are not contiguous.

    Examples
    --------
    >>> thin_product(np.ones((2, 3)), np.ones((3, 2))) is None
    True
    >>> thin_product(np.ones((1024, 3)), np.ones((3, 1024))).max()
    np.float64(3.0)
    """
    if a.ndim != 2 or b.ndim != 2 or a.dtype != b.dtype or a.dtype not in (np.float32, np.float64):
        return None
    (height, inner), width = a.shape, b.shape[1]
    if inner != b.shape[0] or not 1 <= inner <= _THIN or width < _LEAST_COLUMNS or height * width < _LEAST:
        return None
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    product = np.empty((height, width), a.dtype)
    columns = max(_COLUMNS, _BLOCK // height)
    rows = max(1, _BLOCK // min(columns, width))
    for left in range(0, width, columns):
        part = b[:, left : left + columns]
        for top in range(0, height, rows):
            np.matmul(a[top : top + rows], part, out=product[top : top + rows, left : left + columns])
    return product
