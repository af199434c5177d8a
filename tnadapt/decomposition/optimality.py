"""How far a fit is from the best one: error, lower bound and certificate, computed when they are first read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, Self

__all__ = ["Claim", "Optimality", "all_of", "holds"]

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
