"""Decompositions of tensors with missing or weighted elements: the checks, and the call of the solver."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from tnadapt.algebra.formats import Format
from tnadapt.algebra.products import mode_product
from tnadapt.backends import load_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition import Limits
from tnadapt.decomposition.block_passes import LEAST_ERROR, BlockPasses, Compressed, by_error, by_sizes
from tnadapt.decomposition.completion import complete
from tnadapt.errors import BackendError, ConfigError, ShapeError

from ._checks import error_limit
from ._decomposed import Decomposed, FitOutcome, TuckerTensor
from ._requests import Request, Watch
from ._tensor_chains import TTTensor

__all__ = [
    "BLOCK",
    "METHOD",
    "OVERSAMPLED",
    "STARTS",
    "Completed",
    "completed",
    "compressed",
    "expanded_train",
    "expanded_tucker",
    "refuse_observed",
]


# -- Decompositions of tensors with missing or weighted elements: the checks, and the call of the solver ---------------


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


# -- Tucker decompositions and tensor trains of tensors that are read block by block -----------------------------------


#: Bytes of a block, in double precision, unless told otherwise.
BLOCK = 1 << 27
#: Directions of a sketch beyond the rank.
OVERSAMPLED = 10
D = TypeVar("D", bound=Decomposed)


def compressed(passes: BlockPasses, sizes: Sequence[int] | None, max_error: float | None, seed: int) -> Compressed:
    """Compress a tensor to sizes, or as far as an error allows.

    Raises
    ------
    ShapeError
        If the tensor has no elements, NaN or infinity, or the error is below what Gram matrices can tell.
    BackendError
        If the tensor does not hold numbers.
    """
    if passes.dtype.kind not in "biufc":
        raise BackendError(f"the tensor must hold numbers; got the dtype {passes.dtype}")
    if not math.prod(passes.shape):
        raise ShapeError(f"the tensor has shape {passes.shape}, so there is nothing to decompose")
    if sizes is None:
        limit = error_limit(max_error)
        if limit < LEAST_ERROR:
            raise ShapeError(
                f"max_error={limit} is below {LEAST_ERROR}, the least for a tensor read in blocks: give ranks, or "
                "load the tensor into memory"
            )
        return by_error(passes, limit)
    return by_sizes(passes, sizes, seed)


def expanded_tucker(passes: BlockPasses, found: Compressed, small: TuckerTensor) -> TuckerTensor:
    """Return the Tucker tensor of what a tensor was compressed to, expanded."""
    dtype = _result_dtype(passes)
    factors = [np.asarray(basis @ factor, dtype) for basis, factor in zip(found.factors, small.factors, strict=True)]
    return _with_error(TuckerTensor(np.asarray(small.core, dtype), factors), found, small)


def expanded_train(passes: BlockPasses, found: Compressed, small: TTTensor) -> TTTensor:
    """Return the tensor train of what a tensor was compressed to, expanded."""
    backend, dtype = load_backend("numpy"), _result_dtype(passes)
    cores = [
        np.asarray(mode_product(backend, core, basis, 1), dtype)
        for core, basis in zip(small, found.factors, strict=True)
    ]
    return _with_error(TTTensor(cores), found, small)


def _with_error(result: D, found: Compressed, small: Any) -> D:
    outcome = small.outcome
    inside = outcome.error * float(np.linalg.norm(found.core))
    error = math.hypot(found.lost, inside) / found.norm if found.norm else 0.0
    bound = min(error, found.bound / found.norm if found.norm else 0.0)
    eps = float(np.finfo(result.arrays[0].dtype).eps)
    method = f"compressed in blocks, {outcome.method}"
    return result.with_outcome(
        FitOutcome(error, bound, error <= 64.0 * eps, outcome.converged, outcome.history, method)
    )


def _result_dtype(passes: BlockPasses) -> np.dtype[Any]:
    """Return the dtype of a result: that of the tensor, or float64 for integers, float32 for half precision."""
    if passes.dtype.kind not in "fc":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if passes.dtype.itemsize < 4 else passes.dtype
