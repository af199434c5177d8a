"""How near a fit came, group by group."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from tnadapt.algebra.norms import relative, together
from tnadapt.algebra.superlora import SuperLoRA

__all__ = ["FitReport", "GroupReport", "Step"]


class Step(NamedTuple):
    """How far a decomposition is: what a progress callback is given.

    Attributes
    ----------
    group, groups : int
        Which group, from 0, of how many.
    iteration : int
        Of this group; 0 when it begins.
    error : float or None
        The relative error of the group so far, if it is known.
    """

    group: int
    groups: int
    iteration: int
    error: float | None


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """How near the fit of one group came.

    Attributes
    ----------
    size : int
        Elements of its update.
    norm : float
        Frobenius norm of the given update.
    error : float
        Relative Frobenius error, ``|fit - given| / |given|``, in float64 and of the arrays that are returned; 0 for an
        update of zeros.
    bound : float
        A relative error that no parameters of this config can fall below; 0 where none is known.
    certified : bool
        Whether it is the optimum: by theory, as the bound is met, or as nothing but rounding is left.
    iterations : int
        Of the alternating or descending method; 0 where there is none.
    method : str
        What was done.
    """

    size: int
    norm: float
    error: float
    bound: float
    certified: bool
    iterations: int
    method: str


@dataclasses.dataclass(frozen=True)
class FitReport:
    """How near a decomposition came.

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
        """A relative error of all together that no parameters can fall below."""
        return self._together([group.bound for group in self.groups])

    @property
    def errors(self) -> tuple[float, ...]:
        """The relative error of each group."""
        return tuple(group.error for group in self.groups)

    @property
    def certified(self) -> bool:
        """Whether every group is at its optimum."""
        return all(group.certified for group in self.groups)

    @property
    def iterations(self) -> int:
        """Of all groups together."""
        return sum(group.iterations for group in self.groups)

    def _together(self, errors: list[float]) -> float:
        # By a power of two near the largest: an error times a norm of 1e-320 would have few digits.
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON keeps it."""
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
