"""Reports of ``decompose``: how each group of a plan was fitted, how good all fits are together, and progress."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from tnadapt.algebra.norms import relative, together
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.report import TextTable

from .fits import FitOutcome

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupReport(FitOutcome):
    """How the fit of one group was found, and how good it is.

    Attributes
    ----------
    size : int
        Number of elements of its update.
    norm : float
        Frobenius norm of the given update.
    iterations : int
        Iterations of the method; 0 if it is direct.
    error, bound, certified, stopped, history, method
        As for :class:`tnadapt.tensors.FitOutcome`.
    """

    size: int
    norm: float
    iterations: int


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The accuracy of a decomposition.

    Attributes
    ----------
    plan : UpdatePlan
        The plan that the parameters belong to: ``report.plan.deltas(params)``.
    groups : tuple of GroupReport

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.UpdatePlan(tna.Config(rank=1), [(2, 2)])
    >>> group = GroupReport(size=4, norm=2.0, error=0.25, bound=0.25, certified=True, iterations=0, method="SVD")
    >>> print(FitReport(plan, (group,)))
    relative error 0.25 in 1 group, 4 parameters for 4 elements; the optimum
    """

    plan: UpdatePlan
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
    def converged(self) -> bool:
        """Whether the fit of every group stopped because it improved no more."""
        return all(group.converged for group in self.groups)

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
        head = ("group", "elements", "error", "bound", "certified", "iterations", "stopped", "method")
        rows = [
            (
                str(number), f"{group.size:,}", f"{group.error:.3g}", f"{group.bound:.3g}",
                "yes" if group.certified else "no", str(group.iterations), group.stopped, group.method,
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
            "groups": [
                {name: value for name, value in dataclasses.asdict(group).items() if name != "history"}
                for group in self.groups
            ],
        }
