"""CP decompositions under TensorLy's names and keywords."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from .._checks import as_tensor, integer_of, mode_of
from .._cp_decomposition import cp
from .._cp_tensor import CPTensor
from ._keywords import (
    Sweeps,
    as_cp,
    check_criterion,
    errors_of,
    filled_start,
    needed_mask,
    own_arrays,
    ranks_by_share,
    svd_method,
    tolerance,
)
from ._random_draws import random_cp

__all__ = ["non_negative_parafac", "non_negative_parafac_hals", "parafac"]


def parafac(
    tensor: Any,
    rank: Any,
    n_iter_max: int = 100,
    init: Any = "svd",
    svd: str = "truncated_svd",
    normalize_factors: bool = False,
    orthogonalise: bool | int = False,
    tol: float | None = 1e-8,
    random_state: Any = None,
    verbose: bool | int = 0,
    return_errors: bool = False,
    sparsity: float | int | None = None,
    l2_reg: float = 0,
    mask: Any = None,
    cvg_criterion: str = "abs_rec_error",
    fixed_modes: Sequence[int] | None = None,
    svd_mask_repeats: int = 5,
    linesearch: bool = False,
    callback: Any = None,
) -> Any:
    """Decompose a tensor into a sum of outer products; :func:`tnadapt.cp` with TensorLy's keywords.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex.
    rank : int, float or "same"
        Number of components, or the share of the tensor's parameters that they may have. Components above the number
        with which every tensor can be represented are zero.
    n_iter_max : int
        Maximum number of sweeps.
    init : {"svd", "random"} or (weights, factors)
        "random" starts from TensorLy's uniform numbers.
    svd : {"truncated_svd", "symeig_svd", "randomized_svd"}
        How the start is computed; its error is corrected by the sweeps.
    normalize_factors : bool
        Whether the columns have norm 1, and the weights the norms. Otherwise the weights are ones.
    orthogonalise : bool or int
        Whether to start sweeps, or the first ones, from orthonormal columns.
    tol : float or None
        The iteration stops when a sweep changes the relative error by less.
    random_state : int, RandomState or Generator, optional
        Seed; 0 if None, so that results repeat.
    verbose : bool or int
        Whether to print the error of each sweep.
    return_errors : bool
        Whether to return the errors, too.
    sparsity : float or int, optional
        Share or number of elements that a sparse part may have, which is returned, too.
    l2_reg : float
        Added to the diagonal of the equations.
    mask : array, shape (d_1, …, d_M), optional
        1 or True where an element is known. The others may be NaN. The known elements are fitted by least squares, and
        all errors are relative to their norm; see the notes.
    cvg_criterion : {"abs_rec_error", "rec_error"}
        The same here, as no sweep increases the error.
    fixed_modes : sequence of int, optional
        Modes whose factors of ``init`` are kept, the last one as well.
    svd_mask_repeats : int
        How often the start from singular vectors fills in the elements that ``mask`` leaves out.
    linesearch : bool
        Accepted: sweeps are extrapolated in both cases, and a longer step is kept only if it reduces the error.
    callback : callable, optional
        Called with the result so far and its relative error; stops the iteration if it returns True.

    Returns
    -------
    CPTensor
        With its error, bound and history in ``outcome``. With ``sparsity``, ``(CPTensor, sparse part)``. With
        ``return_errors``, that and the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity where it is known, or a rank or a start does not fit.
    ConfigError
        If a keyword has no meaning here; the message says which, and the way out.

    Notes
    -----
    A sweep costs ``4 r prod(d)`` multiply-adds. With ``orthogonalise``, ``sparsity`` or ``l2_reg``, with
    ``n_iter_max=0``, and with ``fixed_modes`` of a start that is not given or together with ``mask``, TensorLy's own
    iteration runs, and ``outcome.method`` says so.

    With ``mask``, TensorLy alternates between filling in what is missing and a sweep on the whole tensor, which
    converges slowly and often ends far from an answer that reproduces all known elements. Here, as in
    :func:`tnadapt.cp`, least squares on the known elements start from the same point as TensorLy, and for small tensors
    from random ones, too; the best result is returned. ``n_iter_max`` is the number of steps from each start.

    Kolda & Bader, "Tensor decompositions and applications" (SIAM Review 51, 2009).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import cp_to_tensor, random_cp
    >>> tensor = random_cp((5, 6, 7), 2, full=True, random_state=0)
    >>> found, errors = parafac(tensor, rank=2, tol=1e-10, return_errors=True)
    >>> weights, factors = found
    >>> weights, errors[-1] < 1e-5, abs(cp_to_tensor(found) - tensor).max() < 1e-4
    (array([1., 1.]), True, np.True_)
    """
    backend, array = as_tensor(tensor)
    shape = tuple(int(size) for size in array.shape)
    mask = needed_mask(array, mask)
    rank = ranks_by_share("validate_cp_rank", shape, rank)
    check_criterion(cvg_criterion)
    svd_method(svd)  # of the start: the exact and the randomized one lead to the same sweeps
    fixed = sorted({mode_of(mode, shape) for mode in fixed_modes or ()})
    start = _start(backend, array, init, fixed)
    if isinstance(start, CPTensor) and len(fixed) == len(shape):
        return (start, []) if return_errors else start
    unlike = orthogonalise or sparsity or l2_reg or n_iter_max == 0
    if unlike or (fixed and (isinstance(start, str) or mask is not None)):
        found, errors, _ = own_arrays(
            "parafac", CPTensor, array, rank, mask, start, random_state, n_iter_max,
            svd=svd, normalize_factors=normalize_factors, orthogonalise=orthogonalise, tol=tol, verbose=verbose,
            sparsity=sparsity, l2_reg=l2_reg, cvg_criterion=cvg_criterion, fixed_modes=list(fixed_modes or ()),
            svd_mask_repeats=svd_mask_repeats, linesearch=linesearch,
            callback=_of_ours(callback, bool(sparsity)),
        )  # fmt: skip
        return (found, errors) if return_errors else found
    sweeps = Sweeps(callback, verbose, lambda factors: CPTensor(None, factors))
    possible = math.prod(shape) // max(1, *shape)
    asked = integer_of("rank", rank, 1)
    if isinstance(start, str) and start == "random":
        start = _uniform(backend, array, min(asked, possible), random_state)
    if isinstance(start, str) and mask is not None:
        start = filled_start(array, min(asked, possible), mask, random_state, svd, svd_mask_repeats)
    fitted = cp(
        array, min(asked, possible), mask=mask, init=start, fixed=fixed, random_state=random_state, tol=tolerance(tol),
        max_iterations=integer_of("n_iter_max", n_iter_max, 1), callback=sweeps.observer,
    )  # fmt: skip
    found = _scaled(backend, fitted, normalize_factors, fixed, asked)
    sweeps.finish(found)
    return (found, errors_of(found)) if return_errors else found


def _of_ours(callback: Any, sparse: bool) -> Any:
    """Return a callback of TensorLy's iteration that passes on our results."""
    if callback is None:
        return None

    def called(found: Any, error: Any) -> Any:
        if sparse:
            return callback((as_cp(found[0]), found[1]), float(error))
        return callback(as_cp(found), float(error))

    return called


