"""Decompositions whose arrays have no negative elements: checks, bounds, and TensorLy's HALS for Tucker's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Array, Backend, load_backend
from tnadapt.decomposition.fits import Fit, Limits
from tnadapt.decomposition.linear_algebra import norm_of, tensorly_on
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._decomposed import TuckerTensor
from ._requests import Request, exponent_of, mode_of

#: A tensor has no positive element if its negative part has at least this part of its norm.
NO_POSITIVE = 1.0 - 1e-14
# TensorLy collects errors, and stops, only if its tolerance is not zero.
_NO_TOLERANCE = 1e-300


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
    if request.backend.is_complex(request.tensor):
        raise BackendError("nonnegative= needs a real tensor: complex numbers are neither negative nor positive")
    request.refuse_trace("nonnegative=", "detach the tensor")
    request.refuse_recorded("with nonnegative=, the tensor", request.source)
    return modes


def not_negative(backend: Backend, array: Array, what: str) -> None:
    """Raise a ShapeError if an array has negative elements."""
    if bool((backend.to_numpy(array) < 0.0).any()):
        raise ShapeError(f"{what} has negative elements, but nonnegative= asks for none: pass its magnitude")


def least_error(request: Request) -> float:
    """Return a lower bound on the error of nonnegative tensors: the norm of the given tensor's negative part."""
    backend, tensor = request.backend, request.tensor
    if not request.norm:
        return 0.0
    if request.sparse:
        return float(np.linalg.norm(np.minimum(tensor.values, 0.0))) / request.norm
    negative = backend.where(tensor < 0.0, tensor, tensor * 0.0)
    return norm_of(backend, request.weighted(negative)) / request.norm


def fit_nonnegative_tucker(request: Request, ranks: Sequence[int], init: str | TuckerTensor, limits: Limits) -> Fit:
    """Return a core and factors that are not negative."""
    backend = request.backend
    start: Any = init
    if not isinstance(init, str):
        if init.rank != tuple(ranks):
            raise ShapeError(f"init has ranks {init.rank}; expected {tuple(ranks)}")
        for place, array in enumerate(init.arrays):
            not_negative(backend, array, f"factor {place - 1} of init" if place else "the core of init")
        start = backend.to_numpy(init.core), [backend.to_numpy(factor) for factor in init.factors]
    bound = least_error(request)
    if request.norm == 0.0 or bound >= NO_POSITIVE:
        shapes = zip(request.shape, ranks, strict=True)
        zeros = {f"factor{mode}": backend.zeros(shape, like=request.tensor) for mode, shape in enumerate(shapes)}
        return Fit({"core": backend.zeros(ranks, like=request.tensor), **zeros}, True, 0, "zero")
    if len(request.shape) == 1:
        first = np.eye(1, ranks[0])
        column = np.maximum(backend.to_numpy(request.tensor), 0.0).reshape(-1, 1)
        return Fit(request.algebra().arrays({"core": first[0], "factor0": column * first}), True, 0, "exact")
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
    stopped = "converged" if len(errors) < limits.iterations else "max_iterations"
    return Fit(
        request.algebra().arrays(arrays), False, len(errors), "non-negative HALS", stopped, errors[-1], tuple(errors),
        bound=bound,
    )  # fmt: skip


def _tucker(
    request: Request, tensor: Array, ranks: Sequence[int], start: Any, limits: Limits
) -> tuple[tuple[np.ndarray, list[np.ndarray]], list[float]] | None:
    """Return a core and factors, and the relative errors, or None if the equations are singular."""
    # TensorLy's implementation updates one column of a factor after another, and the core by an accelerated projected
    # gradient: many small operations, which NumPy runs on the host for every library.
    host = request.backend.to_numpy(tensor)
    shift = exponent_of(host)
    if not isinstance(start, str):
        start = np.ldexp(start[0], -shift), start[1]
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # about divisions by norms of columns that became zero
        try:
            (core, factors), errors = tensorly.decomposition.non_negative_tucker_hals(
                np.ldexp(host, -shift), list(ranks), n_iter_max=limits.iterations, init=start,
                tol=max(limits.tol, _NO_TOLERANCE), random_state=request.seed % (1 << 32), return_errors=True,
            )  # fmt: skip
        except np.linalg.LinAlgError:
            return None
    errors = [float(error) for error in errors]
    return ((np.ldexp(core, shift), factors), errors) if all(np.isfinite(errors)) else None
