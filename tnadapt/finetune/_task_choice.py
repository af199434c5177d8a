"""The choice of the task: the one that the user names, or the one that the data are evidence of."""

from __future__ import annotations

from tnadapt.errors import ConfigError, TnadaptError

from ._data import Data
from ._data_sources import LABEL_COLUMNS, TEXT_COLUMNS
from ._learning_task import LearningTask
from ._sample_tables import Table, find_column, needed_column
from ._specification import Spec
from .tasks import TASKS

__all__ = ["choose_task"]


def choose_task(source: Table | Data, spec: Spec) -> type[LearningTask]:
    """Return the class of the task.

    Parameters
    ----------
    source : Table or Data
    spec : Spec

    Raises
    ------
    TnadaptError
        If the data do not fit the task that was named, or fit several tasks, or none. The message says what was found
        and what to give.
    """
    task = _evident(source, spec) if spec.task is None else _named(source, spec, spec.task)
    for option in dict.fromkeys(name for one in TASKS.values() for name in one.options):
        if getattr(spec, option) is not None and option not in task.options:
            takers = [name for name, one in TASKS.items() if option in one.options]
            raise TnadaptError(f"--{option} is for {_given(takers)}; the task of {source.name} is {task.name}")
    return task


def _evident(source: Table | Data, spec: Spec) -> type[LearningTask]:
    found = {name: task.fits(source, spec) for name, task in TASKS.items()}
    evident = [name for name, evidence in found.items() if evidence.level == "evident"]
    if len(evident) == 1:
        return TASKS[evident[0]]
    open_ones = evident or [name for name, evidence in found.items() if evidence.level == "possible"]
    if isinstance(source, Table) and open_ones in ([], ["causal-lm"]):
        _need_columns(source, spec, bool(open_ones))
    if not open_ones:
        reasons = "; ".join(f"{name}: {evidence.why}" for name, evidence in found.items())
        raise TnadaptError(f"{source.name} fits no task ({reasons})")
    reasons = "; ".join(f"{found[name].why} (--task {name})" for name in open_ones)
    raise TnadaptError(f"the task is not evident from {source.name}: {reasons}; give {_given(open_ones)}")


def _named(source: Table | Data, spec: Spec, name: str) -> type[LearningTask]:
    try:
        chosen = TASKS.find(name)
    except ConfigError as error:
        raise TnadaptError(f"--{error}") from None
    evidence = chosen.fits(source, spec)
    if evidence.level == "no":
        levels = {other: task.fits(source, spec).level for other, task in TASKS.items()}
        others = [other for other, level in levels.items() if level in ("evident", "possible")]
        way = f"; these data fit {_given(others)}" if others else ""
        raise TnadaptError(f"--task {name} does not fit: {evidence.why}{way}")
    return chosen


def _given(names: list[str]) -> str:
    return " or ".join(f"--task {name}" for name in names)


def _need_columns(table: Table, spec: Spec, texts: bool) -> None:
    """Raise the error of a missing column of texts or labels."""
    names = list(table.columns)
    needed_column(table.path, "text", spec.text_column, TEXT_COLUMNS, names)
    usual = (*spec.label_names, *LABEL_COLUMNS)
    if texts and spec.label_column is None and find_column(table.path, None, usual, names) is None:
        raise TnadaptError(
            f"which column of {table.path} is the label? It has {table.listed()}: give --label-column NAME, or "
            "--task causal-lm to learn the texts themselves"
        )
    needed_column(table.path, "label", spec.label_column, usual, names)
