"""Limit matrix products to one thread: while another thread is busy, or where the bits of a result matter."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["one_blas_thread"]


def one_blas_thread() -> AbstractContextManager[Any]:
    """Return a context manager in which NumPy computes matrix products in the calling thread only.

    The last bits of a product depend on the number of threads. Products of a few rows do not gain from more threads.
    BLAS threads wait for each other in a busy loop: next to a thread that copies, and with no core to spare, products
    take up to six times as long.

    Notes
    -----
    The limit applies to the whole process and is reset at the end of the block. It needs threadpoolctl, which the extra
    ``cli`` installs. Without it nothing changes; setting ``OPENBLAS_NUM_THREADS=1`` (or ``OMP_NUM_THREADS=1``) in the
    environment has the same effect.

    Examples
    --------
    >>> import numpy as np
    >>> with one_blas_thread():
    ...     (np.ones((2, 3)) @ np.ones((3, 2))).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return contextlib.nullcontext()
    return threadpool_limits(1, "blas")  # type: ignore[no-any-return]
