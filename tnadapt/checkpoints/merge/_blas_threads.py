"""How many threads matrix products take: one, where another thread has work to do at the same time."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

__all__ = ["one_blas_thread"]


def one_blas_thread() -> AbstractContextManager[Any]:
    """Inside ``with``, NumPy's matrix products are made by the thread that asks for them.

    Products of a few rows gain nothing by more threads, and those wait for each other by turning round: beside a thread
    that copies, on as many cores, they take up to six times as long.

    Notes
    -----
    For the whole process, and as it was afterwards. By threadpoolctl, which the extra ``cli`` brings; without it
    nothing is changed, and ``OPENBLAS_NUM_THREADS=1`` (or ``OMP_NUM_THREADS=1``) in the environment does the same.

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
