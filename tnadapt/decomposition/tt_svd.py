"""Tensor trains: the driver of ``tensor_train`` and ``decompose``, TT-SVD, and sweeps over the cores; tensor rings.

Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from tnadapt.algebra.products import tt_tensor
from tnadapt.backends import Array, Backend

from .fits import Claim, Fit, Iteration, all_of
from .linear_algebra import Algebra, norm_of, refuse_trace

# -- The driver: TT-SVD, then sweeps -----------------------------------------------------------------------------------


def fit_train(
    algebra: Algebra,
    tensor: Array,
    ranks: Sequence[int] | None,
    steps: Iteration,
    *,
    loss: float = 0.0,
    init: Sequence[Array] | None = None,
) -> Fit:
    """Fit the cores of a tensor train.

    Parameters
    ----------
    algebra : Algebra
        For matrices like the tensor.
    tensor : array, shape (d_1, …, d_M)
        Real or complex.
    ranks : sequence of int or None
        The largest rank of each bond; None for as large as ``loss`` asks.
    steps : Iteration
        The sweeps; if its limit is no iteration, TT-SVD alone.
    loss : float
        Frobenius norm that may be lost.
    init : sequence of array, optional
        The cores that the sweeps start from, instead of those of TT-SVD.

    Returns
    -------
    Fit
        Arrays ``core0``, …. The error is at most √(M - 1) times the least one, unless there is ``init``.

    Raises
    ------
    BackendError
        For sweeps inside a trace.
    """
    backend, limits, bonds = algebra.backend, steps.limits, len(tensor.shape) - 1
    if init is not None:
        if norm_of(backend, tensor) == 0.0:
            return Fit(named_cores([backend.zeros(core.shape, like=core) for core in init]), True, 0, "zero", error=0.0)
        if not limits.iterations:
            return Fit(named_cores(init), False, 0, "given start", closed=lambda tensor: named_cores(init))
        return steps.fit(named_cores(improved_train(backend, tensor, init, steps)), "given start, ALS")

    claims = list[Claim]()

    def truncated(matrix: Array, bond: int) -> Array:
        u, exact = algebra.left(matrix, None if ranks is None else ranks[bond], loss / math.sqrt(max(1, bonds)))
        claims.append(exact)
        return u

    cores, cut = tt_svd(backend, tensor, truncated)
    known = all_of(claims)
    method, factor = "TT-SVD" if known is not False else "TT-SVD, randomized", math.sqrt(max(1, sum(cut)))
    if not limits.iterations or (sum(cut) <= 1 and known is not False):
        return Fit(
            named_cores(cores), known, 0, method, factor=factor,
            closed=lambda tensor: named_cores(tt_svd(backend, tensor, truncated)[0]),
        )  # fmt: skip
    refuse_trace(backend, tensor, "tensor_train(sweeps=…)", "leave sweeps out")
    cores = improved_train(backend, tensor, cores, steps)
    return steps.fit(named_cores(cores), f"{method}, ALS", optimal=known, factor=factor)


def named_cores(cores: Sequence[Array]) -> dict[str, Array]:
    """Return the cores of a chain by the names of a fit's arrays."""
    return {f"core{mode}": core for mode, core in enumerate(cores)}


# -- TT-SVD ------------------------------------------------------------------------------------------------------------


def tt_svd(backend: Backend, tensor: Array, truncated: Callable[[Array, int], Array]) -> tuple[list[Array], list[bool]]:
    """Compute the cores of a tensor train.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
    truncated : callable
        Truncates the matrix of a bond; called with the matrix and the number of the bond, from 0.

    Returns
    -------
    list of array, shape (r_{m-1}, d_m, r_m)
        All but the last are orthonormal from the left.
    list of bool
        Of each bond whether its matrix lost something.

    Notes
    -----
    The root of the sum of the squares of the truncations is the error, which is at most √(M - 1) times the least one.
    With one truncation it is the least one.
    """
    sizes = [int(size) for size in tensor.shape]
    rest, rank, cores, cut = tensor, 1, list[Array](), list[bool]()
    for bond, size in enumerate(sizes[:-1]):
        matrix = backend.reshape(rest, (rank * size, math.prod(sizes[bond + 1 :])))
        u = truncated(matrix, bond)
        before, rank = rank, int(u.shape[1])
        cores.append(backend.reshape(u, (before, size, rank)))
        cut.append(rank < min(map(int, matrix.shape)))
        rest = backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix)
    return [*cores, backend.reshape(rest, (rank, sizes[-1], 1))], cut


# -- Alternating least squares over the cores, one at a time -----------------------------------------------------------

# With the cores before it orthogonal from the left and those after it from the right, the best core is the tensor
# contracted with all others, and its norm is that of the whole train (Holtz, Rohwedder & Schneider, 2012).


