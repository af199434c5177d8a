"""What all decompositions share: arguments, missing elements, convergence, the search for a rank, errors of results."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from tnadapt.algebra.formats import Format
from tnadapt.backends import Array, Backend, get_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.block_passes import LEAST_ERROR, BlockPasses, Compressed, by_error, by_sizes
from tnadapt.decomposition.completion import complete, unobserved
from tnadapt.decomposition.fits import OPEN, Claim, holds, smallest_within
from tnadapt.decomposition.linear_algebra import norm_of, with_value
from tnadapt.errors import BackendError, ConfigError, ShapeError, UnexpectedKeywordError, safe_repr

from ._checks import as_tensor, error_limit, finite, integer_of
from ._decomposed import Decomposed, FitOutcome

__all__ = [
    "BLOCK",
    "METHOD",
    "OVERSAMPLED",
    "STARTS",
    "Callback",
    "Request",
    "Watch",
    "completed",
    "compressed",
    "hints_keywords",
    "one_of",
    "refuse_observed",
    "requested",
    "result_dtype",
    "seed_of",
    "smallest_rank",
    "with_block_error",
]


# -- Arguments, and what is said of the result -------------------------------------------------------------------------


Callback = Callable[[int, float], Any]
D = TypeVar("D", bound=Decomposed)

# Of larger tensors no copy is held until the error is asked for: it is computed at once.
_COPIED = 1 << 24


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes
    ----------
    backend : Backend
    tensor : array
        Zero where it is not observed.
    observed : array or None
        Square roots of the weights of the elements, zero for those that are not observed; None if all count equally.
    max_error : float or None
        The relative error that is allowed; None if a rank is given.
    seed : int
    settled : bool
        Whether nobody else can change the tensor, so that the error may be computed when it is read.
    source : array or None
        The tensor with its derivatives, if they are recorded; ``tensor`` is then detached, so that the result is the
        same. :meth:`finished` connects the two.
    """

    backend: Backend
    tensor: Array
    observed: Array | None
    max_error: float | None
    seed: int
    settled: bool = False
    source: Array | None = None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(map(int, self.tensor.shape))

    @property
    def concrete(self) -> bool:
        """Whether the values are known: not inside a trace."""
        return self.backend.is_concrete(self.tensor)

    def norm(self) -> float:
        """Frobenius norm of the tensor in float64; of the observed elements."""
        return self._norm

    @functools.cached_property
    def _norm(self) -> float:
        return norm_of(self.backend, self.weighted(self.tensor))

    def kept(self) -> Request:
        """Return the same request with a tensor of its own, if it is not too large for a copy."""
        if self.settled or not self.concrete or math.prod(self.shape) > _COPIED:
            return self
        return dataclasses.replace(self, tensor=self.tensor * 1, settled=True)

    def refuse_recorded(self, what: str, *given: Array | None) -> None:
        """Raise a BackendError if derivatives of given arrays are recorded: the result has none."""
        if any(array is not None and self.backend.differentiates(array) for array in given):
            raise BackendError(f"{what} is not differentiated: detach the tensor first, as in x.detach()")

    def refuse_trace(self, what: str, way: str) -> None:
        """Raise a BackendError inside a trace, where the values that a solver needs are unknown."""
        if not self.concrete:
            raise BackendError(
                f"{what} iterates until it converges, which takes the values of the tensor, and they are unknown "
                f"inside a trace (jax.jit, jax.grad, torch.func, torch.compile): {way}"
            )

    def weighted(self, tensor: Array) -> Array:
        """Multiply a tensor by the roots of the weights."""
        return tensor if self.observed is None else tensor * self.observed

    def error_of(self, found: Decomposed) -> float:
        """Relative Frobenius error of a decomposition, from its tensor."""
        norm = self.norm()
        residual = norm_of(
            self.backend, self.weighted(self.tensor - self.backend.reshape(found.to_tensor(), self.shape))
        )
        return residual / norm if norm else float(residual > 0.0)

    def finished(
        self,
        found: D,
        method: str,
        *,
        optimal: Claim = False,
        known: Claim = True,
        factor: float = math.inf,
        bound: float = 0.0,
        converged: bool = True,
        history: Sequence[float] = (),
        closed: Callable[[Array], D] | None = None,
        fixed: Collection[int] = (),
    ) -> D:
        """Attach to a result how good it is, and its derivative if it is recorded; inside a trace return it as it is.

        Parameters
        ----------
        found : Decomposed
        method : str
        optimal : bool or function that returns one
            Whether theory guarantees the optimum.
        known : bool or function that returns one
            Whether the steps that ``factor`` rests on are known to be the best ones.
        factor : float
            The error is at most this many times the least one.
        bound : float
            A lower bound on the least relative error.
        converged : bool
        history : sequence of float
        closed : callable, optional
            Computes the result from a tensor whose derivatives are recorded, if that does not take an iteration.
            Otherwise the derivative is that of a minimum of the error.
        fixed : collection of int
            Which of the result's ``arrays`` do not depend on the tensor.
        """
        if not self.concrete:
            return found
        rounding = 64.0 * float(np.finfo(self.backend.dtype_name(self.tensor)).eps)

        def optimum(error: float) -> tuple[float, bool]:
            is_optimal = holds(optimal)
            least = max(bound, error / factor if factor < math.inf and holds(known) else 0.0)
            if is_optimal:
                least = max(least, error * (1.0 - OPEN) - rounding)
            least = max(0.0, min(error, least))
            return least, bool(is_optimal or error <= rounding or error <= least * (1.0 + 1e-6))

        error: float | Callable[[], float]
        if self.settled:
            # The caller may change the arrays before the error is asked for.
            copied: D = tuple.__new__(type(found), _copied(found))  # type: ignore[type-var]
            error = functools.partial(self.error_of, copied)
        else:
            error = self.error_of(found)
        outcome = FitOutcome.computed_later(
            optimum, error=error, converged=converged, history=tuple(history), method=method
        )
        return self.differentiable(found, converged, closed, fixed).with_outcome(outcome)

    def differentiable(
        self, found: D, converged: bool, closed: Callable[[Array], D] | None = None, fixed: Collection[int] = ()
    ) -> D:
        """Return a result with the same values, and with its derivative if it is recorded; see :meth:`finished`."""
        if self.source is None:
            return found
        backend, values = self.backend, found.arrays
        if closed is not None:
            expressed = closed(self.source).arrays
            return found.with_arrays(
                [with_value(backend, value, array) for value, array in zip(values, expressed, strict=True)]
            )
        from tnadapt.decomposition.implicit_gradient import implicit_gradient

        kind = backend.dtype_name(self.tensor)
        hosts, contraction = [backend.to_numpy(value) for value in values], found.contraction

        def pullback(tensor: Array, cotangents: Sequence[Array]) -> Array:
            gradient = implicit_gradient(
                contraction, hosts, backend.to_numpy(tensor), [backend.to_numpy(one) for one in cotangents], fixed,
                float(np.finfo(kind).eps), converged,
            )  # fmt: skip
            return backend.asarray(gradient, kind, backend.device(tensor))

        arrays = backend.with_pullback(self.source, values, pullback)
        for place in fixed:
            arrays[place] = values[place]
        return found.with_arrays(arrays).scaled_alike(found)


