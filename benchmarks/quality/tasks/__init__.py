"""The tasks, by name. A new one is a subclass of :class:`QualityTask` in a file of its own, and one line here."""

from __future__ import annotations

from tnadapt.errors import TnadaptError, safe_repr

from ._quality_task import Bench, Progress, QualityTask
from .cifar10 import Cifar10
from .digits import Digits
from .languages import German, Hungarian
from .reasoning import NumberSequence
from .reviews import Reviews, ReviewsMPNet

__all__ = ["TASKS", "Bench", "Progress", "QualityTask", "find"]

_ALL = (Digits, Reviews, ReviewsMPNet, Cifar10, German, Hungarian, NumberSequence)

TASKS: dict[str, type[QualityTask]] = {one.name: one for one in _ALL}


def find(name: str) -> QualityTask:
    """Return the task of a name."""
    if name not in TASKS:
        raise TnadaptError(f"no task {safe_repr(name)}; expected one of {', '.join(TASKS)}")
    return TASKS[name]()
