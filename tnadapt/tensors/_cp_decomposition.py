"""``cp``: decompose a tensor into a sum of outer products."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import CP, unfolded
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array, get_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.completion import complete, refinable
from tnadapt.decomposition.cp_als import (
    CRAWLS,
    MOVED,
    NEAR,
    OTHER_STARTS,
    CPFactors,
    CPSweeps,
    cp_als,
    nearest_rank_one,
)
from tnadapt.decomposition.fits import Claim
from tnadapt.decomposition.linear_algebra import MatrixTruncation
from tnadapt.errors import ConfigError, ShapeError, safe_repr

from ._checks import integer_of, mode_of, useful_rank
from ._decomposed import CPTensor
from ._nonnegative import constrained_modes, fitted_cp, refuse_callback
from ._requests import (
    METHOD,
    STARTS,
    Callback,
    Request,
    Watch,
    completed,
    hints_keywords,
    refuse_observed,
    requested,
    smallest_rank,
)

__all__ = ["cp"]


@hints_keywords
@checks_arguments
def cp(
    tensor: Any,
    rank: int | None = None,
    *,
    max_error: float | None = None,
    mask: Any = None,
    weights: Any = None,
    init: Any = "svd",
    fixed: Collection[int] = (),
    nonnegative: Any = False,
    starts: int = 1,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
) -> CPTensor:
    """Decompose a tensor into a sum of outer products (CANDECOMP/PARAFAC) by alternating least squares.

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted.
    rank : int, optional
        Number of components.
    max_error : float, optional
        Relative Frobenius error that is allowed, instead of a rank: the smallest rank is searched whose fit has no
        larger error.
    mask : array of bool, shape (d_1, …, d_M), optional
        True where an element is known; others may be NaN. In each mode, every index needs a known element.
    weights : array, shape (d_1, …, d_M), optional
        Nonnegative weights of the squared errors of the elements.
    init : {"svd", "random"} or CPTensor
        What the iteration starts from: the leading singular vectors of each unfolding, with a little noise; normal
        numbers; or a given result.
    fixed : collection of int
        Modes whose factors of ``init`` are kept.
    nonnegative : bool or collection of int
        Whether no factor may have negative elements, or the modes whose factors may not. Negative elements of the
        tensor are allowed and fitted as closely as such factors can; the bound counts what they cost. The iteration is
        then TensorLy's HALS on the host, without a callback.
    starts : int
        Number of starts, the first by ``init`` and the others random; the best result is returned.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps of each start, and of steps of each descent by Gauss-Newton.
    callback : callable, optional
        Called with the number and the relative error of each sweep, then of each step of Gauss-Newton, whose numbers
        continue those of the sweeps; stops the iteration, and all that would follow, if it returns True.

    Returns
    -------
    CPTensor
        With factors of shape (d_m, r) whose columns have norm 1, and their weights in descending order of magnitude, in
        the tensor's library, dtype and device.

    Raises
    ------
    ShapeError
        If the tensor has NaN, infinity or no elements, or the rank is out of range.
    BackendError
        If the tensor is not an array of numbers of a known library, or is traced.
    ConfigError
        If a setting is out of range.

    Notes
    -----
    A matrix has an exact answer, its truncated SVD (Eckart & Young). For more modes there is no guarantee; a best
    approximation may not even exist (de Silva & Lim, 2008). With ``rank``, it is differentiable once it has converged.
    A sweep costs ``4 r prod(d)`` multiply-adds, in two matrix products.

    With ``mask`` or ``weights``, all arrays are fitted to the known elements: some sweeps of least squares from several
    starts, then damped Gauss-Newton if the problem is small enough for its equations. ``error`` is that of the known
    elements; ``callback`` is given the least one so far, after each step of Gauss-Newton or each sweep to the end.

    If sweeps converge slowly to an error below 0.3, and the tensor is small, there may be an exact answer: damped
    Gauss-Newton continues from there and from other starts, each step at the cost of solving for all factors at once,
    which may take much longer than the sweeps. Only with ``init="svd"`` and after more than 30 sweeps:
    ``max_iterations=30`` turns it off.

    Examples
    --------
    >>> import numpy as np
    >>> from tnadapt.tensors import random_cp
    >>> tensor = random_cp((5, 6, 7), 2).to_tensor()
    >>> weights, factors = cp(tensor, 2)
    >>> weights.shape, [factor.shape for factor in factors]
    ((2,), [(5, 2), (6, 2), (7, 2)])
    >>> cp(tensor, max_error=1e-6).rank
    2
    >>> counts = cp(abs(tensor), 4, nonnegative=True)
    >>> all((factor >= 0.0).all() for factor in counts.factors), counts.outcome.method
    (True, 'non-negative HALS')
    """
    request = requested(tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state)
    request.refuse_trace("cp()", "use tensor_train(), or tucker(max_iterations=0)")
    options = _Options(request, init, fixed, nonnegative, starts, tol, max_iterations, callback)
    most = useful_rank(request.shape)
    if rank is None:
        assert request.max_error is not None
        return smallest_rank(options.fitted, request.max_error, most, request.shape, init)
    if integer_of("rank", rank, 1) > most:
        raise ShapeError(
            f"rank {rank} is above {most}, with which every tensor of shape {request.shape} is a CP tensor"
        )
    return options.fitted(int(rank))


class _Options:
    """The checked settings of a CP decomposition."""

    def __init__(
        self,
        request: Request,
        init: Any,
        fixed: Collection[int],
        nonnegative: bool | Collection[int],
        starts: int,
        tol: float,
        max_iterations: int,
        callback: Callback | None,
    ) -> None:
        self.request, self.init = request, init
        self.fixed = {mode_of(mode, request.shape, "a mode in fixed") for mode in fixed}
        self.starts = integer_of("starts", starts, 1, 1 << 20)
        self.iterations = integer_of("max_iterations", max_iterations, 1)
        self.tol, self.callback = tol, callback
        self.nonnegative = constrained_modes(nonnegative, request) if nonnegative is not False else frozenset[int]()
        if self.nonnegative:
            refuse_callback(callback)
        if not isinstance(init, CPTensor) and (not isinstance(init, str) or init not in ("svd", "random")):
            raise ConfigError(f"init must be 'svd', 'random' or a CPTensor; got {safe_repr(init)}")
        if isinstance(init, str) and self.fixed:
            raise ConfigError(
                f"fixed={sorted(self.fixed)} keeps factors of a start: give them as init=CPTensor(None, factors)"
            )
        if isinstance(init, CPTensor):
            get_backend(init.factors[0], request.tensor)
            if init.shape != request.shape:
                raise ShapeError(f"init has shape {init.shape}; expected the tensor's, {request.shape}")
            request.refuse_recorded("init", *init.arrays)

    def fitted(self, rank: int) -> CPTensor:
        """Return the fit of one rank."""
        request, backend = self.request, self.request.backend
        shape = request.shape
        if len(shape) == 2 and request.observed is None and not self.nonnegative and not self.fixed:
            return self._by_svd(rank)
        norm = request.norm()
        if request.observed is not None and norm > 0.0:
            refuse_observed(self.nonnegative)
            return self._completed(rank)
        if norm == 0.0:
            return self._zero(rank)
        if len(shape) == 1:
            column = backend.reshape(request.tensor, (-1, 1))
            if self.nonnegative:
                column = backend.where(column > 0.0, column, column * 0.0)

            def exact(tensor: Array) -> CPTensor:
                return CPTensor(None, [backend.reshape(tensor, (-1, 1))]).truncated(1)

            return self._finished(CPTensor(None, [column]), "exact", optimal=True, closed=exact)
        if self.nonnegative:
            tol = Watch(self.tol, None).tol
            return fitted_cp(request, rank, self.nonnegative, self.init, self.fixed, self.starts, tol, self.iterations)
        rng = np.random.default_rng(request.seed)
        best: tuple[CPFactors, Watch] | None = None
        sweeps = CPSweeps(backend, request.tensor, self.fixed)
        for number in range(self.starts):
            watch = Watch(self.tol, self.callback)
            start = self._start(rank, rng, first=number == 0)
            run = cp_als(sweeps, start, norm, self.iterations, watch, extrapolate=not self.fixed)
            if best is None or run.error < best[0].error:
                best = run, watch
            if best[0].error <= 64.0 * sweeps.epsilon * norm or watch.stopped:
                break
        assert best is not None
        stopped = watch.stopped
        (factors, error, _), watch = best
        if not math.isfinite(error):
            raise ShapeError(
                f"no sweep of rank {rank} succeeded, as the equations are singular: use another init or random_state, "
                "or a smaller rank"
            )
        # Where sweeps crawl; where they converge fast, Gauss-Newton would take longer than all of them.
        near = 64.0 * sweeps.epsilon * norm < error <= NEAR * norm and len(watch.history) > CRAWLS
        plain = isinstance(self.init, str) and self.init == "svd"
        if near and plain and not stopped and refinable(CP(shape, rank)):
            return self._refined(factors, error / norm, watch)
        return self._finished(CPTensor(None, factors), "ALS", watch=watch)

    def _by_svd(self, rank: int) -> CPTensor:
        """Return the truncated SVD of a matrix."""
        request, backend = self.request.kept(), self.request.backend
        truncation = MatrixTruncation(backend, request.tensor, "auto", request.seed, settled=request.settled)

        def closed(tensor: Array) -> CPTensor:
            found = truncation.to_rank(tensor, rank)
            return CPTensor(found.s, [found.u, backend.matrix_transpose(found.vh)])

        found = truncation.to_rank(request.tensor, rank)
        if backend.largest(found.s) == 0.0:
            return self._zero(rank)
        made = CPTensor(found.s, [found.u, backend.matrix_transpose(found.vh)])
        return request.finished(made, "SVD", optimal=found.exact, closed=closed)

    def _zero(self, rank: int) -> CPTensor:
        zeros = [self.request.backend.zeros((size, rank), like=self.request.tensor) for size in self.request.shape]
        return self._finished(CPTensor(None, zeros), "zero", optimal=True)

    def _refined(self, factors: Sequence[Array], error: float, watch: Watch) -> CPTensor:
        """Continue by Gauss-Newton, and from other starts, as there may be an exact answer."""
        request, backend, swept = self.request, self.request.backend, len(watch.history)

        def seen(count: int, now: float) -> bool:
            return watch.told(swept + count, min(now, error))

        found = complete(
            [CP(request.shape, int(factors[0].shape[1]))], backend.to_numpy(request.tensor),
            np.ones(request.shape, bool), starts=OTHER_STARTS, seed=request.seed,
            limits=Limits(watch.tol, self.iterations),
            start={f"factor{mode}": backend.to_numpy(factor) for mode, factor in enumerate(factors)}, watch=seen,
        )  # fmt: skip
        if not found.error < error:
            watch.converged = watch.converged and not watch.stopped
            return self._finished(CPTensor(None, list(factors)), "ALS", watch=watch)
        watch.converged = found.converged
        kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
        refined = [backend.asarray(np.ascontiguousarray(one), kind, device) for one in found.arrays.values()]
        return self._finished(CPTensor(None, refined), "ALS, Gauss-Newton", watch=watch)

    def _completed(self, rank: int) -> CPTensor:
        """Return the fit to the observed elements."""
        start, watch = None, Watch(self.tol, self.callback)
        if isinstance(self.init, CPTensor):
            begun = self._start(rank, np.random.default_rng(self.request.seed), first=True)
            start = {f"factor{mode}": factor for mode, factor in enumerate(begun)}
        found = completed(
            self.request, [CP(self.request.shape, rank)], watch, iterations=self.iterations,
            starts=max(self.starts, STARTS), start=start, fixed=self.fixed,
        )  # fmt: skip
        made = CPTensor(None, [found.arrays[f"factor{mode}"] for mode in range(len(self.request.shape))])
        return self.request.finished(made.truncated(rank), METHOD, converged=found.converged, history=found.history)

    def _finished(
        self,
        found: CPTensor,
        method: str,
        optimal: Claim = False,
        watch: Watch | None = None,
        closed: Callable[[Array], CPTensor] | None = None,
    ) -> CPTensor:
        ordered = found if self.fixed else found.truncated(found.rank)
        history = () if watch is None else watch.history
        return self.request.finished(
            ordered, method, optimal=optimal, converged=watch is None or watch.converged, history=history,
            closed=closed, fixed=self.fixed,
        )  # fmt: skip

    def _start(self, rank: int, rng: np.random.Generator, first: bool) -> list[Array]:
        request, backend = self.request, self.request.backend
        kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)

        def normal(size: int, columns: int) -> Array:
            numbers = rng.standard_normal((size, columns))
            if kind.startswith("complex"):
                numbers = numbers + 1j * rng.standard_normal((size, columns))
            return backend.asarray(numbers, kind, device)

        if isinstance(self.init, CPTensor):
            if self.init.rank != rank:
                raise ShapeError(f"init has rank {self.init.rank}; expected {rank}")
            factors = list(self.init.factors)
            if self.init.weights is not None:
                free = next((mode for mode in range(len(factors)) if mode not in self.fixed), 0)
                factors[free] = factors[free] * self.init.weights
            if not first:
                factors = [
                    one if mode in self.fixed else normal(int(one.shape[0]), rank) for mode, one in enumerate(factors)
                ]
            return factors
        if self.init == "random" or not first:
            return [normal(size, rank) for size in request.shape]
        truncation, factors = MatrixTruncation(backend, request.tensor, "auto", request.seed), []
        if rank == 1 and truncation.algebra is not None:
            return nearest_rank_one(truncation.algebra, request.tensor, Limits(self.tol, self.iterations))[0]
        for mode, size in enumerate(request.shape):
            columns = truncation.left_to_rank(unfolded(backend, request.tensor, mode), rank).u
            missing = rank - int(columns.shape[1])
            if missing:
                columns = backend.concat([columns, normal(size, missing)], axis=1)
            factors.append(columns + normal(size, rank) * (MOVED / math.sqrt(size)))
        return factors
