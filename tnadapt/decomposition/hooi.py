"""Tucker decompositions: HOSVD, and orthogonal iteration from it.

De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, …, RN) approximation" (SIAM J. Matrix Anal. 21, 2000); Vannieuwenhoven et al., "A new truncation strategy for
the higher-order singular value decomposition" (SIAM J. Sci. Comput. 34, 2012).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import unfolded
from tnadapt.algebra.products import mode_product
from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import Array

from .linear_algebra import Leading, tensorly_on

__all__ = [
    "SMALL",
    "hooi",
    "hosvd",
    "nonnegative_cp",
    "nonnegative_tucker",
    "projected",
]


# -- Tucker decompositions: HOSVD, and orthogonal iteration from it ----------------------------------------------------


#: Up to this size, each mode is truncated of the whole tensor: the better start on average.
SMALL = 1 << 14


def projected(backend: Backend, tensor: Array, factor: Array, mode: int) -> Array:
    """Multiply one mode by the conjugate transpose of a factor."""
    return mode_product(backend, tensor, backend.conj(backend.matrix_transpose(factor)), mode)


def hosvd(
    backend: Backend,
    tensor: Array,
    modes: Sequence[int],
    truncated: Callable[[Array, int], Leading],
    sequential: bool = True,
) -> tuple[Array, dict[int, Array], int]:
    """Truncate one mode after another, each of what the modes before it left, or each of the whole tensor.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    modes : sequence of int
        In which order.
    truncated : callable
        Truncates the unfolding of a mode; called with the matrix and the mode.
    sequential : bool
        Whether a mode is truncated of what the modes before it left, which is cheaper.

    Returns
    -------
    core : array
    factors : dict of int to array, shape (d_m, r_m)
        With orthonormal columns.
    lossy : int
        How many truncations lost something.

    Notes
    -----
    The error is at most ``sqrt(lossy)`` times the least one: with one truncation it is the least one.
    """
    factors, core, lossy = dict[int, Array](), tensor, 0
    for mode in modes:
        matrix = unfolded(backend, core if sequential else tensor, mode)
        factors[mode] = truncated(matrix, mode).u
        lossy += int(factors[mode].shape[1]) < min(int(size) for size in matrix.shape)
        core = projected(backend, core, factors[mode], mode)
    return core, factors, lossy


def hooi(
    backend: Backend,
    tensor: Array,
    factors: dict[int, Array],
    moving: Collection[int],
    truncated: Callable[[Array, int], Leading],
    on_sweep: Callable[[int, Array], bool],
    sweeps: int,
) -> tuple[Array, dict[int, Array]]:
    """Improve factors in turn, each the best with the others fixed; no sweep increases the error.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    factors : dict of int to array
        With orthonormal columns.
    moving : collection of int
        The modes whose factors are improved.
    truncated : callable
        Truncates the unfolding of a mode to its rank.
    on_sweep : callable
        Called with the number of sweeps and the core; stops the iteration if it returns True.
    sweeps : int
        Maximum number of sweeps.

    Returns
    -------
    core : array
    factors : dict of int to array
    """
    factors = dict(factors)
    core = _core(backend, tensor, factors, None)
    for count in range(1, sweeps + 1):
        for mode in moving:
            others = _core(backend, tensor, factors, mode)
            factors[mode] = truncated(unfolded(backend, others, mode), mode).u
            core = projected(backend, others, factors[mode], mode)
        if on_sweep(count, core):
            break
    return core, factors


def _core(backend: Backend, tensor: Array, factors: dict[int, Array], left_out: int | None) -> Array:
    """Project a tensor on all factors but one; those that shrink it most come first."""
    order = sorted(
        (mode for mode in factors if mode != left_out), key=lambda mode: factors[mode].shape[1] / factors[mode].shape[0]
    )
    for mode in order:
        tensor = projected(backend, tensor, factors[mode], mode)
    return tensor


# -- Nonnegative CP and Tucker decompositions by hierarchical alternating least squares, through TensorLy --------------

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
    given: Any = init
    if not isinstance(init, str):
        given = [backend.to_numpy(init[mode]) for mode in order]
        given = (None, [*given[:-1], np.ldexp(given[-1], -shift)])
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of divisions by the norms of columns that became zero
        (weights, factors), errors = tensorly.decomposition.non_negative_parafac_hals(
            scaled, rank, n_iter_max=iterations, init=given, tol=max(tol, _NO_TOLERANCE), random_state=seed % (1 << 32),
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
    given: Any = init
    if not isinstance(init, str):
        given = np.ldexp(backend.to_numpy(init[0]), -shift), [backend.to_numpy(factor) for factor in init[1]]
    with tensorly_on(load_backend("numpy")) as tensorly, warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        (core, factors), errors = tensorly.decomposition.non_negative_tucker_hals(
            np.ldexp(host, -shift), list(ranks), n_iter_max=iterations, init=given, tol=max(tol, _NO_TOLERANCE),
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
