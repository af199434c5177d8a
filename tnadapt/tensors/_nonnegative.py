"""CP and Tucker decompositions whose arrays have no negative elements: checks, starts, bounds and TensorLy's HALS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, load_backend
from tnadapt.decomposition.fits import Fit, Limits
from tnadapt.decomposition.linear_algebra import norm_of, tensorly_on
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._decomposed import TuckerTensor
from ._requests import Request, mode_of

_WAY = "non-negative HALS"
# A tensor has no positive element if its negative part has its norm, up to this.
_ROUNDING = 1e-14


def constrained_modes(nonnegative: Any, request: Request, callback: Any) -> frozenset[int]:
    """Return the modes whose factors must not be negative.

    Parameters
    ----------
    nonnegative : bool or collection of int
        True for all modes.
    request : Request
    callback : callable or None

    Raises
    ------
    ConfigError
        If it is something else; or there is a callback, which TensorLy's iteration cannot call.
    ShapeError
        If there is no such mode.
    BackendError
        If the tensor is complex, traced or differentiated.
    """
    if nonnegative is False:
        return frozenset()
    if nonnegative is True:
        modes = frozenset(range(len(request.shape)))
    elif isinstance(nonnegative, (list, tuple, set, frozenset)) and len(nonnegative):
        modes = frozenset(mode_of(mode, request.shape) for mode in nonnegative)
    else:
        raise ConfigError(
            f"nonnegative must be True for all modes, False, or a list of modes; got {safe_repr(nonnegative)}"
        )
    backend = request.backend
    if backend.is_complex(request.tensor):
        raise BackendError("nonnegative= needs a real tensor: complex numbers are neither negative nor positive")
    request.refuse_trace("nonnegative=", "detach the tensor")
    request.refuse_recorded("with nonnegative=, the tensor", request.source)
    if callback is not None:
        raise ConfigError("callback= is not called with nonnegative=: read the result's history, or set max_iterations")
    return modes


def _not_negative(backend: Backend, array: Array, what: str) -> None:
    if bool((backend.to_numpy(array) < 0.0).any()):
        raise ShapeError(f"{what} has negative elements, but nonnegative= asks for none: pass its magnitude")


def _bound(request: Request) -> float:
    """Return a lower bound on the error of nonnegative tensors: the norm of the given tensor's negative part."""
    backend, tensor = request.backend, request.tensor
    norm = request.norm
    return norm_of(backend, backend.where(tensor < 0.0, tensor, tensor * 0.0)) / norm if norm else 0.0


def fit_nonnegative_cp(
    request: Request,
    rank: int,
    modes: frozenset[int],
    start: str | list[Array],
    fixed: Collection[int],
    starts: int,
    limits: Limits,
) -> Fit:
    """Return the best of several fits of one rank."""
    backend, shape = request.backend, request.shape
    if len(shape) == 1:
        column = backend.reshape(request.tensor, (-1, 1))
        return Fit({"factor0": backend.where(column > 0.0, column, column * 0.0)}, True, 0, "exact")
    bound = _bound(request) if len(modes) == len(shape) else 0.0
    if request.norm == 0.0 or (bound >= 1.0 - _ROUNDING and not fixed):
        zeros = {f"factor{mode}": backend.zeros((size, rank), like=request.tensor) for mode, size in enumerate(shape)}
        return Fit(zeros, True, 0, "zero")
    if not isinstance(start, str):
        for mode in sorted(modes):
            _not_negative(backend, start[mode], f"factor {mode} of init")
    # TensorLy computes the error from the last mode, which must therefore be a free one.
    order = [*sorted(fixed), *(mode for mode in range(len(shape)) if mode not in fixed)]
    host = backend.to_numpy(request.tensor)
    shift = _exponent(host)
    scaled = np.ldexp(np.transpose(host, order), -shift)
    initial = None if isinstance(start, str) else [backend.to_numpy(factor) for factor in start]
    rng, best, count = np.random.default_rng(request.seed), Fit({}, False, 0, _WAY, error=math.inf), 0
    for number in range(starts):
        begun: Any = "random" if number else start
        if initial is not None:
            if number:
                initial = [x if m in fixed else rng.random(x.shape).astype(x.dtype) for m, x in enumerate(initial)]
            begun = None, [initial[mode] for mode in order[:-1]] + [np.ldexp(initial[order[-1]], -shift)]
        (weights, factors), errors = _by_tensorly(
            "non_negative_parafac_hals", scaled, rank, begun, limits, request.seed + number,
            fixed_modes=list(range(len(fixed))), nn_modes={order.index(mode) for mode in modes},
        )  # fmt: skip
        count += len(errors)
        if all(np.isfinite(errors)) and errors[-1] < best.error:
            factors = [*factors[:-1], np.ldexp(factors[-1] * weights, shift)]
            arrays = {f"factor{mode}": factors[order.index(mode)] for mode in range(len(order))}
            best = _fit(request, arrays, errors, limits, bound)
    return best._replace(iterations=count)


