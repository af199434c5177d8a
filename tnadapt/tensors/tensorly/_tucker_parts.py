"""Ranks and starts of Tucker decompositions as TensorLy takes them, and results of the ranks that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.hooi import projected
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from .._checks import as_tensor
from .._truncation import ranks_of
from .._tucker_tensor import TuckerTensor
from ._keywords import alike, as_tucker, ranks_by_share

__all__ = [
    "completed",
    "core_and_factors",
    "listed_factors",
    "more_columns",
    "more_zeros",
    "tucker_ranks",
    "tucker_start",
]


def tucker_ranks(rank: Any, shape: tuple[int, ...], sizes: Sequence[int] | None = None) -> list[int]:
    """Return the rank of each of the modes of ``sizes``."""
    sizes = list(shape if sizes is None else sizes)
    if rank is None:
        return sizes
    rank = ranks_by_share("validate_tucker_rank", sizes, rank)
    return [min(one, size) for one, size in zip(ranks_of(rank, len(sizes), "modes"), sizes, strict=True)]


def tucker_start(tensor: Array, init: Any, shape: tuple[int, ...]) -> str | TuckerTensor:
    """Return a start as tucker() takes it."""
    if isinstance(init, str):
        if init not in ("svd", "random"):
            raise ConfigError(f"init must be 'svd', 'random', (core, factors) or factors; got {safe_repr(init)}")
        return init
    if isinstance(init, tuple):
        return as_tucker(core_and_factors(init), tensor)
    factors = listed_factors(init)
    if len(factors) != len(shape):
        raise ShapeError(f"init has {len(factors)} factors; expected {len(shape)}, one for each mode")
    backend, core = as_tensor(tensor)
    factors = alike(factors, "a factor of init", core)
    for mode, factor in enumerate(factors):
        core = projected(backend, core, factor, mode)
    return as_tucker((core, factors), tensor)


def core_and_factors(init: tuple[Any, ...]) -> tuple[Array, list[Array]]:
    """Return the two parts of a start."""
    if len(init) != 2:
        raise ConfigError(f"init must be (core, factors), or a list of factors; got a tuple of {len(init)}")
    return init[0], listed_factors(init[1])


def listed_factors(factors: Any) -> list[Array]:
    """Return the factors of a start."""
    if not isinstance(factors, (list, tuple)):
        raise ConfigError(f"init must be 'svd', 'random', (core, factors) or factors; got {safe_repr(factors)}")
    return [as_tensor(factor, f"factor {mode} of init")[1] for mode, factor in enumerate(factors)]


def more_columns(backend: Backend, factor: Array, rank: int) -> Array:
    """Add orthonormal columns to those of a factor."""
    missing = rank - int(factor.shape[1])
    if missing <= 0:
        return factor
    kind, device = backend.dtype_name(factor), backend.device(factor)
    numbers = np.random.default_rng(0).standard_normal((int(factor.shape[0]), missing))
    q, _ = backend.qr(backend.concat([factor, backend.asarray(numbers, kind, device)], axis=1))
    return backend.concat([factor, q[:, int(factor.shape[1]) :]], axis=1)


def more_zeros(backend: Backend, core: Array, ranks: Sequence[int], modes: Sequence[int]) -> Array:
    """Enlarge a core by zeros to the ranks of some modes."""
    for mode, rank in zip(modes, ranks, strict=True):
        missing = rank - int(core.shape[mode])
        if missing > 0:
            zeros = backend.zeros((*core.shape[:mode], missing, *core.shape[mode + 1 :]), like=core)
            core = backend.concat([core, zeros], axis=mode)
    return core


def completed(backend: Backend, found: TuckerTensor, ranks: Sequence[int]) -> TuckerTensor:
    """Return the same tensor with the ranks that were asked for, also where smaller ones suffice."""
    core = more_zeros(backend, found.core, ranks, range(len(ranks)))
    factors = [more_columns(backend, one, rank) for one, rank in zip(found.factors, ranks, strict=True)]
    return TuckerTensor(core, factors).with_outcome(found.outcome)
