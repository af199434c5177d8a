"""Leading singular triplets on the host by ARPACK, through SciPy: for spectra that a few block steps do not resolve."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["arpack_pays", "arpack_vectors"]

# Largest part of the short side that the rank may be: beyond it the full decomposition takes less time.
_PART = 16
# Products with the matrix, relative to its short side: as many take about as long as the full decomposition.
_PRODUCTS = 0.5
# A deflated matrix whose norm exceeds the smallest value found by more than this holds a triplet that was missed.
_MISSED = 1e-6
_STEPS = 8


def arpack_pays(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether :func:`arpack_vectors` can be faster than the full SVD."""
    return _PART * rank <= min(shape) and _width(rank) < min(shape)


def _width(rank: int) -> int:
    """Return how many vectors ARPACK holds, which must be fewer than the short side."""
    return max(2 * rank + 1, 20)


def arpack_vectors(matrix: np.ndarray, rank: int, start: np.ndarray, least: np.ndarray) -> np.ndarray | None:
    """Compute the leading right singular vectors of a matrix.

    Parameters
    ----------
    matrix : ndarray, shape (m, n), m >= n
    rank : int
    start : ndarray, shape (n,)
    least : ndarray, shape (rank,)
        Lower bounds on the singular values, in descending order.

    Returns
    -------
    ndarray, shape (n, rank), or None
        None if it does not converge in less time than the full decomposition, or misses a value. A single vector may
        find one copy of a repeated value only: the result is compared with the bounds, and with the norm of the
        deflated matrix as another start finds it.
    """
    from scipy.sparse.linalg import ArpackError, svds

    width = _width(rank)
    most = max(5, int(_PRODUCTS * matrix.shape[1] / (width - rank)))
    try:
        u, s, vt = svds(matrix, rank, ncv=width, v0=start, maxiter=most)
        order = np.argsort(-s)
        s, u, vt = s[order], u[:, order], vt[order]
        slack = 64.0 * float(np.finfo(matrix.dtype).eps) * float(s[0])
        if not (s >= least - slack).all():
            return None
        if rank > 1 and _largest_left(matrix, u, s, vt) > s[-1] * (1.0 + _MISSED) + slack:
            return None
    except ArpackError:  # including no convergence
        return None
    return np.ascontiguousarray(vt.T)


def _largest_left(matrix: np.ndarray, u: np.ndarray, s: np.ndarray, vt: np.ndarray) -> float:
    """Return a lower bound on the norm of a matrix without some triplets, close to it, by a few Lanczos steps."""
    turned = np.ascontiguousarray(u.T)
    # Another start than the one that may have missed a direction.
    start = np.asarray(np.random.default_rng(0).standard_normal(matrix.shape[1]), matrix.dtype)
    v = start - vt.T @ (vt @ start)
    v = v / np.linalg.norm(v)
    inner = np.zeros((_STEPS, _STEPS + 1))
    last: np.ndarray = np.zeros(len(matrix), matrix.dtype)
    beta: Any = 0.0
    for step in range(_STEPS):
        w = matrix @ v - last * beta
        w = w - turned.T @ (turned @ w)
        alpha = np.linalg.norm(w)
        if not alpha > 0.0:
            break
        last = w / alpha
        z = last @ matrix - v * alpha
        z = z - vt.T @ (vt @ z)
        beta = np.linalg.norm(z)
        inner[step, step], inner[step, step + 1] = alpha, beta
        if not beta > 0.0:
            break
        v = z / beta
    return float(np.linalg.norm(inner[:, :_STEPS], 2))
