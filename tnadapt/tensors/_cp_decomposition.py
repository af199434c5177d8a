"""``cp``: decompose a tensor into a sum of outer products."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from tnadapt.algebra.formats import CP
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array
from tnadapt.decomposition.cp_als import fit_cp
from tnadapt.decomposition.fits import Callback, Iteration, limits_of
from tnadapt.errors import ConfigError, ShapeError

from . import _requests
from ._decomposed import CPTensor, finished, smallest_rank
from ._nonnegative import constrained_modes, fit_nonnegative_cp


@checks_arguments
def cp(
    tensor: Any,
    rank: int | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    nonnegative: Any = False,
    starts: int | None = None,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
) -> CPTensor:
    """Decompose a tensor into a sum of outer products (CANDECOMP/PARAFAC) by alternating least squares.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    rank : int, optional
        Number of components.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a rank: the smallest rank is searched whose fit has no
        larger error.
    mask : array of bool, shape (d_1, …, d_M), optional
        True where an element is known; others may be NaN. In each mode, every index needs a known element.
    weights : array, shape (d_1, …, d_M), optional
        Nonnegative weights of the squared errors of the elements.
    init : {"svd", "random"} or CPTensor
        What the iteration starts from: the leading singular vectors of each unfolding, with a little noise; normal
        numbers; or a given result.
    fixed : collection of int
        Modes whose factors of ``init`` are kept.
    nonnegative : bool or collection of int
        Whether no factor may have negative elements, or the modes whose factors may not. Negative elements of the
        tensor are allowed and fitted as closely as such factors can; the bound counts what they cost. The iteration is
        then TensorLy's HALS on the host, without a callback.
    starts : int, optional
        Number of starts, the first by ``init`` and the others random; the best result is returned. By default 1, but 3
        from ``"svd"`` of a tensor of up to 2^14 elements, if ``max_iterations`` is above 10.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps of each start, and of steps of each descent by Gauss-Newton.
    callback : callable, optional
        Called with the number of each sweep or step, counted through all starts, and the least relative error so far;
        stops the iteration, and all that would follow, if it returns True.

    Returns
    -------
    CPTensor
        With factors of shape (d_m, r) whose columns have norm 1, and their weights in descending order of magnitude, in
        the tensor's library, dtype and device.

    Raises
    ------
    ShapeError
        If the tensor has NaN, infinity or no elements, or the rank is out of range.
    BackendError
        If the tensor is not an array of numbers of a known library, or is traced.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    A matrix has an exact answer, its truncated SVD (Eckart & Young). For more modes there is no guarantee; a best
    approximation may not even exist (de Silva & Lim, 2008). With ``rank``, it is differentiable once it has converged;
    of several starts, the best may be one that does not: use ``starts=1``.
    A sweep costs ``4 r prod(d)`` multiply-adds, in two matrix products.

    With ``mask`` or ``weights``, all arrays are fitted to the known elements: some sweeps of least squares from several
    starts, then damped Gauss-Newton if the problem is small enough for its equations. ``error`` is that of the known
    elements; ``callback`` is given the least one so far, after each step of Gauss-Newton or each sweep to the end.

    If 30 sweeps have not converged, their error is below 0.3, and the tensor is small, there may be an exact answer:
    damped Gauss-Newton continues from there and from other starts, each step at the cost of solving for all factors at
    once, which may take much longer than the sweeps. Only with ``init="svd"``; ``max_iterations=30`` turns it off.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.tensors import random_cp
    >>> tensor = random_cp((5, 6, 7), 2).to_tensor()
    >>> weights, factors = cp(tensor, 2)
    >>> weights.shape, [factor.shape for factor in factors]
    ((2,), [(5, 2), (6, 2), (7, 2)])
    >>> cp(tensor, max_error=1e-6).rank
    2
    >>> counts = cp(abs(tensor), 4, nonnegative=True)
    >>> all((factor >= 0.0).all() for factor in counts.factors), counts.outcome.method
    (True, 'non-negative HALS')
    """
    request = _requests.requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    request.refuse_trace("cp()", "use tensor_train(), or tucker(max_iterations=0)")
    held = _requests.kept_modes(request, init, fixed, CPTensor, "CPTensor(None, factors)")
    if len(held) == len(request.shape):
        raise ConfigError("fixed= keeps all modes, so that nothing is left to fit: leave out one of them")
    limits = limits_of(tol, max_iterations)
    if starts is not None:
        starts = _requests.integer_of("starts", starts, 1, 1 << 20)
    modes = constrained_modes(nonnegative, request, callback)
    if len(request.shape) == 2 and request.observed is None and not modes and not held:
        request = request.kept()

    def result_of(arrays: Mapping[str, Array]) -> CPTensor:
        factors = [arrays[f"factor{mode}"] for mode in range(len(request.shape))]
        result = CPTensor.of(request.backend, (arrays.get("weights"), factors))
        return result if held or "weights" in arrays else result.truncated(result.rank)

    def fitted(rank: int) -> CPTensor:
        start = init if isinstance(init, str) else _factors(init, rank, held)
        if request.observed is not None:
            _requests.refuse_observed(nonnegative)
            named = None if isinstance(start, str) else {f"factor{mode}": factor for mode, factor in enumerate(start)}
            split, most_starts = CP(request.shape, rank), max(starts or 1, _requests.STARTS)
            fit = _requests.completed(request, split, limits, callback, starts=most_starts, start=named, fixed=held)
        elif modes:
            fit = fit_nonnegative_cp(request, rank, modes, start, held, starts or 1, limits)
        else:
            steps = Iteration(limits, callback)
            fit = fit_cp(request.algebra(), request.tensor, rank, steps, init=start, fixed=held, starts=starts)
        if fit.error == math.inf:
            raise ShapeError(
                f"no sweep of rank {rank} succeeded, as the equations are singular: use another init or random_state, "
                "or a smaller rank"
            )
        return finished(request, fit, result_of, fixed=held)

    most = _requests.useful_rank(request.shape)
    if rank is None:
        assert request.max_error is not None
        return smallest_rank(fitted, request.max_error, most, request.shape, init)
    if _requests.integer_of("rank", rank, 1) > most:
        raise ShapeError(
            f"rank {rank} is above {most}, with which every tensor of shape {request.shape} is a CP tensor"
        )
    return fitted(int(rank))


def _factors(init: CPTensor, rank: int, held: Collection[int]) -> list[Array]:
    """Return the factors of a start, with its weights in the first factor that is not held."""
    if init.rank != rank:
        raise ShapeError(f"init has rank {init.rank}; expected {rank}")
    factors = list(init.factors)
    if init.weights is not None:
        free = next((mode for mode in range(len(factors)) if mode not in held), 0)
        factors[free] = factors[free] * init.weights
    return factors
