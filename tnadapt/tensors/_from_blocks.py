"""Tucker decompositions and tensor trains of tensors that are read block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from tnadapt.algebra.mode_products import mode_product
from tnadapt.backends import load_backend
from tnadapt.decomposition.block_compression import LEAST_ERROR, Compressed, by_error, by_sizes
from tnadapt.decomposition.block_passes import BlockPasses
from tnadapt.errors import BackendError, ShapeError

from ._decomposed import Decomposed, FitOutcome
from ._tensor_chains import TTTensor
from ._truncation import error_limit
from ._tucker_tensor import TuckerTensor

__all__ = ["BLOCK", "OVERSAMPLED", "compressed", "expanded_train", "expanded_tucker"]

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