def _copied(parts: Any) -> list[Any]:
    """Copy arrays in nested sequences."""
    return [_copied(part) if isinstance(part, (list, tuple)) else None if part is None else part * 1 for part in parts]


def requested(
    tensor: Any,
    rank: Any,
    max_error: float | None,
    *,
    mask: Any = None,
    weights: Any = None,
    random_state: Any = None,
    least_order: int = 1,
    what: str = "rank",
) -> Request:
    """Check what a decomposition is asked.

    Raises
    ------
    ShapeError
        If the tensor has too few modes, no elements, NaN or infinity; if not exactly one of rank and max_error is
        given; or if a mask or weights do not fit, or leave a slice without an observed element.
    BackendError
        If the tensor is not an array of numbers.
    ConfigError
        If the random state is something else than an integer.
    """
    backend, tensor = as_tensor(tensor)
    if len(tensor.shape) < least_order:
        raise ShapeError(f"the tensor has shape {tuple(tensor.shape)}; expected at least {least_order} modes")
    one_of(what, rank, max_error)
    observed, tensor = _observed(backend, tensor, mask, weights)
    finite(
        backend, tensor, way="" if mask is not None else "; if these elements are missing, pass mask=, True where known"
    )
    limit = None if max_error is None else error_limit(max_error)
    differentiated = backend.differentiates(tensor)
    if limit is not None and differentiated:
        raise ShapeError(
            "max_error= chooses ranks by the values, which are not known inside a trace and cannot be differentiated: "
            f"give {what}= instead, or detach the tensor"
        )
    source = tensor if differentiated and backend.is_concrete(tensor) else None
    tensor = tensor if source is None else backend.detached(tensor)
    return Request(backend, tensor, observed, limit, seed_of(random_state), source=source)


