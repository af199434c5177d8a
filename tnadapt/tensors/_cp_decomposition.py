"""``cp``: decompose a tensor into a sum of outer products."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.formats import CP
from tnadapt.algebra.products import cp_to_tensor, unfolded
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import Array
from tnadapt.decomposition import completion
from tnadapt.decomposition.block_passes import OVERSAMPLED, BlockPasses, compressed, khatri_rao_product
from tnadapt.decomposition.cp_als import MOVED, Products, SparseSweeps, fit_cp, fit_cp_by_products
from tnadapt.decomposition.fits import Callback, Fit, Iteration, limits_of
from tnadapt.decomposition.linear_algebra import Algebra, double_on_host
from tnadapt.decomposition.sparse_tensor import check_range
from tnadapt.errors import BackendError, ConfigError, ShapeError, safe_repr

from . import _requests
from ._decomposed import CPTensor, finished, scaled_start, smallest_rank
from ._nonnegative import NO_POSITIVE, constrained_modes, least_error, not_negative
from ._requests import Request, exponent_of, normal


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
    symmetric: bool = False,
    ridge: float = 0.0,
    starts: int | None = None,
    random_state: Any = None,
    tol: float = 1e-8,
    max_iterations: int = 200,
    callback: Callback | None = None,
    memory: int = _requests.BLOCK,
) -> CPTensor:
    """Decompose a tensor into a sum of outer products (CANDECOMP/PARAFAC).

    Parameters
    ----------
    tensor : array, shape (d_1, …, d_M)
        Real or complex. Lists and integers are converted. Or sparse: an array of ``scipy.sparse`` (of any order from
        SciPy 1.15), pydata's ``sparse.COO``, or what has ``coords``, ``data`` and ``shape`` as these do; elements that
        are not stored are zero, not missing, and are not formed.
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
        tensor are allowed and fitted as closely as such factors can; the bound counts what they cost.
    symmetric : bool
        Whether all factors are to be the same array, for a real tensor that is symmetric up to rounding; its weights
        may be negative. By L-BFGS in double precision on the host, from three starts by default; without ``mask``,
        ``weights``, ``fixed``, ``nonnegative`` or a given start.
    ridge : float
        Penalty ``ridge * norm ** (2 - 2 / M) * sum(abs(factors) ** 2)`` added to the squared error, with the norm of
        the tensor, over its M factors that are not fixed, with the weights distributed equally over these. It keeps
        components from growing without end. ``history`` then has the root of the sum, relative to the norm. Of a
        matrix, it reduces the singular values by ``ridge * norm``.
    starts : int, optional
        Number of starts, the first by ``init`` and the others random; the best result is returned. Start k depends on
        ``random_state`` and k alone, and each is followed to its end: more starts never have a larger error. By
        default 1, but from ``"svd"`` 3 of a tensor of up to 2^14 elements, and 8 if an exact answer may be near.
    random_state : int or Generator, optional
        Seed of random numbers.
    tol : float
        The iteration stops when a sweep reduces the relative error by no more than this.
    max_iterations : int
        Maximum number of sweeps of each start, and of steps of each descent by Levenberg-Marquardt.
    callback : callable, optional
        Called with the number of each sweep or step, counted through all starts, and the least relative error so far;
        stops the iteration, and all that would follow, if it returns True.
    memory : int
        Bytes that a block may have, for a ``numpy.memmap`` or an array of dask that has more in double precision; mask
        and weights may be such arrays, too. The tensor is then compressed in three passes, the start is found in
        memory, and each sweep, of ALS without Gauss-Newton, reads the tensor once a mode; the result is of NumPy.

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
    approximation may not even exist (de Silva & Lim, 2008). With ``rank``, it is differentiable once it has converged;
    of several starts, the best may be one that does not: use ``starts=1``.

    Sweeps of alternating least squares; each costs ``4 r prod(d)`` multiply-adds, in two matrix products. Where they
    crawl, which is tested after 20 and 30, Levenberg-Marquardt moves all factors at once, with a second-order
    correction, from small matrices: a step costs about two sweeps and a third of ``(r sum(d)) ** 3``, or up to 100
    conjugate gradients beyond 2,000 parameters, in all no more than ``max_iterations`` sweeps or some seconds. On the
    host, of up to 2^20 elements, a tensor is first compressed to its multilinear ranks; a larger problem is first
    solved for its part in the r leading singular vectors of each mode. Every second start has at first a penalty that
    falls with the error. ``max_iterations=30`` turns all of this off.

    With ``rank`` up to 8 and no ``starts``, ``ridge`` or ``callback`` that stops it, ``init="svd"`` of a tensor of up
    to 2^14 elements never has a larger error than a lower rank: unless singular values prove that it is smaller, the
    fit of the rank below is computed, too, and one component of what that leaves is added.

    It has converged where a sweep or step gains no more than ``tol`` and the gradient is small:
    :attr:`FitOutcome.converged` has the definition. If components have grown to a hundred times the tensor and cancel,
    ``outcome.stopped`` is ``"degenerate"``: see :doc:`/cp_convergence`.

    With ``mask`` or ``weights``, all arrays are fitted to the known elements: some sweeps of least squares from several
    starts, then damped Gauss-Newton if the problem is small enough for its equations. ``error`` is that of the known
    elements; ``callback`` is given the least one so far, after each step of Gauss-Newton or each sweep to the end. With
    ``nonnegative``, too, there are only sweeps.

    Nonnegative factors are fitted column by column (hierarchical ALS: Gillis & Glineur, 2012) with extrapolation (Ang
    et al., 2021), in double precision on the host.

    A sparse tensor is fitted like a dense one, in double precision on the host, and the result is of NumPy. With n
    stored elements, a sweep takes ``M² n r`` multiply-adds and ``n r`` numbers, and a step about as much and the
    equations. A sparse tensor of up to 2^14 elements is formed; the error of one above 2^20 is exact to 1e-8.

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
    request = _requests.requested(
        tensor, rank, max_error, mask=mask, weights=weights, random_state=random_state, sparse=True,
        memory=_requests.setting_of("memory", memory, 1),
    )  # fmt: skip
    request.refuse_trace("cp()", "use tensor_train(), or tucker(max_iterations=0)")
    held = _requests.kept_modes(request, init, fixed, CPTensor, "CPTensor(None, factors)")
    if len(held) == len(request.shape):
        raise ConfigError("fixed= keeps all modes, so that nothing is left to fit: leave out one of them")
    limits = limits_of(tol, max_iterations)
    if starts is not None:
        starts = _requests.setting_of("starts", starts, 1, 1 << 20)
    modes = constrained_modes(nonnegative, request)
    whole = not request.sparse and not request.blocks
    ridge = _ridge_of(ridge)
    if ridge and (request.observed is not None or modes or symmetric or request.blocks):
        raise ConfigError(
            "ridge= is for a tensor in memory, without mask=, weights=, nonnegative= and symmetric=: leave one of them "
            "out"
        )
    if len(request.shape) == 2 and request.observed is None and not modes and not held and whole:
        request = request.kept()
    else:
        request = request.scaled()
        init = scaled_start(request, init, held)
    symmetric = symmetric and len(request.shape) > 1
    if symmetric:
        if request.observed is not None or modes or not isinstance(init, str) or mask is not None:
            raise ConfigError("symmetric= goes without mask, weights, nonnegative, fixed and a given start: omit these")
        cubic = _cubic(request)
    gaps = request.blocks and (mask is not None or weights is not None)
    observed = _ObservedBlocks(request.tensor, mask, weights) if gaps else None

    def result_of(arrays: Mapping[str, Array]) -> CPTensor:
        factors = [arrays[f"factor{mode}"] for mode in range(len(request.shape))]
        result = CPTensor.of(request.backend, (arrays.get("weights"), factors))
        return result if held or "weights" in arrays else result.truncated(result.rank)

    def fitted(rank: int) -> CPTensor:
        start = init if isinstance(init, str) else _factors(init, rank, held)
        if not isinstance(start, str):
            for mode in sorted(modes):
                not_negative(request.backend, start[mode], f"factor {mode} of init")
        if symmetric:
            fit = _fitted_symmetric(request, cubic, rank, str(init), starts or _STARTS, Iteration(limits, callback))
        elif observed is not None:
            if held or request.max_error is not None:
                raise ConfigError("mask= and weights= need rank=, and all factors free: leave fixed and max_error out")
            fit = _completed_in_blocks(request, observed, rank, start, Iteration(limits, callback), modes)
        elif request.observed is not None:
            named = None if isinstance(start, str) else {f"factor{mode}": factor for mode, factor in enumerate(start)}
            fit = _requests.completed(
                request, CP(request.shape, rank), limits, callback, starts=max(starts or 1, _requests.STARTS),
                start=named, fixed=held, nonnegative=[f"factor{mode}" for mode in modes],
            )  # fmt: skip
            if len(modes) == len(request.shape):
                fit = fit._replace(bound=least_error(request))
        elif request.blocks:
            fit = _in_blocks(request, rank, start, starts, Iteration(limits, callback), held, modes)
        elif modes or request.sparse:
            fit = _by_products(request, rank, start, starts, Iteration(limits, callback), held, modes, ridge)
        else:
            steps = Iteration(limits, callback)
            fit = fit_cp(
                request.algebra(), request.tensor, rank, steps, init=start, fixed=held, starts=starts, ridge=ridge
            )
        if fit.error == math.inf:
            raise ShapeError(
                f"no sweep of rank {rank} succeeded, as the equations are singular: use another init or random_state, "
                "or a smaller rank"
            )
        return finished(request, fit, result_of, fixed=held, ridge=ridge)

    most = _requests.useful_rank(request.shape)
    if rank is None:
        assert request.max_error is not None
        return smallest_rank(fitted, request.max_error, most, request.shape, init, bool(modes))
    if _requests.integer_of("rank", rank, 1) > most:
        raise ShapeError(
            f"rank {rank} is above {most}, with which every tensor of shape {request.shape} is a CP tensor"
        )
    return fitted(int(rank))


