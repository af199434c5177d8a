"""Proof that no matrix of a rank is closer to a matrix than its part in a given subspace, computed when asked for.

Let U be the subspace, of r dimensions, ``B = Uᵀ A``, and ``R = A - U B``. For any numbers θ and d for which ::

    θ ≤ λ_min(B Bᵀ) + d     and     θ I - R Rᵀ - R Bᵀ B Rᵀ / d  is positive definite,

``A Aᵀ`` is at most ``θ I + U (B Bᵀ + (d - θ) I) Uᵀ``, whose second term is positive semidefinite and of rank r. By
Weyl's inequalities the r largest eigenvalues of ``A Aᵀ`` then have a sum of at most ``|B|² + r d``, and by the theorem
of Eckart & Young the squared error of every matrix of rank r is at least ``|R|² - r d``. Nothing else is assumed of U:
a subspace that misses a direction, from whatever start, has no such θ and d.

Positive definite is proved by a bound on the norm of R where that is enough, otherwise by a Cholesky factorization, as
it succeeds for no matrix with an eigenvalue below minus its rounding (Rump, "Verification of positive definiteness",
BIT 46, 2006).
"""

from __future__ import annotations

import numpy as np

__all__ = ["OPEN", "no_matrix_is_closer"]

# What the claim leaves open, relative to the error, and in units of epsilon relative to the matrix.
OPEN, _ROUNDING = 1e-8, 64.0
# Error of computed singular values, in units of epsilon relative to the largest.
_VALUES = 8.0
# Longest side for a Cholesky factorization, and most elements of a matrix in float64.
_SIDE, _ELEMENTS = 1 << 12, 1 << 25


def no_matrix_is_closer(matrix: np.ndarray, vectors: np.ndarray, epsilon: float) -> bool:
    """Return whether the part of a matrix in a subspace is proved to be its best approximation of that rank.

    Parameters
    ----------
    matrix : ndarray, shape (m, n)
        Real and finite.
    vectors : ndarray, shape (m, rank)
        Columns that span the subspace.
    epsilon : float
        Of the dtype whose rounding counts.

    Returns
    -------
    bool
        True if the relative error of every matrix of that rank is at least that of the part in the subspace, less
        ``1e-8`` times itself and 64 epsilon. False if this is not so, or the proof would need more than a matrix of
        4096 rows or 2^25 elements.
    """
    if matrix.shape[0] * matrix.shape[1] > _ELEMENTS:
        return False
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0:
        return True
    wide = matrix.astype(np.float64) / largest
    u = np.linalg.qr(vectors.astype(np.float64))[0]
    along = u.T @ wide
    rest = wide - u @ along
    error, rounding = float(np.linalg.norm(rest)), _ROUNDING * epsilon * float(np.linalg.norm(wide))
    least = error * (1.0 - OPEN) - rounding
    if not least > 0.0:
        return bool(error <= rounding)
    if epsilon > np.finfo(np.float64).eps:
        # The vectors have the rounding of their dtype: improve them in float64.
        u = np.linalg.qr(wide @ along.T)[0]
        along = u.T @ wide
        rest = wide - u @ along
    # What couples the two parts is rounding for singular vectors. It is left out of the matrix, at its full norm.
    across = np.linalg.qr(along.T)[0]
    coupled = rest @ across
    return _bounded(rest - coupled @ across.T, along, least + float(np.linalg.norm(coupled)))


def _bounded(rest: np.ndarray, along: np.ndarray, least: float) -> bool:
    """Return whether errors below ``least`` are excluded for ``U along + rest``."""
    size, rank = float(np.sum(rest * rest)), len(along)
    margin = (size - least * least) / rank
    if not margin > 0.0:
        return False
    eps, mixed = float(np.finfo(np.float64).eps), along @ rest.T
    values = np.linalg.svd(along, compute_uv=False)
    level = max(0.0, float(values[-1]) - _VALUES * eps * float(values[0])) ** 2 + margin
    if size + float(np.sum(mixed * mixed)) / margin <= level:
        return True
    rows, columns = rest.shape
    if rows > _SIDE:
        return False
    # Rounding: of the products in the Gram matrix, and of its factorization.
    slack = eps * ((columns + rank) * (size + float(np.sum(mixed * mixed)) / margin) + (rows + 2) * rows * level)
    if not level > slack:
        return False
    scaled = mixed / np.sqrt(margin)
    gram = rest @ rest.T
    gram += scaled.T @ scaled
    np.negative(gram, out=gram)
    gram[np.diag_indices(rows)] += level - slack
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return False
    return True
