"""``tt_cross``: a tensor train of a function of indices, from few of its values.

A train follows from the values on crosses: at each bond, some leading indices (*heads*) with some trailing ones
(*tails*). A sweep goes over the modes. At each it evaluates the fibers between the heads before the mode and the tails
behind it, reduces their space by an SVD, and keeps the rows that determine it best as the next heads; the sweep back
finds tails in the same way. Random tails are added in every sweep: by these the ranks grow, and the error of a bond is
seen.

Oseledets & Tyrtyshnikov, "TT-cross approximation for multidimensional arrays" (Linear Algebra Appl. 432, 2010), with
the rows of Drmač & Gugercin, "A new selection operator for the discrete empirical interpolation method" (SIAM J. Sci.
Comput. 38, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition.fits import FitOutcome
from tnadapt.decomposition.tt_svd import moved_left
from tnadapt.errors import BackendError, ShapeError

from ._requests import as_tensor, error_limit, from_lists, seed_of, setting_of, shape_of, train_bonds
from ._tensor_chains import TTTensor

#: Random points: where the error is estimated, among which the first pivot is chosen, and new ones after each sweep.
_HELD, _STARTS, _LARGE, _FRESH = 1000, 100, 200, 100
# Sweeps in one direction. Ranks grow by half in each.
_SWEEPS = 60
# Points in one call of the function, and values that are kept, of some 200 bytes each.
_BATCH, _KEPT = 1 << 17, 1 << 20
#: The largest size of a mode: a fiber is evaluated whole.
_LONGEST = 1 << 24
#: The most elements of a tensor, whose squares add up to a number.
_ELEMENTS = 10**300
_TINY = float(np.finfo(np.float64).tiny)
_TOO_WIDE = (
    "the values of the function are too large, or range too widely, for double precision: divide it by its largest "
    "magnitude, or give points= where it is large"
)


# -- Values of the function --------------------------------------------------------------------------------------------


class _CallsSpentError(Exception):
    """The next values would exceed the allowed number of evaluations."""


class _Values:
    """A function of indices with the values that it has returned, each evaluated once until the cache is full."""

    def __init__(self, function: Callable[[np.ndarray], Any], shape: tuple[int, ...], most: int) -> None:
        self._function, self.shape, self._most, self.calls = function, shape, most, 0
        self._known = dict[bytes, complex]()
        self._index = np.min_scalar_type(max(shape) - 1)
        self.dtype = np.dtype(np.float32)
        self.backend: Backend = load_backend("numpy")
        self.device: Any = None
        # A power of two by which values are divided, so that no square of one overflows or vanishes.
        self.unit = 1.0

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Return the values at points, one a row, in double precision."""
        keys = np.ascontiguousarray(points, self._index)
        listed = keys.view(f"V{keys.shape[1] * keys.itemsize}").reshape(-1).tolist()
        values = list(map(self._known.get, listed))
        missing = {key: place for place, (key, value) in enumerate(zip(listed, values, strict=True)) if value is None}
        if missing:
            new = dict(zip(missing, self._evaluated(points[list(missing.values())]).tolist(), strict=True))
            values = [new[key] if value is None else value for key, value in zip(listed, values, strict=True)]
            if len(self._known) < _KEPT:
                self._known.update(new)
        with np.errstate(over="ignore"):
            scaled = np.array(values, np.result_type(self.dtype, np.float64)) / self.unit
        if not np.isfinite(scaled).all():
            raise ShapeError(_TOO_WIDE)
        return scaled

    def _evaluated(self, points: np.ndarray) -> np.ndarray:
        """Call the function and check what it returns."""
        if self.calls + len(points) > self._most:
            raise _CallsSpentError
        first, what = not self.calls, "what the function returns"
        self.calls += len(points)
        backend, values = as_tensor(self._function(points), what)
        if tuple(values.shape) != (len(points),):
            raise ShapeError(
                f"the function must return one number for each row of its argument, shape ({len(points)},) for indices "
                f"of shape {points.shape}; got shape {tuple(values.shape)}"
            )
        if backend.differentiates(values):
            raise BackendError("tt_cross() is not differentiated: let the function return detached values")
        if not first and backend is not self.backend:
            raise BackendError(
                f"the function returned an array of {self.backend.name} before, and now one of {backend.name}"
            )
        self.backend, self.device = backend, backend.device(values)
        self.dtype = np.result_type(self.dtype, backend.dtype_name(values))
        host = backend.to_numpy(values)
        if not np.isfinite(host).all():
            place = int(np.flatnonzero(~np.isfinite(host))[0])
            raise ShapeError(
                f"the function returned {host[place]} at index {tuple(map(int, points[place]))}; expected finite "
                "numbers: replace such values in the function, for example by 0"
            )
        return host

    def fibers(self, heads: np.ndarray, size: int, tails: np.ndarray, reverse: bool) -> np.ndarray:
        """Return the values at all heads, indices of a mode and tails, as a matrix with a column for each tail."""
        shape = len(heads), size, len(tails)
        pieces = []
        for start in range(0, math.prod(shape), _BATCH):
            places = np.arange(start, min(start + _BATCH, math.prod(shape)))
            head, index, tail = np.unravel_index(places, shape)
            points = np.concatenate([heads[head], index[:, None], tails[tail]], axis=1)
            pieces.append(self(points[:, ::-1] if reverse else points))
        return np.concatenate(pieces).reshape(shape[0] * shape[1], shape[2])