def _ridge_of(ridge: Any) -> float:
    """Return a penalty; raise a ConfigError unless it is a finite number of at least 0."""
    number = isinstance(ridge, (int, float, np.integer, np.floating)) and not isinstance(ridge, bool)
    if not number or not 0.0 <= ridge < math.inf:
        raise ConfigError(f"ridge must be a finite number of at least 0; got {safe_repr(ridge)}")
    return float(ridge)


def _factors(init: CPTensor, rank: int, held: Collection[int]) -> list[Array]:
    """Return the factors of a start, with its weights in the first factor that is not held."""
    if init.rank != rank:
        raise ShapeError(f"init has rank {init.rank}; expected {rank}")
    factors = list(init.factors)
    if init.weights is not None:
        free = next((mode for mode in range(len(factors)) if mode not in held), 0)
        factors[free] = factors[free] * init.weights
    return factors


# -- Sparse tensors, and factors without negative elements -------------------------------------------------------------


def _by_products(
    request: Request,
    rank: int,
    start: str | list[Array],
    starts: int | None,
    steps: Iteration,
    fixed: Collection[int],
    nonnegative: Collection[int],
    ridge: float,
) -> Fit:
    """Return the best fit from several starts."""
    backend, shape, algebra = request.backend, request.shape, request.algebra()
    if len(shape) == 1:
        column = backend.reshape(request.tensor, (-1, 1))
        return Fit({"factor0": backend.where(column > 0.0, column, column * 0.0)}, True, 0, "exact")
    bound = least_error(request) if len(nonnegative) == len(shape) else 0.0
    if request.norm == 0.0 or (bound >= NO_POSITIVE and not fixed):
        zeros = {f"factor{mode}": algebra.zeros((size, rank)) for mode, size in enumerate(shape)}
        return Fit(zeros | {f"factor{mode}": start[mode] for mode in fixed}, True, 0, "zero")
    kept = {f"factor{mode}": start[mode] for mode in fixed}
    if request.sparse and not nonnegative:
        wide = Algebra(backend, np.zeros(1, request.tensor.values.dtype), seed=request.seed)
        fit = fit_cp(wide, request.tensor, rank, steps, init=start, fixed=fixed, starts=starts, ridge=ridge)
        return fit._replace(arrays=algebra.arrays(fit.arrays) | kept)
    if request.sparse:
        sparse = request.tensor
        tensor, shift = Products(shape, sparse.norm, sparse.product, SparseSweeps(sparse).residual), 0
    else:
        host = double_on_host(backend, request.tensor)
        shift = exponent_of(host)
        tensor = _of_dense(np.ldexp(host, -shift))
    # One of the factors that change has the scale of the tensor.
    free = next(mode for mode in range(len(shape)) if mode not in fixed)

    def leading(mode: int) -> np.ndarray:
        if request.sparse:
            return np.asarray(request.tensor.left(mode, min(rank, shape[mode]), request.seed))
        return double_on_host(backend, algebra.left(unfolded(backend, request.tensor, mode), rank)[0])

    begun = _starts(request, rank, start, starts or 1, fixed, nonnegative, leading)
    scaled = ([np.ldexp(x, -shift) if shift and m == free else x for m, x in enumerate(each)] for each in begun)
    fit = fit_cp_by_products(tensor, scaled, steps, fixed=fixed, nonnegative=nonnegative)
    arrays = {n: np.ldexp(x, shift) if shift and n == f"factor{free}" else x for n, x in fit.arrays.items()}
    return fit._replace(arrays=algebra.arrays(arrays) | kept, bound=bound)


