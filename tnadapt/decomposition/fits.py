"""Convergence: when an iteration stops, and why; the fit that it returns; and the search for the smallest rank.

Every solver counts its steps with an :class:`Iteration`, and every decomposition returns a :class:`Fit`, which users
see as a :class:`FitOutcome`. :func:`smallest_within` finds the smallest rank whose error is within a limit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from tnadapt.backends import Array
from tnadapt.errors import ConfigError, safe_repr

# -- When an iteration stops, and why ----------------------------------------------------------------------------------


Arrays = dict[str, Array]


class Limits(NamedTuple):
    """Stopping criteria of an iteration.

    Attributes
    ----------
    tol : float
        Stop when a step reduces the relative error by no more than this: see :meth:`converged`.
    iterations : int
        Maximum number of iterations.
    """

    tol: float = 1e-6
    iterations: int = 100

    def converged(self, before: float, error: float) -> bool:
        """Return whether a step that changed the relative error has gained too little to go on.

        That is no more than ``tol``, and less than a tenth of the error itself; below an error of a hundredth, where it
        may be on its way to an exact answer, less than a thousandth of it.
        """
        least = 1e-3 if error <= 1e-2 else 0.1
        return before - error <= self.tol and error >= before * (1.0 - least)

    def flat(self, slope: float, epsilon: float) -> bool:
        """Return whether a relative gradient is small: at most ten times the root of ``tol``, and not below rounding.

        It is the largest cosine of the residual with its derivative by one column of a factor, so that moving that
        column alone would reduce the squared error by no more than a hundred ``tol`` of itself.
        """
        return slope <= math.sqrt(max(100.0 * self.tol, 16.0 * epsilon))


def limits_of(tol: Any, max_iterations: Any, least: int = 1) -> Limits:
    """Return checked limits; raise a ConfigError unless tol is from 0 to below 1 and there are enough iterations."""
    if isinstance(tol, bool) or not isinstance(tol, (int, float, np.floating)) or not 0.0 <= tol < 1.0:
        raise ConfigError(f"tol must be from 0 to below 1; got {safe_repr(tol)}")
    whole = isinstance(max_iterations, (int, np.integer)) and not isinstance(max_iterations, bool)
    if not whole or max_iterations < least:
        raise ConfigError(f"max_iterations must be an integer of at least {least}; got {safe_repr(max_iterations)}")
    return Limits(float(tol), int(max_iterations))


#: Called with the number of a step and the relative error after it; stops the iteration if it returns True.
Callback = Callable[[int, float], Any]


class Iteration:
    """The steps of an iteration, perhaps from several starts: their errors, when it stops, and why.

    Parameters
    ----------
    limits : Limits
        Of each start.
    callback : callable, optional
        Called with the number of each step and the least relative error so far; if it returns True, that ends the
        iteration and all other starts.

    Attributes
    ----------
    history : list of float
        The least relative error after each step of all starts.
    stopped : str
        Why the last start ended: ``"converged"``, ``"max_iterations"``, ``"callback"``, or what a solver has set;
        empty before it does. All are keys of ``REASONS``.

    Examples
    --------
    >>> steps = Iteration(Limits(1e-3, 50))
    >>> [steps.step(error) for error in (0.5, 0.3, 0.2999)], steps.stopped
    ([False, False, True], 'converged')
    """

    def __init__(self, limits: Limits, callback: Callback | None = None) -> None:
        self.limits, self.callback = limits, callback
        self.history: list[float] = []
        self.begin()

    def begin(self, error: float = math.inf) -> None:
        """Begin another start, with a relative error if it is known."""
        self.count, self.before, self.stopped = 0, error, ""

    def step(self, error: float, flat: Callable[[], bool] = lambda: True) -> bool:
        """Note the relative error after a step; return whether the start ends.

        It converges where a step gains too little and the gradient is small, if the solver can say whether it is.
        """
        before, self.before = self.before, error
        self.count += 1
        if not self.note(error):
            if self.limits.converged(before, error) and flat():
                self.stopped = "converged"
            elif self.count >= self.limits.iterations:
                self.stopped = "max_iterations"
        return bool(self.stopped)

    def note(self, error: float) -> bool:
        """Note the error after a step of a solver with a rule of its own; return whether a callback ends it."""
        self.history.append(min(error, self.history[-1]) if self.history else error)
        if self.callback is not None and self.callback(len(self.history), self.history[-1]) is True:
            self.stopped = "callback"
        return self.stopped == "callback"

    def fit(self, arrays: Arrays, method: str, error: float = math.nan, **fields: Any) -> Fit:
        """Return fitted arrays with the steps of all starts, and why the last start ended."""
        history = tuple(self.history)
        return Fit(arrays, fields.pop("optimal", False), len(history), method, self.stopped, error, history, **fields)


def unwatched(iteration: int, error: float | None) -> None:
    """Ignore progress. A solver that is given this one computes no error that only progress would show."""


# -- What a solver returns ---------------------------------------------------------------------------------------------


#: For each array the indices of its axes, and those of the result: as ``numpy.einsum`` takes them.
Contraction = tuple[list[list[int]], list[int]]
#: Whether something holds: known, or proved by a function that takes longer than the fit.
Claim = bool | Callable[[], bool]


class Fit(NamedTuple):
    """Fitted arrays, and how they were computed.

    Attributes
    ----------
    arrays : dict of str to array
    optimal : bool or function that returns one
        Whether the error is known to be at most ``factor`` times the least possible one.
    iterations : int
        Steps of all starts.
    method : str
        Short description of the method.
    stopped : str
        Why it stopped: a key of ``REASONS``.
    error : float
        The relative error, if the solver knows it; otherwise NaN.
    history : tuple of float
        The relative error after each step, if the solver knows them.
    factor : float
    bound : float
        A lower bound on the relative error of all arrays of these shapes, if the solver knows one.
    closed : callable, optional
        Computes the arrays from the tensor, where that takes no iteration: so they are differentiated.
    """

    arrays: Arrays
    optimal: Claim
    iterations: int
    method: str
    stopped: str = "direct"
    error: float = math.nan
    history: tuple[float, ...] = ()
    factor: float = 1.0
    bound: float = 0.0
    closed: Callable[[Array], Arrays] | None = None

    @property
    def converged(self) -> bool:
        """Whether it stopped because it improved no more."""
        return self.stopped in _CONVERGED


_CONVERGED = ("direct", "converged")
#: Why a fit stops, and what helps.
REASONS = {
    "direct": "it needs no iteration",
    "converged": "a step gains no more than the tolerance",
    "max_iterations": "it has not converged: allow more iterations or a larger tol, or use another start",
    "callback": "the callback has stopped it",
    "singular": "the equations of a step are singular: use another init or random_state, or a smaller rank",
    "stalled": "nothing that it can do reduces the error, which may be as small as rounding lets it be: use float64 or "
    "another start",
    "rank": "no train of these ranks has the error: allow higher ranks or a larger error",
    "max_calls": "the function has been evaluated as often as allowed: allow more calls or a larger error",
    "degenerate": "components have grown and cancel, so that they mean nothing one by one and a best fit may not "
    "exist: use nonnegative=True, a lower rank, or a penalty such as ridge=1e-3",
}


# -- Whether a fit is optimal: its error, bound and certificate, computed when they are first read ---------------------


def holds(claim: Claim) -> bool:
    """Return whether a claim holds, which may take a proof."""
    return claim() if callable(claim) else claim


def all_of(claims: Iterable[Claim]) -> Claim:
    """Return whether all claims hold, without a proof where none is needed."""
    claims = list(claims)
    if any(claim is False for claim in claims):
        return False
    return (lambda: all(map(holds, claims))) if any(map(callable, claims)) else all(claims)


class Optimality:
    """Base of a frozen dataclass with the fields ``error``, ``bound`` and ``certified``.

    Its fields are given as values, or computed when they are first read: see :meth:`computed_later`. The subclass
    declares them with ``dataclasses.field()``, which keeps these properties from becoming their default values.
    """

    _compute_error: Callable[[], float]
    _compute_optimum: Callable[[float], tuple[float, bool]]

    @classmethod
    def computed_later(
        cls,
        compute_optimum: Callable[[float], tuple[float, bool]],
        *,
        error: float | Callable[[], float],
        **fields: Any,
    ) -> Self:
        """Make one whose bound and certificate, and perhaps error, are computed when they are first read.

        Parameters
        ----------
        compute_optimum : callable
            Returns the bound and the certificate, given the error.
        error : float or callable
        **fields
            All other fields.

        Notes
        -----
        A function is released after its call, with the arrays that it refers to.
        """
        result = object.__new__(cls)
        fields["_compute_error" if callable(error) else "error"] = error
        vars(result).update(fields, _compute_optimum=compute_optimum)
        return result

    @functools.cached_property
    def error(self) -> float:
        error = vars(self)["error"] = self._compute_error()
        vars(self).pop("_compute_error", None)
        return error

    @functools.cached_property
    def bound(self) -> float:
        return self._optimum()[0]

    @functools.cached_property
    def certified(self) -> bool:
        return self._optimum()[1]

    def _optimum(self) -> tuple[float, bool]:
        bound, certified = self._compute_optimum(self.error)
        vars(self).update(bound=bound, certified=certified)
        vars(self).pop("_compute_optimum", None)
        return bound, certified

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitOutcome(Optimality):
    """How a decomposition was found, and how good it is.

    Attributes
    ----------
    error : float
        Frobenius norm of the residual over that of the tensor, or of the update, computed from the returned arrays; of
        the observed elements if there is a mask. 0 for zeros.
    bound : float
        A lower bound on the error of all arrays of these shapes; 0 if none is known.
    certified : bool
        Whether the error is known to be the least possible one: by theory, because it meets the bound, or because it is
        no more than rounding.
    stopped : str
        Why it stopped: ``"direct"`` without an iteration, ``"converged"``, ``"max_iterations"``, ``"callback"``,
        ``"singular"``, ``"stalled"`` or ``"degenerate"``; :attr:`reason` says what it means and what helps.
    history : tuple of float
        The least error after each iteration, of all starts; empty if the method does not say.
    method : str
        Short description of the method.
    calls : int
        Values of a function that were computed, by :func:`tnadapt.tt_cross` alone, whose error is an estimate, and
        which stops for other reasons, too.

    Notes
    -----
    The bound and the certificate may take longer than the decomposition: they are computed when they are first read,
    and so is the error of a tensor where no iteration needs it. Until then a copy of the tensor is held, of up to 2^24
    elements.
    """

    error: float = dataclasses.field()
    bound: float = dataclasses.field()
    certified: bool = dataclasses.field()
    stopped: str = "direct"
    history: tuple[float, ...] = ()
    method: str
    calls: int = 0

    @property
    def converged(self) -> bool:
        """Whether it stopped because it improved no more; True if there was no iteration.

        A step gained no more than ``tol``, as :class:`Limits` says; the error fell by less than a tenth of itself, or,
        if it is at most 0.01, a thousandth. :func:`tnadapt.cp` of a dense or sparse tensor in memory also requires a
        small gradient, unless there is a mask or a constraint: the largest cosine of the residual with its derivative
        by one column of a factor is at most ``10 * tol ** 0.5``, 1e-3 by default. It depends on no scale. Or the error
        is no more than rounding.
        """
        return self.stopped in _CONVERGED

    @property
    def reason(self) -> str:
        """Why it stopped, in words, and what helps."""
        return REASONS[self.stopped]


# -- The proof that a matrix has no closer approximation of a rank -----------------------------------------------------

# Let U be the subspace, of r dimensions, ``B = Uᵀ A``, and ``R = A - U B``. For any numbers θ and d for which ::
#
#     θ ≤ λ_min(B Bᵀ) + d     and     θ I - R Rᵀ - R Bᵀ B Rᵀ / d  is positive definite,
#
# ``A Aᵀ`` is at most ``θ I + U (B Bᵀ + (d - θ) I) Uᵀ``, whose second term is positive semidefinite and of rank r. By
# Weyl's inequalities the r largest eigenvalues of ``A Aᵀ`` then have a sum of at most ``|B|² + r d``, and by the
# theorem of Eckart & Young the squared error of every matrix of rank r is at least ``|R|² - r d``. Nothing else is
# assumed of U: a subspace that misses a direction, from whatever start, has no such θ and d.
#
# Positive definiteness is proved by a bound on the norm of R if that is enough, otherwise by a Cholesky factorization,
# which fails for any matrix with an eigenvalue below minus its rounding (Rump, "Verification of positive definiteness",
# BIT 46, 2006).


# What the proof leaves open, relative to the error, and in units of epsilon relative to the matrix.
OPEN, _ROUNDING = 1e-8, 64.0
# Error of computed singular values, in units of epsilon relative to the largest.
_VALUES = 8.0
# Longest side for a Cholesky factorization, and most elements of a matrix in float64.
_FACTORED, _ELEMENTS = 1 << 12, 1 << 25


def no_matrix_is_closer(matrix: np.ndarray, vectors: np.ndarray, epsilon: float) -> bool:
    """Return whether the part of a matrix in a subspace is proved to be its best approximation of that rank.

    Parameters
    ----------
    matrix : ndarray, shape (m, n)
        Real and finite.
    vectors : ndarray, shape (m, rank)
        Columns that span the subspace.
    epsilon : float
        Of the dtype whose rounding counts.

    Returns
    -------
    bool
        True if the relative error of every matrix of that rank is at least that of the part in the subspace, less
        ``1e-8`` times itself and 64 epsilon. False if this is not so, or the proof would need more than a matrix of
        4096 rows or 2^25 elements.
    """
    if matrix.shape[0] * matrix.shape[1] > _ELEMENTS:
        return False
    largest = float(np.max(np.abs(matrix), initial=0.0))
    if largest == 0.0:
        return True
    wide = matrix.astype(np.float64) / largest
    u = np.linalg.qr(vectors.astype(np.float64))[0]
    along = u.T @ wide
    rest = wide - u @ along
    error, rounding = float(np.linalg.norm(rest)), _ROUNDING * epsilon * float(np.linalg.norm(wide))
    least = error * (1.0 - OPEN) - rounding
    if not least > 0.0:
        return bool(error <= rounding)
    if epsilon > np.finfo(np.float64).eps:
        # The vectors have the rounding of their dtype: improve them in float64.
        u = np.linalg.qr(wide @ along.T)[0]
        along = u.T @ wide
        rest = wide - u @ along
    # For singular vectors, the coupling of the two parts is rounding. It is left out of the matrix, at its full norm.
    across = np.linalg.qr(along.T)[0]
    coupled = rest @ across
    return _bounded(rest - coupled @ across.T, along, least + float(np.linalg.norm(coupled)))


def _bounded(rest: np.ndarray, along: np.ndarray, least: float) -> bool:
    """Return whether errors below ``least`` are excluded for ``U along + rest``."""
    size, rank = float(np.sum(rest * rest)), len(along)
    margin = (size - least * least) / rank
    if not margin > 0.0:
        return False
    eps, mixed = float(np.finfo(np.float64).eps), along @ rest.T
    values = np.linalg.svd(along, compute_uv=False)
    level = max(0.0, float(values[-1]) - _VALUES * eps * float(values[0])) ** 2 + margin
    if size + float(np.sum(mixed * mixed)) / margin <= level:
        return True
    rows, columns = rest.shape
    if rows > _FACTORED:
        return False
    # Rounding: of the products in the Gram matrix, and of its factorization.
    slack = eps * ((columns + rank) * (size + float(np.sum(mixed * mixed)) / margin) + (rows + 2) * rows * level)
    if not level > slack:
        return False
    scaled = mixed / np.sqrt(margin)
    gram = rest @ rest.T
    gram += scaled.T @ scaled
    np.negative(gram, out=gram)
    gram[np.diag_indices(rows)] += level - slack
    try:
        np.linalg.cholesky(gram)
    except np.linalg.LinAlgError:
        return False
    return True


# -- The smallest rank for an error ------------------------------------------------------------------------------------


T = TypeVar("T")


def smallest_within(fitted: Callable[[int], T], error_of: Callable[[T], float], max_error: float, most: int) -> T:
    """Return the fit of the smallest rank that is found to keep to an error: doubling, then halving.

    Parameters
    ----------
    fitted : callable
        Returns the fit of a rank.
    error_of : callable
        Returns the error of a fit.
    max_error : float
    most : int
        The largest rank to try. If its fit has a larger error, it is returned.
    """
    low, rank, best = 0, 1, fitted(1)
    while error_of(best) > max_error and rank < most:
        low, rank = rank, min(2 * rank, most)
        best = fitted(rank)
    if error_of(best) > max_error:
        return best
    while rank - low > 1:
        middle = (low + rank) // 2
        candidate = fitted(middle)
        if error_of(candidate) <= max_error:
            rank, best = middle, candidate
        else:
            low = middle
    return best
