"""Tensor trains that are fitted from a given start, some of whose cores may be fixed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from tnadapt.backends import get_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.train_als import improved_train
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr

from ._checks import finite, mode_of
from ._decomposed import Decomposed
from ._requests import Request, Watch
from ._tensor_chains import TTTensor
from ._tt_matrix import TTMatrix

__all__ = ["from_start", "start_of", "started"]

ChainT = TypeVar("ChainT", TTTensor, TTMatrix)


def start_of(
    request: Request, init: str | Sequence[Any], fixed: Collection[int], ranks: Sequence[int] | None
) -> tuple[TTTensor | None, frozenset[int]]:
    """Check what a train starts from.

    Parameters
    ----------
    request : Request
    init, fixed
        As for :func:`tnadapt.tensors.tensor_train`.
    ranks : sequence of int or None
        Of the bonds; None if an error is given instead.

    Returns
    -------
    TTTensor or None
        None for "svd".
    frozenset of int
        Positions of fixed cores, from 0.

    Raises
    ------
    ConfigError
        If it is neither "svd" nor a train, if there is no rank, or if cores are fixed that are not given.
    ShapeError
        If it has another shape or other ranks, or NaN or infinity.
    BackendError
        If it is of another library, dtype or device, its derivatives are recorded, or the tensor is traced.
    """
    held = frozenset(mode_of(mode, request.shape, "a mode in fixed") for mode in fixed)
    other = isinstance(init, Decomposed) and not isinstance(init, TTTensor)
    if isinstance(init, str) or other or not isinstance(init, Sequence):
        if not isinstance(init, str) or init != "svd":
            raise ConfigError(f"init must be 'svd', a TTTensor or its cores; got {safe_repr(init)}")
        if held:
            raise ConfigError(f"fixed={sorted(held)} keeps cores of a start: give them as init=TTTensor(cores)")
        return None, held
    if ranks is None:
        raise ConfigError("max_error= chooses ranks, but a start has its own: give rank= with init=")
    start = started(TTTensor, init)
    get_backend(start[0], request.tensor)
    expected = (request.shape, (1, *ranks, 1))
    if (start.shape, start.rank) != expected:
        raise ShapeError(
            f"init has shape {start.shape} and ranks {start.rank}; expected {expected[0]} and {expected[1]}"
        )
    request.refuse_trace("tensor_train(init=…)", "omit init=")
    request.refuse_recorded("init", *start)
    for mode, core in enumerate(start):
        finite(request.backend, core, f"core {mode} of init")
    return start, held


def started(cls: type[ChainT], init: Any) -> ChainT:
    """Return the train that ``init=`` gives; an error about its cores names ``init``."""
    if isinstance(init, cls):
        return init
    try:
        return cls(init)
    except TnadaptError as error:
        raise type(error)(f"init: {error}") from error


def from_start(request: Request, start: TTTensor, fixed: frozenset[int], sweeps: int, watch: Watch) -> TTTensor:
    """Improve a train by sweeps over the cores that are not fixed."""
    backend, cores, converged = request.backend, list(start), True
    if request.norm() == 0.0:
        free = [mode for mode in range(len(cores)) if mode not in fixed]
        cores = [backend.zeros(core.shape, like=core) if mode in free else core for mode, core in enumerate(cores)]
    elif sweeps:
        limits = Limits(watch.tol, sweeps)
        cores, _, converged = improved_train(backend, request.tensor, cores, limits, watch, fixed)
    method = "given start, ALS" if sweeps else "given start"
    found = TTTensor(cores)
    return request.finished(
        found, method, converged=watch.converged or converged, history=watch.history,
        closed=None if sweeps else lambda tensor: found, fixed=fixed,
    )  # fmt: skip