def _of_dense(tensor: np.ndarray) -> Products:
    def distance(factors: Sequence[np.ndarray]) -> float:
        return float(np.linalg.norm(tensor - cp_to_tensor((None, factors))))

    norm = float(np.linalg.norm(tensor))
    return Products(tensor.shape, norm, lambda factors, mode: khatri_rao_product(tensor, mode, factors), distance)


def _starts(
    request: Request,
    rank: int,
    start: str | list[Array],
    count: int,
    fixed: Collection[int],
    nonnegative: Collection[int],
    leading: Callable[[int], np.ndarray],
) -> Iterator[list[np.ndarray]]:
    """Yield the factors of each start, the first by ``start`` and the others random; ``leading`` returns leading left
    singular vectors of an unfolding.
    """
    backend, rng = request.backend, np.random.default_rng(request.seed)
    dtype = "complex128" if backend.is_complex(request.tensor) else "float64"
    for number in range(count):
        factors = []
        for mode, size in enumerate(request.shape):
            if not isinstance(start, str) and (not number or mode in fixed):
                factor = double_on_host(backend, start[mode])
            elif number or start == "random":
                factor = normal(rng, (size, rank), dtype)
            else:
                columns = leading(mode)[:, :rank]
                factor = normal(rng, (size, rank), dtype) * (MOVED / math.sqrt(size))
                factor[:, : columns.shape[1]] += columns
                factor[:, columns.shape[1] :] *= 1.0 / MOVED
            factors.append(abs(factor) if mode in nonnegative else factor)
        yield factors


