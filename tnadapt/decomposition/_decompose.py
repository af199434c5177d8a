"""``decompose``: fit a config to given updates; and ``search_rank``: find the smallest rank for an error."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra.config import Config, is_named
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.group import useful_rank
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer, wrong_argument
from tnadapt.backends import Array, Backend, get_backend, load_backend
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from ._group_fits import fit_plan
from ._reports import FitReport, Step
from .fits import limits_of, smallest_within
from .linear_algebra import SVD_METHODS, TENSORLY, Algebra


class Settings:
    """Validated settings of a decomposition.

    Parameters
    ----------
    tol, max_iterations, svd, seed
        As for :func:`decompose`.
    """

    NAMES = ("tol", "max_iterations", "svd", "seed")

    def __init__(self, tol: float = 1e-6, max_iterations: int = 100, svd: str = "auto", seed: int = 0) -> None:
        self.limits = limits_of(tol, max_iterations)
        if not isinstance(svd, str) or svd not in SVD_METHODS:
            raise ConfigError(f"svd must be one of {', '.join(SVD_METHODS)}; got {safe_repr(svd)}")
        self.svd, self.seed = svd, integer("seed", seed, 0, (1 << 64) - 1, ConfigError)

    @classmethod
    def taken_from(cls, keywords: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
        """Return the settings among a function's keywords, and the other keywords."""
        settings = {name: value for name, value in keywords.items() if name in cls.NAMES}
        return cls(**settings), {name: value for name, value in keywords.items() if name not in cls.NAMES}

    def fit(
        self,
        backend: Backend,
        like: Array,
        plan: UpdatePlan,
        read: Callable[[int], Array],
        progress: Callable[[Step], None] | None = None,
    ) -> tuple[dict[str, Array], FitReport]:
        """:func:`~tnadapt.decomposition._group_fits.fit_plan` on arrays of like's library, dtype and device."""
        if progress is not None and not callable(progress):
            raise wrong_argument("progress", "a function or None", progress)
        if plan.point.subtracts and plan.point.brought:
            raise ConfigError(
                f"start={plan.config.start!r} is where training starts, and a fit gives all arrays: use start='zero'"
            )
        # Nothing else uses the vectors of groups, so a proof that is computed later keeps them without a copy.
        return fit_plan(Algebra(backend, like, self.svd, self.seed, settled=True), plan, read, self.limits, progress)


