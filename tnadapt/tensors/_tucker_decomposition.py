"""``tucker``: decompose a tensor into a core and a matrix for each mode."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Tucker
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, get_backend
from tnadapt.decomposition.block_passes import BlockPasses, Compressed, passes_over
from tnadapt.decomposition.fits import Claim, all_of
from tnadapt.decomposition.hooi import SMALL, hooi, hosvd, projected
from tnadapt.decomposition.linear_algebra import Leading, MatrixTruncation, norm_of
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from ._checks import integer_of, mode_of, ranks_of
from ._decomposed import TuckerTensor
from ._nonnegative import constrained_modes, fitted_tucker, refuse_callback
from ._requests import (
    BLOCK,
    METHOD,
    OVERSAMPLED,
    STARTS,
    Callback,
    Request,
    Watch,
    completed,
    compressed,
    hints_keywords,
    one_of,
    refuse_observed,
    requested,
    result_dtype,
    seed_of,
    with_block_error,
)

__all__ = ["tucker"]


@hints_keywords
@checks_arguments
def tucker(
    tensor: Any,
    rank: int | Sequence[int] | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    nonnegative: Any = False,
    svd: str = "auto",
    random_state: Any = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    callback: Callback | None = None,
    memory: int = BLOCK,
) -> TuckerTensor:
    """Decompose a tensor into a core and a matrix for each mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    rank : int or sequence of int, optional
        The rank of each mode, or the largest rank of all modes. A rank equal to the size of its mode leaves that mode
        as it is, up to a rotation.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of ranks.
    mask : array of bool, shape (d_1, …, d_M), optional
        True where an element is known; others may be NaN. In each mode, every index needs a known element.
    weights : array, shape (d_1, …, d_M), optional
        Nonnegative weights of the squared errors of the elements.
    init : {"svd", "random"} or TuckerTensor
        What the iteration starts from: the truncated HOSVD, random factors, or a given result.
    fixed : collection of int
        Modes whose factors of ``init`` are kept; they must have orthonormal columns.
    nonnegative : bool
        Whether neither the core nor a factor may have negative elements; the factors are then not orthonormal. Negative
        elements of the tensor are allowed; the bound counts what they cost. The iteration is then TensorLy's HALS on
        the host, by ranks only, without ``fixed`` and without a callback.
    svd : {"auto", "full", "randomized"}
        How to compute leading singular vectors.
    random_state : int or Generator, optional
        Seed of random factors and projections.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps; 0 for the truncated HOSVD alone, which also runs inside ``jax.jit``.
    callback : callable, optional
        Called with the number and the relative error of each sweep; stops the iteration if it returns True.
    memory : int
        Bytes that a block may have, for a tensor that is not in memory: a ``numpy.memmap``, or an array of dask (whose
        own chunks are used). It is then read two or three times, compressed, and decomposed in memory; the result is of
        NumPy.

    Returns
    -------
    TuckerTensor
        With orthonormal factors of shape (d_m, r_m), in the tensor's library, dtype and device.

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
    Sequentially truncated HOSVD (Vannieuwenhoven et al., 2012), then HOOI (De Lathauwer et al., 2000). The error is at
    most √M times the least one, and a lower bound is reported. With ``rank``, it is differentiable once it has
    converged: use ``tol=1e-10`` and, for example, ``max_iterations=2000`` in float64. A sweep costs
    ``prod(d) * max(r)`` multiply-adds for each mode.

    With ``mask`` or ``weights``, all arrays are fitted to the known elements: some sweeps of least squares from several
    starts, then damped Gauss-Newton if the problem is small enough for its equations. ``error`` is that of the known
    elements; ``callback`` is given the least one so far, after each step of Gauss-Newton or each sweep to the end.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.tensors import random_tucker
    >>> tensor = random_tucker((5, 6, 7), (2, 3, 2)).to_tensor()
    >>> core, factors = tucker(tensor, (2, 3, 2))
    >>> core.shape, [factor.shape for factor in factors]
    ((2, 3, 2), [(5, 2), (6, 3), (7, 2)])
    >>> tucker(tensor, max_error=1e-10).rank
    (2, 3, 2)
    """
    passes = passes_over(tensor, integer_of("memory", memory, 1))
    if passes is not None:
        if init != "svd" or fixed or mask is not None or weights is not None:
            raise ConfigError(
                "a tensor that is read in blocks starts from its HOSVD: leave init, fixed, mask and weights out, or "
                "load it into memory"
            )
        if nonnegative is not False:
            raise ConfigError("nonnegative= needs the tensor in memory: pass np.asarray(tensor)")
        return _from_blocks(passes, rank, max_error, seed_of(random_state), svd, tol, max_iterations, callback)
    request = requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    sweeps, watch = integer_of("max_iterations", max_iterations, 0), Watch(tol, callback)
    held = _held(request, init, fixed)
    ranks = None if rank is None else _ranks(rank, request.shape)
    if request.observed is not None:
        refuse_observed(nonnegative)
        return _completed(request, ranks, init, held, watch, sweeps)
    if nonnegative is not False:
        _refuse(nonnegative, request, ranks, held, callback)
        return fitted_tucker(request, ranks or [], init, watch.tol, integer_of("max_iterations", max_iterations, 1))
    truncation = MatrixTruncation(request.backend, request.tensor, svd, request.seed)

    def start(tensor: Array) -> tuple[Array, dict[int, Array], int, Claim]:
        return _start(request, tensor, ranks, truncation, init, held)

    def closed(tensor: Array) -> TuckerTensor:
        core, factors, *_ = start(tensor)
        return TuckerTensor(core, [factors[mode] for mode in range(len(factors))])

    core, factors, lossy, exact = start(request.tensor)
    found = [int(size) for size in core.shape]
    cut = [mode for mode, (r, d) in enumerate(zip(found, request.shape, strict=True)) if r < d]
    moving = [mode for mode in cut if mode not in held]
    direct = init == "svd"
    ran = bool(moving) and sweeps > 0 and not (direct and lossy <= 1)
    if ran:
        request.refuse_trace("tucker()", "use max_iterations=0")
        core, factors = _improved(request, factors, moving, truncation, watch, sweeps)
    return request.finished(
        TuckerTensor(core, [factors[mode] for mode in range(len(factors))]),
        "HOSVD, HOOI" if ran else "HOSVD",
        optimal=exact if direct and lossy <= 1 else False,
        known=exact,
        factor=math.sqrt(lossy) if direct and lossy else math.inf,
        converged=watch.converged or not ran,
        history=watch.history,
        closed=None if ran else closed,
        fixed={1 + mode for mode in held},
    )


def _completed(
    request: Request, ranks: list[int] | None, init: Any, held: set[int], watch: Watch, iterations: int
) -> TuckerTensor:
    """Return the fit to the observed elements."""
    split = Tucker(request.shape, 1 if ranks is None else tuple(ranks))
    start = None
    if isinstance(init, TuckerTensor):
        start = {"core": init.core} | {f"factor{mode}": factor for mode, factor in enumerate(init.factors)}
        if {name: tuple(array.shape) for name, array in start.items()} != split.shapes:
            raise ShapeError(f"init has ranks {init.rank}; expected {tuple(ranks or ())}")
    found = completed(request, [split], watch, iterations=max(1, iterations), starts=STARTS, start=start, fixed=held)
    factors = [found.arrays[f"factor{mode}"] for mode in range(len(request.shape))]
    return request.finished(
        TuckerTensor(found.arrays["core"], factors).orthogonal(), METHOD, converged=found.converged,
        history=found.history,
    )  # fmt: skip


def _from_blocks(
    passes: BlockPasses, rank: Any, max_error: float | None, seed: int, svd: str, tol: float, sweeps: int, callback: Any
) -> TuckerTensor:
    """Compress the tensor in two passes, and decompose what is left."""
    one_of("rank", rank, max_error)
    ranks = None if rank is None else _ranks(rank, passes.shape)
    sizes = None if ranks is None else [min(d, 2 * r + OVERSAMPLED) for r, d in zip(ranks, passes.shape, strict=True)]
    found = compressed(passes, sizes, max_error, seed)
    kept = [int(size) for size in found.core.shape] if ranks is None else ranks
    small = tucker(found.core, kept, svd=svd, random_state=seed, tol=tol, max_iterations=sweeps, callback=callback)
    return _expanded(passes, found, small)


def _expanded(passes: BlockPasses, found: Compressed, small: TuckerTensor) -> TuckerTensor:
    """Return the Tucker tensor of what a tensor was compressed to, expanded."""
    dtype = result_dtype(passes)
    factors = [np.asarray(basis @ factor, dtype) for basis, factor in zip(found.factors, small.factors, strict=True)]
    return with_block_error(TuckerTensor(np.asarray(small.core, dtype), factors), found, small)


def _ranks(rank: Any, shape: tuple[int, ...]) -> list[int]:
    ranks = ranks_of(rank, len(shape), "modes")
    if isinstance(rank, (int, np.integer)):
        return [min(one, size) for one, size in zip(ranks, shape, strict=True)]
    for mode, (one, size) in enumerate(zip(ranks, shape, strict=True)):
        if one > size:
            raise ShapeError(f"rank {one} of mode {mode} is above its size {size}, the largest that is possible")
    return ranks


def _refuse(
    nonnegative: Any, request: Request, ranks: list[int] | None, held: set[int], callback: Callback | None
) -> None:
    """Raise an error for what does not go with nonnegative=."""
    if nonnegative is not True:
        raise ConfigError(
            "nonnegative must be True or False, as the core is constrained with all factors; got "
            f"{safe_repr(nonnegative)}. cp() takes single modes"
        )
    constrained_modes(nonnegative, request)
    refuse_callback(callback)
    if ranks is None or held:
        raise ConfigError("nonnegative= takes neither max_error= nor fixed=: give rank=, and let all factors change")


def _held(request: Request, init: Any, fixed: Collection[int]) -> set[int]:
    """Check the start; return the modes whose factors are kept."""
    held = {mode_of(mode, request.shape, "a mode in fixed") for mode in fixed}
    if isinstance(init, str):
        if init not in ("svd", "random"):
            raise ConfigError(f"init must be 'svd', 'random' or a TuckerTensor; got {safe_repr(init)}")
        if held:
            raise ConfigError(
                f"fixed={sorted(held)} keeps factors of a start: give them as init=TuckerTensor(core, factors)"
            )
        return held
    if not isinstance(init, TuckerTensor):
        raise ConfigError(f"init must be 'svd', 'random' or a TuckerTensor; got {safe_repr(init)}")
    if init.shape != request.shape:
        raise ShapeError(f"init has shape {init.shape}; expected the tensor's, {request.shape}")
    get_backend(init.core, request.tensor)
    request.refuse_recorded("init", *init.arrays)
    return held


def _start(
    request: Request,
    tensor: Array,
    ranks: list[int] | None,
    truncation: MatrixTruncation,
    init: Any,
    held: set[int],
) -> tuple[Array, dict[int, Array], int, Claim]:
    backend, shape, exact = request.backend, request.shape, list[Claim]()
    if ranks is None:
        loss = (request.max_error or 0.0) * request.norm() / math.sqrt(len(shape))

    def truncated(matrix: Array, mode: int) -> Leading:
        found = truncation.left_to_loss(matrix, loss) if ranks is None else truncation.left_to_rank(matrix, ranks[mode])
        exact.append(found.exact)
        return found

    # Modes that shrink most come first: what follows is then smaller.
    order = sorted(range(len(shape)), key=lambda mode: (ranks[mode] if ranks else 1) / shape[mode])
    if init == "svd":
        # With ranks of the whole tensor, an error that is allowed would be spent once for each mode and not used up.
        in_turn = ranks is None or len(shape) < 3 or math.prod(shape) > SMALL
        found = hosvd(backend, tensor, order, truncated, sequential=in_turn)
        return *found, all_of(exact)
    if ranks is None:
        raise ConfigError("max_error= chooses ranks from the HOSVD: use init='svd', or give rank=")
    rng = np.random.default_rng(request.seed)
    kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
    factors = {}
    for mode, (size, rank) in enumerate(zip(shape, ranks, strict=True)):
        given = None if init == "random" else init.factors[mode]
        if given is not None and tuple(given.shape) != (size, rank):
            raise ShapeError(f"factor {mode} of init has shape {tuple(given.shape)}; expected ({size}, {rank})")
        if given is None:
            given = backend.asarray(rng.standard_normal((size, rank)), kind, device)
        if mode in held:
            gram = backend.matmul(backend.conj(backend.matrix_transpose(given)), given)
            wrong = norm_of(backend, gram - backend.asarray(np.eye(rank), kind, device))
            if wrong > 1e-4:
                raise ShapeError(f"factor {mode} of init is fixed and needs orthonormal columns: use init.orthogonal()")
        factors[mode] = given if mode in held else backend.qr(given)[0]
    core = tensor
    for mode in order:
        core = projected(backend, core, factors[mode], mode)
    return core, factors, len(shape), False


def _improved(
    request: Request,
    factors: dict[int, Array],
    moving: list[int],
    truncation: MatrixTruncation,
    watch: Watch,
    sweeps: int,
) -> tuple[Array, dict[int, Array]]:
    backend, norm = request.backend, request.norm()

    def on_sweep(count: int, core: Array) -> bool:
        # The factors are orthonormal, so what the core lacks is the error.
        lost = max(0.0, 1.0 - (norm_of(backend, core) / norm) ** 2) if norm else 0.0
        return watch(count, math.sqrt(lost))

    def truncated(matrix: Array, mode: int) -> Leading:
        return truncation.left_to_rank(matrix, int(factors[mode].shape[1]))

    return hooi(backend, request.tensor, factors, moving, truncated, on_sweep, sweeps)
