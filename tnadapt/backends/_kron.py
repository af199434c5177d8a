"""Kronecker product of two arrays: one product with broadcasting, or one over longer rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["kron_by_rows", "kron_plain", "short_rows"]


def kron_plain(backend: Any, a: Any, b: Any) -> Any:
    """Compute the Kronecker product of two arrays with the same number of axes, in one product."""
    shape: list[int] = []
    slow: list[int] = []
    fast: list[int] = []
    for m, n in zip(a.shape, b.shape, strict=True):
        shape.append(m * n)
        slow += (m, 1)
        fast += (1, n)
    return backend.reshape(backend.reshape(a, slow) * backend.reshape(b, fast), shape)


def kron_by_rows(backend: Any, a: Any, b: Any) -> Any:
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


def short_rows(a: Sequence[int], b: Sequence[int], limit: int, least: int) -> bool:
    """Return whether :func:`kron_by_rows` pays for these shapes where rows of up to ``limit`` elements are slow.

    For a result of fewer than ``least`` elements the additional operations cost more than they save.
    """
    if len(a) < 2 or b[-1] > limit or math.prod(a) * math.prod(b) < least:
        return False
    # With a single row on either side there is nothing to save.
    return math.prod(a[:-1]) > 1 and math.prod(b[:-1]) > 1 and int(a[-1]) > 1
