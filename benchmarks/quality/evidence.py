"""What ``tnadapt plan`` ranks by: the published results of tnadapt's methods, in a file of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tnadapt.planning
from tnadapt.checkpoints.atomic_files import replace_file

from . import store, tasks
from .comparison import Outcome, at_budget, base_of, improves, outcomes_of, share
from .tasks import QualityTask

__all__ = ["PACKAGED", "evidence", "write"]

#: The file that :mod:`tnadapt.planning` reads.
PACKAGED = Path(tnadapt.planning.__file__).with_name("measured.json")


def write(folder: Path) -> Path:
    """Write the file of the package from the results in a folder.

    Raises
    ------
    FileError
        If results are damaged, or the file cannot be written.
    """
    replace_file(str(PACKAGED), evidence(folder).encode())
    return PACKAGED


def evidence(folder: Path) -> str:
    """Return the content of the file: the tasks with their controls, and each measured setting of tnadapt."""
    return json.dumps({"tasks": list(_tasks(folder))}, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def _tasks(folder: Path) -> Iterator[dict[str, Any]]:
    for name in tasks.TASKS:
        task = tasks.find(name)
        # Results at full scale replace those of two cores.
        for scale in ("full", "small"):
            found = store.read(folder, name, scale)
            if found is None:
                continue
            settings = list(_settings(task, outcomes_of(task, found.records.values())))
            if settings:
                size = task.facts(task.sketch()).size
                yield {"name": name, "title": task.title, "scale": scale, "elements": size, "settings": settings}
                break


def _settings(task: QualityTask, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    base = base_of(outcomes)
    for one in outcomes:
        if one.library != "tnadapt" or not one.measured:
            continue
        part = share(task, one, outcomes)
        # Where no method is decided to be better than no adapter, the order of methods is chance.
        gained = any(improves(task, other, base) for other in at_budget(outcomes, one.budget))
        if gained and part is not None:
            yield {"config": one.config, "parameters": one.parameters, "share": round(part, 3), "seeds": len(one.test)}
