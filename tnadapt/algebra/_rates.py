"""Optimizers for which one learning rate fits all configs: a parametrization each, as units of the parameters.

A parametrization is a function of the plan and of the shapes of all adapted weights, which returns the unit of each
parameter by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ._adam_units import adam_units
from ._group_plan import GroupPlan

__all__ = ["RATES"]


def sgd_units(plan: GroupPlan, shapes: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Return 1 for each parameter: :mod:`tnadapt.algebra.init` scales the arrays for equal steps of SGD."""
    return dict.fromkeys(plan.param_shapes, 1.0)


#: By the names in :data:`tnadapt.algebra._rate_names.RATE_NAMES`.
RATES: dict[str, Callable[[GroupPlan, Sequence[tuple[int, int]]], dict[str, float]]] = {
    "sgd": sgd_units,
    "adam": adam_units,
}