# -- Symmetric tensors: one factor for all modes -----------------------------------------------------------------------

# Kolda, "Numerical optimization for symmetric tensor decomposition" (Math. Program. 151, 2015). The weights are the
# best ones for the factor, so that its gradient is that of the error with these weights held.


# Starts by default.
_STARTS = 3
# The norm of a difference that is rounding, in units of epsilon relative to the tensor; and a ridge for the weights.
_ALIKE, _RIDGE = 64.0, 1e-14
# Single steps may gain little; what this many gain says whether it has converged.
_STEPS = 20


def _cubic(request: Request) -> np.ndarray:
    """Return a symmetric tensor on the host, in double precision."""
    if request.sparse or request.blocks:
        raise ConfigError("symmetric= needs a tensor in memory: pass x.toarray() or np.asarray(x)")
    if request.backend.is_complex(request.tensor):
        raise BackendError("symmetric= needs a real tensor: leave it out, or decompose the real and imaginary parts")
    request.refuse_recorded("with symmetric=, the tensor", request.source)
    host, most = double_on_host(request.backend, request.tensor), _ALIKE * request.algebra().eps * request.norm
    alike = len(set(request.shape)) == 1
    for mode in range(len(request.shape) - 1):
        alike = alike and float(np.linalg.norm(host - np.swapaxes(host, mode, mode + 1))) <= most
    if not alike:
        raise ShapeError(
            f"the tensor of shape {request.shape} is not symmetric: symmetric= needs equal sizes, and the same element "
            "for any order of its indices; take the mean over all orders of the modes"
        )
    return host


