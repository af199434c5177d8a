"""What an adapter's file says about its task: how to encode inputs, and how to read the model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, FileError, TnadaptError

from ._learning_task import LearningTask
from ._saved_inputs import check_inputs
from .problem import Problem
from .tasks import TASKS

__all__ = ["check_recordable", "recorded", "task_in"]

_CLASSES = "classes"
_TASK = "task"
_PREFIX = "task_"


def recorded(about: Pretrained, problem: Problem) -> Pretrained:
    """Return a description of the base with the task, the labels, and the settings of inputs."""
    fields = problem.task.to_dict()
    labels = fields.pop(_CLASSES, about.labels)
    own = {_PREFIX + name: value for name, value in fields.items() if name != "name"}
    inputs = {_TASK: problem.task.name, **own, **problem.source}
    return dataclasses.replace(about, labels=labels, inputs=inputs)


def check_recordable(problem: Problem) -> None:
    """Raise an error, before any training, if a file cannot hold the description.

    Raises
    ------
    TnadaptError
        If there are too many classes, one has a name that is too long, or a setting is none that a file may have.
    """
    try:
        check_inputs(recorded(Pretrained(), problem).inputs)
    except ConfigError as error:
        raise TnadaptError(f"an adapter's file cannot hold the task of {problem.name}: {error}") from None


def task_in(about: Pretrained | None, path: str) -> tuple[LearningTask, Mapping[str, Any]]:
    """Return the task that a file describes, and the settings of inputs.

    Raises
    ------
    FileError
        If it describes none or one that is unknown, or a value cannot be used.
    """
    name = None if about is None else about.inputs.get(_TASK)
    if about is None or not isinstance(name, str):
        raise FileError(
            f"{path} does not say how inputs are prepared and outputs are read, as files of tnadapt finetune --model "
            "do; tnadapt predict takes these. Use this one in Python, with tnadapt.torch.load_pretrained"
        )
    try:
        cls = TASKS.find(name)
    except ConfigError as error:
        raise FileError(f"{path} was trained for a task that is unknown here: {error}") from None
    fields = {one.removeprefix(_PREFIX): value for one, value in about.inputs.items() if one.startswith(_PREFIX)}
    if _CLASSES in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        fields[_CLASSES] = about.labels
    try:
        task = cls.from_dict(fields)
    except TnadaptError as error:
        raise FileError(f"{path}: {error}") from None
    if about.library == "timm" and task.kind != "image":
        raise FileError(f"{path} was trained for {name!r}, a task of texts, but its model is one of timm, of images")
    try:
        check_inputs(about.inputs)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from None
    return task, about.inputs
