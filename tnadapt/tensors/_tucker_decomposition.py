"""``tucker``: decompose a tensor into a core and a matrix for each mode."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import Tucker
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, get_backend
from tnadapt.decomposition.fits import Callback, Fit, Iteration, Limits, limits_of
from tnadapt.decomposition.hooi import fit_tucker
from tnadapt.decomposition.linear_algebra import norm_of
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from . import _requests
from ._decomposed import TuckerTensor, finished, scaled_start
from ._nonnegative import constrained_modes, fit_nonnegative_tucker, least_error, not_negative
from ._requests import Request


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
    memory: int = _requests.BLOCK,
) -> TuckerTensor:
    """Decompose a tensor into a core and a matrix for each mode.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted. Or sparse, as for :func:`cp`, by ranks only.
    rank : int or sequence of int, optional
        The rank of each mode, or the largest rank of all modes. A rank equal to the size of its mode leaves that mode
        as it is, up to a rotation; others may not exceed the size, or the number of columns of the mode's unfolding.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of ranks. The parameters are about the fewest that the HOSVD
        needs for it, or fewer by what the iteration gains.
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
        the host, by ranks only, without ``fixed`` and without a callback; with ``mask`` or ``weights``, sweeps over the
        known elements.
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
    ``prod(d) * max(r)`` multiply-adds for each mode; of a sparse tensor with n stored elements, ``n prod(r) / r_m`` for
    mode m.

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
    block = _requests.setting_of("memory", memory, 1)
    if not _requests.in_memory(tensor):
        if init != "svd" or fixed or mask is not None or weights is not None:
            raise ConfigError(
                "a tensor that is read in blocks starts from its HOSVD: leave init, fixed, mask and weights out, or "
                "load it into memory"
            )
        if nonnegative is not False:
            raise ConfigError("nonnegative= needs the tensor in memory: pass np.asarray(tensor)")
        settings = {"svd": svd, "tol": tol, "max_iterations": max_iterations, "callback": callback}
        return _from_blocks(tensor, block, rank, max_error, _requests.seed_of(random_state), settings)
    request = _requests.requested(
        tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state, sparse=True
    )
    held = _requests.kept_modes(request, init, fixed, TuckerTensor, "TuckerTensor(core, factors)")
    limits = limits_of(tol, max_iterations, 0)
    ranks = None if rank is None else _ranks(rank, request.shape, bounded=nonnegative is False)
    if nonnegative is not False:
        _refuse(nonnegative, request, ranks, held, callback)
    if request.observed is not None or nonnegative is not False:
        request = request.scaled()
        init = scaled_start(request, init, held)
    if request.observed is not None:
        fit = _completed(request, ranks, init, held, limits, callback, nonnegative)
        return finished(request, fit, _tucker_tensor if nonnegative else _orthogonal)
    if nonnegative is not False:
        fit = fit_nonnegative_tucker(request, ranks or [], init, limits_of(tol, max_iterations))
        return finished(request, fit, _tucker_tensor)
    if request.sparse and ranks is None:
        raise ConfigError("max_error= needs all singular values, too many for a sparse tensor: give rank=")
    fit = fit_tucker(
        request.algebra(svd),
        request.tensor,
        None if ranks is None else dict(enumerate(ranks)),
        Iteration(limits, callback),
        loss=request.loss,
        init=None if isinstance(init, str) and init == "svd" else _start(request, ranks, init, held),
        fixed=held,
    )
    if request.sparse:
        fit = fit._replace(arrays=request.algebra().arrays(fit.arrays), closed=None)
    return finished(request, fit, _tucker_tensor, fixed={1 + mode for mode in held})


def _tucker_tensor(arrays: Mapping[str, Array]) -> TuckerTensor:
    factors = [arrays[f"factor{mode}"] for mode in range(len(arrays) - 1)]
    return TuckerTensor.of(get_backend(arrays["core"]), (arrays["core"], factors))


def _orthogonal(arrays: Mapping[str, Array]) -> TuckerTensor:
    return _tucker_tensor(arrays).orthogonal()


def _completed(
    request: Request,
    ranks: list[int] | None,
    init: Any,
    held: set[int],
    limits: Limits,
    callback: Callback | None,
    nonnegative: bool,
) -> Fit:
    """Return the fit to the observed elements."""
    split = Tucker(request.shape, 1 if ranks is None else tuple(ranks))
    start = None
    if isinstance(init, TuckerTensor):
        start = {"core": init.core} | {f"factor{mode}": factor for mode, factor in enumerate(init.factors)}
        if {name: tuple(array.shape) for name, array in start.items()} != split.shapes:
            raise ShapeError(f"init has ranks {init.rank}; expected {tuple(ranks or ())}")
        if nonnegative:
            for name, array in start.items():
                not_negative(request.backend, array, f"{name} of init")
    limits = limits._replace(iterations=max(1, limits.iterations))
    fit = _requests.completed(
        request, split, limits, callback, start=start, fixed=held, nonnegative=list(split.shapes) if nonnegative else ()
    )
    return fit._replace(bound=least_error(request)) if nonnegative else fit


