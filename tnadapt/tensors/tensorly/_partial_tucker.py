"""Tucker decompositions along some modes, under TensorLy's name and keywords."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.decomposition.frobenius import norm_of
from tnadapt.decomposition.hooi import hooi, hosvd, projected
from tnadapt.decomposition.matrix_truncation import Leading, MatrixTruncation
from tnadapt.decomposition.tensorly_calls import call, library_for
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from .._checks import as_tensor, integer_of, mode_of
from .._requests import Request, Watch, requested
from .._tucker_tensor import TuckerTensor
from ._keywords import Sweeps, alike, needed_mask, svd_method, tolerance
from ._tucker_parts import core_and_factors, listed_factors, more_columns, more_zeros, tucker_ranks

__all__ = ["partial_tucker"]


def partial_tucker(
    tensor: Any,
    rank: Any,
    modes: Sequence[int] | None = None,
    n_iter_max: int = 100,
    init: Any = "svd",
    tol: float | None = 1e-4,
    svd: str = "truncated_svd",
    random_state: Any = None,
    verbose: bool | int = False,
    mask: Any = None,
    svd_mask_repeats: int = 5,
) -> tuple[tuple[Array, list[Array]], list[float]]:
    """Decompose a tensor into a core and matrices for some modes; the others stay as they are.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
    rank : None, int, sequence of int, float or "same"
        The ranks of ``modes``, as for :func:`tucker`.
    modes : sequence of int, optional
        All if None.
    n_iter_max, init, tol, svd, random_state, verbose
        As for :func:`tucker`; a given ``init`` has factors for ``modes`` alone.
    mask, svd_mask_repeats
        As for :func:`parafac`; TensorLy's own iteration runs.

    Returns
    -------
    (core, factors) : array, and list of array of shape (d_m, r_m)
        The factors of ``modes``, with orthonormal columns.
    errors : list of float
        The relative error after each sweep.

    Raises
    ------
    ShapeError
        If the tensor has NaN or infinity, or a mode, a rank or a start does not fit.
    ConfigError
        If a keyword has no meaning here.

    Notes
    -----
    Costs and references are those of :func:`tucker`, which is the same with all modes, and also says how good the
    result is.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.tensors.tensorly import multi_mode_dot
    >>> tensor = np.random.default_rng(0).normal(size=(10, 5, 6))
    >>> (core, factors), errors = partial_tucker(tensor, rank=[5, 2], modes=[1, 2])
    >>> core.shape, [factor.shape for factor in factors], multi_mode_dot(core, factors, modes=[1, 2]).shape
    ((10, 5, 2), [(5, 5), (6, 2)], (10, 5, 6))
    """
    backend, array = as_tensor(tensor)
    shape = tuple(int(size) for size in array.shape)
    chosen = list(range(len(shape))) if modes is None else [mode_of(mode, shape) for mode in modes]
    if len(set(chosen)) < len(chosen) or not chosen:
        raise ShapeError(f"modes must be different ones, at least one; got {safe_repr(modes)}")
    ranks = tucker_ranks(rank, shape, [shape[mode] for mode in chosen])
    mask = needed_mask(array, mask)
    request = requested(array, ranks, None, mask=mask, random_state=random_state)
    method = svd_method(svd)
    if mask is not None:
        (core, factors), errors = _masked(
            request, ranks, chosen, mask, init,
            n_iter_max=n_iter_max, tol=tol, svd=svd, verbose=bool(verbose), svd_mask_repeats=svd_mask_repeats,
        )  # fmt: skip
        return (core, list(factors)), [float(error) for error in errors]
    truncation = MatrixTruncation(backend, request.tensor, method, request.seed)
    wanted = dict(zip(chosen, ranks, strict=True))

    def truncated(matrix: Array, mode: int) -> Leading:
        return truncation.left_to_rank(matrix, wanted[mode])

    steps = integer_of("n_iter_max", n_iter_max, 0)
    if steps:
        way = "use n_iter_max=0, or tucker(), whose sweeps are differentiated"
        request.refuse_trace("partial_tucker()", way)
        request.refuse_recorded("the tensor of partial_tucker() with n_iter_max > 0", request.source)
    tensor = request.tensor if request.source is None else request.source
    core, found = _begun(request, tensor, wanted, init, truncated)
    norm = request.norm() if request.concrete else 0.0
    sweeps = Sweeps(None, verbose, lambda arrays: TuckerTensor(arrays[0], arrays[1:]))
    watch = Watch(tolerance(tol), sweeps.observer)

    def on_sweep(count: int, core: Array) -> bool:
        return watch(count, _lost(backend, core, norm))

    if steps:
        core, found = hooi(backend, request.tensor, found, chosen, truncated, on_sweep, steps)
    errors = watch.history or ([_lost(backend, core, norm)] if request.concrete else [])
    factors = [more_columns(backend, found[mode], wanted[mode]) for mode in chosen]
    return (more_zeros(backend, core, ranks, chosen), factors), errors


def _lost(backend: Backend, core: Array, norm: float) -> float:
    """The relative error: the factors are orthonormal, so that it is what the core lacks."""
    return math.sqrt(max(0.0, 1.0 - (norm_of(backend, core) / norm) ** 2)) if norm else 0.0


def _begun(
    request: Request, tensor: Array, wanted: dict[int, int], init: Any, truncated: Callable[[Array, int], Leading]
) -> tuple[Array, dict[int, Array]]:
    backend, modes = request.backend, list(wanted)
    if isinstance(init, str) and init == "svd":
        order = sorted(modes, key=lambda mode: wanted[mode] / request.shape[mode])
        core, found, _ = hosvd(backend, tensor, order, truncated)
        return core, found
    if isinstance(init, str) and init != "random":
        raise ConfigError(f"init must be 'svd', 'random', (core, factors) or factors; got {safe_repr(init)}")
    if isinstance(init, str):
        rng = np.random.default_rng(request.seed)
        kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
        given = [backend.asarray(rng.standard_normal((request.shape[m], r)), kind, device) for m, r in wanted.items()]
    else:
        given = core_and_factors(init)[1] if isinstance(init, tuple) else listed_factors(init)
        given = alike(given, "a factor of init", request.tensor)
    if [tuple(one.shape) for one in given] != [(request.shape[mode], wanted[mode]) for mode in modes]:
        raise ShapeError(
            f"the factors of init have shapes {[tuple(one.shape) for one in given]}; expected "
            f"{[(request.shape[mode], wanted[mode]) for mode in modes]}"
        )
    core, found = tensor, {}
    for mode, factor in zip(modes, given, strict=True):
        found[mode] = backend.qr(factor)[0]
        core = projected(backend, core, found[mode], mode)
    return core, found


def _masked(request: Request, ranks: list[int], modes: list[int], mask: Any, init: Any, **words: Any) -> Any:
    backend = request.backend
    library = library_for(backend)
    if library is not backend:
        raise ConfigError(f"mask= of partial_tucker runs on TensorLy's libraries; got an array of {backend.name}")
    known = np.asarray(mask) if isinstance(mask, (list, tuple, np.ndarray)) else backend.to_numpy(mask)
    sent = backend.asarray(known.astype(np.float64), backend.dtype_name(request.tensor), backend.device(request.tensor))
    return call(
        library, "decomposition.partial_tucker", request.tensor, ranks, modes=modes, mask=sent, init=init,
        random_state=request.seed % (1 << 32), **words,
    )  # fmt: skip
