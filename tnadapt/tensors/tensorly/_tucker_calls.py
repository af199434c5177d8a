"""Tucker decompositions under TensorLy's names and keywords."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tnadapt.errors import ConfigError

from .. import _tucker_decomposition
from .._checks import as_tensor, integer_of
from .._tucker_tensor import TuckerTensor
from ._keywords import Sweeps, errors_of, needed_mask, own_arrays, svd_method, tolerance
from ._tucker_parts import completed, tucker_ranks, tucker_start

__all__ = ["non_negative_tucker", "non_negative_tucker_hals", "tucker"]


def tucker(
    tensor: Any,
    rank: Any,
    fixed_factors: Sequence[int] | None = None,
    n_iter_max: int = 100,
    init: Any = "svd",
    return_errors: bool = False,
    svd: str = "truncated_svd",
    tol: float | None = 1e-4,
    random_state: Any = None,
    mask: Any = None,
    verbose: bool | int = False,
) -> Any:
    """Decompose a tensor into a core and a matrix for each mode; :func:`tnadapt.tucker` with TensorLy's keywords.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex.
    rank : None, int, sequence of int, float or "same"
        The sizes themselves, one rank for all modes, one each, or the share of the tensor's parameters. A rank above
        its size is cut to it.
    fixed_factors : sequence of int, optional
        Modes whose factors of ``init`` are kept; these must have orthonormal columns.
    n_iter_max : int
        Maximum number of sweeps; 0 for the truncated HOSVD.
    init : {"svd", "random"}, (core, factors), or list of factors
    return_errors : bool
        Whether to return the errors, too.
    svd : {"truncated_svd", "symeig_svd", "randomized_svd"}
        The first two are computed in the same way: exactly, and no more than the leading singular vectors.
    tol : float or None
        The iteration stops when a sweep reduces the relative error by no more than this.
    random_state : int, RandomState or Generator, optional
        Seed; 0 if None, so that results repeat.
    mask : array, shape (d_1, …, d_M), optional
        1 or True where an element is known. The others may be NaN.
    verbose : bool or int
        Whether to print the error of each sweep.

    Returns
    -------
    TuckerTensor
        With its error, bound and history in ``outcome``. With ``return_errors``, also the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity where it is known, or a rank or a start does not fit.
    ConfigError
        If a keyword has no meaning here; the message says which, and the way out.

    Notes
    -----
    A sweep costs ``M prod(d) max(r)`` multiply-adds. With ``mask``, TensorLy's own iteration runs, and
    ``outcome.method`` says so. De Lathauwer et al. (SIAM J. Matrix Anal. 21, 2000).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tucker, tucker_to_tensor
    >>> tensor = random_tucker((5, 6, 7), (2, 3, 2), full=True, random_state=0)
    >>> core, factors = tucker(tensor, rank=[2, 3, 2])
    >>> core.shape, abs(tucker_to_tensor((core, factors)) - tensor).max() < 1e-10
    ((2, 3, 2), np.True_)
    """
    backend, array = as_tensor(tensor)
    shape = tuple(int(size) for size in array.shape)
    mask = needed_mask(array, mask)
    ranks = tucker_ranks(rank, shape)
    method = svd_method(svd)
    start = tucker_start(array, init, shape)
    if fixed_factors and isinstance(start, str):
        raise ConfigError(
            f"fixed_factors={list(fixed_factors)} keeps factors of a start: give them as init=(core, factors)"
        )
    if mask is not None:
        if fixed_factors:
            raise ConfigError("mask= and fixed_factors= do not go together: leave out one of them")
        found, errors, _ = own_arrays(
            "tucker", TuckerTensor, array, ranks, mask, init, random_state, n_iter_max, svd=svd, tol=tol,
            verbose=bool(verbose),
        )  # fmt: skip
        return (found, errors) if return_errors else found
    sweeps = Sweeps(None, verbose, lambda arrays: TuckerTensor(arrays[0], arrays[1:]))
    fitted = _tucker_decomposition.tucker(
        array, ranks, init=start, fixed=list(fixed_factors or ()), svd=method, random_state=random_state,
        tol=tolerance(tol), max_iterations=integer_of("n_iter_max", n_iter_max, 0), callback=sweeps.observer,
    )  # fmt: skip
    found = completed(backend, fitted, ranks)
    sweeps.finish(found)
    return (found, errors_of(found)) if return_errors else found


def non_negative_tucker(
    tensor: Any,
    rank: Any,
    n_iter_max: int = 10,
    init: Any = "svd",
    tol: float | None = 1e-4,
    random_state: Any = None,
    verbose: bool | int = False,
    return_errors: bool = False,
    normalize_factors: bool = False,
) -> Any:
    """Decompose a tensor into a nonnegative core and factors by TensorLy's multiplicative updates.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real.
    rank, init, tol, random_state, verbose, return_errors
        As for :func:`tucker`.
    n_iter_max : int
        Maximum number of sweeps.
    normalize_factors : bool
        Whether the columns of the factors have norm 1.

    Returns
    -------
    TuckerTensor
        With its error and history in ``outcome``. With ``return_errors``, also the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity, or a rank does not fit.

    Notes
    -----
    :func:`non_negative_tucker_hals`, and :func:`tnadapt.tucker` with ``nonnegative=True``, converge faster. Computed by
    NumPy on the host for every library. Kim & Choi, "Nonnegative Tucker decomposition" (CVPR 2007).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tucker
    >>> tensor = random_tucker((5, 6, 7), (2, 3, 2), full=True, random_state=0)
    >>> core, factors = non_negative_tucker(tensor, rank=[2, 3, 2], n_iter_max=50)
    >>> (core >= 0.0).all(), all((factor >= 0.0).all() for factor in factors)
    (np.True_, True)
    """
    shape = tuple(int(size) for size in as_tensor(tensor)[1].shape)
    found, errors, _ = own_arrays(
        "non_negative_tucker", TuckerTensor, tensor, tucker_ranks(rank, shape), None, init, random_state, n_iter_max,
        host=True, tol=tol, verbose=bool(verbose), normalize_factors=normalize_factors,
    )  # fmt: skip
    return (found, errors) if return_errors else found


def non_negative_tucker_hals(
    tensor: Any,
    rank: Any,
    n_iter_max: int = 100,
    init: Any = "svd",
    svd: str = "truncated_svd",
    tol: float | None = 1e-8,
    sparsity_coefficients: Any = None,
    core_sparsity_coefficient: Any = None,
    fixed_modes: Sequence[int] | None = None,
    random_state: Any = None,
    verbose: bool | int = False,
    normalize_factors: bool = False,
    return_errors: bool = False,
    exact: bool = False,
    algorithm: str = "fista",
) -> Any:
    """Decompose a tensor into a nonnegative core and factors by TensorLy's hierarchical alternating least squares.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real.
    rank, n_iter_max, init, svd, tol, random_state, verbose, return_errors
        As for :func:`tucker`.
    sparsity_coefficients, core_sparsity_coefficient, normalize_factors, exact, algorithm
        As in TensorLy.
    fixed_modes : sequence of int, optional
        Modes whose factors of a given ``init`` are kept; TensorLy does not fix the last one, and warns.

    Returns
    -------
    TuckerTensor
        With its error and history in ``outcome``. With ``return_errors``, also the list of errors.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity, or a rank does not fit.
    ConfigError
        If ``fixed_modes`` are given without ``init``, or a keyword has no meaning here.

    Notes
    -----
    :func:`tnadapt.tucker` with ``nonnegative=True`` runs the same iteration, and adds a bound on the error. Computed by
    NumPy on the host for every library. Phan & Cichocki, "Extended HALS algorithm for nonnegative Tucker decomposition"
    (Neurocomputing 74, 2011).

    Examples
    --------
    >>> from tnadapt.tensors.tensorly import random_tucker
    >>> tensor = random_tucker((5, 6, 7), (2, 3, 2), full=True, random_state=0)
    >>> found, errors = non_negative_tucker_hals(tensor, rank=[2, 3, 2], return_errors=True)
    >>> errors[-1] < 0.05, (found.core >= 0.0).all()
    (True, np.True_)
    """
    svd_method(svd)
    shape = tuple(int(size) for size in as_tensor(tensor)[1].shape)
    if fixed_modes and isinstance(init, str):
        raise ConfigError(f"fixed_modes={list(fixed_modes)} keeps factors of a start: give init=(core, factors)")
    if isinstance(sparsity_coefficients, (list, tuple)):
        sparsity_coefficients = list(sparsity_coefficients)
    found, errors, _ = own_arrays(
        "non_negative_tucker_hals", TuckerTensor, tensor, tucker_ranks(rank, shape), None, init, random_state,
        n_iter_max, host=True, svd=svd, tol=tol, sparsity_coefficients=sparsity_coefficients,
        core_sparsity_coefficient=core_sparsity_coefficient, fixed_modes=list(fixed_modes or ()),
        verbose=bool(verbose), normalize_factors=normalize_factors, exact=exact, algorithm=algorithm,
    )  # fmt: skip
    return (found, errors) if return_errors else found
