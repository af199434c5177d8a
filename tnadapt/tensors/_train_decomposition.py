"""``tensor_train``, ``tt_matrix`` and ``tensor_ring``: decompose a tensor into a chain of cores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tnadapt.algebra.formats import TensorTrain
from tnadapt.algebra.products import mode_product
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, get_backend, load_backend
from tnadapt.decomposition.fits import Callback, Fit, Iteration, Limits, limits_of
from tnadapt.decomposition.hooi import coarse_hosvd
from tnadapt.decomposition.linear_algebra import epsilon_of
from tnadapt.decomposition.tt_svd import fit_train, named_cores, ring_svd, ring_sweep
from tnadapt.errors import ConfigError, ShapeError, TnadaptError, safe_repr

from . import _requests
from ._decomposed import Decomposed, error_of, finished, scaled_start
from ._requests import Request
from ._tensor_chains import TRTensor, TTMatrix, TTTensor

# -- Tensor trains and TT matrices -------------------------------------------------------------------------------------


ChainT = TypeVar("ChainT", TTTensor, TTMatrix)


@checks_arguments
def tensor_train(
    tensor: Any,
    rank: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    init: Any = "svd",
    svd: str = "auto",
    random_state: Any = None,
    sweeps: int | None = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
    memory: int = _requests.BLOCK,
) -> TTTensor:
    """Decompose a tensor into a tensor train by TT-SVD.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    rank : int or sequence of int, optional
        The largest rank of all bonds; or of each of the M - 1 bonds, with or without the 1 at both ends. A single
        number may be larger than is possible.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of ranks. The parameters are about the fewest that TT-SVD
        needs for it: what one bond does not lose, others may.
    mask : array of bool, shape (d_1, …, d_M), optional
        True where an element is known; others may be NaN. In each mode, every index needs a known element.
    weights : array, shape (d_1, …, d_M), optional
        Nonnegative weights of the squared errors of the elements.
    init : "svd", TTTensor or sequence of array
        What the sweeps start from: TT-SVD, or a given train of the same ranks.
    svd : {"auto", "full", "randomized"}
        How to compute leading singular vectors; "auto" computes no more than the rank where that is faster.
    random_state : int or Generator, optional
        Seed of random projections.
    sweeps : int, optional
        Maximum number of sweeps of alternating least squares over the cores, at the same ranks; they never increase the
        error. By default 0 after TT-SVD, and ``max_iterations`` from a given start.
    tol, max_iterations, callback
        Of the iteration with ``mask`` or ``weights``, as for :func:`cp`; ``tol`` and ``callback`` of the sweeps, too.
    memory : int
        Bytes that a block may have, for a tensor that is not in memory: a ``numpy.memmap``, or an array of dask (whose
        own chunks are used). It is then read two or three times, compressed, and decomposed in memory; the result is of
        NumPy.

    Returns
    -------
    TTTensor
        Of cores of shape (r_{m-1}, d_m, r_m), in the tensor's library, dtype and device. After TT-SVD, its error is at
        most √(M - 1) times the least one at these ranks.

    Raises
    ------
    ShapeError
        If the tensor has NaN, infinity or no elements, or a rank is out of range.
    BackendError
        If the tensor is not an array of numbers of a known library; or for sweeps inside a trace.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Oseledets, "Tensor-train decomposition" (SIAM J. Sci. Comput. 33, 2011); sweeps: Holtz, Rohwedder & Schneider, "The
    alternating linear scheme for tensor optimization in the tensor train format" (SIAM J. Sci. Comput. 34, 2012). With
    ``rank``, it is differentiable, after sweeps once they have converged; without sweeps it runs inside ``jax.jit`` and
    ``torch.func``. Costs the SVDs of M - 1 matrices, the first of shape (d_1, d_2 ⋯ d_M), and ``4 max(r) prod(d)``
    multiply-adds a sweep; with ``max_error`` also the search for ranks in a smaller train, and TT-SVD once more.

    With ``mask`` or ``weights``, all arrays are fitted to the known elements: some sweeps of least squares from several
    starts, then damped Gauss-Newton if the problem is small enough for its equations. ``error`` is that of the known
    elements; ``callback`` is given the least one so far, after each step of Gauss-Newton or each sweep to the end.

    Examples
    --------
    >>> import numpy as np
    >>> tensor = np.arange(24.0).reshape(2, 3, 4)
    >>> train = tensor_train(tensor, 2)
    >>> train.rank, bool(np.allclose(train.to_tensor(), tensor)), train.certified
    ((1, 2, 2, 1), True, True)
    >>> tensor_train(tensor, max_error=0.2).rank
    (1, 1, 1, 1)
    >>> noise = np.random.default_rng(0).normal(size=(5, 5, 5, 5))
    >>> tensor_train(noise, 3, sweeps=50).error < tensor_train(noise, 3).error
    True
    >>> tensor_train(noise + 0.01, 3, init=tensor_train(noise, 3)).outcome.method
    'given start, ALS'
    """
    block = _requests.setting_of("memory", memory, 1)
    if not _requests.in_memory(tensor):
        if mask is not None or weights is not None or not isinstance(init, str):
            raise ConfigError("a tensor that is read in blocks takes no mask, weights or init: load it into memory")
        return _from_blocks(tensor, block, rank, max_error, svd, _requests.seed_of(random_state))
    request = _requests.requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    limits = limits_of(tol, max_iterations)
    ranks = None if rank is None else _requests.inner_ranks(rank, _possible(request.shape))
    start = _start_of(request, init, ranks)
    most = None if sweeps is None else _requests.setting_of("sweeps", sweeps, 0)
    if request.observed is not None:
        request = request.scaled()
        start = scaled_start(request, start)
        split = TensorTrain(request.shape, 1 if ranks is None else tuple(ranks))
        named = None if start is None else named_cores(start)
        fit = _requests.completed(request, split, limits, callback, start=named)
        return finished(request, fit, _train)
    if most is not None or start is None:
        limits = limits._replace(iterations=most or 0)
    # The core of a vector is the vector itself.
    request = request.kept() if start is None and not limits.iterations and len(request.shape) > 1 else request
    steps = Iteration(limits, callback)
    fit = fit_train(request.algebra(svd), request.tensor, ranks, steps, loss=request.loss, init=start)
    return finished(request, fit, _train)


def _train(arrays: Mapping[str, Array]) -> TTTensor:
    # Skip the checks of user arrays, which take a third of the time of a small tensor.
    return TTTensor.of(get_backend(arrays["core0"]), [arrays[f"core{mode}"] for mode in range(len(arrays))])


def _from_blocks(tensor: Any, block: int, rank: Any, max_error: float | None, svd: str, seed: int) -> TTTensor:
    """Compress the modes to the sizes that a train of these ranks can have, and decompose the result."""
    from tnadapt.decomposition.block_passes import OVERSAMPLED, BlockPasses, compressed, result_dtype

    passes = BlockPasses(tensor, block)
    _requests.one_of("rank", rank, max_error)
    sizes = None
    if rank is not None:
        shape = passes.shape
        ranks = [1, *_requests.inner_ranks(rank, _possible(shape)), 1]
        wanted = [ranks[mode] * ranks[mode + 1] + OVERSAMPLED for mode in range(len(shape))]
        sizes = [min(size, most) for size, most in zip(shape, wanted, strict=True)]
    limit = None if max_error is None else _requests.error_limit(max_error)
    small = compressed(passes, sizes, limit, seed)
    left = None if limit is None else small.left(limit)
    inner = tensor_train(small.core, rank, max_error=left, svd=svd, random_state=seed)
    numpy, dtype = load_backend("numpy"), result_dtype(passes)
    pairs = zip(inner, small.factors, strict=True)
    cores = [np.asarray(mode_product(numpy, core, basis, 1), dtype) for core, basis in pairs]
    assert inner.outcome is not None
    return TTTensor(cores).with_outcome(small.outcome(inner.outcome, dtype))


def _possible(shape: tuple[int, ...]) -> list[int]:
    """Return the largest possible rank of each bond."""
    return [min(math.prod(shape[: bond + 1]), math.prod(shape[bond + 1 :])) for bond in range(len(shape) - 1)]


@checks_arguments
def tt_matrix(
    matrix: Any,
    rank: int | Sequence[int] | None = None,
    *,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    max_error: float | None = None,
    init: Any = "svd",
    svd: str = "auto",
    random_state: Any = None,
    sweeps: int | None = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
) -> TTMatrix:
    """Decompose a matrix whose rows and columns are divided into modes.

    Parameters
    ----------
    matrix : array, shape (prod rows, prod cols) or (rows_1, …, rows_M, cols_1, …, cols_M)
        The second form is TensorLy's, and needs neither ``rows`` nor ``cols``.
    rank, max_error, svd, random_state, sweeps, tol, max_iterations, callback
        As for :func:`tensor_train`.
    rows, cols : sequence of int, optional
        How the rows and the columns are divided, into the same number of modes.
    init : "svd", TTMatrix or sequence of array
        What the sweeps start from: TT-SVD, or a given TT matrix of the same ranks, divided in the same way.

    Returns
    -------
    TTMatrix
        Of cores of shape (r_{m-1}, rows_m, cols_m, r_m).

    Raises
    ------
    ShapeError
        If the sizes do not multiply to those of the matrix, or as for :func:`tensor_train`.
    BackendError
        If it is not an array of numbers of a known library.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Oseledets, "Approximation of 2^d × 2^d matrices using tensor decomposition" (SIAM J. Matrix Anal. 31, 2010): a
    tensor train whose mode m is row m and column m together.

    Examples
    --------
    >>> import numpy as np
    >>> matrix = tt_matrix(np.eye(12), 1, rows=(3, 4), cols=(3, 4))
    >>> [core.shape for core in matrix], bool(np.allclose(matrix.to_matrix(), np.eye(12)))
    ([(1, 3, 3, 1), (1, 4, 4, 1)], True)
    """
    backend, array = _requests.as_tensor(matrix, "the matrix")
    shape = tuple(int(size) for size in array.shape)
    tall, wide = _sizes(shape, rows, cols)
    count = len(tall)
    paired = backend.permute_dims(
        backend.reshape(array, (*tall, *wide)), [axis for m in range(count) for axis in (m, count + m)]
    )
    merged = backend.reshape(paired, [r * c for r, c in zip(tall, wide, strict=True)])
    start = init if isinstance(init, str) else _merged_start(init, tall, wide)
    train = tensor_train(
        merged, rank, max_error=max_error, init=start, svd=svd, random_state=random_state, sweeps=sweeps,
        tol=tol, max_iterations=max_iterations, callback=callback,
    )  # fmt: skip
    cores = [
        backend.reshape(core, (core.shape[0], r, c, core.shape[2]))
        for core, r, c in zip(train, tall, wide, strict=True)
    ]
    return TTMatrix(cores).with_outcome(train.outcome)


def _merged_start(init: Sequence[Any], rows: tuple[int, ...], cols: tuple[int, ...]) -> TTTensor:
    start = _started(TTMatrix, init)
    if (start.row_sizes, start.col_sizes) != (rows, cols):
        raise ShapeError(
            f"init divides rows and columns into {start.row_sizes} and {start.col_sizes}; expected {rows} and {cols}"
        )
    return start.train()


def _sizes(
    shape: tuple[int, ...], rows: Sequence[int] | None, cols: Sequence[int] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if rows is None and cols is None:
        if len(shape) < 2 or len(shape) % 2:
            raise ShapeError(
                f"a tensor of shape {shape} does not divide into rows and columns: expected an even number of modes, "
                "or a matrix with rows= and cols="
            )
        return shape[: len(shape) // 2], shape[len(shape) // 2 :]
    if rows is None or cols is None or len(shape) != 2:
        raise ShapeError(f"give rows= and cols= together, with a matrix; got a tensor of shape {shape}")
    tall = tuple(_requests.integer_of("a size in rows", size, 1) for size in rows)
    wide = tuple(_requests.integer_of("a size in cols", size, 1) for size in cols)
    if len(tall) != len(wide) or (math.prod(tall), math.prod(wide)) != shape:
        raise ShapeError(
            f"rows {tall} and columns {wide} do not divide a matrix of shape {shape}: expected equally many, whose "
            f"products are {shape[0]} and {shape[1]}"
        )
    return tall, wide


# -- Trains from a given start -----------------------------------------------------------------------------------------


def _start_of(request: Request, init: str | Sequence[Any], ranks: Sequence[int] | None) -> TTTensor | None:
    """Return the checked train that sweeps start from, or None for "svd"."""
    other = isinstance(init, Decomposed) and not isinstance(init, TTTensor)
    if isinstance(init, str) or other or not isinstance(init, Sequence):
        if not isinstance(init, str) or init != "svd":
            raise ConfigError(f"init must be 'svd', a TTTensor or its cores; got {safe_repr(init)}")
        return None
    if ranks is None:
        raise ConfigError("max_error= chooses ranks, but a start has its own: give rank= with init=")
    start = _started(TTTensor, init)
    get_backend(start[0], request.tensor)
    expected = (request.shape, (1, *ranks, 1))
    if (start.shape, start.rank) != expected:
        raise ShapeError(
            f"init has shape {start.shape} and ranks {start.rank}; expected {expected[0]} and {expected[1]}"
        )
    request.refuse_trace("tensor_train(init=…)", "omit init=")
    request.refuse_recorded("init", *start)
    for mode, core in enumerate(start):
        _requests.finite(request.backend, core, f"core {mode} of init")
    return start


def _started(cls: type[ChainT], init: Any) -> ChainT:
    """Return the train given by ``init=``, naming ``init`` in errors about its cores."""
    if isinstance(init, cls):
        return init
    try:
        return cls(init)
    except TnadaptError as error:
        raise type(error)(f"init: {error}") from error


# -- Tensor rings ------------------------------------------------------------------------------------------------------


@checks_arguments
def tensor_ring(
    tensor: Any,
    rank: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    starts: int = 1,
    random_state: Any = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    callback: Callback | None = None,
) -> TRTensor:
    """Decompose a tensor into a tensor ring.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M), M ≥ 2
        Real or complex. Lists and integers are converted.
    rank : int or sequence of int, optional
        The rank of all bonds; or of each of the M bonds, the first one closing the ring, with or without the first
        again at the end. A single number may be larger than is useful.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of ranks: the result is the train of :func:`tensor_train` as
        a ring, or a ring of equal ranks that has fewer parameters, if the iteration finds one.
    init : {"svd", "random"} or TRTensor
        What the iteration starts from: TR-SVD, normal numbers, or a given result. TR-SVD needs ``rank[0] * rank[1]`` of
        at most d_1; otherwise "svd" starts as "random" does.
    fixed : collection of int
        Positions of the cores of ``init`` that are kept.
    starts : int
        Number of starts, the first by ``init`` and the others random; the best result is returned. With ``max_error``,
        the first that is close enough, of at least six for small tensors.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps; 0 for TR-SVD alone, which also runs inside ``jax.jit``.
    callback : callable, optional
        Called with the number of each sweep, counted through all starts, and the least relative error so far; stops
        the iteration, and all that would follow, if it returns True.

    Returns
    -------
    TRTensor
        Of cores of shape (r_{m-1}, d_m, r_m), in the tensor's library, dtype and device.

    Raises
    ------
    ShapeError
        If the tensor has fewer than two modes, NaN, infinity or no elements, or a rank is out of range.
    BackendError
        If the tensor is not an array of numbers of a known library; or for sweeps inside a trace.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    Zhao et al., "Tensor ring decomposition" (arXiv 1606.05535): TR-SVD, then alternating least squares, which never
    increases the error. There is no guarantee of the least error. With ``rank``, it is differentiable once it has
    converged: use ``tol=1e-10`` and, for example, ``max_iterations=2000`` in float64. A sweep costs ``prod(d) * r²``
    multiply-adds for each mode.

    Examples
    --------
    >>> from tnadapt.tensors import random_tr
    >>> ring = tensor_ring(random_tr((4, 5, 6), 2).to_tensor(), 2)
    >>> ring.rank, ring.error < 1e-6
    ((2, 2, 2, 2), True)
    >>> tensor_ring(ring.to_tensor(), max_error=1e-3).rank
    (2, 2, 2, 2)
    """
    request = _requests.requested(tensor, rank, max_error, random_state=random_state, least_order=2).scaled()
    limits, count = limits_of(tol, max_iterations, 0), _requests.setting_of("starts", starts, 1, 1 << 20)
    held = _requests.kept_modes(request, init, fixed, TRTensor, "TRTensor(cores)")
    init = scaled_start(request, init, held)
    if rank is None:
        return _ring_within(request, init, count, limits, callback)
    fit = _fitted(request, _ranks(rank, request.shape), init, held, count, Iteration(limits, callback))
    return finished(request, fit, _ring, fixed=held if limits.iterations else ())


# The part of a squared error by which a tensor is compressed before a ring of equal ranks is searched. Up to a size,
# there are some more starts.
_COMPRESSED, _SMALL, _STARTS = 0.1, 1 << 14, 6


def _ring_within(request: Request, init: Any, starts: int, limits: Limits, callback: Callback | None) -> TRTensor:
    """Return a ring of equal ranks within an error, or the train as a ring if that has no more parameters."""
    if not isinstance(init, str):
        raise ConfigError("max_error= tries several ranks: use init='svd' or 'random', or give rank=")
    assert request.max_error is not None
    algebra, steps, norm = request.algebra(), Iteration(limits, callback), request.norm or 1.0
    best = fit_train(algebra, request.tensor, None, Iteration(limits._replace(iterations=0)), loss=request.loss)
    parameters = sum(math.prod(core.shape) for core in best.arrays.values())
    # In a small tensor, scaled so that no power of its norm overflows.
    small, bases, dropped, least = coarse_hosvd(algebra, request.tensor, norm, request.max_error**2, _COMPRESSED)
    if math.prod(small.shape) <= _SMALL:
        starts = max(starts, _STARTS)
    exponent = math.frexp(norm)[1]
    inner = dataclasses.replace(request, tensor=algebra.scaled(small, -exponent), settled=True)
    rest = request.max_error**2 - sum(float(squares.sum()) for squares in dropped)
    left = math.sqrt(max(0.0, rest)) * math.ldexp(norm, -exponent) / (inner.norm or 1.0)

    def tried(rank: int) -> Fit | None:
        """Return a fit if it is close enough."""
        fit = _fitted(inner, _ranks(rank, inner.shape), init, set(), starts, steps, left)
        error = error_of(inner, _ring(fit.arrays)) if math.isnan(fit.error) else fit.error
        if error > left:
            return None
        cores = [mode_product(request.backend, fit.arrays[f"core{mode}"], bases[mode], 1) for mode in sorted(bases)]
        cores[0] = algebra.scaled(cores[0], exponent)
        return fit._replace(arrays=named_cores(cores), error=math.nan, closed=None)

    # The unfolding of one mode has at most the square of equal ranks. If the largest ring that is smaller than the
    # train is not close enough, no smaller one is tried.
    low, high = math.isqrt(max(least) - 1), math.isqrt((parameters - 1) // sum(request.shape))
    if low < high and (fit := tried(high)) is not None:
        best = fit
        while high - low > 1 and steps.stopped != "callback":
            rank = (low + high) // 2
            if (fit := tried(rank)) is None:
                low = rank
            else:
                best, high = fit, rank
    return finished(request, best, _ring)


def _ring(arrays: Mapping[str, Array]) -> TRTensor:
    return TRTensor.of(get_backend(arrays["core0"]), [arrays[f"core{mode}"] for mode in range(len(arrays))])


def _fitted(
    request: Request, ranks: list[int], init: Any, held: set[int], starts: int, steps: Iteration, enough: float = 0.0
) -> Fit:
    """Return the best fit of these ranks over several starts, or the first one whose error is enough."""
    rng = np.random.default_rng(request.seed)
    cores, method = _start(request, request.tensor, ranks, init, rng)
    if not steps.limits.iterations:
        return Fit(
            named_cores(cores), False, 0, method,
            closed=lambda tensor: named_cores(_start(request, tensor, ranks, init, rng)[0]),
        )  # fmt: skip
    request.refuse_trace("tensor_ring()", "use max_iterations=0")
    best: Fit | None = None
    for number in range(starts):
        begun = cores if number == 0 else _random(request, ranks, rng, dict(enumerate(cores)), held)
        fit = _improved(request, begun, held, steps, enough)
        if best is None or fit.error < best.error:
            best = fit
        if steps.stopped == "callback" or best.error <= enough:
            break
    assert best is not None
    return best._replace(method=f"{method}, ALS", iterations=len(steps.history), history=tuple(steps.history))


def _ranks(rank: Any, shape: tuple[int, ...]) -> list[int]:
    several = isinstance(rank, (list, tuple, np.ndarray))
    if several and len(rank) == len(shape) + 1 and rank[0] != rank[-1]:
        raise ShapeError(f"the first and the last rank of a ring must be the same; got {safe_repr(rank)}")
    ranks = _requests.ring_bonds(rank, len(shape))
    useful = _requests.ring_ranks(ranks, shape)
    for bond, (bond_rank, most) in enumerate(zip(ranks, useful, strict=True)):
        if bond_rank > most and several:
            raise ShapeError(
                f"rank {bond_rank} of bond {bond} is above {most}, the largest that is useful there in a ring of shape "
                f"{shape} and ranks {tuple(ranks)}: give {tuple(useful)}"
            )
    return useful


def _start(
    request: Request, tensor: Array, ranks: list[int], init: Any, rng: np.random.Generator
) -> tuple[list[Array], str]:
    backend, shape = request.backend, request.shape
    if isinstance(init, TRTensor):
        expected = (*ranks, ranks[0])
        if init.rank != expected:
            raise ShapeError(f"init has shape {shape} and ranks {init.rank}; expected {shape} and {expected}")
        return list(init), "given start"
    if init == "svd" and ranks[0] * ranks[1] <= min(shape[0], math.prod(shape[1:])):
        algebra = request.algebra()

        def truncated(matrix: Array, bond: int) -> Array:
            return algebra.left(matrix, ranks[0] * ranks[1] if bond == 0 else ranks[bond + 1])[0]

        cores = ring_svd(backend, tensor, ranks[0], truncated)
        if [int(core.shape[0]) for core in cores] == ranks:
            return cores, "TR-SVD"
    if not request.concrete:
        raise ShapeError(
            f"inside a trace a ring is computed by TR-SVD, which needs ranks whose first two multiply to at most "
            f"{shape[0]}, and others that are possible; got {ranks}"
        )
    return _random(request, ranks, rng, {}, set()), "random start"


def _random(
    request: Request, ranks: list[int], rng: np.random.Generator, given: dict[int, Array], held: set[int]
) -> list[Array]:
    """Return normal cores, except for the held ones, which are given."""
    shapes = [(ranks[mode], size, ranks[(mode + 1) % len(ranks)]) for mode, size in enumerate(request.shape)]
    return [given[mode] if mode in held else request.normal(rng, shape) for mode, shape in enumerate(shapes)]


def _improved(request: Request, cores: list[Array], held: set[int], steps: Iteration, enough: float) -> Fit:
    """Run sweeps, with a small ridge where equations are singular, until the error is enough or cannot become so."""
    backend = request.backend
    steps.begin()
    if request.norm == 0.0:
        return Fit(named_cores([backend.zeros(core.shape, like=core) for core in cores]), True, 0, "zero", error=0.0)
    eps, best, error = epsilon_of(backend, request.tensor), cores, error_of(request, TRTensor(cores))
    ridges = [0.0, 100.0 * eps, eps**0.5]
    while not steps.stopped:
        swept = _tried(request, best, held, ridges[0] * request.norm ** (2.0 * (len(cores) - 1) / len(cores)))
        now = math.inf if swept is None else error_of(request, TRTensor(swept))
        if swept is None or not now <= error * (1.0 + 1e-9):
            if len(ridges) > 1:
                ridges.pop(0)
            else:
                steps.stopped = "singular" if swept is None else "converged"
            continue
        gained, best, error = error - now, swept, min(error, now)
        # Later sweeps gain less than the last one.
        if not steps.step(error) and enough:
            ahead = gained * (steps.limits.iterations - steps.count)
            if error <= enough or error - ahead > enough:
                steps.stopped = "converged"
    return Fit(named_cores(best), False, steps.count, "ALS", steps.stopped, error)


def _tried(request: Request, cores: list[Array], held: set[int], ridge: float) -> list[Array] | None:
    with np.errstate(all="ignore"):
        try:
            new_cores = ring_sweep(request.backend, request.tensor, cores, held, ridge)
        except (np.linalg.LinAlgError, RuntimeError):  # torch raises a RuntimeError
            return None
    return new_cores if all(np.isfinite(request.backend.to_numpy(core)).all() for core in new_cores) else None
