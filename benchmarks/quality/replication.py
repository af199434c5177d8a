"""Whether a second run on another machine says the same: counts from the results of two runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from . import store
from .comparison import Outcome, at_budget, difference, outcomes_of
from .figures import budgets_of
from .tasks import QualityTask

#: The folder of second runs, in that of the results.
FOLDER = "repeats"


@dataclasses.dataclass
class Agreement:
    """Pairs of settings whose difference is decided in the first run, and what the second run says of them."""

    decided: int = 0
    same: int = 0
    confirmed: int = 0
    reversed: int = 0


def summary(folder: Path, task: QualityTask, scale: str) -> str:
    """Return one sentence on a second run; empty if there is none."""
    first, second = store.read(folder, task.name, scale), store.read(folder / FOLDER, task.name, scale)
    if first is None or second is None:
        return ""
    found = agreement(task, outcomes_of(task, first.records.values()), outcomes_of(task, second.records.values()))
    return (
        f"Repeated on another machine: of {found.decided} differences between two methods that are decided here, "
        f"{found.same} have the same sign there, {found.confirmed} are decided there, too, and {found.reversed} are "
        "decided the other way."
    )


def agreement(task: QualityTask, first: Sequence[Outcome], second: Sequence[Outcome]) -> Agreement:
    """Compare two runs at each budget at which both have at least three settings."""
    found = Agreement()
    for budget in budgets_of(first):
        here, there = ({(one.method, one.label): one for one in at_budget(every, budget)} for every in (first, second))
        both = here.keys() & there.keys()
        for one, other in itertools.combinations(sorted(both), 2) if len(both) > 2 else ():
            before, after = difference(task, here[one], here[other]), difference(task, there[one], there[other])
            if before is None or after is None or not before.decided:
                continue
            agrees = (before.mean > 0.0) == (after.mean > 0.0)
            found.decided += 1
            found.same += agrees
            found.confirmed += agrees and after.decided
            found.reversed += not agrees and after.decided
    return found
