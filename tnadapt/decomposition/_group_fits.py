"""Fit of all groups of a plan, one after another, with updates that are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from tnadapt.algebra.group import Group
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.backends import load_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, ShapeError

from ._fit import unwatched
from ._fit_report import FitReport, GroupReport, Step
from ._linear_algebra import Algebra
from ._lower_bounds import lower_bound
from ._parameter_fit import ParameterFit, fit_parameters
from ._scaling import at_size, power_of
from ._single_tensor import Fit, Limits
from ._through_map import fit_group, started
from .leading_proof import OPEN
from .optimality import Claim, holds

__all__ = ["fit_plan"]

Progress = Callable[[Step], None]

# An error of up to this many times the dtype's epsilon is rounding.
_ROUNDING = 64
# A bound counts as met within this relative tolerance.
_MET = 1e-6
# Elements of updates that reports keep for bounds that were not read yet.
_HELD = 1 << 24


def fit_plan(
    algebra: Algebra,
    plan: SuperLoRA,
    read: Callable[[int], Array],
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a plan to given updates.

    Parameters
    ----------
    algebra : Algebra
    plan : SuperLoRA
    read : callable
        Returns the update of one weight, given its index: an array, shape (rows, cols), in algebra's library and
        dtype. It is called once per weight, unless a weight lies in groups that do not follow one another.
    limits : Limits
    progress : callable, optional
        Called with a :class:`Step` when a group begins and after each iteration.

    Returns
    -------
    dict of str to array
        With the names and shapes of ``plan.param_shapes``.
    FitReport

    Raises
    ------
    ShapeError
        If an update contains NaN or infinity.
    ConfigError
        If the config has sources or a map before the network, and F is nonlinear; or a frozen array is missing; or the
        config does more than add its updates.

    Notes
    -----
    Memory is a few times one group's part of the long vector.
    """
    if not plan.applying.additive:
        raise ConfigError(
            f"a fit needs updates that are added to the weights, and apply={plan.config.apply!r} does more: use "
            "apply='add'"
        )
    if plan.theta is not None or any(config.sources for config, _ in plan.config.split(plan.shapes)):
        return _fitted_together(algebra, plan, read, limits, progress)
    params: dict[str, Array] = {}
    reports, held = [], 0
    count = len(plan.groups)
    for number, (group, y) in enumerate(_vectors(algebra, plan, read)):

        def watch(iteration: int, error: float | None, number: int = number) -> None:
            if progress is not None:
                progress(Step(number, count, iteration, error))

        watch(0, None)
        arrays, report = _fitted(algebra, group, y, limits, watch if progress is not None else unwatched)
        params.update({full: arrays[name] for name, full in group.names.items()})
        reports.append(report)
        held += group.size
        if held > _HELD:
            report.bound  # noqa: B018 - computed now, so that the update is not kept
            held -= group.size
    return params, FitReport(plan, tuple(reports))


def _vectors(algebra: Algebra, plan: SuperLoRA, read: Callable[[int], Array]) -> Iterator[tuple[Group, Array]]:
    """Yield each group with its part of the long vector."""
    last: tuple[int, Array] | None = None
    for group in plan.groups:
        parts = []
        for piece in group.pieces:
            if last is None or last[0] != piece.weight:
                last = piece.weight, algebra.backend.flatten(read(piece.weight))
            parts.append(last[1][piece.weight_start : piece.weight_start + piece.length])
        yield group, algebra.backend.concat(parts)


def _fitted_together(
    algebra: Algebra, plan: SuperLoRA, read: Callable[[int], Array], limits: Limits, progress: Progress | None
) -> tuple[dict[str, Array], FitReport]:
    """Fit the parameters of a plan that has more than one trained array per array of the network."""
    if not all(group.projection.linear for group in plan.groups):
        raise ConfigError(
            "the solvers fit frozen, tied and scaled arrays and θ through linear maps F only; got "
            f"projection={plan.config.projection!r}: use another one, or leave sources and before out"
        )
    wide = [np.asarray(algebra.backend.to_numpy(y), np.float64) for _, y in _vectors(algebra, plan, read)]
    norms = [float(np.linalg.norm(y)) for y in wide]
    if not all(map(math.isfinite, norms)):
        raise ShapeError(
            "an update holds NaN, infinity, or numbers whose Frobenius norm exceeds float64: it cannot be fitted"
        )

    def watch(iteration: int, error: float | None) -> None:
        if progress is not None:
            progress(Step(0, len(wide), iteration, error))

    watch(0, None)
    found = fit_parameters(plan, wide, limits, algebra.seed, _ROUNDING * algebra.eps, watch)
    params = {name: algebra.array(array) for name, array in found.params.items()}
    host = {name: np.asarray(algebra.backend.to_numpy(array), np.float64) for name, array in params.items()}
    arrays = plan.arrays(host)
    numpy, reports = load_backend("numpy"), []
    for group, y, norm in zip(plan.groups, wide, norms, strict=True):
        error = float(np.linalg.norm(group.update(numpy, arrays, 0, group.size) - y))
        if group.subtracts:
            y = y + np.asarray(group.projection(group.network.whole(numpy, group.begun(numpy, arrays))))
        # Arrays are rounded with a start that is subtracted, however small the update is.
        rounding = _ROUNDING * algebra.eps * float(np.linalg.norm(y))
        known = _Known(Algebra(numpy, y), group, y, norm, error, rounding, found.optimal, len(wide) == 1)
        reports.append(_report(known, norm, found))
    return params, FitReport(plan, tuple(reports))