def _fitted_symmetric(request: Request, tensor: np.ndarray, rank: int, init: str, starts: int, steps: Iteration) -> Fit:
    """Return the best of several fits, with weights in descending order of magnitude."""
    from scipy.optimize import minimize

    order, size, rng = tensor.ndim, len(tensor), np.random.default_rng(request.seed)
    names = [f"factor{mode}" for mode in range(order)]

    def named(weights: np.ndarray, factor: np.ndarray) -> dict[str, Array]:
        sort = np.argsort(-abs(weights), kind="stable")
        arrays = request.algebra().arrays({"weights": weights[sort], "factor": factor[:, sort]})
        return {"weights": arrays["weights"]} | dict.fromkeys(names, arrays["factor"])

    if order == 2 or not request.norm:
        values, vectors = np.linalg.eigh(tensor.reshape(size, -1)[:, :size])
        first = np.argsort(-abs(values), kind="stable")[:rank]
        return Fit(named(values[first], vectors[:, first]), True, 0, "eigenvectors", error=0.0)
    shift = exponent_of(tensor)
    tensor = np.ldexp(tensor, -shift)
    norm = float(np.linalg.norm(tensor))

    def unit(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = flat.reshape(size, rank)
        lengths = np.linalg.norm(factor, axis=0)
        return factor / lengths, lengths

    def solved(factor: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """Return the best weights, half their gradient by the columns, and half the squared error."""
        products = khatri_rao_product(tensor, 0, [factor] * order)
        gram = (factor.T @ factor) ** order
        weights = np.linalg.solve(gram + _RIDGE * np.eye(rank), np.sum(products * factor, axis=0))
        # From the residual, both have as many digits for exact data as for any other.
        left = cp_to_tensor((weights, [factor] * order)) - tensor
        return weights, khatri_rao_product(left, 0, [factor] * order), 0.5 * float(np.vdot(left, left))

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        factor, lengths = unit(flat)
        weights, pulled, half = solved(factor)
        slope = order * weights * pulled
        slope = (slope - factor * np.sum(slope * factor, axis=0)) / lengths
        return half / norm**2, slope.reshape(-1) / norm**2

    def stop(intermediate_result: Any) -> None:
        errors.append(math.sqrt(max(0.0, 2.0 * intermediate_result.fun)))
        if not steps.note(errors[-1]):
            if len(errors) > _STEPS and steps.limits.converged(errors[-_STEPS - 1], errors[-1]):
                steps.stopped = "converged"
            elif len(errors) == steps.limits.iterations:
                steps.stopped = "max_iterations"
        if steps.stopped:
            raise StopIteration

    best, best_error, stopped = np.zeros((size, rank)), math.inf, ""
    for number in range(starts):
        factor = rng.standard_normal((size, rank))
        if not number and init == "svd":
            leading = np.linalg.svd(tensor.reshape(size, -1), full_matrices=False)[0][:, :rank]
            factor[:, : leading.shape[1]] = leading + MOVED * factor[:, : leading.shape[1]]
        steps.begin()
        errors = list[float]()
        minimum = minimize(
            value, factor.reshape(-1), jac=True, method="L-BFGS-B", callback=stop,
            options={"maxiter": steps.limits.iterations, "ftol": 0.0, "gtol": 0.0, "maxcor": 20},
        )  # fmt: skip
        if minimum.fun < best_error:
            best, best_error, stopped = unit(minimum.x)[0], float(minimum.fun), steps.stopped or "converged"
        if steps.stopped == "callback":
            break
    arrays = named(np.ldexp(solved(best)[0], shift), best)
    return steps.fit(arrays, "L-BFGS", math.sqrt(max(0.0, 2.0 * best_error)))._replace(stopped=stopped)


# -- Tensors that are read block by block ------------------------------------------------------------------------------


def _in_blocks(
    request: Request,
    rank: int,
    start: str | list[Array],
    starts: int | None,
    steps: Iteration,
    fixed: Collection[int],
    nonnegative: Collection[int],
) -> Fit:
    """Fit the tensor that three passes compress it to, and go on with sweeps over the blocks from there."""
    passes: BlockPasses = request.tensor
    small = compressed(passes, [min(d, 2 * rank + OVERSAMPLED) for d in passes.shape], None, request.seed)
    zeros = {f"factor{mode}": np.zeros((size, rank), passes.wide) for mode, size in enumerate(passes.shape)}
    if not small.norm:
        kept = {f"factor{mode}": start[mode] for mode in fixed}
        return Fit(request.algebra().arrays(zeros) | kept, True, 0, "zero", error=0.0)
    core, bases = small.core, small.factors
    inside = Iteration(steps.limits)
    if isinstance(start, str) and not nonnegative:
        inner = fit_cp(Algebra(request.backend, core, seed=request.seed), core, rank, inside, init=start, starts=starts)
        factors = [inner.arrays[f"factor{mode}"] for mode in range(core.ndim)]
        if "weights" in inner.arrays and not fixed:  # of a matrix, whose SVD sweeps would not keep
            error = math.hypot(
                small.lost, float(np.linalg.norm(core - cp_to_tensor((inner.arrays["weights"], factors))))
            )
            turned = {
                f"factor{mode}": basis @ factor for mode, (basis, factor) in enumerate(zip(bases, factors, strict=True))
            }
            arrays = request.algebra().arrays({"weights": inner.arrays["weights"]} | turned)
            return Fit(arrays, False, 0, "compressed in blocks, SVD", error=error / small.norm)
        factors[0] = factors[0] * inner.arrays.get("weights", 1.0)
        begun = [basis @ factor for basis, factor in zip(bases, factors, strict=True)]
        if begun[0].shape[1] < rank:  # of no more use
            begun = [np.pad(factor, ((0, 0), (0, rank - factor.shape[1]))) for factor in begun]
    else:

        def product(factors: Sequence[np.ndarray], mode: int) -> np.ndarray:
            projected = [basis.T @ factor for basis, factor in zip(bases, factors, strict=True)]
            return np.asarray(bases[mode] @ khatri_rao_product(core, mode, projected))

        def distance(factors: Sequence[np.ndarray]) -> float:
            inside_core = CPTensor(
                None, [basis.conj().T @ factor for basis, factor in zip(bases, factors, strict=True)]
            )
            outside = float(CPTensor(None, list(factors)).norm()) ** 2 - float(inside_core.norm()) ** 2
            return math.hypot(float(np.linalg.norm(core - inside_core.to_tensor())), math.sqrt(max(0.0, outside)))

        tensor = Products(passes.shape, float(np.linalg.norm(core)), product, distance)
        each = _starts(request, rank, start, starts or 1, fixed, nonnegative, lambda mode: bases[mode])
        fitted = fit_cp_by_products(tensor, each, inside, fixed=fixed, nonnegative=nonnegative).arrays
        begun = [fitted[f"factor{mode}"] for mode in range(core.ndim)]
    whole = Products(
        passes.shape, small.norm, lambda factors, mode: passes.sketches({mode: factors})[0][mode],
        lambda factors: passes.distance(None, factors),
    )  # fmt: skip
    fit = fit_cp_by_products(whole, [begun], steps, fixed=fixed, nonnegative=nonnegative)
    kept = {f"factor{mode}": start[mode] for mode in fixed}
    arrays = request.algebra().arrays(fit.arrays) | kept
    return fit._replace(arrays=arrays, method=f"compressed in blocks, {fit.method}")


class _ObservedBlocks:
    """The observed elements of a tensor that is read block by block, checked in one pass."""

    def __init__(self, passes: BlockPasses, mask: Any, weights: Any) -> None:
        self.passes, self.mask, self.weights = passes, mask, weights
        for what, array in (("mask", mask), ("weights", weights)):
            if array is not None and tuple(getattr(array, "shape", ())) != passes.shape:
                raise ShapeError(
                    f"{what} must be an array of the tensor's shape {passes.shape}; got "
                    f"{getattr(array, 'shape', type(array).__name__)}"
                )
        seen, square, largest = [np.zeros(size, bool) for size in passes.shape], 0.0, 0.0
        for place, wanted, weight in self.blocks():
            if not (np.isfinite(weight).all() and np.isfinite(wanted).all()):
                raise ShapeError(
                    "an observed element is NaN or infinity, or a weight is one of these or negative: mask must be "
                    "True where an element is known, and weights finite and not negative"
                )
            for mode, (rows, at) in enumerate(zip(seen, place, strict=True)):
                rows[at] |= weight.any(axis=tuple(m for m in range(weight.ndim) if m != mode))
            sizes = np.abs(wanted) * np.sqrt(weight)
            largest = max(largest, float(np.max(sizes)))
            with np.errstate(over="ignore"):
                square += float(np.sum(sizes**2))
        check_range(largest, "a tensor that is read in blocks")
        self.norm = math.sqrt(square)
        for mode, rows in enumerate(seen):
            if not rows.all():
                raise ShapeError(_requests.UNOBSERVED.format(index=int(np.argmin(rows)), mode=mode))

    def blocks(self) -> Iterator[tuple[tuple[slice, ...], np.ndarray, np.ndarray]]:
        """Yield the position of each block, its elements and their weights, both zero where it is not observed."""
        for place, block in self.passes.blocks():
            weights = np.ones(())
            if self.weights is not None:
                with np.errstate(invalid="ignore"):  # negative weights become NaN
                    weights = np.sqrt(np.asarray(self.weights[place], np.float64)) ** 2
            if self.mask is not None:
                weights = weights * np.asarray(self.mask[place], bool)
            yield place, np.where(weights, block, 0.0), weights


def _completed_in_blocks(
    request: Request,
    observed: _ObservedBlocks,
    rank: int,
    start: str | list[Array],
    steps: Iteration,
    nonnegative: Collection[int],
) -> Fit:
    """Fit the observed elements, by sweeps from a given start or a random one."""
    passes, split = observed.passes, CP(request.shape, rank)
    names = [f"factor{mode}" for mode in range(len(request.shape))]
    bounded = {names[mode] for mode in nonnegative}
    if not observed.norm:
        zeros = {name: np.zeros(shape) for name, shape in split.shapes.items()}
        return Fit(request.algebra().arrays(zeros), True, 0, "zero", error=0.0)
    if isinstance(start, str):
        place, wanted, _ = next(block for block in observed.blocks() if block[1].any())
        # Some of its elements tell the size of a start.
        inside = np.flatnonzero(wanted)[: max(1, passes.elements // (rank * (len(names) + 2)))]
        places = [at.start + index for at, index in zip(place, np.unravel_index(inside, wanted.shape), strict=True)]
        wanted = wanted.reshape(-1)[inside]
        elements, rng = completion.ObservedElements([split], [[""]], [places]), np.random.RandomState(request.seed)
        begun = completion.random_start(elements, rng, float(np.linalg.norm(wanted)), passes.wide, bounded)
    else:
        begun = {name: double_on_host(request.backend, factor) for name, factor in zip(names, start, strict=True)}
    fit = completion.sweeps_in_blocks(observed.blocks, begun, steps, observed.norm, passes.elements, bounded)
    solver = "nonnegative least squares" if bounded else "least squares"
    return fit._replace(arrays=request.algebra().arrays(fit.arrays), method=f"{solver} on observed elements in blocks")
