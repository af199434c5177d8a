"""``tnadapt.plan``: find the settings that fit a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence

from tnadapt.algebra.config import Config
from tnadapt.algebra.known_weights import KnownWeights, require_keys
from tnadapt.argument_checks import wrong_argument
from tnadapt.errors import ConfigError

from ._budget_units import bytes_each, parameters_of
from ._measured import Measurements, measurements
from ._plan_row import Row
from ._plan_table import RUNG, Plan, checked_criteria, front_of
from ._setting_names import known_as
from .families import families
from .ladders import Family, Found, Search

__all__ = ["plan"]


def plan(
    shapes: Sequence[tuple[int, int]],
    budget: int | str,
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
    dtype: str = "float32",
    by: Sequence[str] = ("parameters", "freedom", "cost"),
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Find the settings of all families within a budget, with their capacity and cost, and their Pareto front.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
        Shapes of the weights to update, in torch's order (out_features, in_features).
    budget : int or str
        A number of parameters; or bytes of the arrays in a file, as text: ``"4 kB"``, ``"64 KiB"``.
    layers : sequence of hashable, optional
        One key per weight; if given, ``groups="layer"`` is among the settings.
    roles : sequence of hashable, optional
        One key per weight, such as ``"q"`` and ``"v"``; if given, ``groups="role"`` is among the settings.
    dtype : str
        Dtype of the file: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    by : sequence of str
        The criteria of the front: ``"parameters"``, ``"freedom"``, ``"cost"``, ``"rank"``, ``"waste"``. With
        ``"rank"``, the rank of every row is computed, which takes a second each for weights of 4096².
    progress : callable, optional
        Called with the number of families that are searched and of all, after each.

    Returns
    -------
    Plan
        ``print`` shows it as a table; see ``rows``, ``front``, ``freest`` and ``to_dict()``.

    Raises
    ------
    ConfigError
        If the budget is invalid or is less than the smallest setting needs; if ``by`` or the dtype is unknown, or
        layers or roles do not fit.
    ShapeError
        If shapes are not a list of (rows, cols), or are empty.

    Notes
    -----
    The families are the methods of table 1 of the paper, settings between them (over G, M, K, format, projection and
    ratio), and the methods of the literature with the fewest parameters. For each family, bisection finds the setting
    with the most parameters within the budget (if the family has several K and f, or ρ, the one with the most freedom),
    the same for a tenth of the budget, a hundredth, …, and the smallest setting. No array is created until a rank is
    needed. Shapes are checked once, and what settings need of them is counted once for each different group, so that
    the time hardly depends on the number of weights.

    Freedom and rank measure what a setting can represent, not its accuracy. Where published results apply, rows are in
    the order of the accuracy that their methods reached on held-out samples: on tasks whose adapted weights have
    between a tenth and ten times as many elements, with at most 3.2 times more or fewer parameters
    (``benchmarks/quality``). On your own task, measure it with ``tnadapt finetune``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> found = tna.plan([(768, 768)] * 24, 1000)
    >>> row = max(found.rows, key=lambda row: row.freedom)
    >>> print(row.name, row.parameters, row.freedom, row.rank)
    Uni-LoRA p = 1000, r = 4 1000 1000 4
    """
    names = checked_criteria(by)
    each = bytes_each(dtype)
    require_keys(layers, roles)
    if progress is not None and not callable(progress):
        raise wrong_argument("progress", "a function or None", progress)
    layers, roles = (None if keys is None else list(keys) for keys in (layers, roles))
    shapes = KnownWeights(shapes, layers, roles)
    for name, keys in (("layer", layers), ("role", roles)):
        if keys is not None:
            shapes.layout(name)  # raise errors early
    size = sum(rows * cols for rows, cols in shapes)
    wanted = parameters_of(budget, dtype)
    search, kinds = Search(shapes, layers, roles), families(shapes, layers, roles)
    found = _down(search, kinds, min(wanted, size), progress)
    if not found:
        least = _least(search, kinds)
        raise ConfigError(
            f"a budget of {wanted:,} parameters is less than any setting needs on these {len(shapes)} weights; the "
            f"least is {least.parameters:,}: {known_as(least.config)}"
        )
    known = measurements(size)
    rows = sorted((_with_gain(Row.of(search.adapter(config), each), known) for config in found), key=_order)
    front = tuple(front_of(rows, names, min(wanted, size)))
    used = {title for row in rows for title in (*row.measured_on, *row.estimated_on)}
    titles = tuple(task.title for task in known.tasks if task.title in used)
    no_gain = known.no_gain([min(wanted, size), *(row.parameters for row in rows if row.measured is not None)])
    return Plan(wanted, dtype, tuple(shapes), names, tuple(rows), front, tuple(_freest(rows)), titles, no_gain)


def _with_gain(row: Row, known: Measurements) -> Row:
    gain = known.gain(row.config, row.parameters)
    if gain is None:
        return row
    return dataclasses.replace(row, measured=gain.share, measured_on=gain.measured_on, estimated_on=gain.estimated_on)


def _order(row: Row) -> tuple[float, ...]:
    """Sort by measured accuracy where there is any, then by parameters."""
    measured = -1.0 if row.measured is None else row.measured
    return (row.measured is None, -measured, -row.parameters, row.cost, -row.freedom)


def _freest(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in rows:
        known = best.get(row.name.family)
        if known is None or (row.freedom, -row.cost) > (known.freedom, -known.cost):
            best[row.name.family] = row
    return list(best.values())


def _least(search: Search, kinds: Sequence[Family]) -> Found:
    return min((found for family in kinds if (found := search.least(family))), key=lambda found: found.parameters)


def _down(
    search: Search, kinds: Sequence[Family], allowed: int, progress: Callable[[int, int], None] | None
) -> dict[Config, None]:
    """Return for each family the freest of its largest settings within the budget, a tenth of it, …, and the least."""
    found: dict[Config, None] = {}
    for number, family in enumerate(kinds):
        least, rung = search.least(family), allowed
        while least is not None and rung >= least.parameters:
            best = search.largest(family, rung, search.freedom)
            assert best is not None
            found[best.config] = None
            rung //= RUNG
        if least is not None and least.parameters <= allowed:
            found[least.config] = None
        if progress is not None:
            progress(number + 1, len(kinds))
    return found