# -- Sweeps ------------------------------------------------------------------------------------------------------------


class _Sweep(NamedTuple):
    """A sweep in one direction: the cores, the heads at each bond, the largest error at one, and what ranks did."""

    cores: list[np.ndarray]
    heads: list[np.ndarray]
    local: float
    grew: bool
    cut: bool


def _swept(
    values: _Values,
    reverse: bool,
    tails: Sequence[np.ndarray],
    extra: np.ndarray,
    ranks: Sequence[int],
    tol: float,
    more: Callable[[int, int], int],
    rng: np.random.Generator,
) -> _Sweep:
    """Sweep over the modes, in reverse order if asked, with given tails, tails of extra points and random ones."""
    from scipy.linalg import qr

    shape = values.shape[::-1] if reverse else values.shape
    last = len(shape) - 1
    left, none = np.empty((1, 0), np.int64), np.empty((1, 0), np.int64)
    cores, heads, local, grew, cut = [], [], 0.0, False, False
    for bond in range(last):
        old, rest = tails[bond], shape[bond + 1 :]
        count = more(len(old), ranks[bond])
        # Half of the new tails differ from those of the next bond in one index, half are random altogether.
        behind = tails[bond + 1] if bond + 1 < last else none
        near = np.concatenate([rng.integers(0, rest[0], (count, 1)), behind[rng.integers(0, len(behind), count)]], 1)
        far = rng.integers(0, rest, (count, len(rest)))
        added = np.concatenate([extra[:, bond + 1 :], near[::2], far[1::2]])
        columns = _distinct(np.concatenate([old, added]))
        matrix = values.fibers(left, shape[bond], columns, reverse)
        u, s, _ = np.linalg.svd(matrix, full_matrices=False)
        dropped = np.sqrt(np.cumsum(s[::-1] ** 2)[::-1])
        needed = max(1, int((dropped > tol * dropped[0]).sum()))
        rank = min(needed, ranks[bond])
        if dropped[0] > 0.0:
            q = np.linalg.qr(matrix[:, : len(old)])[0]
            new = matrix[:, len(old) :]
            missed = np.linalg.norm(new - q @ (q.conj().T @ new), axis=0)
            local = max(local, float(missed.max(initial=0.0) / np.linalg.norm(matrix, axis=0).max()))
        rows = qr(u[:, :rank].T, mode="r", pivoting=True)[1][:rank]
        core = np.linalg.solve(u[rows, :rank].T, u[:, :rank].T).T
        cores.append(core.reshape(len(left), shape[bond], rank))
        grew, cut = grew or rank > len(old), cut or rank < needed
        left = np.concatenate([left[rows // shape[bond]], rows[:, None] % shape[bond]], axis=1)
        heads.append(left)
    cores.append(values.fibers(left, shape[last], none, reverse).reshape(len(left), shape[last], 1))
    if reverse:
        cores = [core.transpose(2, 1, 0) for core in reversed(cores)]
    return _Sweep(cores, heads, local, grew, cut)


def _distinct(rows: np.ndarray) -> np.ndarray:
    """Return the distinct rows in the order of their first occurrence."""
    return rows[np.sort(np.unique(rows, axis=0, return_index=True)[1])]


# -- The error at random points ----------------------------------------------------------------------------------------


def _drawn(train: TTTensor, count: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Draw points with probabilities proportional to the squares of a train's elements; return its norm, too."""
    # With orthonormal rows in all cores but the first, the squares of all elements that begin with some indices add up
    # to that of the product of their matrices.
    cores = list(train)
    for mode in range(len(cores) - 1, 0, -1):
        moved_left(train.backend, cores, mode)
    norm = float(np.linalg.norm(cores[0]))
    if norm == 0.0:
        return rng.integers(0, train.shape, (count, len(cores))), norm
    points, state = np.zeros((count, len(cores)), np.int64), np.ones((count, 1))
    for mode, core in enumerate(cores):
        following = np.zeros((count, core.shape[2]), core.dtype)
        some = max(1, _LONGEST // (core.shape[1] * core.shape[2]))
        for rows in (slice(start, start + some) for start in range(0, count, some)):
            ahead = np.tensordot(state[rows], core, 1)
            chances = np.cumsum(np.sum(abs(ahead) ** 2, axis=2), axis=1)
            draws = rng.random((len(ahead), 1)) * chances[:, -1:]
            index = np.minimum((draws >= chances).sum(axis=1), core.shape[1] - 1)
            points[rows, mode] = index
            following[rows] = ahead[np.arange(len(ahead)), index] / np.sqrt(np.maximum(chances[:, -1:], _TINY))
        state = following
    return points, norm


class _Sample(NamedTuple):
    """Points that no pivot was chosen from, values and a train's elements there, and a factor for each if not all."""

    points: np.ndarray
    values: np.ndarray
    train: TTTensor
    elements: np.ndarray
    factors: np.ndarray | None = None

    def error(self, train: TTTensor) -> float:
        """Estimate the relative error of this train or one near it; it is exact if these are all points."""
        factors = 1.0 if self.factors is None else self.factors
        values, made = self.values, self.elements
        other = made if train is self.train else train.entries(self.points)
        rows = np.stack([values, made, values - made, values - other, made - other])
        size, train_size, before, after, between = map(float, np.sum(abs(rows * factors) ** 2, axis=1))
        if self.factors is not None and train_size:
            # The norms of the train, which is 1 here, and of its difference from the other one are known. Points tell
            # how much those of the values and of their difference from the other one exceed them.
            apart = 0.0 if train is self.train else float((train - self.train).norm() / self.train.norm())
            # No more than the errors of both steps together.
            after = min(max(0.0, apart**2 + after - between), (math.sqrt(before) + apart) ** 2)
            size = 1.0 + size - train_size
        return math.sqrt(after / size) if size > 0.0 else float(after > 0.0)


class _Test:
    """The points of all samples, and the values there."""

    def __init__(self, values: _Values, rng: np.random.Generator) -> None:
        self._values, self._rng, shape = values, rng, values.shape
        self._size = math.prod(shape)
        self._held = rng.integers(0, shape, (_HELD, len(shape)))
        if self._size <= _HELD:
            self._held = np.indices(shape).reshape(len(shape), -1).T
        self._at_held = values(self._held)

    def sample(self, train: TTTensor) -> tuple[_Sample, np.ndarray]:
        """Return points to estimate errors near a train, and the two with the largest errors among new ones."""
        drawn, norm = _drawn(train, _LARGE, self._rng)
        new = np.concatenate([drawn, self._rng.integers(0, self._values.shape, (_FRESH, drawn.shape[1]))])
        points = np.concatenate([self._held, new])
        known, elements = np.concatenate([self._at_held, self._values(new)]), train.entries(points)
        worst = new[np.argsort(-abs(known - elements)[len(self._held) :], kind="stable")[:2]]
        if self._size <= _HELD:
            return _Sample(self._held, self._at_held, train, elements[: self._size]), worst
        # Each point counts by the number that both distributions let expect of it: importance sampling from a mixture.
        tested = slice(len(self._held) + _LARGE)
        expected = len(self._held) / self._size + _LARGE * abs(elements[tested] / (norm or 1.0)) ** 2
        factors = 1.0 / np.sqrt(np.maximum(expected, _TINY)) / (norm or 1.0)
        return _Sample(points[tested], known[tested], train, elements[tested], factors), worst


# -- The public function -----------------------------------------------------------------------------------------------


@checks_arguments
def tt_cross(
    function: Callable[[np.ndarray], Any],
    shape: Sequence[int],
    *,
    rank: int | Sequence[int] | None = None,
    max_error: float | None = None,
    max_calls: int | None = None,
    points: Any = None,
    random_state: Any = None,
) -> TTTensor:
    """Approximate a function of indices by a tensor train, from few of its values: cross approximation.

    Parameters
    ----------
    function : callable
        Given an integer array of shape (n, M), one index a row, it returns n finite numbers, real or complex, as an
        array of any library.
    shape : sequence of M int
        Number of indices of each mode; the tensor may have up to 1e300 elements.
    rank : int or sequence of int, optional
        The largest rank of all bonds, or of each.
    max_error : float, optional
        Relative Frobenius error at which it stops, as estimated. At least one of both is needed.
    max_calls : int, optional
        The most values that are computed; 10,000,000 if None.
    points : array of int, shape (n, M), optional
        Indices at which the function is known to be large, for one that is nearly zero almost everywhere.
    random_state : int or Generator, optional
        Seed of the points.

    Returns
    -------
    TTTensor
        In the library, dtype and device of what the function returns. ``error`` is an estimate for this train.
        ``history`` has the least estimate after each sweep, of trains whose higher ranks are reduced in the end: the
        error may be larger. ``outcome.calls`` is how many values were computed, and ``outcome.stopped`` says why it
        stopped: ``"converged"``, ``"rank"`` if ``max_error`` asks for more than the ranks allow, ``"max_calls"``,
        ``"stalled"`` if sweeps gain nothing more (as below rounding), or ``"max_iterations"``.

    Raises
    ------
    ShapeError
        If the function returns NaN, infinity, another number of values, or values that range too widely; if a size or
        rank is out of range, or ``max_calls`` too small for a train of rank 1.
    BackendError
        If the function returns something else than numbers.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Oseledets & Tyrtyshnikov, "TT-cross approximation for multidimensional arrays" (Linear Algebra Appl. 432, 2010).
    Each of some sweeps computes ``d r^2`` values for each mode; what the function raises is passed on.

    Errors are estimated at 1,200 points, none of which was a pivot before: 1,000 random ones, and 200 where the train
    is large, new after each sweep. What no point meets they do not see: a function that is zero at all of them becomes
    zeros. For noisy tensors of known error, estimates are off by less than 30 %. A tensor of up to 1,000 elements is
    computed whole, and the error is exact.

    Examples
    --------
    >>> train = tt_cross(lambda i: 1.0 / (1.0 + i.sum(axis=1)), (20,) * 20, max_error=1e-6)
    >>> train.size > 1e26, train.outcome.calls < 500_000, train.error < 1e-6, train.outcome.stopped
    (True, True, True, 'converged')
    >>> abs(float(train.entry(*range(20))) * 191.0 - 1.0) < 1e-4
    True
    """
    sizes = shape_of(shape)
    if max(sizes) > _LONGEST:
        raise ShapeError(
            f"a mode of shape {sizes} has more than {_LONGEST} indices: divide it into several modes, such as 40 of 2 "
            "for 2**40"
        )
    if math.prod(sizes) > _ELEMENTS:
        raise ShapeError(
            f"a tensor of {len(sizes)} modes has more than 1e300 elements, beyond double precision: use fewer or "
            "smaller modes"
        )
    if rank is None and max_error is None:
        raise ShapeError("give rank= or max_error=, or both, to say how closely to approximate; got neither")
    limit = None if max_error is None else error_limit(max_error)
    order = len(sizes)
    possible = [min(math.prod(sizes[: bond + 1]), math.prod(sizes[bond + 1 :])) for bond in range(order - 1)]
    ranks = possible
    if rank is not None:
        ranks = [min(pair) for pair in zip(train_bonds(rank, order - 1), possible, strict=True)]
    pivots = _pivots_of(points, sizes)
    least = min(
        math.prod(sizes), _HELD + _STARTS + _LARGE + _FRESH + len(pivots) + (1 + (1 + len(pivots)) ** 2) * sum(sizes)
    )
    most = 10_000_000 if max_calls is None else setting_of("max_calls", max_calls, 1)
    if most < least:
        raise ShapeError(f"max_calls={most} is too small for a train of shape {sizes}: expected at least {least}")
    rng = np.random.default_rng(seed_of(random_state))
    values = _Values(function, sizes, most)
    extra = np.concatenate([pivots, _start(values, pivots, rng)[None]])
    return _crossed(values, extra, ranks, possible, limit, rng)


def _pivots_of(points: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return checked indices, one a row."""
    if points is None:
        return np.empty((0, len(shape)), np.int64)
    rows = from_lists(points, "points are")
    if rows.ndim != 2 or rows.shape[1] != len(shape) or rows.dtype.kind not in "iu" or not rows.size:
        raise ShapeError(
            f"points must be integers of shape (n, {len(shape)}), one index a row; got {rows.dtype} of shape "
            f"{rows.shape}"
        )
    outside = np.any((rows < 0) | (rows >= np.array(shape)), axis=1)
    if outside.any():
        raise ShapeError(f"points has {tuple(map(int, rows[outside][0]))}, outside of a tensor of shape {shape}")
    return rows.astype(np.int64)


def _start(values: _Values, pivots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a point with a large value: the best of some, improved along each mode in turn."""
    shape = values.shape
    tried = np.concatenate([pivots, rng.integers(0, shape, (_STARTS, len(shape)))])
    point = tried[np.argmax(abs(values(tried)))].copy()
    for mode, size in enumerate(shape):
        line = np.repeat(point[None], size, axis=0)
        line[:, mode] = np.arange(size)
        point[mode] = np.argmax(abs(values(line)))
    values.unit = math.ldexp(0.5, math.frexp(abs(values(point[None])[0]))[1])
    return np.asarray(point)


def _crossed(
    values: _Values,
    extra: np.ndarray,
    ranks: Sequence[int],
    possible: Sequence[int],
    limit: float | None,
    rng: np.random.Generator,
) -> TTTensor:
    """Sweep back and forth until the error is met twice, or nothing is gained; return the best train of the ranks."""
    test, bonds = _Test(values, rng), len(ranks)
    tails = [extra[-1:, bond + 1 :] for bond in range(bonds)]
    # Rounding a train of higher ranks ends nearer to the best one of a rank than a sweep at that rank.
    most = [min(rank + rank // 2 + 2, top) for rank, top in zip(ranks, possible, strict=True)]
    history: list[float] = []
    least, met, stopped, reverse = math.inf, 0, "max_iterations", False
    floor = 4.0 * float(np.finfo(values.dtype).eps)
    # Without max_error, an error of rounding is enough.
    wanted = 16.0 * floor if limit is None else limit
    tol = max(floor, 0.1 * wanted)

    def more(current: int, top: int) -> int:
        if not history:
            return 0
        return max(2, top - current + 2 if limit is None else current // 2)

    try:
        for _ in range(_SWEEPS):
            sweep = _swept(values, reverse, tails, extra[:, ::-1] if reverse else extra, most, tol, more, rng)
            train = TTTensor(sweep.cores)
            # What is behind a bond in one direction is before it in the other.
            tails, most, reverse = [heads[:, ::-1] for heads in reversed(sweep.heads)], most[::-1], not reverse
            sample, extra = test.sample(train)
            error = sample.error(train)
            if not math.isfinite(error):
                raise ShapeError(_TOO_WIDE)
            history.append(error)
            if error <= least:
                best, least = sample, error
            met = met + 1 if error <= wanted and sweep.local <= max(wanted, tol) else 0
            if met == 2:
                stopped = "converged"
                break
            if error > wanted and not sweep.grew:
                if len(history) > 2 and error > 0.5 * history[-3] and (sweep.cut or tol <= floor):
                    stopped = "rank" if sweep.cut else "stalled"
                    # Without max_error there is nothing to miss, unless the train is no better than zeros.
                    stopped = "converged" if limit is None and least < 1.0 else stopped
                    break
                tol = max(floor, 0.1 * tol)
    except _CallsSpentError:
        stopped = "max_calls"
    train = best.train.round(max_error=limit - least) if limit is not None and least < limit else best.train
    if any(rank > top for rank, top in zip(train.rank[1:-1], ranks, strict=True)):
        train, stopped = train.round(ranks), "rank" if limit is not None else stopped
    with np.errstate(over="ignore"):
        cores = [train[0] * values.unit, *train[1:]]
    if not np.isfinite(cores[0]).all():
        raise ShapeError(_TOO_WIDE)
    result = TTTensor([values.backend.asarray(core, values.dtype.name, values.device) for core in cores])
    # In the dtype of the result.
    first, *others = (values.backend.to_numpy(core).astype(train[0].dtype) for core in result)
    return result.with_outcome(
        FitOutcome(
            error=best.error(TTTensor([first / values.unit, *others])), bound=0.0, certified=False, stopped=stopped,
            history=tuple(np.minimum.accumulate(history).tolist()), method="cross approximation", calls=values.calls,
        )
    )  # fmt: skip