def one_of(what: str, rank: Any, max_error: Any) -> None:
    """Raise a ShapeError unless exactly one of a rank and an error is given."""
    if (rank is None) == (max_error is None):
        got = "neither" if rank is None else "both"
        raise ShapeError(f"give either {what}= or max_error=, to say how closely to decompose; got {got}")


def seed_of(random_state: Any) -> int:
    """Return a seed; None is 0. A generator gives its next number."""
    if random_state is None:
        return 0
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(1 << 31))
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(1 << 31))
    try:
        return integer_of("random_state", random_state, 0, (1 << 64) - 1)
    except ShapeError:
        raise ConfigError(
            f"random_state must be an integer of at least 0 or a NumPy generator; got {safe_repr(random_state)}"
        ) from None


def _observed(backend: Backend, tensor: Array, mask: Any, weights: Any) -> tuple[Array | None, Array]:
    """Return the roots of the weights, and the tensor with zeros where it is not observed."""
    if mask is None and weights is None:
        return None, tensor
    shape, roots = tuple(tensor.shape), np.ones(tuple(tensor.shape))
    if weights is not None:
        host = _host(weights, "weights", shape).astype(np.float64)
        if not np.isfinite(host).all() or (host < 0.0).any():
            place = tuple(int(one) for one in np.argwhere(~(np.isfinite(host) & (host >= 0.0)))[0])
            raise ShapeError(
                f"weights must be finite and not negative; got {host[place]:g} at {place}. 0 leaves an element out"
            )
        roots = np.sqrt(host)
    if mask is not None:
        host = _host(mask, "mask", shape)
        if host.dtype.kind != "b" and not np.isin(host, (0, 1)).all():
            place = tuple(int(one) for one in np.argwhere(~np.isin(host, (0, 1)))[0])
            raise ShapeError(
                f"mask must be True (or 1) where an element is known and False (or 0) elsewhere; got "
                f"{host[place]:g} at {place}. Give weights= to count elements in part"
            )
        roots = roots * host.astype(np.float64)
    _all_seen(roots)
    # A missing element may be NaN, which no product with zero removes.
    known = backend.constant(roots > 0.0, backend.device(tensor))
    filled = backend.where(known, tensor, backend.zeros(shape, like=tensor))
    if (roots == 1.0).all():
        return None, filled
    return backend.asarray(roots, backend.dtype_name(tensor), backend.device(tensor)), filled