def improved_train(backend: Backend, tensor: Array, cores: Sequence[Array], steps: Iteration) -> list[Array]:
    """Improve the cores of a train by sweeps until the iteration stops.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M)
        Real or complex; not zero.
    cores : sequence of array, shape (r_{m-1}, d_m, r_m)
        A start, such as that of TT-SVD. The ranks stay, unless one is larger than its neighbors can use.
    steps : Iteration
        A step goes to the first core and back to the last.

    Returns
    -------
    list of array
        Their error is never above that of the start. If any differs from the start, all but the last one are
        orthogonal from the left.
    """
    train = _Train(backend, tensor, list(cores))
    norm, best = norm_of(backend, tensor), list(cores)
    steps.begin(train.error() / norm)
    while not steps.stopped:
        train.sweep()
        if not (error := train.error() / norm) < steps.before:
            steps.stopped = "converged"  # up to rounding
            break
        best = list(train.cores)
        steps.step(error)
    return best


class _Train:
    """A train of fixed ranks, and the tensor contracted with its first or last cores."""

    def __init__(self, backend: Backend, tensor: Array, cores: list[Array]) -> None:
        self.backend, self.cores = backend, cores
        self.sizes = [int(size) for size in tensor.shape]
        self.tensor = tensor
        for mode in range(len(cores) - 1):
            moved_right(self.backend, self.cores, mode)

    def error(self) -> float:
        """Return the norm of the residual."""
        return norm_of(self.backend, self.tensor - tt_tensor(self.backend, self.cores))

    def sweep(self) -> None:
        """Improve each core in turn, from the last to the first and back."""
        order = len(self.cores)
        # The tensor contracted with the cores before each one, which the sweep back does not change.
        before = [self.backend.reshape(self.tensor, (1, -1))]
        for mode in range(order - 1):
            before.append(self._step(before[-1], mode))
        after: list[Array | None] = [None] * order
        for mode in range(order - 1, 0, -1):
            self.cores[mode] = self._core(before[mode], after[mode], mode)
            self._to_the_left(mode)
            after[mode - 1] = self._rights(mode, after[mode])
        rest = before[0]
        for mode in range(order):
            self.cores[mode] = self._core(rest, after[mode], mode)
            if mode < order - 1:
                moved_right(self.backend, self.cores, mode)
                rest = self._step(rest, mode)

    def _core(self, first: Array, after: Array | None, mode: int) -> Array:
        """Contract the tensor, already contracted with the cores to the left, with the cores to the right."""
        backend, (left, size, right) = self.backend, map(int, self.cores[mode].shape)
        rows = backend.reshape(first, (left * size, math.prod(self.sizes[mode + 1 :])))
        if after is not None:
            rows = backend.matmul(rows, backend.matrix_transpose(backend.conj(after)))
        return backend.reshape(rows, (left, size, right))

    def _step(self, first: Array, mode: int) -> Array:
        """Contract with one more core from the left."""
        backend, core = self.backend, self.cores[mode]
        rows = backend.reshape(first, (int(core.shape[0] * core.shape[1]), -1))
        flat = backend.reshape(core, (-1, int(core.shape[2])))
        return backend.matmul(backend.matrix_transpose(backend.conj(flat)), rows)

    def _rights(self, mode: int, after: Array | None) -> Array:
        """Return the product of one core and those after it, shape (r, prod d)."""
        backend, core = self.backend, self.cores[mode]
        flat = backend.reshape(core, (-1, int(core.shape[2])))
        product = flat if after is None else backend.matmul(flat, after)
        return backend.reshape(product, (int(core.shape[0]), -1))

    def _to_the_left(self, mode: int) -> None:
        """Make a core orthogonal from the right, and multiply the one before it by the rest."""
        backend, core, before = self.backend, self.cores[mode], self.cores[mode - 1]
        left, size, right = map(int, core.shape)
        flat = backend.reshape(core, (left, size * right))
        q, r = backend.qr(backend.matrix_transpose(backend.conj(flat)))
        width = int(q.shape[1])
        turned = backend.matrix_transpose(backend.conj(q))
        self.cores[mode] = backend.reshape(turned, (width, size, right))
        rest = backend.matmul(backend.reshape(before, (-1, left)), backend.matrix_transpose(backend.conj(r)))
        self.cores[mode - 1] = backend.reshape(rest, (*before.shape[:2], width))


def moved_right(backend: Backend, cores: list[Array], mode: int) -> None:
    """Make a core orthogonal from the left, and multiply the next one by the rest."""
    core, after = cores[mode], cores[mode + 1]
    left, size, right = map(int, core.shape)
    q, r = backend.qr(backend.reshape(core, (left * size, right)))
    width = int(q.shape[1])
    cores[mode] = backend.reshape(q, (left, size, width))
    rest = backend.matmul(r, backend.reshape(after, (right, -1)))
    cores[mode + 1] = backend.reshape(rest, (width, *after.shape[1:]))


