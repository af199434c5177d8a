"""The answer to "Which method?", generated from the results: in words for each budget, and a table for each task.

README.md, the page of the documentation and ``tnadapt plan`` have the same words.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from tnadapt.report import TextTable

from ..formatting import wrapped
from .comparison import (
    Outcome,
    added_by_search,
    at_budget,
    control_of,
    difference,
    half_learned,
    improves,
    leader_of,
    worse_than_base,
)
from .facts import Facts
from .figures import budgets_of
from .methods import BASE, DENSE, FITTED_HEAD
from .recommendation import Recommendation, Study, lora_rank, recommendations, sentence, studies_of
from .report import scored, shown, value
from .tasks import QualityTask

#: Names in a cell.
_NAMED = 3


def answers(folder: Path) -> list[Recommendation]:
    """Return the answer for each budget, among tnadapt's methods."""
    return recommendations(studies_of(folder), "tnadapt")


def answer(folder: Path) -> Iterator[str]:
    """Yield the lines of the answer in Markdown: a sentence for each budget, and what they are based on."""
    found = answers(folder)
    for one in found:
        yield textwrap.fill(f"- {sentence(one)}", 120, subsequent_indent="  ", break_on_hyphens=False)
    yield ""
    tied = [f"{one.tied} of {one.compared - 1}" for one in found]
    yield from wrapped(BASIS.format(tied=" and ".join(filter(None, (", ".join(tied[:-1]), *tied[-1:])))))
    rows = [_row(study, found) for study in studies_of(folder)]
    head = [
        "task",
        "base",
        "head alone",
        "dense",
        "clear gain from",
        "half of it at",
        "tuned rate adds",
        "worse than base",
    ]
    yield TextTable(rows, head, range(1, 8)).markdown()
    yield ""


def _row(study: Study, found: Sequence[Recommendation]) -> list[str]:
    """Return what controls reach on a task, how many parameters gain, what a tuned rate adds, and how many fail."""
    task, outcomes = study.task, study.outcomes
    scores = {one.method: value(task, one.mean) for one in outcomes if one.library == "control" and one.measured}
    clear = min((one.budget for one in found if task.name in one.tasks), default=None)
    half, added = half_learned(task, outcomes), added_by_search(task, outcomes)
    failing = worse_than_base(task, outcomes)
    return [
        f"`{task.name}`, {task.metric}",
        *(scores.get(control.name, "–") for control in (BASE, FITTED_HEAD, DENSE)),
        *("never" if count is None else f"{count:,.0f}" for count in (clear, half)),
        "–" if added is None else f"{100 * added:.0f}%",
        "–" if failing is None else f"{failing[0]} of {failing[1]}",
    ]


def task_answer(task: QualityTask, outcomes: Sequence[Outcome], facts: Facts) -> str:
    """Return the table of a task: for each budget the best method, those tied with it, and the best served as LoRA."""
    score = f"test {task.metric}"
    head = ["parameters", "best", score, "statistically tied", "best as LoRA", score, "behind best"]
    rows = []
    control = control_of(task, outcomes)
    for budget in budgets_of(outcomes):
        here = at_budget(outcomes, budget)
        best = leader_of(task, here)
        assert best is not None
        name = _named(best) if improves(task, best, control) else f"{_named(best)} (no gain)"
        servable = [one for one in here if lora_rank(one, facts) is not None]
        lora = leader_of(task, servable)
        cells = ["–", "–", "–"]
        if lora is not None:
            behind = "" if lora is best else shown(task, difference(task, best, lora))
            cells = [f"{_named(lora)} (rank {lora_rank(lora, facts)})", scored(task, lora), behind]
        rows.append([f"{budget:,}", name, scored(task, best), _tied(task, here, best), *cells])
    return TextTable(rows, head, (0, 2, 5, 6)).markdown()


def _named(one: Outcome) -> str:
    return f"{one.name} {one.label}".strip()


def _tied(task: QualityTask, here: Sequence[Outcome], best: Outcome) -> str:
    """Return the methods that the best one, which held-out scores chose, is not decided to be better than."""
    tied = []
    for one in sorted(here, key=lambda one: -task.quality(one.mean)):
        gain = None if one is best else difference(task, best, one)
        if gain is not None and gain.low <= 0.0:
            tied.append(f"{one.name} (better on test)" if gain.decided else one.name)
    names = ", ".join(tied[:_NAMED])
    more = len(tied) - _NAMED
    return f"{names} and {more} more" if more > 0 else names or "none"


BASIS = """\
Held-out samples chose the methods; gains are on test samples, over the best control, at the default rate.
Of the other methods, {tied} are statistically tied with them.
"""
