"""The result of planning: the settings with their measures, their Pareto front, and the table; budgets in bytes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.network import Network
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer, is_sequence
from tnadapt.backends import FLOAT_DTYPES
from tnadapt.checkpoints.lora_export import LoraExport, lora_export
from tnadapt.errors import ConfigError, safe_repr
from tnadapt.report import TextTable

from ._flops import step_cost
from ._matrix_rank import Rank, degrees_of_freedom, largest_rank
from ._setting_names import SYMBOLS, Name, PresetCall, known_as, preset_call

# -- One setting, with its measures on given weights -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a plan.

    Attributes
    ----------
    config : Config
        Ready to use.
    name : Name
        Its common name.
    parameters : int
    bytes : int
        Bytes of its arrays in a file, in the plan's dtype.
    waste : float
        Fraction of the folded tensors' elements that are computed but not used, 0 to 1.
    freedom : int
        Dimension of the set of updates that it can represent: :func:`~tnadapt.planning.degrees_of_freedom`.
    cost : int
        Multiply-adds to compute all updates, what they make of the weights, and their gradients once:
        :func:`~tnadapt.planning.step_cost`.
    adapter : UpdatePlan
        The setting on the plan's weights.
    measured : float, optional
        What part of the gain of dense updates the method reached on held-out samples with about as many parameters, in
        published results that apply to these weights; None if there are none. It puts rows in order.
    gain : float, optional
        The same on test samples, which the table shows.
    measured_on : tuple of str
        The tasks of these results.
    estimated_on : tuple of str
        The tasks on which, with about as many parameters, only other methods were measured. If there are any,
        ``measured`` is an estimate: on them, the method is assumed to keep its distance to the others.

    Examples
    --------
    >>> import tnadapt as tna
    >>> row = Row.of(tna.UpdatePlan(tna.presets.lora(1), [(64, 64)] * 8))
    >>> print(row.name, row.parameters, row.bytes, row.freedom, row.rank)
    LoRA r = 1 1024 4096 1016 1
    """

    config: Config
    name: Name
    parameters: int
    bytes: int
    waste: float
    freedom: int
    cost: int
    adapter: UpdatePlan = dataclasses.field(compare=False, repr=False)
    measured: float | None = None
    gain: float | None = None
    measured_on: tuple[str, ...] = ()
    estimated_on: tuple[str, ...] = ()

    @classmethod
    @checks_arguments
    def of(cls, adapter: UpdatePlan, each: int = 4) -> Row:
        """Return the row of a :class:`~tnadapt.UpdatePlan` whose parameters have ``each`` bytes."""
        count = adapter.num_parameters
        return cls(
            adapter.config, known_as(adapter.config), count, count * each, padding_waste(adapter),
            degrees_of_freedom(adapter), step_cost(adapter), adapter,
        )  # fmt: skip

    @functools.cached_property
    def rank(self) -> Rank:
        """Largest matrix rank that an update can have, for the first of the weights whose smaller side is largest.

        Computed by :func:`~tnadapt.planning.largest_rank` on first access, and cached.
        """
        return largest_rank(self.adapter)

    @functools.cached_property
    def export(self) -> LoraExport:
        """Whether it exports exactly as LoRA, at which rank, and at which rank vLLM serves it; or why not."""
        return lora_export(self.adapter)

    @functools.cached_property
    def call(self) -> PresetCall | None:
        """How to write the config: :func:`~tnadapt.planning.preset_call`."""
        return preset_call(self.config)

    @property
    def lora_rank(self) -> int | None:
        """Rank of LoRA that holds every update exactly, or None: :attr:`tnadapt.UpdatePlan.lora_rank`."""
        return self.export.rank

    @property
    def fraction(self) -> float:
        """``freedom`` as a fraction of the number of elements of all updates."""
        return self.freedom / self.adapter.size

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary for JSON, including the rank."""
        return {
            "family": self.name.family, "label": self.name.label, "parameters": self.parameters, "bytes": self.bytes,
            "call": None if self.call is None else str(self.call), "measured": self.measured, "gain": self.gain,
            "measured_on": list(self.measured_on), "estimated_on": list(self.estimated_on),
            "rank": self.rank.value, "rank_exact": self.rank.exact, "export": self.export.to_dict(),
            "lora_rank": self.lora_rank, "freedom": self.freedom, "fraction": self.fraction, "waste": self.waste,
            "cost": self.cost, "config": self.config.to_dict(),
        }  # fmt: skip


@checks_arguments
def padding_waste(plan: UpdatePlan) -> float:
    """Return the fraction of the elements of all folded tensors that are computed but not used.

    Parameters
    ----------
    plan : UpdatePlan

    Returns
    -------
    float
        0 if all elements are used. For a Kronecker product, its sizes before cropping count.

    Examples
    --------
    >>> import tnadapt as tna
    >>> padding_waste(tna.UpdatePlan(tna.Config(groups=1, fold="hypercube", order=3), [(3, 3)]))  # 27 for 9
    0.6666666666666666
    """
    computed = sum(count * _elements(group.network) for group, count in plan.alike)
    return (computed - sum(count * group.network.size for group, count in plan.alike)) / computed


def _elements(network: Network) -> int:
    tensors = [split.sizes for split in network.splits] if network.kronecker else [network.sizes]
    return math.prod(map(math.prod, tensors))


# -- The plan: rows, Pareto front, and printed table -------------------------------------------------------------------


# Criteria of the front, and whether more is better. (The rank of a row is computed on first access.)
CRITERIA = {"parameters": False, "freedom": True, "cost": False, "rank": True, "waste": False}

# Numbers of parameters are compared by powers of this factor ("rungs") of the budget. Freedom grows with parameters
# about one for one: if they were compared exactly, nearly every row would be on the front.
RUNG = 10

# Characters in a line of the notes, one of which lists tasks.
_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Plan:
    """Settings within a budget.

    Attributes
    ----------
    budget : int
        Number of parameters.
    dtype : str
        Dtype of the parameters in a file.
    shapes : tuple of (rows, cols)
        Shapes of the weights.
    by : tuple of str
        Criteria of the front.
    rows : tuple of Row
        All settings that were compared: the recommended one, those with published results by accuracy, then the others,
        those with the most parameters first.
    front : tuple of Row
        The Pareto front: the rows for which no other row is as good in everything that ``by`` names and better in
        something. Parameters are compared by tenths: all rows between a tenth of the budget and the budget count as
        equal, and their exact numbers only decide between rows that are otherwise equal.
    freest : tuple of Row
        For each method, the row with the most freedom.
    measured_on : tuple of str
        The tasks whose published results apply to these weights, and to some of the rows.
    no_gain_on : tuple of (str, int)
        The tasks with such weights on which no method was clearly better than the best control, and the number of
        parameters: about the budget, or about as many as a row with results has.
    recommendation : str
        The answer to "Which method?" for about this budget, from the same results, whatever the weights; empty if there
        is none.

    Examples
    --------
    >>> import tnadapt as tna
    >>> plan = tna.plan([(64, 64)] * 8, 300)
    >>> plan.front[0].parameters <= 300
    True
    """

    budget: int
    dtype: str
    shapes: tuple[tuple[int, int], ...]
    by: tuple[str, ...]
    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    freest: tuple[Row, ...]
    measured_on: tuple[str, ...] = ()
    no_gain_on: tuple[tuple[str, int], ...] = ()
    recommendation: str = ""

    @property
    def size(self) -> int:
        """N, the number of elements of all weights."""
        return sum(rows * cols for rows, cols in self.shapes)

    @property
    def shown(self) -> tuple[Row, ...]:
        """Rows of the printed table: the front, and each method's most accurate row and that with the most freedom."""
        best: dict[str, Row] = {}
        for row in self.rows:  # those with published results are in the order of their accuracy
            if row.measured is not None:
                best.setdefault(row.name.family, row)
        return tuple(row for row in self.rows if row in self.front or row in self.freest or row in best.values())

    def table(self, every: bool = False) -> list[tuple[str, ...]]:
        """Return the cells of the table, the titles first.

        Parameters
        ----------
        every : bool
            Whether to include all rows, not only ``shown``; each rank is computed, which may take a while.
        """
        rows = self.rows if every else self.shown
        table = [TITLES, *(_cells(row, row in self.front) for row in rows)]
        if any(row.measured is not None for row in rows):
            return table
        place = TITLES.index("gain")
        return [(*cells[:place], *cells[place + 1 :]) for cells in table]

    def __str__(self) -> str:
        """Return the recommendation and the table as plain text."""
        return "\n".join([*_wrapped(self.recommendation), str(self._table())])

    def _repr_html_(self) -> str:
        return self._table().html()

    def _table(self) -> TextTable:
        head, *rows = self.table()
        caption = f"{_counted(len(self.shapes), 'weight')}, at most {_counted(self.budget, 'parameter')}"
        caption = ". ".join(filter(None, (caption, self.recommendation)))
        return TextTable(rows, head, range(3, len(head)), caption, self.notes())

    def notes(self, targets: str | Sequence[str] = ()) -> list[str]:
        """Return the lines that explain the table.

        Parameters
        ----------
        targets : str or sequence of str
            What the weights were chosen by, to say how to use the first row; by default they are queries and values.
        """
        measured = any(row.measured is not None for row in self.rows)
        names = {"parameters": "parameters (by tenths)", "cost": "step", "waste": "padding"}
        told = ", ".join(names.get(name, name) for name in self.by)
        return [
            *self._order(),
            f"● front: no other setting is as good in {told}, and better in one",
            f"  other rows: for each method, the setting with the most freedom{', and the most accurate' * measured}",
            *self._symbols(),
            "rank: the largest that a weight's update can have; step: multiply-adds of updates and gradients",
            "LoRA: exports exactly as LoRA of that rank, padded for vLLM to the one in brackets; –: merge only",
            "freedom: the dimension of the set of all updates, and its share of their elements",
            f"{_counted(len(self.shapes), 'weight')} of {_counted(self.size, 'element')}; at most "
            f"{_counted(self.budget, 'parameter')}; {_counted(len(self.rows), 'setting')} compared",
            *self._first(targets),
        ]

    def _first(self, targets: str | Sequence[str]) -> list[str]:
        call = self.shown[0].call if self.shown else None
        if call is None:
            return []
        options = call.options(targets)
        return [f"first row: {call.attach(targets)}", *([f"  or tnadapt finetune {options}"] if options else [])]

    def _symbols(self) -> list[str]:
        labels = " ".join(row.name.label for row in self.shown)
        used = [f"{symbol} {means}" for symbol, means in SYMBOLS.items() if f" {symbol} = " in f" {labels}"]
        return _wrapped(f"setting: {'; '.join(used)}") if used else []

    def _order(self) -> list[str]:
        none = self._no_gain()
        if not self.measured_on:
            why = none or "no published results apply to weights and budgets of this size"
            return _wrapped(f"order: by parameters, as {why}")
        tasks = "; ".join(self.measured_on)
        lines = _wrapped(f"order: by held-out accuracy on {tasks} ('Which method?' in the documentation)")
        if none:
            lines += _wrapped(f"no gain: {none}")
        lines.append("gain: on test samples, with about as many parameters; 0% is the best control, 100% dense updates")
        rows = [row for row in self.rows if row.measured is not None]
        if any(row.estimated_on for row in rows):
            lines.append("  ~ estimated: not measured on all of these tasks")
        if len({frozenset(row.measured_on + row.estimated_on) for row in rows}) > 1:
            lines.append("  compare rows with similar numbers of parameters: others were measured on different tasks")
        return lines

    def _no_gain(self) -> str:
        """Describe where no method gained anything, if anywhere."""
        budgets: dict[str, list[str]] = {}
        for title, budget in self.no_gain_on:
            budgets.setdefault(title, []).append(f"{budget:,}")
        places = [f"{title} with {' and '.join(counts)} parameters" for title, counts in budgets.items()]
        return f"no method was clearly better than the best control on {'; '.join(places)}" if places else ""

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON; with all rows if ``every``."""
        rows = self.rows if every else self.shown
        return {
            "budget": self.budget, "dtype": self.dtype, "weights": len(self.shapes), "elements": self.size,
            "by": list(self.by), "compared": len(self.rows),
            "recommendation": self.recommendation, "measured_on": list(self.measured_on),
            "no_gain_on": [{"task": title, "parameters": budget} for title, budget in self.no_gain_on],
            "rows": [{**row.to_dict(), "front": row in self.front} for row in rows],
        }  # fmt: skip


TITLES = (
    "", "method", "setting", "parameters", "gain", "bytes", "rank", "LoRA", "freedom", "share", "padding", "step",
)  # fmt: skip


def _cells(row: Row, front: bool) -> tuple[str, ...]:
    return (
        "●" if front else "", row.name.family, row.name.label, f"{row.parameters:,}",
        _gained(row), f"{row.bytes:,}", str(row.rank), _exported(row.export), f"{row.freedom:,}",
        _percent(row.fraction), f"{row.waste:.1%}", _short(row.cost),
    )  # fmt: skip


def _gained(row: Row) -> str:
    if row.gain is None:
        return "–"
    return f"{'~' if row.estimated_on else ''}{round(row.gain, 2) + 0.0:.0%}"  # no "-0%"


def _exported(export: LoraExport) -> str:
    if export.rank is None:
        return "–"
    return str(export.rank) if export.served in (export.rank, None) else f"{export.rank} ({export.served})"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.2g}%"


def _short(count: int) -> str:
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def checked_criteria(by: Iterable[str]) -> tuple[str, ...]:
    """Return names of ``CRITERIA``, or raise a ConfigError."""
    names: tuple[Any, ...] = tuple(by) if is_sequence(by) else (by,)
    if not names or any(not isinstance(name, str) or name not in CRITERIA for name in names):
        raise ConfigError(f"by must name criteria among {', '.join(CRITERIA)}; got {safe_repr(by)}")
    return names


def rung(parameters: int, budget: int) -> int:
    """Return how many times the budget can be divided by ten and still hold that many parameters.

    Examples
    --------
    >>> [rung(parameters, 1000) for parameters in (1000, 101, 100, 10, 1)]
    [0, 0, 1, 2, 3]
    """
    steps = 0
    while parameters * RUNG ** (steps + 1) <= budget:
        steps += 1
    return steps


def front_of(rows: Sequence[Row], by: Sequence[str], budget: int) -> list[Row]:
    """Return the rows that no other row dominates, in order; of several that are equal, the first."""
    keys = [(*(_goodness(row, name, budget) for name in by), -row.parameters) for row in rows]
    firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
    return [
        row
        for place, (row, key) in enumerate(zip(rows, keys, strict=True))
        if firsts[key] == place and not any(_beats(other, key) for other in keys)
    ]


def _goodness(row: Row, name: str, budget: int) -> float:
    if name == "parameters":
        return rung(row.parameters, budget)
    value = row.rank.value if name == "rank" else getattr(row, name)
    return value if CRITERIA[name] else -value


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Return whether a setting is as good in all criteria and better in one or, if all are equal, smaller."""
    *ours, few = one
    *theirs, fewer = other
    return all(a >= b for a, b in zip(ours, theirs, strict=True)) and (ours != theirs or few > fewer)