def _fitted(
    algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Callable[[int, float | None], None]
) -> tuple[dict[str, Array], GroupReport]:
    # If F is linear, F and the network are homogeneous: scale the update to magnitude one by a power of two, which is
    # exact. A start that is subtracted has its own scale.
    linear = group.projection.linear
    exponent = power_of(algebra, y) if linear and not group.subtracts else 0
    scaled = algebra.scaled(y, -exponent)
    norm = algebra.norm(scaled)
    if not norm < math.inf or math.frexp(norm)[1] + exponent > 1024:
        raise ShapeError(
            "an update holds NaN, infinity, or numbers whose Frobenius norm exceeds float64: it cannot be fitted"
        )
    target = scaled
    if linear and group.subtracts and norm:
        target = scaled + group.projection(group.network.whole(algebra.backend, started(algebra, group)))
    found = fit_group(algebra, group, target, limits, watch)
    arrays = at_size(algebra, group.network, found.arrays, exponent) if norm else found.arrays
    error = _error(algebra, group, arrays, scaled, exponent)
    if not error <= norm:
        # Never return a fit that is worse than an update of zeros.
        found = Fit(started(algebra, group), False, found.iterations, f"{found.method}: no better than zero")
        arrays = found.arrays
        error = _error(algebra, group, arrays, scaled, exponent)
    # The caller may change the update before the report is read.
    kept = target if exponent else target * 1.0
    known = _Known(algebra, group, kept, norm, error, _ROUNDING * algebra.eps * algebra.norm(kept), found.optimal)
    return arrays, _report(known, math.ldexp(norm, exponent), found)


class _Known(NamedTuple):
    """What the bound of a group and its certificate are computed from, when they are read."""

    algebra: Algebra
    group: Group
    y: Array
    norm: float
    error: float
    rounding: float
    optimal: Claim
    alone: bool = True

    def optimum(self) -> tuple[float, bool]:
        """Return the relative bound, and whether the fit is certified."""
        optimal = holds(self.optimal)
        if not self.norm:
            return 0.0, bool(optimal or self.error <= self.rounding)
        bound, projection = 0.0, self.group.projection
        if projection.map.isometry:
            bound = lower_bound(self.algebra, self.group.network, projection.adjoint(self.y))
        certified = bool(optimal or self.error <= self.rounding or self.error <= bound * (1.0 + _MET))
        if optimal and self.alone:
            # Other arrays can be better by at most the rounding of the optimum to the dtype.
            bound = max(bound, self.error * (1.0 - OPEN) - self.rounding)
        return min(self.error, bound) / self.norm, certified


def _report(known: _Known, norm: float, found: Fit | ParameterFit) -> GroupReport:
    error = known.error / known.norm if known.norm else 0.0
    return GroupReport.computed_later(
        lambda _: known.optimum(), size=known.group.size, norm=norm, error=error, iterations=found.iterations,
        method=found.method,
    )  # fmt: skip


def _error(algebra: Algebra, group: Group, arrays: Mapping[str, Array], scaled: Array, exponent: int) -> float:
    """Compute, in float64, the distance of the arrays' update from ``scaled``, both divided by ``2 ** exponent``."""
    double = algebra.double
    wide = {name: algebra.doubled(array) for name, array in arrays.items()}
    if group.projection.linear:
        wide = at_size(double, group.network, wide, -exponent)
    params = {full: wide[name] for name, full in group.names.items()}
    with np.errstate(over="ignore", invalid="ignore"):  # the error is infinite for arrays that overflow
        made = group.update(double.backend, params, 0, group.size, algebra.backend.dtype_name(algebra.like))
        return double.norm(made - algebra.doubled(scaled))