def fit_nonnegative_tucker(request: Request, ranks: Sequence[int], init: str | TuckerTensor, limits: Limits) -> Fit:
    """Return a core and factors that are not negative."""
    backend = request.backend
    start: Any = init
    if not isinstance(init, str):
        if init.rank != tuple(ranks):
            raise ShapeError(f"init has ranks {init.rank}; expected {tuple(ranks)}")
        for place, array in enumerate(init.arrays):
            _not_negative(backend, array, f"factor {place - 1} of init" if place else "the core of init")
        start = backend.to_numpy(init.core), [backend.to_numpy(factor) for factor in init.factors]
    bound = _bound(request)
    if request.norm == 0.0 or bound >= 1.0 - _ROUNDING:
        shapes = zip(request.shape, ranks, strict=True)
        zeros = {f"factor{mode}": backend.zeros(shape, like=request.tensor) for mode, shape in enumerate(shapes)}
        return Fit({"core": backend.zeros(ranks, like=request.tensor), **zeros}, True, 0, "zero")
    fitted = _tucker(request, request.tensor, ranks, start, limits)
    if fitted is None:
        # A core or factor that becomes zero stays zero; one that fits the positive part of the tensor does not.
        positive = backend.where(request.tensor > 0.0, request.tensor, request.tensor * 0.0)
        begun = _tucker(request, positive, ranks, start, limits)
        fitted = None if begun is None else _tucker(request, request.tensor, ranks, begun[0], limits)
    if fitted is None:
        raise ShapeError("the iteration failed, as its equations are singular: use another init or smaller ranks")
    (core, factors), errors = fitted
    arrays = {"core": core} | {f"factor{mode}": factor for mode, factor in enumerate(factors)}
    return _fit(request, arrays, errors, limits, bound)


def _tucker(
    request: Request, tensor: Array, ranks: Sequence[int], start: Any, limits: Limits
) -> tuple[tuple[np.ndarray, list[np.ndarray]], list[float]] | None:
    """Return a core and factors, and the errors, or None if the equations are singular."""
    host = request.backend.to_numpy(tensor)
    shift = _exponent(host)
    if not isinstance(start, str):
        start = np.ldexp(start[0], -shift), start[1]
    try:
        (core, factors), errors = _by_tensorly(
            "non_negative_tucker_hals", np.ldexp(host, -shift), list(ranks), start, limits, request.seed
        )
    except np.linalg.LinAlgError:
        return None
    return ((np.ldexp(core, shift), factors), errors) if all(np.isfinite(errors)) else None


def _fit(
    request: Request, arrays: Mapping[str, np.ndarray], errors: Sequence[float], limits: Limits, bound: float
) -> Fit:
    """Return host arrays as a fit in the tensor's library."""
    stopped = "converged" if len(errors) < limits.iterations else "max_iterations"
    return Fit(
        request.algebra().arrays(arrays), False, len(errors), _WAY, stopped, errors[-1], tuple(errors), bound=bound
    )


# -- Hierarchical alternating least squares, by TensorLy ---------------------------------------------------------------

# Gillis & Glineur, "Accelerated multiplicative updates and hierarchical ALS algorithms for nonnegative matrix
# factorization" (Neural Computation 24, 2012). TensorLy's implementation updates one column of a factor after another,
# and the core of a Tucker decomposition by an accelerated projected gradient: many small operations, which NumPy runs
# on the host for every library.


# TensorLy collects errors, and stops, only if its tolerance is not zero.
_NO_TOLERANCE = 1e-300


def _by_tensorly(
    solver: str, tensor: np.ndarray, rank: Any, start: Any, limits: Limits, seed: int, **settings: Any
) -> tuple[Any, list[float]]:
    """Return the result of a TensorLy solver, and the relative error after each iteration."""
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # about divisions by norms of columns that became zero
        arrays, errors = getattr(tensorly.decomposition, solver)(
            tensor, rank, n_iter_max=limits.iterations, init=start, tol=max(limits.tol, _NO_TOLERANCE),
            random_state=seed % (1 << 32), return_errors=True, **settings,
        )  # fmt: skip
    return arrays, [float(error) for error in errors]


def _exponent(tensor: np.ndarray) -> int:
    """Return the power of two to divide a tensor by, as TensorLy's thresholds are absolute."""
    return math.frexp(float(np.max(np.abs(tensor))))[1]
