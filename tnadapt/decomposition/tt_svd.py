"""Tensor trains: the driver of ``tensor_train`` and ``decompose``, TT-SVD, and sweeps over the cores; tensor rings.

Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011), algorithm 1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Sequence

import numpy as np

from tnadapt.algebra.products import tt_tensor
from tnadapt.backends import Array, Backend

from .fits import Claim, Fit, Iteration, all_of
from .hooi import Dropped, coarse_parts, coarse_rank
from .linear_algebra import Algebra, kept, norm_of, refuse_trace

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
        The largest rank of each bond; None for the fewest parameters that ``loss`` allows.
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
    backend, limits = algebra.backend, steps.limits
    if init is not None:
        if norm_of(backend, tensor) == 0.0:
            return Fit(named_cores([backend.zeros(core.shape, like=core) for core in init]), True, 0, "zero", error=0.0)
        if not limits.iterations:
            return Fit(named_cores(init), False, 0, "given start", closed=lambda tensor: named_cores(init))
        return steps.fit(named_cores(improved_train(backend, tensor, init, steps)), "given start, ALS")

    claims = list[Claim]()

    def truncated(matrix: Array, bond: int) -> Array:
        u, exact = algebra.left(matrix, ranks[bond])  # type: ignore[index]
        claims.append(exact)
        return u

    cores, cut = _within(algebra, tensor, loss) if ranks is None else tt_svd(backend, tensor, truncated)
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


# -- The fewest parameters for an error --------------------------------------------------------------------------------

# A bond cannot have fewer ranks than those at which it alone loses all that is allowed. If TT-SVD with these ranks is
# close enough, no train has fewer parameters. Otherwise a coarse TT-SVD loses a part of the squared error. In its
# result, a small train on the host, ranks are searched by what each pair of neighboring bonds loses. TT-SVD of the
# tensor then leaves to each bond what it loses there.


# Up to so many choices of ranks are compared at once; among more, by so many prices of the squared error.
_CHOICES, _PRICES = 1 << 14, 20
# Rounds of the search, each in the result of the one before; up to so many bonds, by what truncations really lose.
_ROUNDS, _EXACT = 4, 2
# Up to so many bonds, one rank is raised for another.
_RAISED = 6
# A squared error from which the search takes singular values from squared matrices, which have half of the digits.
_SQUARED = 1e-10
# The ranks of the first coarse train are at most so many times the least ones, and so many more. If it loses more than
# its part, so many times the parameters of the least ranks are few.
_NEAR, _CLOSE = 2, 1.12


class Spending:
    """Chooses the ranks of one bond after another for a squared error.

    Parameters
    ----------
    allowed : float
        What all bonds may lose.
    ranks : sequence of int
        Those that are planned; the last bond may lose all that is left.
    """

    def __init__(self, allowed: float, ranks: Sequence[int]) -> None:
        self.left, self.ranks = allowed, ranks

    def rank(self, values: np.ndarray, bond: int) -> int:
        """Return how many singular values of a bond are kept."""
        here = max(0.0, self.left)
        if bond < len(self.ranks) - 1:
            here = min(here, float(np.sum(values[self.ranks[bond] :] ** 2)))
        count = kept(values, len(values), math.sqrt(here))
        self.left -= float(np.sum(values[count:] ** 2))
        return count


class _Coarse:
    """Chooses the ranks of a coarse train, which loses a part of a squared error; near the least ranks, more of it."""

    def __init__(self, allowed: float, part: float, bonds: int, near: bool) -> None:
        self.allowed, self.part, self.bonds, self.near, self.left = allowed, part, bonds, near, part * allowed
        self.dropped, self.least = list[np.ndarray](), list[int]()

    def rank(self, values: np.ndarray, bond: int) -> int:
        """Return how many singular values of a bond are kept."""
        rank = kept(values, len(values), math.sqrt(max(0.0, self.left) / (self.bonds - bond)))
        rank, least = coarse_rank(values, rank, self.allowed)
        if self.near:
            rank = min(rank, _NEAR * (least + 1))
        self.least.append(least)
        self.dropped.append(values[rank:] ** 2)
        self.left -= float(self.dropped[-1].sum())
        if self.near and self.left < (self.part - 1.0) * self.allowed:
            raise _LostError
        return rank


class _LostError(Exception):
    """A sweep has lost more than is allowed."""


def _within(algebra: Algebra, tensor: Array, loss: float) -> tuple[list[Array], list[bool]]:
    """Return the cores of TT-SVD with about the fewest parameters for a loss, and which bonds lost something."""
    backend, bonds = algebra.backend, len(tensor.shape) - 1
    norm = norm_of(backend, tensor) or 1.0
    allowed, known = (loss / norm) ** 2, dict[int, tuple[list[int], Array, np.ndarray]]()

    def swept(rank_of: Callable[[np.ndarray, int], int]) -> tuple[list[Array], list[bool]]:
        ranks = list[int]()

        def truncated(matrix: Array, bond: int) -> Array:
            # With the same ranks before it, the matrix of a bond is the same each time.
            if bond not in known or known[bond][0] != ranks:
                u, values = algebra.all_left(matrix)
                known[bond] = (ranks[:], u, np.asarray(backend.to_numpy(values), np.float64) / norm)
            _, u, values = known[bond]
            ranks.append(rank_of(values, bond))
            return u[:, : ranks[-1]]

        return tt_svd(backend, tensor, truncated)

    left = allowed

    def fewest(values: np.ndarray, bond: int) -> int:
        nonlocal left
        rank = kept(values, len(values), math.sqrt(allowed))
        left -= float(np.sum(values[rank:] ** 2))
        if left < -1e-11 * allowed:
            raise _LostError
        return rank

    with contextlib.suppress(_LostError):
        return swept(fewest)
    parts, sizes, plans = coarse_parts(tensor.shape), [int(size) for size in tensor.shape], list[list[int]]()
    for near, part in [(True, parts[0])] * bool(parts[0]) + [(False, part) for part in parts]:
        coarse = _Coarse(allowed, part, bonds, near)
        with contextlib.suppress(_LostError):
            host = [backend.to_numpy(core) for core in swept(coarse.rank)[0]]
            ranks, saves = planned([*host[:-1], host[-1] / norm], allowed, coarse.dropped)
            plans.append(ranks)
            # What several bonds lose in turn they may lose once: a train that has lost much proves less.
            much = coarse.left < 0.0 and parameters_of(ranks, sizes) > _CLOSE * parameters_of(coarse.least, sizes)
            if not saves and not much:
                break
    ranks = min(plans, key=lambda ranks: parameters_of(ranks, sizes))
    # These ranks lose about as much of the tensor.
    cores, cut = swept(Spending(allowed, ranks).rank)
    for mode in range(bonds, 0, -1):
        left_rank, size, right = map(int, cores[mode].shape)
        if left_rank > size * right:  # the bond is larger than the core behind it can use
            moved_left(backend, cores, mode)
    return cores, cut


def planned(cores: Sequence[np.ndarray], allowed: float, dropped: Sequence[np.ndarray] = ()) -> tuple[list[int], bool]:
    """Choose the ranks of a train for a squared error.

    Parameters
    ----------
    cores : sequence of ndarray, shape (r_{m-1}, d_m, r_m)
        All but the last are orthonormal from the left.
    allowed : float
    dropped : sequence of ndarray
        The squares that each bond of the train has lost.

    Returns
    -------
    list of int
        The rank of each bond, with about the fewest parameters for the error.
    bool
        Whether parameters would be fewer had the train lost less.
    """
    if len(cores) < 2:
        return [], False
    spent = float(sum(squares.sum() for squares in dropped))
    rest = left = max(0.0, allowed - spent)
    search = whole = _Bonds(cores, rest)
    ranks = trial = whole.cheapest(rest)
    if len(ranks) <= _EXACT:
        ranks = whole.exchanged(ranks, rest, exact=True)
    for _ in range(_ROUNDS if len(ranks) > _EXACT else 0):
        spending = Spending(left, trial)
        smaller = search.truncated(spending.rank)
        trial, left = [len(core) for core in smaller[1:]], spending.left
        if search is not whole and whole.exact_loss(trial) > rest * (1.0 + 1e-9):
            break
        ranks, search = trial, _Bonds(smaller, rest)
        trial = search.exchanged(search.most, left)
        if trial == ranks:
            break
    parameters, sides = parameters_of(ranks, whole.sizes), [1, *ranks, 1]
    terms = [
        Dropped(
            float(squares.sum()), float(squares[0]),
            sides[bond] * whole.sizes[bond] + whole.sizes[bond + 1] * sides[bond + 2],
        )
        for bond, squares in enumerate(dropped)
        if len(squares) and ranks[bond] == whole.most[bond]
    ]  # fmt: skip
    most_saved = max(terms, key=lambda term: term.largest / term.parameters, default=None)
    saves = most_saved is not None and most_saved.saves(
        lambda allowed: parameters_of(whole.cheapest(allowed), whole.sizes), rest, parameters
    )
    return ranks, saves


def parameters_of(ranks: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the number of parameters of a train."""
    total, left = 0, 1
    for size, right in zip(sizes, [*ranks, 1], strict=True):
        total, left = total + left * size * right, right
    return total


