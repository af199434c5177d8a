"""The result of planning: the rows, their Pareto front, and the printed table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from tnadapt.argument_checks import is_sequence
from tnadapt.checkpoints.lora_export import LoraExport
from tnadapt.errors import ConfigError, safe_repr
from tnadapt.report import html_table, text_table

from ._plan_row import Row
from ._setting_names import SYMBOLS

__all__ = ["CRITERIA", "RUNG", "Plan", "front_of", "rung"]

# Criteria of the front, and whether more is better. (The rank of a row is computed on first access.)
CRITERIA = {"parameters": False, "freedom": True, "cost": False, "rank": True, "waste": False}

# Numbers of parameters are compared by powers of this factor ("rungs") of the budget. Freedom grows with parameters
# about one for one: if they were compared exactly, nearly every row would be on the front.
RUNG = 10

# Characters in a line of the notes, of which one lists tasks.
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
        All settings that were compared: those with published results by accuracy, then the others, those with the most
        parameters first.
    front : tuple of Row
        The Pareto front: the rows for which no other row is as good in everything that ``by`` names and better in
        something. Parameters are compared by tenths: all rows between a tenth of the budget and the budget count as
        equal, and their exact numbers only decide between rows that are otherwise equal.
    freest : tuple of Row
        For each method, the row with the most freedom.
    measured_on : tuple of str
        The tasks whose published results apply to these weights, and to some of the rows.
    no_gain_on : tuple of (str, int)
        The tasks with such weights on which no method was clearly better than no adapter, and the number of parameters:
        about the budget, or about as many as a row with results has.

    Examples
    --------
    >>> import tnadapt as tna
    >>> found = tna.plan([(64, 64)] * 8, 300)
    >>> found.front[0].parameters <= 300
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
        """Return the table as plain text."""
        return "\n".join([*text_table(self.table(), range(3, len(TITLES))), *self.notes()])

    def _repr_html_(self) -> str:
        head, *rows = self.table()
        caption = f"{_counted(len(self.shapes), 'weight')}, at most {_counted(self.budget, 'parameter')}"
        return html_table(caption, head, rows, self.notes(), right=3)

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
        return [f"setting: {'; '.join(used)}"] if used else []

    def _order(self) -> list[str]:
        none = self._no_gain()
        if not self.measured_on:
            why = none or "no published results apply to weights and budgets of this size"
            return _wrapped(f"order: by parameters, as {why}")
        lines = _wrapped(f"order: by accuracy on {'; '.join(self.measured_on)} ('Which method?' in the documentation)")
        if none:
            lines += _wrapped(f"no gain: {none}")
        lines.append("gain: on held-out samples, with about as many parameters; 0% is no adapter, 100% dense updates")
        rows = [row for row in self.rows if row.measured is not None]
        if any(row.estimated_on for row in rows):
            lines.append("  ~ estimated: not measured on all of these tasks")
        if len({frozenset(row.measured_on + row.estimated_on) for row in rows}) > 1:
            lines.append("  compare rows with similar numbers of parameters: others were measured on different tasks")
        return lines

    def _no_gain(self) -> str:
        """Return where no method gained anything; empty if nowhere."""
        budgets: dict[str, list[str]] = {}
        for title, budget in self.no_gain_on:
            budgets.setdefault(title, []).append(f"{budget:,}")
        places = [f"{title} with {' and '.join(own)} parameters" for title, own in budgets.items()]
        return f"no method was clearly better than no adapter on {'; '.join(places)}" if places else ""

    def to_dict(self, every: bool = False) -> dict[str, Any]:
        """Return the plan as a dictionary for JSON; with all rows if ``every``."""
        rows = self.rows if every else self.shown
        return {
            "budget": self.budget, "dtype": self.dtype, "weights": len(self.shapes), "elements": self.size,
            "by": list(self.by), "compared": len(self.rows), "measured_on": list(self.measured_on),
            "no_gain_on": [{"task": title, "parameters": budget} for title, budget in self.no_gain_on],
            "rows": [{**row.to_dict(), "front": row in self.front} for row in rows],
        }  # fmt: skip


TITLES = (
    "",
    "method",
    "setting",
    "parameters",
    "gain",
    "bytes",
    "rank",
    "LoRA",
    "freedom",
    "share",
    "padding",
    "step",
)


def _cells(row: Row, front: bool) -> tuple[str, ...]:
    return (
        "●" if front else "", row.name.family, row.name.label, f"{row.parameters:,}",
        _gained(row), f"{row.bytes:,}", str(row.rank), _exported(row.export), f"{row.freedom:,}",
        _percent(row.fraction), f"{row.waste:.1%}", _short(row.cost),
    )  # fmt: skip


def _gained(row: Row) -> str:
    if row.measured is None:
        return "–"
    return f"{'~' if row.estimated_on else ''}{round(row.measured, 2) + 0.0:.0%}"  # no "-0%"


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
    """Return whether one is as good in all criteria and better in one; if all are equal, whether it is smaller."""
    *ours, few = one
    *theirs, fewer = other
    return all(a >= b for a, b in zip(ours, theirs, strict=True)) and (ours != theirs or few > fewer)
