"""Measures of how close an update is to the dense one: the paper's appendix A.4."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.backends import Array, get_backend
from tnadapt.errors import ShapeError

from .norms import exponent_of, relative_difference, scaled_by


class Geometry(NamedTuple):
    """The three measures of equations (5) to (7).

    Attributes
    ----------
    d_left, d_right : float
        d_L and d_R, from 0 to 1 up to rounding: 0 for orthogonal spaces, 1 for equal ones.
    d_euclid : float
        d_E; 0 for equal updates.
    """

    d_left: float
    d_right: float
    d_euclid: float


@checks_arguments
def geometry(dense: Array, variant: Array, k: int = 5) -> Geometry:
    """Compute the similarity of the singular spaces of two updates, and their distance.

    Parameters
    ----------
    dense, variant : array, shape (rows, cols)
        ΔW of full fine-tuning and of the method compared with it; of the same library and dtype.
    k : int
        Number of leading singular vectors, 1 to ``min(rows, cols)``.

    Returns
    -------
    Geometry
        ``(d_left, d_right, d_euclid)``: Python floats, computed in float64 on the host.

    Raises
    ------
    ShapeError
        If they are not two finite matrices of the same shape, or k is out of range.
    BackendError
        If libraries, dtypes or devices are mixed, or the dtype is not real floating.

    Notes
    -----
    Equations (5) to (7)::

        d_L = || U_dense[:, :k]ᵀ U_variant[:, :k] || / sqrt(k)      d_R likewise for V
        d_E = || dense - variant || / || dense ||

    The norms are Frobenius norms: only then are d_L and d_R 1 for equal spaces, as the paper states. (The
    spectral norm would give 1 / sqrt(k).) Costs two singular value decompositions.

    Examples
    --------
    >>> import numpy as np
    >>> dense = np.diag([3.0, 2.0, 1.0])
    >>> geometry(dense, dense, k=2)
    Geometry(d_left=1.0, d_right=1.0, d_euclid=0.0)
    """
    backend = get_backend(dense, variant)
    backend.require_float(dense, "an update")
    if len(dense.shape) != 2 or tuple(dense.shape) != tuple(variant.shape):
        raise ShapeError(
            f"geometry needs two matrices of the same shape; got {tuple(dense.shape)} and {tuple(variant.shape)}"
        )
    k = integer("k", k, 1, min(dense.shape), ShapeError)
    ours, theirs = (backend.to_numpy(x).astype(np.float64) for x in (dense, variant))
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        raise ShapeError("geometry needs finite updates; one of them has a NaN or an infinity")
    # Scaled by a power of two first: the squares of very large or very small numbers leave float64's range.
    (u, _, vt), (u2, _, vt2) = (
        np.linalg.svd(scaled_by(update, -exponent_of(update)), full_matrices=False) for update in (ours, theirs)
    )
    left = np.linalg.norm(u[:, :k].T @ u2[:, :k]) / math.sqrt(k)
    right = np.linalg.norm(vt[:k] @ vt2[:k].T) / math.sqrt(k)
    return Geometry(float(left), float(right), relative_difference(ours, theirs))
