"""Calls of TensorLy's own functions, on the library of the arrays or on the host."""

from __future__ import annotations

import operator
from typing import Any

from tnadapt.backends import Backend, load_backend

from ._linear_algebra import TENSORLY, tensorly_on

__all__ = ["call", "library_for"]


def library_for(backend: Backend) -> Backend:
    """Return the library itself if TensorLy computes with it, otherwise NumPy.

    Examples
    --------
    >>> library_for(load_backend("numpy")).name
    'numpy'
    """
    return backend if backend.name in TENSORLY else load_backend("numpy")


def call(backend: Backend, function: str, *given: Any, **words: Any) -> Any:
    """Call one of TensorLy's functions; its backend is as before afterwards.

    Parameters
    ----------
    backend : Backend
        The library of the arrays, from :func:`library_for`.
    function : str
        Its name in TensorLy, such as ``"decomposition.parafac"``.
    *given, **words
        What it is called with.

    Examples
    --------
    >>> call(load_backend("numpy"), "validate_tt_rank", (4, 5, 6), 2)
    [1, 2, 2, 1]
    """
    with tensorly_on(backend) as tensorly:
        return operator.attrgetter(function)(tensorly)(*given, **words)
