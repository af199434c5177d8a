"""What an adapter's file says about its task: how to encode inputs, and how to read the model's outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, FileError, TnadaptError, safe_repr

from ._learning_task import LearningTask
from .problem import Problem
from .tasks import TASKS

# -- The settings of inputs, which are untrusted and checked -----------------------------------------------------------


#: Sides of images beyond this are refused, because they would take all memory.
_SIDE = 1 << 13
_LONGEST = (1 << 31) - 1
#: Settings of images in a file.
_PIXELS = ("image_size", "channels", "pixel_mean", "pixel_std")


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _numbers(value: Any, low: float) -> bool:
    """Return whether a value is a list of one or three numbers from low to a million, one per channel."""
    return (
        isinstance(value, list)
        and len(value) in (1, 3)
        and all(type(number) in (int, float) and math.isfinite(number) and low <= number <= 1e6 for number in value)
    )


# For each setting: what it must be, and the check of a value.
_EXPECTED: Mapping[str, tuple[str, Any]] = {
    "tokenizer": ("text or None", lambda value: value is None or (isinstance(value, str) and value.isprintable())),
    "max_length": (
        f"an integer from 1 to {_LONGEST}, or None",
        lambda value: value is None or _whole(value, 1, _LONGEST),
    ),
    "image_size": (f"an integer from 1 to {_SIDE}", lambda value: _whole(value, 1, _SIDE)),
    "channels": ("1 or 3", lambda value: type(value) is int and value in (1, 3)),
    "pixel_mean": ("a list of one number per channel, at most 1e6", lambda value: _numbers(value, -1e6)),
    "pixel_std": ("a list of one number per channel, from 1e-6 to 1e6", lambda value: _numbers(value, 1e-6)),
}


def _check_inputs(inputs: Mapping[str, Any]) -> None:
    """Raise a ConfigError that names the setting if a value cannot be used."""
    for name, (expected, possible) in _EXPECTED.items():
        if name in inputs and not possible(inputs[name]):
            raise ConfigError(f"{name} of the inputs must be {expected}; got {safe_repr(inputs[name])}")
    channels = inputs.get("channels", 3)
    for name in ("pixel_mean", "pixel_std"):
        if name in inputs and len(inputs[name]) != channels:
            raise ConfigError(
                f"{name} of the inputs must be a list of {channels} numbers, one per channel; got {inputs[name]}"
            )


def pixel_settings(inputs: Mapping[str, Any], path: str) -> tuple[Any, ...]:
    """Return size, channels, and mean and deviation of pixels.

    Raises
    ------
    FileError
        If one is missing.
    """
    if missing := [name for name in _PIXELS if name not in inputs]:
        raise FileError(f"{path} does not say how images are scaled: its inputs have no {missing[0]}")
    return tuple(inputs[name] for name in _PIXELS)


def tokenizer_in(
    about: Pretrained, inputs: Mapping[str, Any], given: str | None, base: str | None, path: str
) -> tuple[str, str | None]:
    """Return the folder, GGUF file or hub name of the tokenizer, and its revision.

    Parameters
    ----------
    about : Pretrained
    inputs : mapping
        Of the file.
    given, base : str, optional
        The user's, which come first.
    path : str
        Of the file, for messages.

    Raises
    ------
    FileError
        If the file names one that must not be opened because a file says so.
    """
    named = inputs.get("tokenizer")
    if given is None and named and dataclasses.replace(about, name=named).remote:
        raise FileError(
            f"{path} names as its tokenizer {safe_repr(named)}, an address or network share, which is not opened "
            "because a file says so: use --tokenizer with it"
        )
    from_base = not given and not named and base in (None, about.name)
    recorded = f"{about.name}/{about.file}" if about.file else about.name
    return given or named or (recorded if from_base else str(base)), (about.revision or None) if from_base else None


# -- The task ----------------------------------------------------------------------------------------------------------


_CLASSES = "classes"
_TASK = "task"
_PREFIX = "task_"


def recorded(about: Pretrained, problem: Problem) -> Pretrained:
    """Return a description of the base with the task, the labels, and the settings of inputs."""
    fields = problem.task.to_dict()
    labels = fields.pop(_CLASSES, about.labels)
    settings = {_PREFIX + name: value for name, value in fields.items() if name != "name"}
    inputs = {_TASK: problem.task.name, **settings, **problem.source}
    return dataclasses.replace(about, labels=labels, inputs=inputs)


def check_recordable(problem: Problem) -> None:
    """Raise an error, before any training, if a file cannot hold the description.

    Raises
    ------
    TnadaptError
        If there are too many classes, one has a name that is too long, or a setting is none that a file may have.
    """
    try:
        _check_inputs(recorded(Pretrained(), problem).inputs)
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
    fields = {name.removeprefix(_PREFIX): value for name, value in about.inputs.items() if name.startswith(_PREFIX)}
    if _CLASSES in {field.name for field in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        fields[_CLASSES] = about.labels
    try:
        task = cls.from_dict(fields)
    except TnadaptError as error:
        raise FileError(f"{path}: {error}") from None
    if about.library == "timm" and task.kind != "image":
        raise FileError(f"{path} was trained for {name!r}, a task of texts, but its model is one of timm, of images")
    try:
        _check_inputs(about.inputs)
    except ConfigError as error:
        raise FileError(f"{path}: {error}") from None
    return task, about.inputs
