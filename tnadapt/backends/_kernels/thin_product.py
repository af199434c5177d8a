"""Matrix products whose inner dimension is small, on NumPy: block after block of the result.

BLAS fills a result with zeros and adds to it: where little is added to each element, memory is what takes the time, and
it is gone through three times. With a block that stays in the cache it is once; OpenBLAS besides has kernels for small
products, which neither fill nor pack. The reference implementation is ``a @ b``.
"""

from __future__ import annotations

import numpy as np

__all__ = ["thin_product"]

# More inner columns than this, and arithmetic takes the time; fewer elements, and the result stays in the cache anyway.
_THIN = 16
_LEAST = 1 << 20
# Of a block: its elements, and its columns where there are that many rows.
_BLOCK = 1 << 15
_COLUMNS = 1 << 10
_LEAST_COLUMNS = 1 << 9


def thin_product(a: np.ndarray, b: np.ndarray) -> np.ndarray | None:
    """``a @ b`` of two matrices, or None where that itself is as good.

    Parameters
    ----------
    a : ndarray, shape (n, r)
    b : ndarray, shape (r, m)
        float32 or float64, both of one dtype.

    Returns
    -------
    ndarray of shape (n, m), or None

    Notes
    -----
    Beyond the result it needs copies of a and b where they are not contiguous.

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
