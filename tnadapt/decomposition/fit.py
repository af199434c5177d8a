"""All groups of a plan, one after another, from updates that are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from ..backends.base import Array
from ..errors import ShapeError
from ..projection import SQUARE
from ..superlora import Group, SuperLoRA
from .algebra import Algebra
from .bounds import lower_bound
from .report import GroupReport, Report, Step
from .single import Fit, Limits
from .through import fit_group, started

__all__ = ["fit_plan"]

Progress = Callable[[Step], None]

# What is left is rounding where it is this many times the dtype's.
_ROUNDING = 64
# A bound counts as met within this share of it.
_MET = 1e-6


def fit_plan(
    algebra: Algebra,
    plan: SuperLoRA,
    read: Callable[[int], Array],
    limits: Limits,
    progress: Progress | None = None,
) -> tuple[dict[str, Array], Report]:
    """The parameters of a plan whose updates are nearest to given ones.

    Parameters
    ----------
    algebra : Algebra
    plan : SuperLoRA
    read : callable
        The update of one weight, by its number: an array, shape (rows, cols), of algebra's library and dtype. It
        is asked for each once where no weight lies in two groups, or those follow one another.
    limits : Limits
    progress : callable, optional
        Called with a :class:`Step` when a group begins and after each iteration.

    Returns
    -------
    dict of str to array
        Named and shaped as ``plan.param_shapes``.
    Report

    Raises
    ------
    ShapeError
        If an update holds NaN or infinity.

    Notes
    -----
    In memory is one group's part of the long vector at a time, a few times over.
    """
    params: dict[str, Array] = {}
    reports = []
    last: tuple[int, Array] | None = None
    count = len(plan.groups)
    for number, group in enumerate(plan.groups):
        parts = []
        for piece in group.pieces:
            if last is None or last[0] != piece.weight:
                last = piece.weight, algebra.backend.flatten(read(piece.weight))
            parts.append(last[1][piece.weight_start : piece.weight_start + piece.length])
        y = algebra.backend.concat(parts)

        def watch(iteration: int, error: float | None, number: int = number) -> None:
            if progress is not None:
                progress(Step(number, count, iteration, error))

        watch(0, None)
        arrays, report = _fitted(algebra, group, y, limits, watch)
        params.update({full: arrays[name] for name, full in group.names.items()})
        reports.append(report)
    return params, Report(plan, tuple(reports))


def _fitted(
    algebra: Algebra, group: Group, y: Array, limits: Limits, watch: Callable[[int, float | None], None]
) -> tuple[dict[str, Array], GroupReport]:
    unit = _unit(algebra, y) if group.projection.linear else 1.0
    scaled = y if unit == 1.0 else _times(y, 1.0 / unit)
    norm = algebra.norm(scaled)
    if not norm < math.inf:
        raise ShapeError("an update holds NaN, infinity, or numbers whose squares are infinite: nothing fits it")
    found = fit_group(algebra, group, scaled, limits, watch)
    error = _error(algebra, group, found, scaled)
    if not error <= norm:
        # Never worse than nothing at all.
        found = Fit(started(algebra, group), False, found.iterations, f"{found.method}: no better than zero")
        error = _error(algebra, group, found, scaled)
    bound = 0.0
    if norm and group.projection.kind in SQUARE:
        bound = lower_bound(algebra, group.network, group.projection.adjoint(scaled))
    rounding = _ROUNDING * algebra.eps * norm
    certified = found.optimal or error <= rounding or error <= bound * (1.0 + _MET)
    bound = error if found.optimal else min(error, bound)
    relative = (error / norm, bound / norm) if norm else (0.0, 0.0)
    arrays = _at_size(group, found.arrays, unit) if norm else found.arrays
    return arrays, GroupReport(group.size, norm * unit, *relative, certified, found.iterations, found.method)


def _unit(algebra: Algebra, y: Array) -> float:
    """The power of two nearest to an update's root mean square: divided by it, no square is beyond the dtype.

    A linear F and the network are homogeneous, and powers of two change no digit.
    """
    total = algebra.squares(y)
    if 1e-20 < total < 1e20:
        size = math.sqrt(total / y.shape[0])
    else:
        # By the largest number; seldom, so that it may pass through the host.
        size = float(np.max(np.abs(algebra.backend.to_numpy(y)), initial=0.0))
        if not math.isfinite(size):
            return 1.0
    return 2.0 ** round(math.log2(size)) if size else 1.0


def _times(y: Array, factor: float) -> Array:
    """An array times a power of two that may itself be beyond the dtype."""
    root = 2.0 ** (math.frexp(factor)[1] // 2)
    return y * root * (factor / root)


def _at_size(group: Group, arrays: Mapping[str, Array], unit: float) -> dict[str, Array]:
    """The arrays that make the update itself, one of each term times its unit."""
    last = group.network.splits[-1]
    scaled = {f"{prefixes[-1]}{last.zero}" for prefixes in group.network.prefixes}
    if unit == 1.0:
        return dict(arrays)
    return {name: _times(array, unit) if name in scaled else array for name, array in arrays.items()}


def _error(algebra: Algebra, group: Group, found: Fit, y: Array) -> float:
    params = {full: found.arrays[name] for name, full in group.names.items()}
    return algebra.norm(group.update(algebra.backend, params, 0, group.size) - y)