def _start(backend: Backend, tensor: Array, init: Any, fixed: Sequence[int]) -> str | CPTensor:
    """Return a start as cp() takes it; a factor that is computed first may have any number of rows."""
    if isinstance(init, str):
        if init not in ("svd", "random"):
            raise ConfigError(f"init must be 'svd', 'random' or (weights, factors); got {safe_repr(init)}")
        return init
    try:
        start = as_cp(init, tensor)
    except TypeError:
        raise ConfigError(f"init must be 'svd', 'random' or (weights, factors); got {safe_repr(init)}") from None
    shape = tuple(int(size) for size in tensor.shape)
    free = [mode for mode in range(len(shape)) if mode not in fixed]
    if len(free) == 1 and len(start.factors) == len(shape) and start.shape[free[0]] != shape[free[0]]:
        factors = list(start.factors)
        numbers = np.random.default_rng(0).standard_normal((shape[free[0]], start.rank))
        factors[free[0]] = backend.asarray(numbers, backend.dtype_name(factors[0]), backend.device(factors[0]))
        return CPTensor(None, factors)
    if start.shape != shape:
        raise ShapeError(f"init has shape {start.shape}; expected the tensor's, {shape}")
    return start


def _uniform(backend: Backend, tensor: Array, rank: int, random_state: Any) -> CPTensor:
    """Return the uniform factors that TensorLy starts from."""
    kind, device = backend.dtype_name(tensor), backend.device(tensor)
    drawn = random_cp(
        tuple(tensor.shape), rank, random_state=0 if random_state is None else random_state, normalise_factors=False
    )
    return CPTensor(None, [backend.asarray(factor, kind, device) for factor in drawn.factors])


def _scaled(backend: Backend, found: CPTensor, normalize: bool, fixed: Sequence[int], rank: int) -> CPTensor:
    """Return a result with the weights that TensorLy gives, and as many components as were asked for."""
    outcome = found.outcome
    if normalize:
        found = found.normalized()
    weights, factors = found.weights, list(found.factors)
    ones = backend.zeros((found.rank,), like=factors[0]) + 1.0
    if weights is None:
        weights = ones
    elif not normalize:
        free = max(mode for mode in range(len(factors)) if mode not in fixed)
        factors[free], weights = factors[free] * weights, ones
    missing = rank - found.rank
    if missing:
        factors = [backend.concat([one, backend.zeros((one.shape[0], missing), like=one)], axis=1) for one in factors]
        more = backend.zeros((missing,), like=weights)
        weights = backend.concat([weights, more if normalize else more + 1.0])
    return CPTensor(weights, factors).with_outcome(outcome)