def _from_blocks(
    tensor: Any, block: int, rank: Any, max_error: float | None, seed: int, settings: dict[str, Any]
) -> TuckerTensor:
    """Compress the tensor in two passes, and decompose the result."""
    from tnadapt.decomposition.block_passes import OVERSAMPLED, BlockPasses, compressed, result_dtype

    passes = BlockPasses(tensor, block)
    _requests.one_of("rank", rank, max_error)
    ranks = None if rank is None else _ranks(rank, passes.shape)
    sizes = None if ranks is None else [min(d, 2 * r + OVERSAMPLED) for r, d in zip(ranks, passes.shape, strict=True)]
    limit = None if max_error is None else _requests.error_limit(max_error)
    small = compressed(passes, sizes, limit, seed)
    left = None if limit is None else small.left(limit)
    inner = tucker(small.core, ranks, max_error=left, random_state=seed, **settings)
    dtype = result_dtype(passes)
    assert inner.outcome is not None
    factors = [np.asarray(basis @ factor, dtype) for basis, factor in zip(small.factors, inner.factors, strict=True)]
    return TuckerTensor(np.asarray(inner.core, dtype), factors).with_outcome(small.outcome(inner.outcome, dtype))


def _ranks(rank: Any, shape: tuple[int, ...], bounded: bool = True) -> list[int]:
    """Return a rank for each mode, where ``bounded`` says whether unfoldings have no larger one."""
    ranks = _requests.ranks_of(rank, len(shape), "modes")
    if isinstance(rank, (int, np.integer)):
        return [min(mode_rank, size) for mode_rank, size in zip(ranks, shape, strict=True)]
    for mode, (mode_rank, size) in enumerate(zip(ranks, shape, strict=True)):
        if mode_rank > size:
            raise ShapeError(f"rank {mode_rank} of mode {mode} is above its size {size}, the largest that is possible")
        if bounded and mode_rank < size and mode_rank > (others := math.prod(shape) // size):
            raise ShapeError(
                f"rank {mode_rank} of mode {mode} is above {others}, the number of columns of its unfolding and the "
                "largest that is possible"
            )
    return ranks


def _refuse(
    nonnegative: Any, request: Request, ranks: list[int] | None, held: set[int], callback: Callback | None
) -> None:
    """Raise an error for arguments that cannot be combined with nonnegative=."""
    if nonnegative is not True:
        raise ConfigError(
            "nonnegative must be True or False, as the core is constrained with all factors; got "
            f"{safe_repr(nonnegative)}. cp() takes single modes"
        )
    constrained_modes(nonnegative, request)
    if request.sparse:
        raise ConfigError("nonnegative= of tucker() needs zeros, too: pass x.toarray() or x.todense(), or use cp()")
    if callback is not None and request.observed is None:
        raise ConfigError(
            "tucker() does not call callback= with nonnegative=: read the result's history, or set max_iterations"
        )
    if ranks is None or held:
        raise ConfigError("nonnegative= takes neither max_error= nor fixed=: give rank=, and let all factors change")


def _start(request: Request, ranks: list[int] | None, init: Any, held: set[int]) -> dict[int, Array]:
    """Return the factors that the iteration starts from."""
    if ranks is None:
        raise ConfigError("max_error= chooses ranks from the HOSVD: use init='svd', or give rank=")
    rng, backend = np.random.default_rng(request.seed), request.backend
    factors = dict[int, Array]()
    for mode, shape in enumerate(zip(request.shape, ranks, strict=True)):
        factors[mode] = request.normal(rng, shape) if isinstance(init, str) else init.factors[mode]
        if tuple(factors[mode].shape) != shape:
            raise ShapeError(f"factor {mode} of init has shape {tuple(factors[mode].shape)}; expected {shape}")
        if mode in held:
            gram = backend.matmul(backend.conj(backend.matrix_transpose(factors[mode])), factors[mode])
            eye = backend.asarray(np.eye(shape[1]), backend.dtype_name(gram), backend.device(gram))
            if norm_of(backend, gram - eye) > 1e-4:
                raise ShapeError(f"factor {mode} of init is fixed and needs orthonormal columns: use init.orthogonal()")
    return factors
