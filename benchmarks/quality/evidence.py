"""What ``tnadapt plan`` ranks by: the published results of tnadapt's methods, in a file of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tnadapt.planning
from tnadapt.checkpoints.atomic_files import replace_file

from . import store, tasks, which
from .comparison import Outcome, at_budget, control_of, improves, outcomes_of, share, tells
from .figures import budgets_of
from .recommendation import basis, sentence
from .tasks import QualityTask

#: The file that :mod:`tnadapt.planning` reads.
PACKAGED = Path(tnadapt.planning.__file__).with_name("measured.json")


def write(folder: Path) -> Path:
    """Write the file of the package from the results in a folder."""
    replace_file(str(PACKAGED), evidence(folder).encode())
    return PACKAGED


def evidence(folder: Path) -> str:
    """Return the content of the file.

    It has the answers to "Which method?" in words, and the tasks, each with tnadapt's measured settings and the budgets
    at which no method is decided to be better than the best control. Settings have their share of the gain of dense
    updates on held-out samples, which ranks them; test samples only decide at which budgets something is gained.
    """
    answers = [
        {
            "budget": one.budget, "method": one.best.name, "served": one.served.name if one.served else "",
            "words": f"{sentence(one)} {basis(one)}",
        }
        for one in which.answers(folder)
    ]  # fmt: skip
    content = {"answers": answers, "tasks": list(_tasks(folder))}
    return json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _tasks(folder: Path) -> Iterator[dict[str, Any]]:
    for name in tasks.TASKS:
        task = tasks.find(name)
        # Results at full scale replace those of two cores.
        for scale in ("full", "small"):
            found = store.read(folder, name, scale)
            if found is None:
                continue
            outcomes = outcomes_of(task, found.records.values())
            if not tells(task, outcomes):
                break
            no_gain = [budget for budget in budgets_of(outcomes) if not _gained(task, outcomes, budget)]
            settings = list(_settings(task, outcomes, no_gain))
            if settings or no_gain:
                size = task.facts(task.sketch()).size
                yield {
                    "name": name, "title": task.title, "scale": scale, "elements": size, "settings": settings,
                    "no_gain": no_gain,
                }  # fmt: skip
                break


def _gained(task: QualityTask, outcomes: Sequence[Outcome], budget: int) -> bool:
    """Return whether some method, of any library, is decided to be better than the best control."""
    control = control_of(task, outcomes)
    return any(improves(task, one, control) for one in at_budget(outcomes, budget))


def _settings(task: QualityTask, outcomes: Sequence[Outcome], no_gain: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the settings, but not those of budgets at which no method gains: their order is chance."""
    for one in outcomes:
        if one.library != "tnadapt" or not one.measured or one.budget in no_gain:
            continue
        held_out, test = (share(task, one, outcomes, held_out) for held_out in (True, False))
        if held_out is not None and test is not None:
            yield {
                "config": one.config, "parameters": one.parameters, "held_out_share": round(held_out, 4),
                "test_share": round(test, 4), "seeds": len(one.held_out),
            }  # fmt: skip