def non_negative_parafac(
    tensor: Any,
    rank: Any,
    n_iter_max: int = 100,
    init: Any = "svd",
    svd: str = "truncated_svd",
    tol: float | None = 1e-6,
    random_state: Any = None,
    verbose: bool | int = 0,
    normalize_factors: bool = False,
    return_errors: bool = False,
    mask: Any = None,
    cvg_criterion: str = "abs_rec_error",
    fixed_modes: Sequence[int] | None = None,
) -> Any:
    """Decompose a tensor into nonnegative factors by TensorLy's multiplicative updates.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real.
    rank : int, float or "same"
    n_iter_max, init, svd, tol, random_state, verbose, normalize_factors, return_errors, mask, cvg_criterion
        As in TensorLy and for :func:`parafac`.
    fixed_modes : sequence of int, optional
        Modes whose factors of ``init`` are kept; TensorLy does not fix the last one, and warns.

    Returns
    -------
    CPTensor
        With its error and history in ``outcome``. With ``return_errors``, also the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity where it is known.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    :func:`non_negative_parafac_hals`, and :func:`tnadapt.cp` with ``nonnegative=True``, converge faster. Computed by
    NumPy on the host for every library; a sweep costs ``M r prod(d)`` multiply-adds. Shashua & Hazan, "Non-negative
    tensor factorization with applications to statistics and computer vision" (ICML 2005).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_cp
    >>> tensor = random_cp((5, 6, 7), 2, full=True, random_state=0)
    >>> found = non_negative_parafac(tensor, rank=2)
    >>> found.error < 0.05, all((factor >= 0.0).all() for factor in found.factors)
    (True, True)
    """
    svd_method(svd)
    check_criterion(cvg_criterion)
    found, errors, _ = own_arrays(
        "non_negative_parafac", CPTensor, tensor, ranks_by_share("validate_cp_rank", _shape(tensor), rank), mask, init,
        random_state, n_iter_max, host=True, svd=svd, tol=tol or _NO_TOLERANCE, verbose=verbose,
        normalize_factors=normalize_factors, cvg_criterion=cvg_criterion, fixed_modes=list(fixed_modes or ()),
    )  # fmt: skip
    return (found, errors) if return_errors else found


def non_negative_parafac_hals(
    tensor: Any,
    rank: Any,
    n_iter_max: int = 100,
    init: Any = "svd",
    svd: str = "truncated_svd",
    tol: float | None = 1e-7,
    random_state: Any = None,
    sparsity_coefficients: Any = None,
    fixed_modes: Sequence[int] | None = None,
    nn_modes: Any = "all",
    exact: bool = False,
    normalize_factors: bool = False,
    verbose: bool | int = False,
    return_errors: bool = False,
    cvg_criterion: str = "abs_rec_error",
) -> Any:
    """Decompose a tensor into nonnegative factors by TensorLy's hierarchical alternating least squares.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real.
    rank : int, float or "same"
    n_iter_max, init, svd, tol, random_state, sparsity_coefficients, fixed_modes, exact, normalize_factors, verbose
        As in TensorLy and for :func:`parafac`.
    nn_modes : "all", None or collection of int
        The modes whose factors are not negative.
    return_errors, cvg_criterion
        As for :func:`parafac`.

    Returns
    -------
    CPTensor
        With its error and history in ``outcome``. With ``return_errors``, also the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    :func:`tnadapt.cp` with ``nonnegative=True`` runs the same iteration, and adds several starts, a bound on the error
    and a search of the rank. Computed by NumPy on the host for every library; a sweep costs ``M r prod(d)``
    multiply-adds. Gillis & Glineur (Neural Computation 24, 2012).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_cp
    >>> tensor = random_cp((5, 6, 7), 2, full=True, random_state=0)
    >>> found, errors = non_negative_parafac_hals(tensor, rank=2, return_errors=True)
    >>> errors[-1] < 0.01, all((factor >= 0.0).all() for factor in found.factors)
    (True, True)
    """
    svd_method(svd)
    check_criterion(cvg_criterion)
    if not isinstance(nn_modes, str) and nn_modes is not None:
        nn_modes = {mode_of(mode, _shape(tensor)) for mode in nn_modes}
    found, errors, _ = own_arrays(
        "non_negative_parafac_hals", CPTensor, tensor, ranks_by_share("validate_cp_rank", _shape(tensor), rank), None,
        init, random_state, n_iter_max, host=True, svd=svd, tol=tol or _NO_TOLERANCE,
        sparsity_coefficients=sparsity_coefficients, fixed_modes=list(fixed_modes or ()), nn_modes=nn_modes,
        exact=exact, normalize_factors=normalize_factors, verbose=verbose, cvg_criterion=cvg_criterion,
    )  # fmt: skip
    return (found, errors) if return_errors else found


# TensorLy collects errors only if its tolerance is not zero.
_NO_TOLERANCE = 1e-300


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in as_tensor(tensor)[1].shape)
