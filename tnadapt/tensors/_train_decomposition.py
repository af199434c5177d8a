"""Tensor trains and TT matrices of given tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import TensorTrain
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends.backend import Array
from tnadapt.decomposition import Limits
from tnadapt.decomposition.block_passes import BlockPasses, passes_over
from tnadapt.decomposition.matrix_truncation import Leading, MatrixTruncation
from tnadapt.decomposition.optimality import Claim, all_of
from tnadapt.decomposition.train_als import improved_train
from tnadapt.decomposition.tt_svd import tt_svd
from tnadapt.errors import ConfigError, ShapeError

from ._checks import as_tensor, integer_of
from ._from_blocks import BLOCK, OVERSAMPLED, compressed, expanded_train
from ._keyword_hints import hints_keywords
from ._known_elements import METHOD, STARTS, completed
from ._requests import Callback, Request, Watch, one_of, requested, seed_of
from ._tensor_chains import TTTensor
from ._train_start import from_start, start_of, started
from ._truncation import error_limit, inner_ranks
from ._tt_matrix import TTMatrix

__all__ = ["tensor_train", "tt_matrix"]


@hints_keywords
@checks_arguments
def tensor_train(
    tensor: Any,
    rank: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    svd: str = "auto",
    random_state: Any = None,
    sweeps: int | None = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
    memory: int = BLOCK,
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
        Relative Frobenius error that is allowed, instead of ranks; the ranks are as small as the truncations of the
        single bonds allow.
    mask : array of bool, shape (d_1, …, d_M), optional
        True where an element is known; others may be NaN. In each mode, every index needs a known element.
    weights : array, shape (d_1, …, d_M), optional
        Nonnegative weights of the squared errors of the elements.
    init : "svd", TTTensor or sequence of array
        What the sweeps start from: TT-SVD, or a given train of the same ranks.
    fixed : collection of int
        Positions of the cores of ``init`` that are kept, to the bit.
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
    multiply-adds a sweep.

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
    >>> again = tensor_train(noise + 0.01, 3, init=tensor_train(noise, 3), fixed=[0])
    >>> bool((again[0] == tensor_train(noise, 3)[0]).all()), again.outcome.method
    (True, 'given start, ALS')
    """
    passes = passes_over(tensor, integer_of("memory", memory, 1))
    if passes is not None:
        if mask is not None or weights is not None:
            raise ConfigError("a tensor that is read in blocks takes neither mask nor weights: load it into memory")
        if not isinstance(init, str) or fixed:
            raise ConfigError("a tensor that is read in blocks takes neither init nor fixed: load it into memory")
        return _from_blocks(passes, rank, max_error, svd, seed_of(random_state))
    request = requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    watch, iterations = Watch(tol, callback), integer_of("max_iterations", max_iterations, 1)
    most = None if sweeps is None else integer_of("sweeps", sweeps, 0)
    ranks = None if rank is None else inner_ranks(rank, _possible(request.shape))
    begun, held = start_of(request, init, fixed, ranks)
    if request.observed is not None:
        split = TensorTrain(request.shape, 1 if ranks is None else tuple(ranks))
        start = None if begun is None else {f"core{mode}": core for mode, core in enumerate(begun)}
        found = completed(request, [split], watch, iterations=iterations, starts=STARTS, start=start, fixed=held)
        cores = [found.arrays[f"core{mode}"] for mode in range(len(request.shape))]
        return request.finished(TTTensor(cores), METHOD, converged=found.converged, history=found.history)
    if begun is not None:
        return from_start(request, begun, held, iterations if most is None else most, watch)
    return _finished(request, ranks, svd, most or 0, watch)


def _from_blocks(passes: BlockPasses, rank: Any, max_error: float | None, svd: str, seed: int) -> TTTensor:
    """Compress the modes to what a train of these ranks can have, and decompose that."""
    one_of("rank", rank, max_error)
    sizes = None
    if rank is not None:
        shape = passes.shape
        ranks = [1, *inner_ranks(rank, _possible(shape)), 1]
        wanted = [ranks[mode] * ranks[mode + 1] + OVERSAMPLED for mode in range(len(shape))]
        sizes = [min(size, most) for size, most in zip(shape, wanted, strict=True)]
    # Both steps together lose the root of the sum of the squares.
    half = None if max_error is None else error_limit(max_error) / math.sqrt(2.0)
    found = compressed(passes, sizes, half, seed)
    left = None
    if max_error is not None:
        core = float(np.linalg.norm(found.core))
        left = math.sqrt(max(0.0, (max_error * found.norm) ** 2 - found.lost**2)) / core if core else 0.0
    small = tensor_train(found.core, rank, max_error=left, svd=svd, random_state=seed)
    return expanded_train(passes, found, small)


