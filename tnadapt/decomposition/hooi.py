"""Tucker decompositions: the driver of ``tucker`` and ``decompose``, HOSVD, and orthogonal iteration (HOOI) from it.

De Lathauwer, De Moor & Vandewalle, "A multilinear singular value decomposition" and "On the best rank-1 and
rank-(R1, …, RN) approximation" (SIAM J. Matrix Anal. 21, 2000); Vannieuwenhoven et al., "A new truncation strategy for
the higher-order singular value decomposition" (SIAM J. Sci. Comput. 34, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.products import mode_product, unfolded
from tnadapt.backends import Array, Backend

from .fits import Claim, Fit, Iteration, Limits, all_of
from .linear_algebra import Algebra, kept, norm_of, refuse_trace
from .sparse_tensor import SparseTensor

# -- The driver --------------------------------------------------------------------------------------------------------


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
    tensor : array or SparseTensor, shape (d_1, …, d_M)
        Real or complex. A sparse one needs ``ranks`` of all modes.
    ranks : mapping of int to int, or None
        By the modes; None for all modes, and the fewest parameters that ``loss`` allows.
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
    if ranks is None:
        return _fit_within(algebra, tensor, steps, loss)
    backend, shape, modes = algebra.backend, [int(size) for size in tensor.shape], list(ranks)
    # Modes that shrink most come first, so that the later steps are smaller.
    order = sorted(modes, key=lambda mode: ranks[mode] / shape[mode])
    in_turn = len(shape) < 3 or math.prod(shape) > _SMALL

    claims = list[Claim]()

    def truncated(matrix: Array, mode: int) -> Array:
        u, exact = algebra.left(matrix, ranks[mode])
        claims.append(exact)
        return u

    def start(tensor: Array) -> tuple[Array, dict[int, Array], int]:
        if init is None and isinstance(tensor, SparseTensor):
            claims.append(False)
            factors = {mode: tensor.left(mode, ranks[mode], algebra.seed) for mode in modes}
            return tensor.projected(factors), factors, len(shape)
        if init is None:
            return hosvd(backend, tensor, order, truncated, in_turn)
        factors = {mode: init[mode] if mode in fixed else backend.qr(init[mode])[0] for mode in modes}
        return _core(backend, tensor, factors, None), factors, len(shape)

    core, factors, lossy = start(tensor)
    optimal = all_of(claims) if init is None else False
    factor = math.sqrt(max(1, lossy))
    moving = [mode for mode in modes if mode not in fixed and int(core.shape[mode]) < shape[mode]]
    if not moving or not steps.limits.iterations or (init is None and lossy <= 1):
        method = "HOSVD" if init is None else "given start"
        return Fit(
            _named(core, factors), optimal, 0, method, factor=factor, closed=lambda tensor: _named(*start(tensor)[:2])
        )
    refuse_trace(backend, tensor, "tucker()", "use max_iterations=0")
    core, factors = hooi(backend, tensor, factors, moving, truncated, steps)
    return steps.fit(_named(core, factors), "HOSVD, HOOI", optimal=optimal, factor=factor)


# -- The fewest parameters for an error --------------------------------------------------------------------------------

# A first, coarse truncation loses a part of the squared error, so that ranks are searched in a small tensor. If it may
# have lost what saves parameters elsewhere, the next part follows. Small tensors need no coarse one; what the fine one
# leaves of large ones takes too much memory.
_COARSE, _FINE, _TINY, _LARGE = 0.5, 1e-3, 1 << 12, 1 << 25
# Two numbers of parameters that differ by less are as good.
_NEAR = 1.05
# Sweeps whose gain is spent on lower ranks.
_FEW = 3


def coarse_parts(shape: Sequence[int]) -> tuple[float, ...]:
    """Return the parts of a squared error that the truncation before a search may lose, one after another."""
    size = math.prod(shape)
    return (0.0,) if size <= _TINY else (_COARSE, _FINE) if size <= _LARGE else (_COARSE,)


def coarse_rank(values: np.ndarray, rank: int, allowed: float) -> tuple[int, int]:
    """Return some more than a coarse rank, and the rank below which no tensor has the whole squared error."""
    least = kept(values, len(values), math.sqrt(allowed))
    return min(len(values), rank + 1 + rank // 16) if rank > least else rank, least


class Dropped(NamedTuple):
    """What a coarse truncation lost at a rank: the squared error, its largest term, and the parameters of each."""

    lost: float
    largest: float
    parameters: int

    def saves(self, least: Callable[[float], int], allowed: float, parameters: int) -> bool:
        """Return whether less of it would save parameters, given the least ones for an error."""
        terms = 1
        while terms * self.largest < 2.0 * self.lost:
            gained = min(terms * self.largest, self.lost)
            if _NEAR * (least(allowed + gained) + terms * self.parameters) < parameters:
                return True
            terms *= 4
        return False


def _fit_within(algebra: Algebra, tensor: Array, steps: Iteration, loss: float) -> Fit:
    """Fit the Tucker tensor with the fewest parameters that truncations, and a few sweeps, find within a loss."""
    backend, shape = algebra.backend, [int(size) for size in tensor.shape]
    norm = norm_of(backend, tensor) or 1.0
    allowed, turns = (loss / norm) ** 2, None
    for part in coarse_parts(shape):
        small, bases, dropped, least_ranks = coarse_hosvd(algebra, tensor, norm, allowed, part)
        core, rest = small, allowed - sum(squares.sum() for squares in dropped)
        if list(small.shape) == least_ranks:
            break
        core, turns, values, least = _fewest(algebra, small, norm, shape, rest)
        ranks = [int(size) for size in core.shape]
        others = [shape[mode] + math.prod(ranks) // ranks[mode] for mode in range(len(shape))]
        terms = [
            Dropped(float(squares.sum()), float(squares[0]), count)
            for rank, most, squares, count in zip(ranks, small.shape, dropped, others, strict=True)
            if rank == most and len(squares)
        ]
        if not any(term.saves(least, rest, _parameters(ranks, shape)) for term in terms):
            break

    def truncated(matrix: Array, mode: int) -> Array:
        return algebra.left(matrix, int(core.shape[mode]))[0]

    def cut() -> list[int]:
        return [mode for mode, size in enumerate(shape) if int(core.shape[mode]) < size]

    lowered, sweeps = False, min(_FEW, steps.limits.iterations)
    while turns is not None and sweeps and len(cut()) > 1:
        core, turns = hooi(backend, small, turns, cut(), truncated, Iteration(Limits(0.0, sweeps)))
        # The difference of the squares is known up to rounding.
        gone = (norm_of(backend, small) / norm) ** 2 - (norm_of(backend, core) / norm) ** 2 + 64.0 * algebra.eps
        smaller, more, *_ = _fewest(algebra, core, norm, shape, max(0.0, rest - gone))
        if smaller.shape == core.shape:
            break
        core, turns, lowered = smaller, {mode: backend.matmul(turns[mode], more[mode]) for mode in turns}, True
    factors, bound = bases, 0.0
    if turns is not None:
        factors = {mode: backend.matmul(bases[mode], turns[mode]) for mode in turns}
        bound = math.sqrt(max(float(np.sum(values[mode][core.shape[mode] :] ** 2)) for mode in values))
    known: dict[str, Any] = {"optimal": not lowered, "factor": math.sqrt(max(1, len(cut()))), "bound": bound}
    if not sweeps or len(cut()) <= 1:
        return Fit(_named(core, factors), iterations=0, method="HOSVD", **known)
    refuse_trace(backend, tensor, "tucker()", "use max_iterations=0")
    core, factors = hooi(backend, tensor, factors, cut(), truncated, steps)
    return steps.fit(_named(core, factors), "HOSVD, HOOI", **known)


def coarse_hosvd(
    algebra: Algebra, tensor: Array, norm: float, allowed: float, part: float
) -> tuple[Array, dict[int, Array], list[np.ndarray], list[int]]:
    """Truncate each mode by a part of a squared error.

    Parameters
    ----------
    algebra : Algebra
    tensor : array, shape (d_1, …, d_M)
    norm : float
        Of the tensor.
    allowed, part : float
        The squared relative error, and the part of it.

    Returns
    -------
    core : array
    factors : dict of int to array
        With orthonormal columns.
    dropped : list of ndarray
        The relative squares that each mode loses. The core's error is the root of their sum.
    least : list of int
        Ranks of the modes' unfoldings below which no tensor has the whole error.
    """
    backend, core, left = algebra.backend, tensor, part * allowed
    bases, dropped, least = dict[int, Array](), dict[int, np.ndarray](), dict[int, int]()
    shape = [int(size) for size in tensor.shape]
    # The largest modes come first, so that the later steps are smaller.
    for number, mode in enumerate(sorted(range(len(shape)), key=lambda mode: -shape[mode])):
        u, values = algebra.all_left(unfolded(backend, core, mode))
        sizes = np.asarray(backend.to_numpy(values), np.float64) / norm
        rank = kept(sizes, len(sizes), math.sqrt(left / (len(shape) - number)))
        rank, least[mode] = coarse_rank(sizes, rank, allowed)
        dropped[mode] = sizes[rank:] ** 2
        left = max(0.0, left - float(dropped[mode].sum()))
        bases[mode] = u[:, :rank]
        core = projected(backend, core, bases[mode], mode)
    modes = range(len(shape))
    return core, bases, [dropped[mode] for mode in modes], [least[mode] for mode in modes]


def _fewest(
    algebra: Algebra, tensor: Array, norm: float, shape: Sequence[int], allowed: float
) -> tuple[Array, dict[int, Array], dict[int, np.ndarray], Callable[[float], int]]:
    """Truncate the core of the HOSVD to the box with the fewest parameters; tell those for another error, too."""
    backend, factors, values, core = algebra.backend, dict[int, Array](), dict[int, np.ndarray](), tensor
    for mode in range(len(shape)):
        factors[mode], sizes = algebra.all_left(unfolded(backend, tensor, mode))
        values[mode] = np.asarray(backend.to_numpy(sizes), np.float64) / norm
        core = projected(backend, core, factors[mode], mode)
    energy = np.abs(backend.to_numpy(core) / norm).astype(np.float64) ** 2
    # The energy outside of each box, as sums of positive numbers: first of what one mode cuts, then of what the next
    # one cuts of the rest, and so on.
    lost = np.zeros(())
    for mode in range(energy.ndim):
        slices = energy.sum(axis=tuple(range(mode + 1, energy.ndim)))
        tails = np.zeros_like(slices)
        tails[..., :-1] = slices[..., :0:-1].cumsum(-1)[..., ::-1]
        for before in range(mode):
            tails = tails.cumsum(before)
        lost = lost[..., None] + tails
    parameters = _parameters(np.ogrid[tuple(slice(1, size + 1) for size in energy.shape)], shape)
    best = np.argmin(np.where(lost <= allowed * (1.0 + 2e-12), parameters, np.inf))
    ranks = [int(index) + 1 for index in np.unravel_index(best, energy.shape)]
    factors = {mode: factor[:, : ranks[mode]] for mode, factor in factors.items()}
    core = core[tuple(slice(rank) for rank in ranks)]
    return core, factors, values, lambda allowed: int(parameters[lost <= allowed].min())


def _parameters(ranks: Sequence[Any], shape: Sequence[int]) -> Any:
    """Return the number of parameters of a Tucker tensor, for numbers or arrays of ranks."""
    return math.prod(ranks) + sum(rank * size for rank, size in zip(ranks, shape, strict=True))


def _named(core: Array, factors: Mapping[int, Array]) -> dict[str, Array]:
    return {"core": core} | {f"factor{mode}": factor for mode, factor in sorted(factors.items())}


# -- HOSVD and HOOI ----------------------------------------------------------------------------------------------------


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
    tensor : array or SparseTensor, shape (d_1, …, d_M)
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
    factors, norm = dict(factors), tensor.norm if isinstance(tensor, SparseTensor) else norm_of(backend, tensor)
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
    if isinstance(tensor, SparseTensor):
        return tensor.projected(factors, left_out)
    order = sorted(
        (mode for mode in factors if mode != left_out), key=lambda mode: factors[mode].shape[1] / factors[mode].shape[0]
    )
    for mode in order:
        tensor = projected(backend, tensor, factors[mode], mode)
    return tensor