def _host(given: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(given, (list, tuple, np.ndarray)):
        try:
            found = np.asarray(given)
        except ValueError:
            raise ShapeError(f"{what} is a list whose parts differ in length; expected equal lengths") from None
    else:
        found = get_backend(given, what=what).to_numpy(given)
    if found.shape != shape or found.dtype.kind not in "biuf":
        raise ShapeError(
            f"{what} must be numbers of the tensor's shape {shape}; got {found.dtype} of shape {found.shape}"
        )
    return found


def _all_seen(roots: np.ndarray) -> None:
    """Raise a ShapeError if a slice has no observed element: nothing says what its row of a factor is."""
    if not roots.any():
        raise ShapeError("mask and weights leave no element: nothing is known of the tensor")
    missing = unobserved(roots > 0.0)
    if missing is not None:
        mode, index = missing
        raise ShapeError(
            f"index {index} of mode {mode} has no observed element, so that its row of a factor cannot be found: "
            "remove it from the tensor"
        )


# -- Convergence -------------------------------------------------------------------------------------------------------


class Watch:
    """Collects the errors of an iteration, calls the callback, and says when to stop.

    Parameters
    ----------
    tol : float
        Stop when a step reduces the relative error by no more than this.
    callback : callable, optional
        Called with the number and the relative error of each iteration; stops the iteration if it returns True.

    Attributes
    ----------
    history : list of float
    converged : bool
    stopped : bool
        Whether the callback has stopped the iteration.
    """

    def __init__(self, tol: float, callback: Callback | None) -> None:
        if not isinstance(tol, (int, float, np.floating)) or isinstance(tol, bool) or not 0.0 <= tol < 1.0:
            raise ConfigError(f"tol must be from 0 to below 1; got {safe_repr(tol)}")
        if callback is not None and not callable(callback):
            raise ConfigError(f"callback must be callable; got {safe_repr(callback)}")
        self.tol, self.callback = float(tol), callback
        self.history: list[float] = []
        self.converged = self.stopped = False

    def __call__(self, iteration: int, error: float) -> bool:
        """Note an error; return whether to stop."""
        before = self.history[-1] if self.history else math.inf
        if self.told(iteration, error):
            return True
        self.converged = before - error <= self.tol
        return self.converged

    def told(self, iteration: int, error: float) -> bool:
        """Note an error; return whether the callback stops the iteration, whatever the tolerance."""
        self.history.append(error)
        self.stopped = self.callback is not None and self.callback(iteration, error) is True
        return self.stopped


# -- The smallest rank for an error ------------------------------------------------------------------------------------


DecomposedT = TypeVar("DecomposedT", bound=Decomposed)


def smallest_rank(
    fitted: Callable[[int], DecomposedT], limit: float, most: int, shape: Sequence[int], init: Any = "svd"
) -> DecomposedT:
    """Return the fit of the smallest rank that is found to keep to an error.

    Parameters
    ----------
    fitted : callable
        Returns the fit of a rank.
    limit : float
        The relative error that is allowed.
    most : int
        The rank that represents any tensor of the shape.
    shape : sequence of int
    init : object
        What the fits start from, which must be named.

    Raises
    ------
    ConfigError
        If a start is given, since it has one rank only.
    ShapeError
        If the fit of the largest rank has a larger error.
    """
    if not isinstance(init, str):
        raise ConfigError("max_error= tries several ranks: use init='svd' or 'random', or give rank=")
    best = smallest_within(fitted, lambda fit: fit.error or 0.0, limit, most)
    if (best.error or 0.0) > limit:
        raise ShapeError(
            f"rank {most}, which represents any tensor of shape {tuple(shape)}, was fitted with an error of "
            f"{best.error:.2g} only: allow a larger max_error, more max_iterations or more starts"
        )
    return best


# -- Fits with missing or weighted elements ----------------------------------------------------------------------------


#: Random starts of a small problem.
STARTS = 8
METHOD = "least squares on the observed elements"


class Completed(NamedTuple):
    """The arrays of a completion, in the tensor's library, and how they were found."""

    arrays: dict[str, Array]
    converged: bool
    history: tuple[float, ...]


def refuse_observed(nonnegative: Any) -> None:
    """Raise a ConfigError if what is fitted to observed elements is to be nonnegative."""
    if nonnegative is not False and nonnegative not in ((), frozenset(), None):
        raise ConfigError("nonnegative= does not go with mask= or weights=: leave one of them out")


def completed(
    request: Request,
    splits: Sequence[Format],
    watch: Watch,
    *,
    iterations: int,
    starts: int,
    terms: int = 1,
    hadamard: bool = False,
    start: Mapping[str, Array] | None = None,
    fixed: Any = (),
) -> Completed:
    """Fit formats to the observed elements of a tensor.

    Parameters
    ----------
    request : Request
        With ``observed``.
    splits, terms, hadamard, starts
        As for :func:`tnadapt.decomposition.completion.complete`.
    watch : Watch
    iterations : int
    start : mapping of str to array, optional
    fixed : collection
        What the caller was asked to keep.

    Raises
    ------
    ConfigError
        If an error is given in place of ranks, or something is to be kept.
    BackendError
        If the tensor is traced or differentiated.
    """
    assert request.observed is not None
    backend = request.backend
    request.refuse_trace("a decomposition with mask= or weights=", "detach the tensor")
    request.refuse_recorded("with mask= or weights=, the tensor", request.source)
    if request.max_error is not None:
        raise ConfigError("mask= and weights= need ranks, as the error of known elements says little about the others")
    if fixed:
        raise ConfigError(f"fixed={sorted(fixed)} cannot be kept with mask= or weights=: leave one of them out")
    roots = np.real(backend.to_numpy(request.observed)).astype(np.float64)
    host = None if start is None else {name: backend.to_numpy(array) for name, array in start.items()}
    found = complete(
        splits, backend.to_numpy(request.tensor), roots**2, terms=terms, hadamard=hadamard, start=host, starts=starts,
        seed=request.seed, limits=Limits(watch.tol, iterations), watch=watch.told,
    )  # fmt: skip
    kind, device = backend.dtype_name(request.tensor), backend.device(request.tensor)
    arrays = {name: backend.asarray(np.ascontiguousarray(one), kind, device) for name, one in found.arrays.items()}
    return Completed(arrays, found.converged, found.history)


# -- Tensors that are read block by block ------------------------------------------------------------------------------


#: Bytes of a block, in double precision, unless told otherwise.
BLOCK = 1 << 27
#: Directions of a sketch beyond the rank.
OVERSAMPLED = 10


def compressed(passes: BlockPasses, sizes: Sequence[int] | None, max_error: float | None, seed: int) -> Compressed:
    """Compress a tensor to sizes, or as far as an error allows.

    Raises
    ------
    ShapeError
        If the tensor has no elements, NaN or infinity, or the error is below what Gram matrices can tell.
    BackendError
        If the tensor does not hold numbers.
    """
    if passes.dtype.kind not in "biufc":
        raise BackendError(f"the tensor must hold numbers; got the dtype {passes.dtype}")
    if not math.prod(passes.shape):
        raise ShapeError(f"the tensor has shape {passes.shape}, so there is nothing to decompose")
    if sizes is None:
        limit = error_limit(max_error)
        if limit < LEAST_ERROR:
            raise ShapeError(
                f"max_error={limit} is below {LEAST_ERROR}, the least for a tensor read in blocks: give ranks, or "
                "load the tensor into memory"
            )
        return by_error(passes, limit)
    return by_sizes(passes, sizes, seed)


def with_block_error(result: D, found: Compressed, small: Any) -> D:
    """Attach how good a result is, from what the compression lost and the error of what was left."""
    outcome = small.outcome
    inside = outcome.error * float(np.linalg.norm(found.core))
    error = math.hypot(found.lost, inside) / found.norm if found.norm else 0.0
    bound = min(error, found.bound / found.norm if found.norm else 0.0)
    eps = float(np.finfo(result.arrays[0].dtype).eps)
    method = f"compressed in blocks, {outcome.method}"
    return result.with_outcome(
        FitOutcome(error, bound, error <= 64.0 * eps, outcome.converged, outcome.history, method)
    )


def result_dtype(passes: BlockPasses) -> np.dtype[Any]:
    """Return the dtype of a result: that of the tensor, or float64 for integers, float32 for half precision."""
    if passes.dtype.kind not in "fc":
        return np.dtype(np.float64)
    return np.dtype(np.float32) if passes.dtype.itemsize < 4 else passes.dtype


# -- TensorLy's keywords, refused with our names for them --------------------------------------------------------------


P = ParamSpec("P")
R = TypeVar("R")

# TensorLy's keyword -> what to write here. A keyword that the function has itself is never looked up.
_TENSORLY = {
    "n_iter_max": "'max_iterations' here",
    "fixed_modes": "'fixed' here",
    "fixed_factors": "'fixed' here",
    "return_errors": "the attribute 'history' of the result here",
    "normalize_factors": "not needed here, as factors of a CP are always normalized",
    "linesearch": "not needed here, as cp extrapolates where that helps",
    "non_negative": "'nonnegative' here",
    "verbose": "'callback=print' here",
    "modes": "not needed here: give every mode a rank, its size to those that stay as they are",
}


def hints_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let a decomposition refuse TensorLy's keywords with an error that has our names for them.

    Examples
    --------
    >>> @hints_keywords
    ... def solve(tensor, *, max_iterations=10):
    ...     return tensor
    >>> solve(1, n_iter_max=5)
    Traceback (most recent call last):
        ...
    tnadapt.errors.UnexpectedKeywordError: solve() got an unexpected keyword argument 'n_iter_max': TensorLy's
    'n_iter_max' is 'max_iterations' here
    """
    own = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def hinting(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in own and name in _TENSORLY:
                raise UnexpectedKeywordError(
                    f"{function.__name__}() got an unexpected keyword argument {name!r}: TensorLy's {name!r} is "
                    f"{_TENSORLY[name]}"
                )
        return function(*args, **kwargs)

    return hinting