def _possible(shape: tuple[int, ...]) -> list[int]:
    """Return the largest rank of each bond."""
    return [min(math.prod(shape[: bond + 1]), math.prod(shape[bond + 1 :])) for bond in range(len(shape) - 1)]


def _finished(request: Request, ranks: list[int] | None, svd: str, sweeps: int, watch: Watch) -> TTTensor:
    bonds = len(request.shape) - 1
    # The core of a vector is the vector itself.
    request = request if sweeps or not bonds else request.kept()
    truncation = MatrixTruncation(request.backend, request.tensor, svd, request.seed, settled=request.settled)
    exact = list[Claim]()
    loss = 0.0 if ranks is not None else (request.max_error or 0.0) * request.norm() / math.sqrt(max(1, bonds))

    def truncated(matrix: Array, bond: int) -> Leading:
        found = truncation.left_to_loss(matrix, loss) if ranks is None else truncation.left_to_rank(matrix, ranks[bond])
        exact.append(found.exact)
        return found

    def closed(tensor: Array) -> TTTensor:
        # Without the checks of arrays from a user, which take a third of the time of a small tensor.
        return TTTensor.of(request.backend, tt_svd(request.backend, tensor, truncated)[0])

    cores, cut = tt_svd(request.backend, request.tensor, truncated)
    known = all_of(exact)
    method = "TT-SVD, randomized" if known is False else "TT-SVD"
    ran = sweeps > 0 and (sum(cut) > 1 or known is False)
    if ran:
        request.refuse_trace("tensor_train(sweeps=…)", "leave sweeps out")
        limits = Limits(watch.tol, sweeps)
        cores, _, ended = improved_train(request.backend, request.tensor, cores, limits, watch)
        watch.converged = watch.converged or ended
    return request.finished(
        TTTensor.of(request.backend, cores),
        f"{method}, ALS" if ran else method,
        optimal=known if sum(cut) <= 1 else False,
        known=known,
        converged=watch.converged or not ran,
        history=watch.history,
        factor=math.sqrt(sum(cut)) if sum(cut) > 1 else math.inf,
        closed=None if ran else closed,
    )


@hints_keywords
@checks_arguments
def tt_matrix(
    matrix: Any,
    rank: int | Sequence[int] | None = None,
    *,
    rows: Sequence[int] | None = None,
    cols: Sequence[int] | None = None,
    max_error: float | None = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
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
    rank, max_error, fixed, svd, random_state, sweeps, tol, max_iterations, callback
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

    Notes
    -----
    Oseledets, "Approximation of 2^d × 2^d matrices using tensor decomposition" (SIAM J. Matrix Anal. 31, 2010): a
    tensor train whose mode m is row m and column m together.

    Examples
    --------
    >>> import numpy as np
    >>> found = tt_matrix(np.eye(12), 1, rows=(3, 4), cols=(3, 4))
    >>> [core.shape for core in found], bool(np.allclose(found.to_matrix(), np.eye(12)))
    ([(1, 3, 3, 1), (1, 4, 4, 1)], True)
    """
    backend, array = as_tensor(matrix, "the matrix")
    shape = tuple(int(size) for size in array.shape)
    tall, wide = _sizes(shape, rows, cols)
    count = len(tall)
    paired = backend.permute_dims(
        backend.reshape(array, (*tall, *wide)), [axis for m in range(count) for axis in (m, count + m)]
    )
    merged = backend.reshape(paired, [r * c for r, c in zip(tall, wide, strict=True)])
    start = init if isinstance(init, str) else _merged_start(init, tall, wide)
    train = tensor_train(
        merged, rank, max_error=max_error, init=start, fixed=fixed, svd=svd, random_state=random_state, sweeps=sweeps,
        tol=tol, max_iterations=max_iterations, callback=callback,
    )  # fmt: skip
    cores = [
        backend.reshape(core, (core.shape[0], r, c, core.shape[2]))
        for core, r, c in zip(train, tall, wide, strict=True)
    ]
    return TTMatrix(cores).with_outcome(train.outcome)


def _merged_start(init: Sequence[Any], rows: tuple[int, ...], cols: tuple[int, ...]) -> TTTensor:
    given = started(TTMatrix, init)
    if (given.row_sizes, given.col_sizes) != (rows, cols):
        raise ShapeError(
            f"init divides rows and columns into {given.row_sizes} and {given.col_sizes}; expected {rows} and {cols}"
        )
    return given.train()


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
    tall = tuple(integer_of("a size in rows", size, 1) for size in rows)
    wide = tuple(integer_of("a size in cols", size, 1) for size in cols)
    if len(tall) != len(wide) or (math.prod(tall), math.prod(wide)) != shape:
        raise ShapeError(
            f"rows {tall} and columns {wide} do not divide a matrix of shape {shape}: expected equally many, whose "
            f"products are {shape[0]} and {shape[1]}"
        )
    return tall, wide
