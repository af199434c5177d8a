"""Matrix products with a small inner dimension, on NumPy, computed in blocks of the result.

BLAS fills the result with zeros and then adds to it. With a small inner dimension, memory bandwidth dominates, and BLAS
makes three passes over the result. Computing one cached block at a time makes one pass; OpenBLAS also has kernels for
small products, which neither fill nor pack. The reference implementation is ``a @ b``.
"""

from __future__ import annotations

import numpy as np

__all__ = ["thin_product"]

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
    made = np.empty((height, width), a.dtype)
    columns = max(_COLUMNS, _BLOCK // height)
    rows = max(1, _BLOCK // min(columns, width))
    for left in range(0, width, columns):
        part = b[:, left : left + columns]
        for top in range(0, height, rows):
            np.matmul(a[top : top + rows], part, out=made[top : top + rows, left : left + columns])
    return made
