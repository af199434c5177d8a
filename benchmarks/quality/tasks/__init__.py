"""The tasks, by name. A new one is a subclass of :class:`QualityTask` in a file of its own, and one line here."""

from __future__ import annotations

from tnadapt.errors import TnadaptError, safe_repr

from ._quality_task import Bench, Progress, QualityTask
from .cifar10 import Cifar10
from .diffusion import Diffusion
from .digits import Digits
from .reviews import Reviews
from .smollm2_grpo import SmolLM2GRPO
from .smollm2_sft import SmolLM2SFT

__all__ = ["TASKS", "Bench", "Progress", "QualityTask", "find"]

_ALL = (Digits, Reviews, Cifar10, SmolLM2SFT, SmolLM2GRPO, Diffusion)

TASKS: dict[str, type[QualityTask]] = {one.name: one for one in _ALL}


def find(name: str) -> QualityTask:
    """Return the task of a name."""
    if name not in TASKS:
        raise TnadaptError(f"no task {safe_repr(name)}; expected one of {', '.join(TASKS)}")
    return TASKS[name]()
