"""Tensor rings of given tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import get_backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.matrix_truncation import Leading, MatrixTruncation
from tnadapt.decomposition.ring_als import ring_svd, ring_sweep
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from ._checks import integer_of, mode_of
from ._keyword_hints import hints_keywords
from ._requests import Callback, Request, Watch, requested
from ._smallest_rank import smallest_rank
from ._tensor_chains import TRTensor
from ._truncation import ranks_of, ring_ranks

__all__ = ["tensor_ring"]


@hints_keywords
@checks_arguments
def tensor_ring(
    tensor: Any,
    rank: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    starts: int = 1,
    random_state: Any = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    callback: Callback | None = None,
) -> TRTensor:
    """Decompose a tensor into a tensor ring.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M), M ≥ 2
        Real or complex. Lists and integers are converted.
    rank : int or sequence of int, optional
        The rank of all bonds; or of each of the M bonds, the first one closing the ring, with or without the first
        again at the end. A single number may be larger than is useful.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of ranks: the smallest rank of all bonds is searched whose fit
        has no larger error.
    init : {"svd", "random"} or TRTensor
        What the iteration starts from: TR-SVD, normal numbers, or a given result. TR-SVD needs ``rank[0] * rank[1]`` of
        at most d_1; otherwise "svd" starts as "random" does.
    fixed : collection of int
        Positions of the cores of ``init`` that are kept.
    starts : int
        Number of starts, the first by ``init`` and the others random; the best result is returned.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps; 0 for TR-SVD alone, which also runs inside ``jax.jit``.
    callback : callable, optional
        Called with the number and the relative error of each sweep; stops the iteration if it returns True.

    Returns
    -------
    TRTensor
        Of cores of shape (r_{m-1}, d_m, r_m), in the tensor's library, dtype and device.

    Raises
    ------
    ShapeError
        If the tensor has fewer than two modes, NaN, infinity or no elements, or a rank is out of range.
    BackendError
        If the tensor is not an array of numbers of a known library; or for sweeps inside a trace.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Zhao et al., "Tensor ring decomposition" (arXiv 1606.05535): TR-SVD, then alternating least squares, which never
    increases the error. There is no guarantee of the least error. With ``rank``, it is differentiable once it has
    converged: use ``tol=1e-10`` and, for example, ``max_iterations=2000`` in float64. A sweep costs ``prod(d) * r²``
    multiply-adds for each mode.

    Examples
    --------
    >>> from tnadapt.tensors import random_tr
    >>> ring = tensor_ring(random_tr((4, 5, 6), 2).to_tensor(), 2)
    >>> ring.rank, ring.error < 1e-6
    ((2, 2, 2, 2), True)
    >>> tensor_ring(ring.to_tensor(), max_error=1e-3).rank
    (2, 2, 2, 2)
    """
    request = requested(tensor, rank, max_error, random_state=random_state, least_order=2)
    sweeps = integer_of("max_iterations", max_iterations, 0)
    count = integer_of("starts", starts, 1, 1 << 20)
    held = {mode_of(mode, request.shape, "a mode in fixed") for mode in fixed}

    def fitted(one: int | Sequence[int]) -> TRTensor:
        return _fitted(request, _ranks(one, request.shape), init, held, count, sweeps, tol, callback)

    if rank is not None:
        return fitted(rank)
    assert request.max_error is not None
    most = ring_ranks([math.prod(request.shape)] * len(request.shape), request.shape)[0]
    return smallest_rank(fitted, request.max_error, most, request.shape, init)


def _fitted(
    request: Request,
    ranks: list[int],
    init: Any,
    held: set[int],
    starts: int,
    sweeps: int,
    tol: float,
    callback: Callback | None,
) -> TRTensor:
    """Return the best fit of given ranks."""
    rng = np.random.default_rng(request.seed)
    cores, method = _start(request, request.tensor, ranks, init, held, rng)
    if not sweeps:
        return request.finished(
            TRTensor(cores), method, closed=lambda tensor: TRTensor(_start(request, tensor, ranks, init, held, rng)[0])
        )
    request.refuse_trace("tensor_ring()", "use max_iterations=0")
    found = list[TRTensor]()
    for number in range(starts):
        watch = Watch(tol, callback)
        begun = cores if number == 0 else _random(request, ranks, rng, dict(enumerate(cores)), held)
        ring = TRTensor(_improved(request, begun, held, watch, sweeps))
        found.append(
            request.finished(ring, f"{method}, ALS", converged=watch.converged, history=watch.history, fixed=held)
        )
    return min(found, key=lambda ring: ring.error or 0.0)


def _ranks(rank: Any, shape: tuple[int, ...]) -> list[int]:
    order = len(shape)
    listed = list(rank) if isinstance(rank, (list, tuple, np.ndarray)) else rank
    if isinstance(listed, list) and len(listed) == order + 1:
        if listed[0] != listed[-1]:
            raise ShapeError(f"the first and the last rank of a ring must be the same; got {safe_repr(rank)}")
        listed = listed[:-1]
    ranks = ranks_of(listed, order, "bonds")
    useful = ring_ranks(ranks, shape)
    for bond, (one, most) in enumerate(zip(ranks, useful, strict=True)):
        if one > most and isinstance(listed, list):
            raise ShapeError(
                f"rank {one} of bond {bond} is above {most}, the largest that is useful there in a ring of shape "
                f"{shape} and ranks {tuple(ranks)}: give {tuple(useful)}"
            )
    return useful


def _start(
    request: Request, tensor: Array, ranks: list[int], init: Any, held: set[int], rng: np.random.Generator
) -> tuple[list[Array], str]:
    backend, shape = request.backend, request.shape
    if isinstance(init, TRTensor):
        get_backend(init[0], request.tensor)
        expected = (shape, (*ranks, ranks[0]))
        if (init.shape, init.rank) != expected:
            raise ShapeError(
                f"init has shape {init.shape} and ranks {init.rank}; expected {expected[0]} and {expected[1]}"
            )
        request.refuse_recorded("init", *init)
        return list(init), "given start"
    if not isinstance(init, str) or init not in ("svd", "random"):
        raise ConfigError(f"init must be 'svd', 'random' or a TRTensor; got {safe_repr(init)}")
    if held:
        raise ConfigError(f"fixed={sorted(held)} keeps cores of a start: give them as init=TRTensor(cores)")
    if init == "svd" and ranks[0] * ranks[1] <= min(shape[0], math.prod(shape[1:])):
        truncation = MatrixTruncation(backend, request.tensor, "auto", request.seed)

        def truncated(matrix: Array, bond: int) -> Leading:
            return truncation.left_to_rank(matrix, ranks[0] * ranks[1] if bond == 0 else ranks[bond + 1])

        cores = ring_svd(backend, tensor, ranks[0], truncated)
        if [int(core.shape[0]) for core in cores] == ranks:
            return cores, "TR-SVD"
    if not request.concrete:
        raise ShapeError(
            f"inside a trace a ring is computed by TR-SVD, which needs ranks whose first two multiply to at most "
            f"{shape[0]}, and others that are possible; got {ranks}"
        )
    return _random(request, ranks, rng, {}, set()), "random start"


def _random(
    request: Request, ranks: list[int], rng: np.random.Generator, given: dict[int, Array], held: set[int]
) -> list[Array]:
    """Return normal cores, and the given ones where they are held."""
    backend = request.backend
    kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
    cores = []
    for mode, size in enumerate(request.shape):
        ends = (ranks[mode], size, ranks[(mode + 1) % len(ranks)])
        numbers = rng.standard_normal(ends)
        if kind.startswith("complex"):
            numbers = numbers + 1j * rng.standard_normal(ends)
        cores.append(given[mode] if mode in held else backend.asarray(numbers, kind, device))
    return cores


def _improved(request: Request, cores: list[Array], held: set[int], watch: Watch, sweeps: int) -> list[Array]:
    backend, norm = request.backend, request.norm()
    if norm == 0.0:
        return [backend.zeros(core.shape, like=core) for core in cores]
    eps = float(np.finfo(backend.dtype_name(request.tensor)).eps)
    best, error, ridges = cores, request.error_of(TRTensor(cores)), [0.0, 100.0 * eps, eps**0.5]
    count = 0
    while count < sweeps and ridges:
        ridge = ridges[0] * norm ** (2.0 * (len(cores) - 1) / len(cores))
        found = _tried(request, best, held, ridge)
        now = float("inf") if found is None else request.error_of(TRTensor(found))
        if found is None or not now <= error * (1.0 + 1e-9):
            ridges.pop(0)
            watch.converged = found is not None and not ridges
            continue
        count += 1
        best, error = found, min(error, now)
        if watch(count, error):
            break
    return best


def _tried(request: Request, cores: list[Array], held: set[int], ridge: float) -> list[Array] | None:
    with np.errstate(all="ignore"):
        try:
            found = ring_sweep(request.backend, request.tensor, cores, held, ridge)
        except (np.linalg.LinAlgError, RuntimeError):  # torch raises a RuntimeError
            return None
    finite = all(np.isfinite(request.backend.to_numpy(core)).all() for core in found)
    return found if finite else None
