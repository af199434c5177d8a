"""Solvers for Tucker decompositions: HOSVD, and orthogonal iteration (HOOI) from it.

De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, …, RN) approximation" (SIAM J. Matrix Anal. 21, 2000); Vannieuwenhoven et al., "A new truncation strategy for
the higher-order singular value decomposition" (SIAM J. Sci. Comput. 34, 2012).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from tnadapt.algebra.formats import unfolded
from tnadapt.algebra.products import mode_product
from tnadapt.backends import Array, Backend

from .linear_algebra import Leading

__all__ = [
    "SMALL",
    "hooi",
    "hosvd",
    "projected",
]


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
