"""Decompositions of tensors with missing or weighted elements: the checks, and the call of the solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.formats import Format
from tnadapt.backends.backend import Array
from tnadapt.decomposition import Limits
from tnadapt.decomposition.completion import complete
from tnadapt.errors import ConfigError

from ._requests import Request, Watch

__all__ = ["METHOD", "STARTS", "Completed", "completed", "refuse_observed"]

#: Random starts of a small problem.
STARTS = 8
METHOD = "least squares on the observed elements"


class Completed(NamedTuple):
    """The arrays of a completion, in the tensor's library, and how they were found."""

    arrays: dict[str, Array]
    converged: bool
    history: tuple[float, ...]


def refuse_observed(nonnegative: Any) -> None:
    """Raise a ConfigError if what is fitted to observed elements is to be nonnegative."""
    if nonnegative is not False and nonnegative not in ((), frozenset(), None):
        raise ConfigError("nonnegative= does not go with mask= or weights=: leave one of them out")


def completed(
    request: Request,
    splits: Sequence[Format],
    watch: Watch,
    *,
    iterations: int,
    starts: int,
    terms: int = 1,
    hadamard: bool = False,
    start: Mapping[str, Array] | None = None,
    fixed: Any = (),
) -> Completed:
    """Fit formats to the observed elements of a tensor.

    Parameters
    ----------
    request : Request
        With ``observed``.
    splits, terms, hadamard, starts
        As for :func:`tnadapt.decomposition.completion.complete`.
    watch : Watch
    iterations : int
    start : mapping of str to array, optional
    fixed : collection
        What the caller was asked to keep.

    Raises
    ------
    ConfigError
        If an error is given in place of ranks, or something is to be kept.
    BackendError
        If the tensor is traced or differentiated.
    """
    assert request.observed is not None
    backend = request.backend
    request.refuse_trace("a decomposition with mask= or weights=", "detach the tensor")
    request.refuse_recorded("with mask= or weights=, the tensor", request.source)
    if request.max_error is not None:
        raise ConfigError("mask= and weights= need ranks, as the error of known elements says little about the others")
    if fixed:
        raise ConfigError(f"fixed={sorted(fixed)} cannot be kept with mask= or weights=: leave one of them out")
    roots = np.real(backend.to_numpy(request.observed)).astype(np.float64)
    host = None if start is None else {name: backend.to_numpy(array) for name, array in start.items()}
    found = complete(
        splits, backend.to_numpy(request.tensor), roots**2, terms=terms, hadamard=hadamard, start=host, starts=starts,
        seed=request.seed, limits=Limits(watch.tol, iterations), watch=watch.told,
    )  # fmt: skip
    kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
    arrays = {name: backend.asarray(np.ascontiguousarray(one), kind, device) for name, one in found.arrays.items()}
    return Completed(arrays, found.converged, found.history)
