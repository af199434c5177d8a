"""Results of fits: errors, reports, the proof that a fit is optimal, and the search for the smallest rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np

from tnadapt.algebra.norms import relative, together
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import Array
from tnadapt.report import TextTable

__all__ = [
    "OPEN",
    "Claim",
    "Contraction",
    "Fit",
    "FitReport",
    "GroupReport",
    "Limits",
    "Optimality",
    "Step",
    "all_of",
    "holds",
    "no_matrix_is_closer",
    "smallest_within",
    "unwatched",
]


# -- Whether a fit is optimal: its error, bound and certificate, computed when they are first read ---------------------


#: Whether something holds: known, or proved by a function that takes longer than the fit.
Claim = bool | Callable[[], bool]


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
# Positive definite is proved by a bound on the norm of R where that is enough, otherwise by a Cholesky factorization,
# as it succeeds for no matrix with an eigenvalue below minus its rounding (Rump, "Verification of positive
# definiteness", BIT 46, 2006).


# What the claim leaves open, relative to the error, and in units of epsilon relative to the matrix.
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
    # What couples the two parts is rounding for singular vectors. It is left out of the matrix, at its full norm.
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


# -- Reports, overall and per group ------------------------------------------------------------------------------------


#: Rows that notebooks show.
_SHOWN = 20


class Step(NamedTuple):
    """Progress of a decomposition, the argument of a progress callback.

    Attributes
    ----------
    group, groups : int
        Index of the group, from 0, and the number of groups.
    iteration : int
        Iteration within this group; 0 when the group begins.
    error : float or None
        The relative error of the group so far, if known.
    """

    group: int
    groups: int
    iteration: int
    error: float | None


@dataclasses.dataclass(frozen=True)
class GroupReport(Optimality):
    """The accuracy of the fit of one group.

    Attributes
    ----------
    size : int
        Number of elements of its update.
    norm : float
        Frobenius norm of the given update.
    error : float
        Relative Frobenius error, ``|fit - given| / |given|``, computed in float64 from the returned arrays; 0 for an
        update of zeros.
    bound : float
        A lower bound on the relative error over all parameters of this config; 0 if none is known.
    certified : bool
        Whether the fit is known to be optimal: by theory, because it meets the bound, or because the error is no more
        than rounding.
    iterations : int
        Iterations of the method; 0 if it is direct.
    method : str
        Description of the method.

    Notes
    -----
    The bound and the certificate often take longer than the fit: they are computed when one of them is first read.
    """

    size: int
    norm: float
    error: float = dataclasses.field()
    bound: float = dataclasses.field()
    certified: bool = dataclasses.field()
    iterations: int
    method: str


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The accuracy of a decomposition.

    Attributes
    ----------
    plan : SuperLoRA
        The plan that the parameters belong to: ``report.plan.deltas(params)``.
    groups : tuple of GroupReport

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.SuperLoRA(tna.Config(rank=1), [(2, 2)])
    >>> print(FitReport(plan, (GroupReport(4, 2.0, 0.25, 0.25, True, 0, "SVD"),)))
    relative error 0.25 in 1 group, 4 parameters for 4 elements; the optimum
    """

    plan: SuperLoRA
    groups: tuple[GroupReport, ...]

    @functools.cached_property
    def error(self) -> float:
        """Relative Frobenius error of all updates together."""
        return self._together([group.error for group in self.groups])

    @functools.cached_property
    def bound(self) -> float:
        """Lower bound on the relative error of all updates together."""
        return self._together([group.bound for group in self.groups])

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error of each group."""
        return tuple(group.error for group in self.groups)

    @property
    def certified(self) -> bool:
        """Whether the fit of every group is known to be optimal."""
        return all(group.certified for group in self.groups)

    @property
    def iterations(self) -> int:
        """Total number of iterations of all groups."""
        return sum(group.iterations for group in self.groups)

    def _together(self, errors: list[float]) -> float:
        # Scale by a power of two near the largest norm: an error times a norm of 1e-320 would have few digits.
        exponent = math.frexp(max((group.norm for group in self.groups), default=0.0))[1]
        norms = [math.ldexp(group.norm, -exponent) for group in self.groups]
        wrong = together(error * norm for error, norm in zip(errors, norms, strict=True))
        return relative(wrong, together(norms))

    def __str__(self) -> str:
        count = len(self.groups)
        if not any(group.norm for group in self.groups):
            return f"the updates are zero, in {count} group{'s' * (count != 1)}: there is nothing to fit"
        known = "the optimum" if self.certified else "not known to be the optimum"
        if self.bound and not self.certified:
            known += f" (no less than {self.bound:.3g})"
        return (
            f"relative error {self.error:.3g} in {count} group{'s' * (count != 1)}, "
            f"{self.plan.num_parameters:,} parameters for {self.plan.size:,} elements; {known}"
        )

    def _repr_html_(self) -> str:
        head = ("group", "elements", "error", "bound", "certified", "iterations", "method")
        rows = [
            (
                str(number), f"{group.size:,}", f"{group.error:.3g}", f"{group.bound:.3g}",
                "yes" if group.certified else "no", str(group.iterations), group.method,
            )
            for number, group in enumerate(self.groups)
        ]  # fmt: skip
        more = [f"{len(rows) - _SHOWN} more groups in .groups"] if len(rows) > _SHOWN else []
        return TextTable(rows[:_SHOWN], head, caption="Fit", notes=[*more, str(self)]).html()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary for JSON."""
        return {
            "config": self.plan.config.to_dict(),
            "parameters": self.plan.num_parameters,
            "elements": self.plan.size,
            "error": self.error,
            "bound": self.bound,
            "certified": self.certified,
            "iterations": self.iterations,
            "groups": [dataclasses.asdict(group) for group in self.groups],
        }


# -- The result of a solver, and its stopping criteria -----------------------------------------------------------------


Arrays = dict[str, Array]
#: For each array the indices of its axes, and those of the result: as ``numpy.einsum`` takes them.
Contraction = tuple[list[list[int]], list[int]]


def unwatched(iteration: int, error: float | None) -> None:
    """Ignore progress. A solver that is given this one computes no error that only progress would show."""


class Fit(NamedTuple):
    """Fitted arrays, and how they were computed.

    Attributes
    ----------
    arrays : dict of str to array
    optimal : bool or function that returns one
        Whether they are known to be the optimum.
    iterations : int
    method : str
        Short description of the method.
    """

    arrays: Arrays
    optimal: Claim
    iterations: int
    method: str


class Limits(NamedTuple):
    """Stopping criteria of an iteration.

    Attributes
    ----------
    tol : float
        Stop when a step reduces the relative error by no more than this.
    iterations : int
        Maximum number of iterations.
    """

    tol: float = 1e-6
    iterations: int = 100


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
