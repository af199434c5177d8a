"""Kronecker product of two arrays: one product with broadcasting, or one over longer rows."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["kron_by_rows", "kron_plain", "short_rows"]

Array = Any
Backend = Any  # the interface imports this module

# Below this number of elements the additional operations cost more than they save.
_FEW = 1 << 14


def kron_plain(backend: Backend, a: Array, b: Array) -> Array:
    """Compute the Kronecker product of two arrays with the same number of axes, in one product."""
    shape: list[int] = []
    slow: list[int] = []
    fast: list[int] = []
    for m, n in zip(a.shape, b.shape, strict=True):
        shape.append(m * n)
        slow += (m, 1)
        fast += (1, n)
    return backend.reshape(backend.reshape(a, slow) * backend.reshape(b, fast), shape)


def kron_by_rows(backend: Backend, a: Array, b: Array) -> Array:
    """Compute :func:`kron_plain` with both arrays first expanded along the last axis, to rows of the result's length.

    With broadcasting, the innermost loop of many libraries is as short as b's rows.
    """
    *rows, n = a.shape
    *others, q = b.shape
    spread = backend.xp.broadcast_to(backend.reshape(a, (*rows, n, 1)), (*rows, n, q))
    tiled = backend.xp.broadcast_to(backend.reshape(b, (*others, 1, q)), (*others, n, q))
    slow = [size for m in rows for size in (m, 1)]
    fast = [size for p in others for size in (1, p)]
    product = backend.reshape(spread, (*slow, n * q)) * backend.reshape(tiled, (*fast, n * q))
    return backend.reshape(product, [*(m * p for m, p in zip(rows, others, strict=True)), n * q])


def short_rows(a: Array, b: Array, limit: int) -> bool:
    """Return whether :func:`kron_by_rows` pays in a library where rows of up to ``limit`` elements are slow."""
    size = math.prod(a.shape) * math.prod(b.shape)
    if size < _FEW or len(a.shape) < 2 or b.shape[-1] > limit:
        return False
    # With a single row on either side there is nothing to save.
    rows, others = math.prod(a.shape[:-1]), math.prod(b.shape[:-1])
    return rows > 1 and others > 1 and int(a.shape[-1]) > 1
