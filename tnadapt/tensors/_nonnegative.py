"""CP and Tucker decompositions whose arrays have no negative elements: checks, starts, bounds and TensorLy's HALS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, load_backend
from tnadapt.decomposition.fits import Fit, Limits
from tnadapt.decomposition.linear_algebra import norm_of, tensorly_on
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._decomposed import TuckerTensor
from ._requests import Request, mode_of

__all__ = ["constrained_modes", "fit_nonnegative_cp", "fit_nonnegative_tucker", "refuse_callback"]

_WAY = "non-negative HALS"
# A tensor has no positive element if its negative part has its norm, up to this.
_ROUNDING = 1e-14


def constrained_modes(nonnegative: Any, request: Request) -> frozenset[int]:
    """Return the modes whose factors must not be negative.

    Parameters
    ----------
    nonnegative : bool or collection of int
        True for all modes.
    request : Request

    Raises
    ------
    ConfigError
        If it is something else.
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
    return modes


def refuse_callback(callback: Any) -> None:
    """Raise a ConfigError if there is a callback, which TensorLy's iteration cannot call."""
    if callback is not None:
        raise ConfigError("callback= is not called with nonnegative=: read the result's history, or set max_iterations")


def _not_negative(backend: Backend, array: Array, what: str) -> None:
    if bool((backend.to_numpy(array) < 0.0).any()):
        raise ShapeError(f"{what} has negative elements, but nonnegative= asks for none: pass its magnitude")


def _bound(request: Request) -> float:
    """The error of any tensor without negative elements: at least the negative part of the given one."""
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
    rng, best, count = np.random.default_rng(request.seed), Fit({}, False, 0, _WAY, error=math.inf), 0
    for number in range(starts):
        begun: str | list[Array] = start if number == 0 or not isinstance(start, str) else "random"
        if number and not isinstance(start, str):
            begun = [factor if mode in fixed else _uniform(request, rng, factor) for mode, factor in enumerate(start)]
        factors, errors = nonnegative_cp(
            backend, request.tensor, rank, modes, begun, fixed, limits.tol, limits.iterations, request.seed + number
        )
        count += len(errors)
        if all(np.isfinite(errors)) and errors[-1] < best.error:
            best = _hals({f"factor{mode}": factor for mode, factor in enumerate(factors)}, errors, limits, bound)
    return best._replace(iterations=count)


def _hals(arrays: dict[str, Array], errors: Sequence[float], limits: Limits, bound: float) -> Fit:
    stopped = "converged" if len(errors) < limits.iterations else "max_iterations"
    return Fit(arrays, False, len(errors), _WAY, stopped, errors[-1], tuple(errors), bound=bound)


def _uniform(request: Request, rng: np.random.Generator, like: Array) -> Array:
    backend = request.backend
    return backend.asarray(rng.random(tuple(like.shape)), backend.dtype_name(like), backend.device(like))


def fit_nonnegative_tucker(request: Request, ranks: Sequence[int], init: str | TuckerTensor, limits: Limits) -> Fit:
    """Return a core and factors that are not negative."""
    backend = request.backend
    start: str | tuple[Array, list[Array]]
    if isinstance(init, str):
        start = init
    else:
        if init.rank != tuple(ranks):
            raise ShapeError(f"init has ranks {init.rank}; expected {tuple(ranks)}")
        for place, array in enumerate(init.arrays):
            _not_negative(backend, array, f"factor {place - 1} of init" if place else "the core of init")
        start = (init.core, list(init.factors))
    bound = _bound(request)
    if request.norm == 0.0 or bound >= 1.0 - _ROUNDING:
        shapes = zip(request.shape, ranks, strict=True)
        zeros = {f"factor{mode}": backend.zeros(shape, like=request.tensor) for mode, shape in enumerate(shapes)}
        return Fit({"core": backend.zeros(ranks, like=request.tensor), **zeros}, True, 0, "zero")
    fitted = _tried(request, request.tensor, ranks, start, limits)
    if fitted is None:
        # A core or a factor that becomes zero stays so; one that fits the positive part of the tensor does not.
        positive = backend.where(request.tensor > 0.0, request.tensor, request.tensor * 0.0)
        begun = _tried(request, positive, ranks, start, limits)
        fitted = None if begun is None else _tried(request, request.tensor, ranks, begun[:2], limits)
    if fitted is None:
        raise ShapeError("the iteration failed, as its equations are singular: use another init or smaller ranks")
    core, factors, errors = fitted
    arrays = {"core": core} | {f"factor{mode}": factor for mode, factor in enumerate(factors)}
    return _hals(arrays, errors, limits, bound)


