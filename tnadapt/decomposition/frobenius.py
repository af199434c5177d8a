"""Frobenius norms in float64 of arrays of any library, real or complex."""

from __future__ import annotations

import math

import numpy as np

from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array

from ._linear_algebra import TENSORLY, Algebra

__all__ = ["norm_of"]


def norm_of(backend: Backend, x: Array) -> float:
    """Compute the Frobenius norm for numbers of any magnitude, in float64.

    Parameters
    ----------
    backend : Backend
    x : array
        Real or complex; detached from any gradient.

    Returns
    -------
    float

    Examples
    --------
    >>> from tnadapt.backends import get_backend
    >>> norm_of(get_backend(np.ones(1)), np.array([3.0, 4.0j]))
    5.0
    """
    if backend.is_complex(x):
        parts = backend.to_numpy(x)
        return math.hypot(float(np.linalg.norm(parts.real)), float(np.linalg.norm(parts.imag)))
    x = backend.detached(x)
    if backend.name not in TENSORLY:
        backend, x = load_backend("numpy"), backend.to_numpy(x)
    return Algebra(backend, x).norm(x)
