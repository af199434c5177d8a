"""Options of ``tnadapt finetune`` about tasks and reports, checked before torch is imported."""

from __future__ import annotations

import enum
import importlib.util
from collections.abc import Mapping

from tnadapt.errors import TnadaptError

__all__ = ["TASK_NAMES", "ReportTo", "check_options"]

#: The built-in tasks; a test compares them with ``tnadapt.finetune.tasks``.
TASK_NAMES = (
    "classification", "multi-label", "regression", "token-classification", "causal-lm", "image-classification",
)  # fmt: skip


class ReportTo(enum.StrEnum):
    """Reports of transformers' Trainer."""

    NONE = "none"
    TENSORBOARD = "tensorboard"
    WANDB = "wandb"
    TRACKIO = "trackio"

    @property
    def given(self) -> str | None:
        """The name, or None without reports."""
        return None if self is ReportTo.NONE else self.value


def check_options(own: Mapping[str, str | None], model: bool, report_to: ReportTo) -> None:
    """Raise an error for an option that cannot be used.

    Parameters
    ----------
    own : mapping of str to str, optional
        Options that need a model and data of the user's own.
    model : bool
        Whether these are given.
    report_to : ReportTo

    Raises
    ------
    TnadaptError
        If an option needs a model, is empty, or its library is not installed.
    """
    for name, value in own.items():
        if value is not None and not model:
            raise TnadaptError(f"--{name} needs --model and --data; without them the data are scikit-learn's digits")
        if value is not None and not value.strip():
            raise TnadaptError(f"--{name} is empty")
    library = report_to.given
    if library is not None and importlib.util.find_spec(library) is None:
        raise TnadaptError(f"--report-to {library} needs {library}, which is not installed: pip install {library}")