def _tried(
    request: Request,
    tensor: Array,
    ranks: Sequence[int],
    start: str | tuple[Array, list[Array]],
    limits: Limits,
) -> tuple[Array, list[Array], list[float]] | None:
    """Return a core, factors and errors; None if the equations are singular."""
    try:
        fit = nonnegative_tucker(request.backend, tensor, ranks, start, limits.tol, limits.iterations, request.seed)
    except np.linalg.LinAlgError:
        return None
    return fit if all(np.isfinite(fit[2])) else None


# -- Hierarchical alternating least squares, by TensorLy ---------------------------------------------------------------

# Gillis & Glineur, "Accelerated multiplicative updates and hierarchical ALS algorithms for nonnegative matrix
# factorization" (Neural Computation 24, 2012). TensorLy's implementation updates one column of a factor after another,
# and the core of a Tucker decomposition by an accelerated projected gradient: many small operations, which NumPy runs
# on the host for every library.


# TensorLy collects errors, and stops, only if its tolerance is not zero.
_NO_TOLERANCE = 1e-300


def nonnegative_cp(
    backend: Backend,
    tensor: Array,
    rank: int,
    modes: Collection[int],
    init: str | Sequence[Array],
    fixed: Collection[int],
    tol: float,
    iterations: int,
    seed: int,
) -> tuple[list[Array], list[float]]:
    """Fit factors of which those of some modes are not negative.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M), M ≥ 2
        Real.
    rank : int
    modes : collection of int
        Those whose factors are not negative.
    init : {"svd", "random"} or sequence of array
        Singular vectors with their negative parts removed, uniform numbers, or given factors.
    fixed : collection of int
        Modes whose factors of ``init`` are kept.
    tol : float
        Stop when the relative error changes by less.
    iterations : int
    seed : int

    Returns
    -------
    factors : list of array, shape (d_m, r)
    errors : list of float
        The relative error after each iteration.
    """
    # TensorLy computes the error from the last mode, which must therefore be a free one.
    order = [*sorted(fixed), *(mode for mode in range(len(tensor.shape)) if mode not in fixed)]
    host = backend.to_numpy(tensor)
    shift = _exponent(host)
    scaled = np.ldexp(np.transpose(host, order), -shift)
    start: Any = init
    if not isinstance(init, str):
        start = [backend.to_numpy(init[mode]) for mode in order]
        start = (None, [*start[:-1], np.ldexp(start[-1], -shift)])
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of divisions by the norms of columns that became zero
        (weights, factors), errors = tensorly.decomposition.non_negative_parafac_hals(
            scaled, rank, n_iter_max=iterations, init=start, tol=max(tol, _NO_TOLERANCE), random_state=seed % (1 << 32),
            fixed_modes=list(range(len(fixed))), nn_modes={order.index(mode) for mode in modes}, return_errors=True,
        )  # fmt: skip
    factors = [*factors[:-1], np.ldexp(factors[-1] * weights, shift)]
    return _back(backend, tensor, [factors[order.index(mode)] for mode in range(len(order))]), _floats(errors)


def nonnegative_tucker(
    backend: Backend,
    tensor: Array,
    ranks: Sequence[int],
    init: str | tuple[Array, Sequence[Array]],
    tol: float,
    iterations: int,
    seed: int,
) -> tuple[Array, list[Array], list[float]]:
    """Fit a core and factors that are not negative.

    Parameters
    ----------
    backend, tensor, tol, iterations, seed
        As for :func:`nonnegative_cp`.
    ranks : sequence of int
    init : {"svd", "random"} or (core, factors)

    Returns
    -------
    core : array, shape (r_1, …, r_M)
    factors : list of array, shape (d_m, r_m)
    errors : list of float
    """
    host = backend.to_numpy(tensor)
    shift = _exponent(host)
    start: Any = init
    if not isinstance(init, str):
        start = np.ldexp(backend.to_numpy(init[0]), -shift), [backend.to_numpy(factor) for factor in init[1]]
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        (core, factors), errors = tensorly.decomposition.non_negative_tucker_hals(
            np.ldexp(host, -shift), list(ranks), n_iter_max=iterations, init=start, tol=max(tol, _NO_TOLERANCE),
            random_state=seed % (1 << 32), return_errors=True,
        )  # fmt: skip
    core, *factors = _back(backend, tensor, [np.ldexp(core, shift), *factors])
    return core, factors, _floats(errors)


def _exponent(tensor: np.ndarray) -> int:
    """The power of two that a tensor is divided by, as TensorLy's thresholds are absolute."""
    return math.frexp(float(np.max(np.abs(tensor))))[1]


def _back(backend: Backend, like: Array, arrays: Sequence[np.ndarray]) -> list[Array]:
    dtype, device = backend.dtype_name(like), backend.device(like)
    return [backend.asarray(array, dtype, device) for array in arrays]


def _floats(errors: Sequence[Any]) -> list[float]:
    return [float(error) for error in errors]