# -- Budgets: a number of parameters, or bytes of a dtype --------------------------------------------------------------


UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30,
}  # fmt: skip
#: Of parameters.
THOUSANDS = {"k": 10**3, "m": 10**6}
MOST = 1 << 62
_FORM = re.compile(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


def bytes_each(dtype: str) -> int:
    """Return the bytes of one parameter.

    Raises
    ------
    ConfigError
        If adapters do not support that dtype.

    Examples
    --------
    >>> bytes_each("bfloat16")
    2
    """
    if not isinstance(dtype, str) or dtype not in FLOAT_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {safe_repr(dtype)}")
    return {"float64": 8, "float32": 4}.get(dtype, 2)


def parameters_of(budget: Any, dtype: str = "float32") -> int:
    """Return the number of parameters of a budget.

    Parameters
    ----------
    budget : int or str
        A number of parameters, also as a string; or bytes, with a unit: B, kB, MB, GB (powers of 1000), KiB, MiB, GiB.
    dtype : str
        Dtype of the parameters, for a budget in bytes.

    Returns
    -------
    int
        At least 1.

    Raises
    ------
    ConfigError
        If it is neither, or is too small for one parameter.

    Examples
    --------
    >>> from tnadapt.planning import parameters_of
    >>> parameters_of(1000), parameters_of("10,000"), parameters_of("1.5k")
    (1000, 10000, 1500)
    >>> parameters_of("4 kB"), parameters_of("4 KiB", "float16")
    (1000, 2048)
    """
    each = bytes_each(dtype)
    if not isinstance(budget, str):
        return integer("budget", budget, 1, MOST, ConfigError, "of parameters, or bytes as text, such as '4 kB'")
    match = _FORM.fullmatch(budget)
    unit = match[2].lower() if match else ""
    if match is None or (unit and unit not in {*UNITS, *THOUSANDS}):
        raise ConfigError(
            f"a budget is a number of parameters, such as 1000 or '1k', or of bytes, such as '4 kB' or '64 KiB'; "
            f"got {safe_repr(budget)}"
        )
    number = Decimal(match[1].replace(",", "").replace("_", ""))
    if unit in THOUSANDS:
        number, unit = number * THOUSANDS[unit], ""
    if not unit and number != int(number):
        raise ConfigError(f"a budget of parameters must be a whole number; got {safe_repr(budget)}")
    parameters = int(number * UNITS[unit]) // each if unit else int(number)
    if parameters < 1:
        least = f"; one parameter is {each} bytes in {dtype}" if unit else ""
        raise ConfigError(f"a budget must be at least 1 parameter; got {safe_repr(budget)}{least}")
    return min(parameters, MOST)
