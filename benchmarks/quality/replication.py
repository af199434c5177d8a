"""Whether a second run says the same: tables from the results of two runs."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import scipy.stats

from . import store
from .comparison import Outcome, at_budget, base_of, dense_of, difference, outcomes_of
from .figures import budgets_of
from .report import row, scored
from .tasks import QualityTask

__all__ = ["FOLDER", "Agreement", "agreements", "section", "summary"]

#: The folder of second runs, in that of the results.
FOLDER = "repeats"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How two runs agree on the settings at a budget."""

    budget: int
    #: Number of settings with a result in both.
    settings: int
    #: Spearman's, of the mean test scores.
    correlation: float
    #: Pairs of settings whose difference is decided in the first run.
    decided: int
    #: Those with the same sign in the second run; those that are decided there, too; and those that are decided there
    #: the other way.
    same: int
    confirmed: int
    reversed: int


def section(folder: Path, task: QualityTask, scale: str) -> str:
    """Return what a second run of a task says of the first one, as Markdown; empty if there is none."""
    runs = _runs(folder, task, scale)
    return "" if runs is None else "\n".join(_lines(task, *runs)) + "\n"


def summary(folder: Path, task: QualityTask, scale: str) -> str:
    """Return one sentence on a second run; empty if there is none. For the arguments see :func:`section`."""
    runs = _runs(folder, task, scale)
    if runs is None:
        return ""
    found = agreements(task, *runs)
    decided, same, confirmed, reversed_ = (
        sum(getattr(one, name) for one in found) for name in ("decided", "same", "confirmed", "reversed")
    )
    return (
        f"Repeated on another machine: of {decided} differences between two methods that are decided here, {same} have "
        f"the same sign there, {confirmed} are decided there, too, and {reversed_} are decided the other way."
    )


def agreements(task: QualityTask, first: Sequence[Outcome], second: Sequence[Outcome]) -> list[Agreement]:
    """Return how two runs agree at each budget of both that has at least three settings."""
    found = []
    for budget in budgets_of(first):
        here, there = ({(one.method, one.label): one for one in at_budget(every, budget)} for every in (first, second))
        both = sorted(here.keys() & there.keys())
        if len(both) > 2:
            found.append(_agreement(task, budget, [(here[key], there[key]) for key in both]))
    return found


def _runs(folder: Path, task: QualityTask, scale: str) -> tuple[list[Outcome], list[Outcome]] | None:
    first, second = store.read(folder, task.name, scale), store.read(folder / FOLDER, task.name, scale)
    if first is None or second is None:
        return None
    return outcomes_of(task, first.records.values()), outcomes_of(task, second.records.values())


def _lines(task: QualityTask, first: Sequence[Outcome], second: Sequence[Outcome]) -> Iterator[str]:
    controls = ", ".join(
        f"{name} {scored(task, one)} and {scored(task, other)}"
        for name, find in (("no adapter", base_of), ("dense", dense_of))
        if (one := find(first)) is not None and (other := find(second)) is not None
    )
    yield "**Repeated on another machine**"
    yield ""
    yield textwrap.fill(TEXT.format(folder=FOLDER, controls=controls), 120, break_on_hyphens=False)
    yield ""
    titles = ("parameters", "settings in both", "correlation", "decided", "same sign", "decided, too", "reversed")
    yield row(titles)
    yield "|--:|--:|--:|--:|--:|--:|--:|"
    for one in agreements(task, first, second):
        counts = (one.decided, one.same, one.confirmed, one.reversed)
        yield row((f"{one.budget:,}", f"{one.settings}", f"{one.correlation:.2f}", *map(str, counts)))


def _agreement(task: QualityTask, budget: int, settings: Sequence[tuple[Outcome, Outcome]]) -> Agreement:
    scores = zip(*((one.mean, other.mean) for one, other in settings), strict=True)
    decided = same = confirmed = reversed_ = 0
    for (one, again), (other, other_again) in itertools.combinations(settings, 2):
        before, after = difference(task, one, other), difference(task, again, other_again)
        if before is None or after is None or not before.decided:
            continue
        agrees = (before.mean > 0.0) == (after.mean > 0.0)
        decided += 1
        same += agrees
        confirmed += agrees and after.decided
        reversed_ += not agrees and after.decided
    correlation = float(scipy.stats.spearmanr(*scores).statistic)
    return Agreement(budget, len(settings), correlation, decided, same, confirmed, reversed_)


TEXT = """\
The same trainings were run on another processor (`{folder}/`). A task that pretrains its own model gets a slightly
different one there, so the controls differ, too: {controls}. *Correlation* compares the ranks by test score. *Decided*
counts the pairs of settings whose difference is decided in the tables above. The last three columns count how many of
these have the same sign in the second run, are decided there as well, or are decided the other way.
"""
