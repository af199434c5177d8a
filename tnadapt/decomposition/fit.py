"""All groups of a plan, one after another, from updates that are read when they are needed."""

from __future__ import annotations

from collections.abc import Callable

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
    norm = algebra.norm(y)
    if not norm < float("inf"):
        raise ShapeError("an update holds NaN, infinity, or numbers whose squares are infinite: nothing fits it")
    found = fit_group(algebra, group, y, limits, watch)
    error = _error(algebra, group, found, y)
    if not error <= norm:
        # Never worse than nothing at all.
        found = Fit(started(algebra, group), False, found.iterations, f"{found.method}: no better than zero")
        error = _error(algebra, group, found, y)
    bound = 0.0
    if norm and group.projection.kind in SQUARE:
        bound = min(error, lower_bound(algebra, group.network, group.projection.adjoint(y)))
    if found.optimal:
        bound = error
    rounding = _ROUNDING * algebra.eps * norm
    certified = found.optimal or error <= rounding or error <= bound * (1.0 + _MET)
    relative = (error / norm, bound / norm) if norm else (0.0, 0.0)
    return found.arrays, GroupReport(group.size, norm, *relative, certified, found.iterations, found.method)


def _error(algebra: Algebra, group: Group, found: Fit, y: Array) -> float:
    params = {full: found.arrays[name] for name, full in group.names.items()}
    return algebra.norm(group.update(algebra.backend, params, 0, group.size) - y)