def _from_squared(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the singular vectors and values whose squares are the eigenvalues of a matrix, in descending order."""
    squares, vectors = np.linalg.eigh(matrix)
    return vectors[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0.0))


class _Bonds:
    """What the bonds of a train on the host, whose cores but the last are orthonormal from the left, lose by ranks."""

    def __init__(self, cores: Sequence[np.ndarray], allowed: float) -> None:
        self.cores = [np.asarray(core, np.result_type(core, np.float64)) for core in cores]
        self.sizes, self._sharp = [core.shape[1] for core in cores], allowed < _SQUARED
        #: Of each bond, a matrix that has the singular values and left vectors of what is behind it.
        self._roots, energies = [np.ones((1, 1))], list[np.ndarray]()
        for core in self.cores[:0:-1]:
            rows = (core.reshape(-1, core.shape[2]) @ self._roots[-1]).reshape(len(core), -1)
            if self._sharp:
                u, values, _ = np.linalg.svd(rows, full_matrices=False)
            else:
                u, values = _from_squared(rows @ rows.conj().T)
            self._roots.append(u * values)
            # A core between the singular vectors of both its bonds.
            energies.append((np.abs(u.conj().T @ rows) ** 2).reshape(len(values), core.shape[1], -1).sum(axis=1))
        energies.append((np.abs(self.cores[0] @ self._roots[-1]) ** 2).sum(axis=1))
        #: By the rank of the bond before, and of the bond; their sum bounds what two bonds lose.
        self.tables = list[np.ndarray]()
        for energy in energies[:0:-1]:
            lost = np.zeros_like(energy)
            lost[:, :-1] = energy[:, :0:-1].cumsum(1)[:, ::-1]
            self.tables.append(lost.cumsum(0))
        self.most = [table.shape[1] for table in self.tables]

    def loss(self, ranks: Sequence[int]) -> float:
        """Return about what ranks lose."""
        lost, left = 0.0, 1
        for table, right in zip(self.tables, ranks, strict=True):
            lost, left = lost + table[left - 1, right - 1], right
        return float(lost)

    def exact_loss(self, ranks: Sequence[int]) -> float:
        """Return what truncations to ranks lose, from the first bond to the last."""
        lost = list[float]()

        def rank_of(values: np.ndarray, bond: int) -> int:
            lost.append(float(np.sum(values[ranks[bond] :] ** 2)))
            return ranks[bond]

        self.truncated(rank_of, formed=False)
        return sum(lost)

    def truncated(self, rank_of: Callable[[np.ndarray, int], int], formed: bool = True) -> list[np.ndarray]:
        """Truncate each bond, from the first to the last, and return the cores of the train if they are formed."""
        cores = list(self.cores)
        for bond, root in enumerate(self._roots[:0:-1]):
            left, size, right = cores[bond].shape
            rows = cores[bond].reshape(-1, right)
            if self._sharp or len(rows) <= right:
                matrix = rows @ root
                if self._sharp:
                    u, values, _ = np.linalg.svd(matrix, full_matrices=False)
                else:
                    u, values = _from_squared(matrix @ matrix.conj().T)
                u = u[:, : rank_of(values, bond)]
                rest = u.conj().T @ rows
            else:
                inner = rows.conj().T @ rows
                right_vectors, values = _from_squared(root.conj().T @ inner @ root)
                # Smaller values are rounding.
                turned = root @ (right_vectors / np.where(values > 1e-8, values, 1.0))[:, : rank_of(values, bond)]
                u = rows @ turned if formed else turned
                rest = turned.conj().T @ inner
            cores[bond] = u.reshape(left, size, -1) if formed else u
            cores[bond + 1] = (rest @ cores[bond + 1].reshape(right, -1)).reshape(-1, *cores[bond + 1].shape[1:])
        return cores

    def least(self, allowed: float) -> list[int]:
        """Return the ranks below which a bond alone loses more than is allowed."""
        return [int(np.argmax(table[-1] <= allowed * (1.0 + 2e-12))) + 1 for table in self.tables]

    def cheapest(self, allowed: float) -> list[int]:
        """Return the ranks with the fewest parameters that lose no more than is allowed."""
        least = self.least(allowed)
        if self.loss(least) <= allowed:
            return least
        sides = [np.arange(low, rank + 1) for low, rank in zip([1, *least], [1, *self.most], strict=True)]
        # Of the core between two bonds, and the last one with its bond.
        counts = [np.outer(*pair) * size for *pair, size in zip(sides[:-1], sides[1:], self.sizes[:-1], strict=True)]
        counts[-1] = counts[-1] + sides[-1] * self.sizes[-1]
        tables = [table[a - 1 :, b - 1 :] for table, a, b in zip(self.tables, [1, *least], least, strict=False)]
        if math.prod(map(len, sides)) <= _CHOICES:
            lost, parameters = np.zeros(1), np.zeros(1)
            for table, count in zip(tables, counts, strict=True):
                lost, parameters = lost[..., None] + table, parameters[..., None] + count
            best = np.argmin(np.where(lost <= allowed * (1.0 + 2e-12), parameters, np.inf))
            return [low + int(index) for low, index in zip(least, np.unravel_index(best, lost.shape)[1:], strict=True)]

        def at_price(price: float) -> list[int]:
            value, choices = np.zeros(1), list[np.ndarray]()
            for table, count in zip(tables, counts, strict=True):
                total = value[:, None] + count + price * table
                choices.append(total.argmin(0))
                value = total.min(0)
            ranks = [int(value.argmin())]
            for choice in choices[:0:-1]:
                ranks.append(int(choice[ranks[-1]]))
            return [low + rank for low, rank in zip(least, reversed(ranks), strict=True)]

        # The price at which two choices are equal leads to one between them, until there is none.
        few, ranks = least, self.most
        for _ in range(_PRICES):
            saved = parameters_of(ranks, self.sizes) - parameters_of(few, self.sizes)
            trial = at_price(saved / (self.loss(few) - self.loss(ranks)))
            if trial in (few, ranks):
                break
            if self.loss(trial) <= allowed:
                ranks = trial
            else:
                few = trial
        return self.exchanged(ranks, allowed)

    def exchanged(self, ranks: list[int], allowed: float, exact: bool = False) -> list[int]:
        """Raise a rank by one, or none, and lower another as far as is allowed, while that saves parameters."""
        bonds = range(len(ranks))
        lowest = self._exactly_lowest if exact else self._lowest
        while True:
            best, parameters = ranks, parameters_of(ranks, self.sizes)
            # In a long train, ranks are only lowered.
            for raised in [None, *(bond for bond in bonds if len(bonds) <= _RAISED and ranks[bond] < self.most[bond])]:
                for lowered in bonds:
                    if lowered == raised:
                        continue
                    trial = [rank + (bond == raised) for bond, rank in enumerate(ranks)]
                    trial[lowered] = lowest(trial, lowered, allowed)
                    if (count := parameters_of(trial, self.sizes)) < parameters:
                        best, parameters = trial, count
            if best is ranks:
                return ranks
            ranks = best

    def _lowest(self, ranks: list[int], bond: int, allowed: float) -> int:
        """Return the least rank of a bond that loses no more than is allowed, the others given, or its own."""
        lost = self.tables[bond][ranks[bond - 1] - 1 if bond else 0, : ranks[bond]]
        if bond + 1 < len(ranks):
            lost = lost + self.tables[bond + 1][: ranks[bond], ranks[bond + 1] - 1]
        fits = lost <= allowed - self.loss(ranks) + lost[-1]
        return int(fits.argmax()) + 1 if fits.any() else ranks[bond]

    def _exactly_lowest(self, ranks: list[int], bond: int, allowed: float) -> int:
        """Return the same by what truncations lose in turn."""
        least, rank = self.least(allowed)[bond], ranks[bond]
        while rank > least and self.exact_loss([*ranks[:bond], rank - 1, *ranks[bond + 1 :]]) <= allowed:
            rank -= 1
        return rank


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
            moved_left(self.backend, self.cores, mode)
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


def moved_left(backend: Backend, cores: list[Array], mode: int) -> None:
    """Make a core orthogonal from the right, and multiply the one before it by the rest."""
    core, before = cores[mode], cores[mode - 1]
    left, size, right = map(int, core.shape)
    flat = backend.reshape(core, (left, size * right))
    q, r = backend.qr(backend.matrix_transpose(backend.conj(flat)))
    width = int(q.shape[1])
    cores[mode] = backend.reshape(backend.matrix_transpose(backend.conj(q)), (width, size, right))
    rest = backend.matmul(backend.reshape(before, (-1, left)), backend.matrix_transpose(backend.conj(r)))
    cores[mode - 1] = backend.reshape(rest, (*before.shape[:2], width))


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
