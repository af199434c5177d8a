"""``tnadapt.plan``: which settings a budget has room for."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from tnadapt.algebra.config import Config
from tnadapt.algebra.layout import make_layout
from tnadapt.errors import ConfigError

from ._budget_units import bytes_each, parameters_of
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
    dtype: str = "float32",
    by: Sequence[str] = ("parameters", "freedom", "cost"),
) -> Plan:
    """Settings of all families within a budget, with what each can and costs, and which of them none beats.

    Parameters
    ----------
    shapes : sequence of (rows, cols)
        Of the weights to update, in torch's order (out_features, in_features).
    budget : int or str
        Parameters; or bytes of the file's arrays, in words: ``"4 kB"``, ``"64 KiB"``.
    layers : sequence of hashable, optional
        One key a weight; with it, ``groups="layer"`` is among the settings.
    dtype : str
        Of the file: ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    by : sequence of str
        What the front is of: ``"parameters"``, ``"freedom"``, ``"cost"``, ``"rank"``, ``"waste"``. With ``"rank"``
        the rank of every row is computed, which takes a second each where weights have 4096².

    Returns
    -------
    Plan
        ``print`` it for a table; ``rows``, ``front``, ``freest``; ``to_dict()``.

    Raises
    ------
    ConfigError
        If the budget is no number or unit, or is less than the least setting needs; if ``by`` or the dtype is
        unknown, or layers do not fit.
    ShapeError
        If shapes are no list of (rows, cols), or empty.

    Notes
    -----
    Families are the methods of table 1 of the paper and what lies between them: over G, M, K, format, projection and
    ratio. Of each, the setting with the most parameters within the budget is found by bisection (of several K and f, or
    ρ, the one with the most freedom), and within a tenth of it, a hundredth, … and its least. No array is made until a
    rank is asked for.

    More freedom and a higher rank are what a setting can do, not what it does: accuracy is measured by
    ``tnadapt finetune``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> found = tna.plan([(768, 768)] * 24, 1000)
    >>> row = max(found.rows, key=lambda row: row.freedom)
    >>> print(row.name, row.parameters, row.freedom, row.rank)
    fastfood ρ = 7.064e-05 1000 1000 768
    """
    names = checked_criteria(by)
    each = bytes_each(dtype)
    shapes = make_layout("weight", shapes).shapes
    if layers is not None:
        layers = list(layers)
        make_layout("layer", shapes, layers)  # what does not fit is said now
    size = sum(rows * cols for rows, cols in shapes)
    wanted = parameters_of(budget, dtype)
    search, kinds = Search(shapes, layers), families(shapes, layers)
    found = _down(search, kinds, min(wanted, size))
    if not found:
        least = _least(search, kinds)
        raise ConfigError(
            f"a budget of {wanted:,} parameters is less than any setting needs on these {len(shapes)} weights; the "
            f"least is {least.parameters:,}: {known_as(least.config)}"
        )
    rows = [Row.of(search.adapter(config), each) for config in found]
    rows.sort(key=lambda row: (-row.parameters, row.cost, -row.freedom))
    front = tuple(front_of(rows, names, min(wanted, size)))
    return Plan(wanted, dtype, shapes, names, tuple(rows), front, tuple(_freest(rows)))


def _freest(rows: Sequence[Row]) -> list[Row]:
    best: dict[str, Row] = {}
    for row in rows:
        known = best.get(row.name.family)
        if known is None or (row.freedom, -row.cost) > (known.freedom, -known.cost):
            best[row.name.family] = row
    return list(best.values())


def _least(search: Search, kinds: Sequence[Family]) -> Found:
    return min((found for family in kinds if (found := search.least(family))), key=lambda found: found.parameters)


def _down(search: Search, kinds: Sequence[Family], allowed: int) -> dict[Config, None]:
    """Of each family the freest of its largest settings within the budget, a tenth of it, …; and the least."""
    found: dict[Config, None] = {}
    for family in kinds:
        least, rung = search.least(family), allowed
        while least is not None and rung >= least.parameters:
            best = search.largest(family, rung, search.freedom)
            assert best is not None
            found[best.config] = None
            rung //= RUNG
        if least is not None and least.parameters <= allowed:
            found[least.config] = None
    return found
