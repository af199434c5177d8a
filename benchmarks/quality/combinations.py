"""Whether a new combination is better than the methods that have the fewest parameters: tables from results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tnadapt.checkpoints.atomic_files import replace_file

from . import store, tasks
from .comparison import Outcome, at_budget, difference, leader_of, outcomes_of
from .figures import budgets_of
from .methods import REFERENCES
from .report import row, scored, shown
from .tasks import QualityTask

__all__ = ["page", "write"]


def write(folder: Path) -> Path:
    """Write the tables of all tasks with results in a folder.

    Raises
    ------
    FileError
        If results are damaged, or the file cannot be written.
    """
    path = folder / "combinations.md"
    replace_file(str(path), page(folder).encode())
    return path


def page(folder: Path) -> str:
    """Return the tables as Markdown, of the tasks with new combinations; empty if there are none."""
    parts = []
    for name in tasks.TASKS:
        task = tasks.find(name)
        for scale in task.scales:
            found = store.read(folder, name, scale)
            if found is not None and any(line["library"] == "new" for line in found.records.values()):
                parts.append("\n".join(_section(task, outcomes_of(task, found.records.values()))) + "\n")
    return "\n".join(parts)


def _section(task: QualityTask, outcomes: Sequence[Outcome]) -> Iterator[str]:
    yield f"## {task.title}"
    for budget in budgets_of(outcomes):
        here = at_budget(outcomes, budget)
        new = [one for one in here if one.library == "new"]
        known = [one for one in here if one.library != "new"]
        if not new or not known:
            continue
        yield from ("", f"**At most {budget:,} parameters**", "")
        yield from _budget(task, new, known)


def _budget(task: QualityTask, new: Sequence[Outcome], known: Sequence[Outcome]) -> Iterator[str]:
    leader = leader_of(task, known)
    assert leader is not None
    parents = [one for name in REFERENCES for one in known if one.method == name]
    others = [one for one in parents if one is not leader]
    yield (
        f"The best known method of tnadapt by held-out {task.chosen_by} is {leader.name} {leader.label}".rstrip()
        + f", with a test {task.metric} of {scored(task, leader)}. {_sentence(task, new, leader)}"
    )
    yield ""
    against = [leader, *others]
    yield row(["combination", "setting", "parameters", f"test {task.metric}", *(f"over {one.name}" for one in against)])
    yield "|---|---|--:|--:|" + "--:|" * len(against)
    for one in sorted(new, key=lambda one: -task.quality(one.mean)):
        differences = [shown(task, difference(task, one, other)) for other in against]
        yield row([one.name, one.label, f"{one.parameters:,}", scored(task, one), *differences])


def _sentence(task: QualityTask, new: Sequence[Outcome], leader: Outcome) -> str:
    found = [(one, difference(task, one, leader)) for one in new]
    better = [one.name for one, gain in found if gain is not None and gain.low > 0]
    worse = [one.name for one, gain in found if gain is not None and gain.high < 0]
    names = f" ({'; '.join(better)})" if better else ""
    undecided = len(new) - len(better) - len(worse)
    return (
        f"Of {len(new)} combinations, {len(better)} are better by an interval that excludes 0{names}, {len(worse)} are "
        f"worse, and {undecided} are not decided by these seeds."
    )