@checks_arguments
def decompose(
    deltas: Any,
    cfg: Config,
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
    base: Sequence[Array] | None = None,
    given: Mapping[str, Array] | None = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    svd: str = "auto",
    seed: int = 0,
    progress: Callable[[Step], None] | None = None,
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a config to given updates.

    Parameters
    ----------
    deltas : list of array, or one array
        The updates, each of shape (rows, cols), all of the same library, real floating dtype and device. Or one
        tensor of any order, which counts as one weight of shape (d_1, d_2 ⋯ d_M). A tensor of more than two modes
        needs a config that names them, ``Config(order=M, fold=(d_1, …, d_M), groups=1, …)``; the fold may also merge
        neighboring modes or divide modes.
    cfg : Config
        The method to fit.
    layers : sequence of hashable, optional
        One key per weight, for ``groups="layer"``.
    roles : sequence of hashable, optional
        One key per weight, for ``groups="role"``.
    base : sequence of array, optional
        The base weights, for frozen arrays that are computed from them; see :meth:`tnadapt.UpdatePlan.with_base`.
    given : mapping of str to array, optional
        The frozen arrays that the caller brings.
    tol : float
        An iteration stops when a step reduces the relative error by no more than this. The sweeps of CP and of trains,
        which gain little each, have a hundredth of it.
    max_iterations : int
        Maximum number of iterations from each start, at least 1; of the sweeps of CP and of trains twice as many, if
        it is above 10.
    svd : {"auto", "full", "randomized"}
        How to compute leading singular vectors: from the full matrix, or by random projections (Halko et al.), whose
        results are never certified. "auto" uses a Krylov space if few vectors of a large matrix are needed, and the
        full matrix where it does not converge.
    seed : int
        Seed of random projections and starts.
    progress : callable, optional
        Called with a :class:`~tnadapt.decomposition.Step` after each step.

    Returns
    -------
    params : dict of str to array
        With the names and shapes of ``UpdatePlan(cfg, shapes).param_shapes``, and the library, device and dtype of the
        updates (float32 for half precision). Not differentiable.
    report : FitReport
        The relative Frobenius error and a lower bound on it, overall and per group, the iterations and why they
        stopped, and whether the optimum is certified; ``report.plan.deltas(params)`` are the fitted updates.

    Raises
    ------
    ShapeError
        If an update is not a matrix, contains NaN or infinity, the config does not fit the shapes, or the config does
        not name the modes of a tensor with more than two.
    ConfigError
        If a setting is out of range.
    BackendError
        If the arrays are of different libraries, dtypes or devices.

    Notes
    -----
    Each group is fitted separately, with a method that depends on the config:

    ============================================ =========================================================
    dense; anything of order 1                   exact
    CP, M = 2 (LoRA)                             truncated SVD: without padding the optimum (Eckart & Young)
    CP, M > 2                                    as :func:`tnadapt.cp`: ALS, no guarantee; several starts for a small
                                                 tensor, and Gauss-Newton where the error is small
    Tucker                                       as :func:`tnadapt.tucker`: HOSVD, then HOOI
    tensor train                                 as :func:`tnadapt.tensor_train`: TT-SVD, then ALS: within √(M - 1) of
                                                 the optimum
    K = 2 dense splits                           nearest Kronecker product, by rearrangement and SVD: the optimum
    other Kronecker splits, sums                 from there, alternating over splits; if small, then Gauss-Newton
    Hadamard splits                              L-BFGS on all arrays from several starts, for nearly exact matrices
                                                 also from the space of their rows; if small, then Gauss-Newton
    padding that cuts a row                      full rows, the cut row, then Gauss-Newton on the given elements
    shuffle                                      as without F, for the unshuffled vector
    dense through linear F                       least squares: small F directly, the optimum; large F by CGLS
    others through linear F                      from there, or for a large group with few parameters from ``Fᵀ ΔW``,
                                                 alternating least squares over arrays
    nonlinear F                                  from the inverse of tanhshrink, L-BFGS on all arrays
    arrays frozen, tied, scaled, or made from θ  least squares if ΔW is linear in what is trained, else
                                                 Gauss-Newton from several starts, in float64 on the host
    ============================================ =========================================================

    Elements that padding adds are free: they are not fitted to zero, but take any value that helps to fit the others.
    An update of zeros gives the initial parameters of training. No global state changes; in particular, TensorLy's
    backend stays the same. Memory is a few times the largest group.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> rng = np.random.default_rng(0)
    >>> delta = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 8))
    >>> params, report = decompose([delta], tna.Config(rank=3))
    >>> bool(np.allclose(report.plan.deltas(params)[0], delta)), report.certified
    (True, True)
    >>> tensor = rng.normal(size=(4, 5, 6))
    >>> params, report = decompose(tensor, tna.Config(rank=2, order=3, fold=(4, 5, 6), format="tt"))
    >>> [array.shape for array in params.values()], report.bound <= report.error < 1
    ([(1, 4, 2), (2, 5, 2), (2, 6, 1)], True)
    """
    listed, cfg = _listed(deltas), _in_own_modes(deltas, cfg)
    backend = get_backend(*listed, what="each of deltas")
    for number, delta in enumerate(listed):
        backend.require_float(delta, f"deltas[{number}]")
        if str(backend.device(delta)) == "meta":
            raise BackendError(f"deltas[{number}] is on the meta device and has no values: move it to a real device")
    plan = UpdatePlan(cfg, [_shape(delta, number) for number, delta in enumerate(listed)], layers, roles, given=given)
    if base is not None:
        plan = plan.with_base(base)
    settings = Settings(tol, max_iterations, svd, seed)
    # For a library that TensorLy does not support, compute in NumPy on the host.
    fit_backend = backend if backend.name in TENSORLY else load_backend("numpy")
    dtype = backend.dtype_name(listed[0])
    wide = dtype if dtype == "float64" else "float32"

    def read(weight: int) -> Array:
        delta = listed[weight]
        delta = backend.detached(delta) if fit_backend is backend else backend.to_numpy(delta)
        return fit_backend.reshape(fit_backend.astype(delta, wide), plan.shapes[weight])

    params, report = settings.fit(fit_backend, read(0), plan, read, progress)
    if fit_backend is not backend:
        device = backend.device(listed[0])
        params = {name: backend.asarray(fit_backend.to_numpy(array), wide, device) for name, array in params.items()}
    return params, report


def _listed(deltas: Any) -> list[Array]:
    if isinstance(deltas, (list, tuple)):
        if not deltas:
            raise ShapeError("deltas is empty: there is no update to decompose")
        return list(deltas)
    if not isinstance(getattr(deltas, "shape", None), Sequence):
        raise BackendError(f"deltas must be a list of arrays, or one array; got {type(deltas).__name__}")
    if len(deltas.shape) < 1 or not all(deltas.shape):
        raise ShapeError(f"deltas, a tensor to decompose, must have elements; got shape {tuple(deltas.shape)}")
    order = len(deltas.shape)
    if order == 2:
        return [deltas]
    backend: Backend = get_backend(deltas)
    rows = deltas.shape[0] if order > 1 else 1
    return [backend.reshape(deltas, (rows, math.prod(deltas.shape) // rows))]


def _in_own_modes(deltas: Any, cfg: Config) -> Config:
    """Return the config for one tensor; raise a ShapeError if it has over two modes that the fold does not name."""
    if isinstance(deltas, (list, tuple)) or len(deltas.shape) <= 2 or not isinstance(cfg, Config):
        return cfg
    shape = tuple(int(size) for size in deltas.shape)
    if not isinstance(cfg.fold, tuple) or is_named(cfg.fold):
        raise ShapeError(
            f"a tensor of shape {shape} has {len(shape)} modes, and fold={cfg.fold!r} does not say which of them are "
            f"rows and which are columns: give Config(order={len(shape)}, fold={shape}, groups=1, …) to decompose it "
            "in its own modes, or a list of matrices, one per weight"
        )
    fold = tuple(int(size) for size in cfg.fold)
    ours, theirs = (set(itertools.accumulate(sizes, operator.mul)) for sizes in (fold, shape))
    if math.prod(fold) != math.prod(shape) or not (ours <= theirs or theirs <= ours):
        raise ShapeError(
            f"fold={cfg.fold} cuts across the modes of a tensor of shape {shape}: give fold={shape}, or sizes that "
            "merge neighboring modes or divide them"
        )
    if cfg.groups not in ("weight", "layer", "role", 1, ((0,),)):
        raise ShapeError(
            f"groups={cfg.groups!r} would cut a tensor of shape {shape} across its modes: give groups=1, or a list of "
            "matrices, one per weight"
        )
    # The plan sees the tensor as a single weight, even if its first mode enumerates several.
    return cfg.replace(weight_shape=None)


def _shape(delta: Array, number: int) -> tuple[int, int]:
    if len(delta.shape) != 2:
        raise ShapeError(
            f"deltas[{number}] has shape {tuple(delta.shape)}; expected (rows, cols). Pass one tensor of another order "
            "by itself, not in a list"
        )
    return int(delta.shape[0]), int(delta.shape[1])


# -- The smallest rank for an error ------------------------------------------------------------------------------------


class FoundRank(NamedTuple):
    """The result of a rank search.

    Attributes
    ----------
    rank : int
    config : Config
        The config with that rank.
    params : dict of str to array
    report : FitReport
    """

    rank: int
    config: Config
    params: dict[str, Array]
    report: FitReport


@checks_arguments
def search_rank(
    deltas: Any, cfg: Config, max_error: float = 0.1, *, max_rank: int | None = None, **settings: Any
) -> FoundRank:
    """Find the smallest rank at which a config fits given updates within an error.

    Parameters
    ----------
    deltas : list of array, or one array
        As for :func:`tnadapt.decompose`.
    cfg : Config
        The config whose rank is searched; a scale of ``alpha / rank`` changes with it. If it has one rank per mode,
        those that are not None must be equal, and are changed together.
    max_error : float
        Maximum relative Frobenius error of all updates together, above 0 and below 1.
    max_rank : int, optional
        The largest rank to test; by default the rank beyond which the config gains no expressiveness.
    **settings
        Settings of :func:`tnadapt.decompose`.

    Returns
    -------
    FoundRank
        Rank, config, parameters and report.

    Raises
    ------
    ConfigError
        If no rank reaches the error (the message has the error at the largest rank), or the config has no rank to
        search.

    Notes
    -----
    Doubling, then bisection: about 2 log2(r) decompositions. If each decomposition is optimal (LoRA: SVD), so is the
    rank. Otherwise a smaller rank may exist for which the solver did not find the optimum.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> rng = np.random.default_rng(0)
    >>> delta = rng.normal(size=(12, 3)) @ rng.normal(size=(3, 8))
    >>> search_rank([delta], tna.presets.lora(), max_error=1e-6).rank
    3
    """
    return smallest_rank(lambda config: decompose(deltas, config, **settings), cfg, max_error, max_rank)


@checks_arguments
def smallest_rank(
    fit: Callable[[Config], tuple[dict[str, Array], FitReport]],
    cfg: Config,
    max_error: float,
    max_rank: int | None = None,
) -> FoundRank:
    """:func:`search_rank` with any function that fits a config."""
    if isinstance(max_error, bool) or not isinstance(max_error, (int, float, np.floating)) or not 0.0 < max_error < 1.0:
        raise ConfigError(f"max_error must be above 0 and below 1, relative to the updates; got {safe_repr(max_error)}")
    ranks = {cfg.rank} if isinstance(cfg.rank, int) else set(cfg.rank) - {None}
    if len(ranks) != 1:
        raise ConfigError(f"only one rank can be searched, and rank={cfg.rank} has {len(ranks)}: give an integer")
    if max_rank is not None:
        max_rank = integer("max_rank", max_rank, 1, MAX_SIZE, ConfigError)

    def at(rank: int) -> FoundRank:
        several = not isinstance(cfg.rank, int) and tuple(None if r is None else rank for r in cfg.rank)
        config = cfg.replace(rank=several or rank)
        return FoundRank(rank, config, *fit(config))

    first = at(1)
    useful = useful_rank(first.report.plan.groups)
    if useful is None:
        raise ConfigError(f"format={cfg.format!r} has no rank to search: decompose() gives its parameters")
    most = min(useful, max_rank or useful)
    smallest = smallest_within(
        lambda rank: first if rank == 1 else at(rank), lambda fit: fit.report.error, max_error, most
    )
    if smallest.report.error > max_error:
        raise ConfigError(
            f"no rank up to {most} comes within {max_error:g}: the error there is {smallest.report.error:.4g}; allow "
            "a larger error, or use another format or fold"
        )
    return smallest
