"""Tucker decompositions: the driver of ``tucker`` and ``decompose``, HOSVD, and orthogonal iteration (HOOI) from it.

De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, …, RN) approximation" (SIAM J. Matrix Anal. 21, 2000); Vannieuwenhoven et al., "A new truncation strategy for
the higher-order singular value decomposition" (SIAM J. Sci. Comput. 34, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from tnadapt.algebra.products import mode_product, unfolded
from tnadapt.backends import Array, Backend

from .fits import Claim, Fit, Iteration, all_of
from .linear_algebra import Algebra, norm_of, refuse_trace

# Up to this size, the SVD of each mode is that of the whole tensor: a better start on average.
_SMALL = 1 << 14


def fit_tucker(
    algebra: Algebra,
    tensor: Array,
    ranks: Mapping[int, int] | None,
    steps: Iteration,
    *,
    loss: float = 0.0,
    init: Mapping[int, Array] | None = None,
    fixed: Collection[int] = (),
) -> Fit:
    """Fit a core, and a matrix with orthonormal columns for each mode that has a rank.

    Parameters
    ----------
    algebra : Algebra
        For matrices like the tensor.
    tensor : array, shape (d_1, …, d_M)
        Real or complex.
    ranks : mapping of int to int, or None
        By the modes; None for all modes, and as large as ``loss`` asks.
    steps : Iteration
        If its limit is no iteration, the HOSVD alone.
    loss : float
        Frobenius norm that may be lost.
    init : mapping of int to array, optional
        The matrices that the iteration starts from, instead of those of the HOSVD.
    fixed : collection of int
        Modes whose matrices in ``init`` have orthonormal columns and are kept.

    Returns
    -------
    Fit
        Arrays ``core``, ``factor0``, ….

    Raises
    ------
    BackendError
        For an iteration inside a trace.
    """
    backend, shape = algebra.backend, [int(size) for size in tensor.shape]
    modes = list(range(len(shape)) if ranks is None else ranks)
    # Modes that shrink most come first, so that the later steps are smaller.
    order = sorted(modes, key=lambda mode: (ranks[mode] if ranks else 1) / shape[mode])
    # With ranks from the whole tensor, the allowed error would be split among the modes and not used up.
    in_turn = ranks is None or len(shape) < 3 or math.prod(shape) > _SMALL

    claims = list[Claim]()

    def truncated(matrix: Array, mode: int) -> Array:
        u, exact = algebra.left(matrix, None if ranks is None else ranks[mode], loss / math.sqrt(len(shape)))
        claims.append(exact)
        return u

    def start(tensor: Array) -> tuple[Array, dict[int, Array], int]:
        if init is None:
            return hosvd(backend, tensor, order, truncated, in_turn)
        factors = {mode: init[mode] if mode in fixed else backend.qr(init[mode])[0] for mode in modes}
        return _core(backend, tensor, factors, None), factors, len(shape)

    def named(core: Array, factors: Mapping[int, Array]) -> dict[str, Array]:
        return {"core": core} | {f"factor{mode}": factors[mode] for mode in modes}

    core, factors, lossy = start(tensor)
    optimal = all_of(claims) if init is None else False
    factor = math.sqrt(max(1, lossy))
    moving = [mode for mode in modes if mode not in fixed and int(core.shape[mode]) < shape[mode]]
    if not moving or not steps.limits.iterations or (init is None and lossy <= 1):
        method = "HOSVD" if init is None else "given start"
        return Fit(
            named(core, factors), optimal, 0, method, factor=factor, closed=lambda tensor: named(*start(tensor)[:2])
        )
    refuse_trace(backend, tensor, "tucker()", "use max_iterations=0")
    ranks = {mode: int(core.shape[mode]) for mode in modes}
    core, factors = hooi(backend, tensor, factors, moving, truncated, steps)
    return steps.fit(named(core, factors), "HOSVD, HOOI", optimal=optimal, factor=factor)


def projected(backend: Backend, tensor: Array, factor: Array, mode: int) -> Array:
    """Multiply one mode by the conjugate transpose of a factor."""
    return mode_product(backend, tensor, backend.conj(backend.matrix_transpose(factor)), mode)


def hosvd(
    backend: Backend, tensor: Array, modes: Sequence[int], truncated: Callable[[Array, int], Array], sequential: bool
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
        factors[mode] = truncated(matrix, mode)
        lossy += int(factors[mode].shape[1]) < min(int(size) for size in matrix.shape)
        core = projected(backend, core, factors[mode], mode)
    return core, factors, lossy


def hooi(
    backend: Backend,
    tensor: Array,
    factors: Mapping[int, Array],
    moving: Collection[int],
    truncated: Callable[[Array, int], Array],
    steps: Iteration,
) -> tuple[Array, dict[int, Array]]:
    """Improve factors in turn, each the best with the others fixed; no sweep increases the error.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    factors : mapping of int to array
        With orthonormal columns.
    moving : collection of int
        The modes whose factors are improved.
    truncated : callable
        Truncates the unfolding of a mode to its rank.
    steps : Iteration

    Returns
    -------
    core : array
    factors : dict of int to array
    """
    factors, norm = dict(factors), norm_of(backend, tensor)
    core = _core(backend, tensor, factors, None)
    while not steps.stopped:
        for mode in moving:
            others = _core(backend, tensor, factors, mode)
            factors[mode] = truncated(unfolded(backend, others, mode), mode)
            core = projected(backend, others, factors[mode], mode)
        # The factors are orthonormal, so the error is what the core lacks in norm.
        steps.step(math.sqrt(max(0.0, 1.0 - (norm_of(backend, core) / norm) ** 2)) if norm else 0.0)
    return core, factors


def _core(backend: Backend, tensor: Array, factors: dict[int, Array], left_out: int | None) -> Array:
    """Project a tensor on all factors but one, starting with those that shrink it most."""
    order = sorted(
        (mode for mode in factors if mode != left_out), key=lambda mode: factors[mode].shape[1] / factors[mode].shape[0]
    )
    for mode in order:
        tensor = projected(backend, tensor, factors[mode], mode)
    return tensor