# -- Rings: TR-SVD, and alternating least squares ----------------------------------------------------------------------

# Zhao et al., "Tensor ring decomposition" (arXiv 1606.05535), algorithms 1 and 2.


# Magnitudes above this share of the largest one are equal to it up to rounding.
_EQUAL = 1.0 - 1e-3


def ring_svd(backend: Backend, tensor: Array, closing: int, truncated: Callable[[Array, int], Array]) -> list[Array]:
    """Compute the cores of a tensor ring.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M), M ≥ 2
    closing : int
        r_0. The rank of the first truncation is divided by it.
    truncated : callable
        Truncates the matrix of a bond; called with the matrix and the number of the bond, from 0. The first one must
        return a multiple of ``closing`` vectors.

    Returns
    -------
    list of array, shape (r_{m-1}, d_m, r_m), with r_M = r_0
    """
    sizes = [int(size) for size in tensor.shape]
    matrix = backend.reshape(tensor, (sizes[0], math.prod(sizes[1:])))
    u = _signed(backend, truncated(matrix, 0))
    rank = int(u.shape[1]) // closing
    core = backend.reshape(u, (sizes[0], closing, rank))
    cores = [backend.permute_dims(core, (1, 0, 2))]
    # The closing rank moves to the end of the rest: (r_1, d_2 ⋯ d_M, r_0).
    rest = backend.reshape(backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix), (closing, rank, -1))
    rest = backend.permute_dims(rest, (1, 2, 0))
    for bond, size in enumerate(sizes[1:-1], 1):
        matrix = backend.reshape(rest, (rank * size, -1))
        u = truncated(matrix, bond)
        before, rank = rank, int(u.shape[1])
        cores.append(backend.reshape(u, (before, size, rank)))
        rest = backend.matmul(backend.conj(backend.matrix_transpose(u)), matrix)
    return [*cores, backend.reshape(rest, (rank, sizes[-1], closing))]


def _signed(backend: Backend, u: Array) -> Array:
    """Make the first of the largest elements of each singular vector positive."""
    # A ring depends on the signs or phases: the vectors of one matrix are distributed over two bonds.
    sizes = abs(backend.detached(u))
    largest = backend.where(sizes >= _EQUAL * backend.xp.max(sizes, axis=0), sizes * 0.0 + 1.0, sizes * 0.0)
    rows = backend.constant(np.arange(int(u.shape[0])).reshape(-1, 1), backend.device(u))
    pivots = backend.sum(backend.where(rows == backend.xp.argmax(largest, axis=0), u, u * 0.0), axis=0)
    pivots = backend.where(pivots == 0.0, pivots * 0.0 + 1.0, pivots)
    return u * (backend.conj(pivots) / abs(pivots))


def chain_of(backend: Backend, cores: Sequence[Array]) -> Array:
    """Contract neighboring cores: shape (r, prod d, r')."""
    product = cores[0]
    for core in cores[1:]:
        left, right = int(product.shape[0]), int(core.shape[2])
        rows = backend.reshape(product, (-1, int(core.shape[0])))
        product = backend.reshape(
            backend.matmul(rows, backend.reshape(core, (int(core.shape[0]), -1))), (left, -1, right)
        )
    return product


def ring_sweep(
    backend: Backend, tensor: Array, cores: Sequence[Array], fixed: Collection[int], ridge: float
) -> list[Array]:
    """Replace each core by the best one with the others fixed, up to the ridge.

    Parameters
    ----------
    backend : Backend
    tensor : array, shape (d_1, …, d_M), M ≥ 2
    cores : sequence of array
    fixed : collection of int
        Positions of cores that are not changed.
    ridge : float
        Added to the diagonal of the equations.

    Returns
    -------
    list of array
    """
    cores, order = list(cores), len(cores)
    for mode in range(order):
        if mode in fixed:
            continue
        left, size, right = map(int, cores[mode].shape)
        # All other cores, from the next one around: (r_m, d_{m+1} ⋯ d_{m-1}, r_{m-1}), as rows of the unknown core.
        others = chain_of(backend, [cores[(mode + step) % order] for step in range(1, order)])
        others = backend.reshape(backend.permute_dims(others, (2, 0, 1)), (left * right, -1))
        turned = backend.permute_dims(tensor, [(mode + step) % order for step in range(order)])
        rows = backend.reshape(turned, (size, -1))
        adjoint = backend.conj(backend.matrix_transpose(others))
        system = backend.matmul(others, adjoint)
        if ridge:
            eye = backend.asarray(np.eye(left * right), backend.dtype_name(tensor), backend.device(tensor))
            system = system + ridge * eye
        right_side = backend.matmul(rows, adjoint)
        solved = backend.solve(backend.matrix_transpose(system), backend.matrix_transpose(right_side))
        core = backend.reshape(solved, (left, right, size))
        cores[mode] = backend.permute_dims(core, (0, 2, 1))
    return cores
