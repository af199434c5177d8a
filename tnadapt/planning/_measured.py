"""Measured accuracy of methods, from ``benchmarks/quality``: which results apply to given weights and settings."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import operator
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Source

#: Written by ``python -m benchmarks.quality page`` from the published results.
DATA = "measured.json"
#: Results apply to weights with at most ten times more, or fewer, elements,
_SIZES = 10.0
#: and to settings with at most this many times more, or fewer, parameters.
_PARAMETERS = math.sqrt(10.0)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A measured setting.

    Attributes
    ----------
    kind : hashable
        What it has in common with settings of the same method and another size.
    parameters : int
    held_out, test : float
        Its gain over the best control, divided by that of dense updates: on held-out samples, which put methods in
        order, and on test samples, which tell what was reached.
    """

    kind: Hashable
    parameters: int
    held_out: float
    test: float


@dataclasses.dataclass(frozen=True)
class TaskMeasurements:
    """The measured settings of a task.

    Attributes
    ----------
    title : str
    elements : int
        Of the weights that were adapted.
    settings : tuple of Setting
        Those of the budgets at which some method is better than the best control.
    no_gain : tuple of int
        The budgets at which no method is.
    """

    title: str
    elements: int
    settings: tuple[Setting, ...]
    no_gain: tuple[int, ...]

    def nearest(self, parameters: int) -> dict[Hashable, Setting]:
        """Return the nearest setting of each kind that was measured with about as many parameters."""
        near = [setting for setting in self.settings if _near(setting.parameters, parameters)]
        settings: dict[Hashable, Setting] = {}
        for setting in sorted(near, key=lambda setting: _distance(setting.parameters, parameters)):
            settings.setdefault(setting.kind, setting)
        return settings


def _distance(one: int, other: int) -> float:
    return abs(math.log(one / other))


def _near(one: int, other: int) -> bool:
    """Return whether two numbers of parameters are close."""
    return _distance(one, other) <= math.log(_PARAMETERS)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What the results say of a setting.

    Attributes
    ----------
    held_out, test : float
        What part of the gain of dense updates it reached on held-out and on test samples, as a mean over tasks.
    measured_on : tuple of str
        The tasks on which its method was measured with about as many parameters.
    estimated_on : tuple of str
        The tasks on which only others were; then the share is an estimate.
    """

    held_out: float
    test: float
    measured_on: tuple[str, ...]
    estimated_on: tuple[str, ...]


def gain_of(tasks: Iterable[TaskMeasurements], config: Config, parameters: int) -> Gain | None:
    """Return what part of the gain of dense updates a setting reached, and on which tasks; None if unknown.

    Tasks differ in how much any method gains, and not all methods are measured on all tasks. So a setting that was not
    measured on a task is assumed to differ from the methods that were measured on all tasks as it does on the others.
    """
    nearest = {task: settings for task in tasks if (settings := task.nearest(parameters))}
    method = kind_of(config)
    measured_on = tuple(task.title for task, settings in nearest.items() if method in settings)
    if not measured_on:
        return None
    estimated_on = tuple(task.title for task, settings in nearest.items() if method not in settings)
    held_out, test = (
        _mean_share(
            [{kind: share(setting) for kind, setting in settings.items()} for settings in nearest.values()], method
        )
        for share in (operator.attrgetter("held_out"), operator.attrgetter("test"))
    )
    return Gain(held_out, test, measured_on, estimated_on)


def _mean_share(tasks: Sequence[Mapping[Hashable, float]], method: Hashable) -> float:
    """Return the mean share of a method over tasks, given those of the methods measured on each."""
    common = set[Hashable].intersection(*map(set, tasks))
    if not common:
        return statistics.fmean(shares[method] for shares in tasks if method in shares)
    levels = [statistics.fmean(shares[other] for other in common) for shares in tasks]
    ahead = [shares[method] - level for shares, level in zip(tasks, levels, strict=True) if method in shares]
    return statistics.fmean(ahead) + statistics.fmean(levels)


def without_gain(tasks: Iterable[TaskMeasurements], parameters: Iterable[int]) -> tuple[tuple[str, int], ...]:
    """Return the tasks and budgets with no gain of any method, for budgets of about one of these numbers."""
    numbers = set(parameters)
    return tuple(
        (task.title, budget)
        for task in tasks
        for budget in task.no_gain
        if any(_near(budget, number) for number in numbers)
    )


def measurements(elements: int) -> tuple[TaskMeasurements, ...]:
    """Return the tasks whose results apply to weights with this many elements in sum.

    Examples
    --------
    >>> measurements(10**15)
    ()
    """
    return tuple(task for task in _measured() if 1 / _SIZES <= task.elements / elements <= _SIZES)


class Answer(NamedTuple):
    """The answer to "Which method?" in words, the method, and the one to choose if it is to be served as LoRA."""

    words: str
    method: str
    served: str


def recommendation(parameters: int) -> Answer:
    """Return the answer to "Which method?" for the nearest measured budget; empty if none is near.

    Examples
    --------
    >>> recommendation(3).words, recommendation(100).words[:14], recommendation(250).words[:42]
    ('', 'Up to 100 para', 'Nearest measured budget: 100 parameters. U')
    """
    answers = [answer for answer in _content()["answers"] if _near(answer["budget"], parameters)]
    nearest = min(answers, key=lambda answer: _distance(answer["budget"], parameters), default=None)
    if nearest is None:
        return Answer("", "", "")
    other = "" if nearest["budget"] == parameters else f"Nearest measured budget: {nearest['budget']:,} parameters. "
    return Answer(f"{other}{nearest['words']}", nearest["method"], nearest["served"])


@functools.cache
def _measured() -> tuple[TaskMeasurements, ...]:
    return read(_content()["tasks"])


@functools.cache
def _content() -> dict[str, Any]:
    text = (importlib.resources.files("tnadapt.planning") / DATA).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def read(tasks: Iterable[Mapping[str, Any]]) -> tuple[TaskMeasurements, ...]:
    """Return the tasks of a file's content."""
    return tuple(
        TaskMeasurements(
            task["title"], task["elements"], tuple(map(_setting, task["settings"])), tuple(task["no_gain"])
        )
        for task in tasks
    )


def _setting(content: Mapping[str, Any]) -> Setting:
    kind = kind_of(Config.from_dict(content["config"]))
    return Setting(kind, content["parameters"], content["held_out_share"], content["test_share"])


def kind_of(config: Config) -> Hashable:
    """Return what settings of one method have in common, whatever their sizes and seeds.

    Examples
    --------
    >>> from tnadapt import presets
    >>> kind_of(presets.lora(4)) == kind_of(presets.lora(8, seed=5))
    True
    >>> kind_of(presets.lora(4)) == kind_of(presets.superlora(4))
    False
    >>> kind_of(presets.fourierft(n=10)) == kind_of(presets.fourierft(n=20))
    True
    """
    sources = tuple(sorted((name, _without_numbers(source)) for name, source in config.sources.items()))
    named = config.fold if isinstance(config.fold, str) else tuple(map(str, config.fold))
    steps = config.projection if isinstance(config.projection, tuple) else (config.projection,)
    return (
        config.groups, named, config.axes, config.format, config.combine, config.leading, tuple(map(_map, steps)),
        config.on, config.shared, config.alpha, sources, config.before, config.scope, config.offset, config.apply,
        config.magnitude_axis, config.start, min(config.order, 3), min(config.splits, 2), min(config.terms, 2),
    )  # fmt: skip


def _map(step: Any) -> Hashable:
    """Return the name of a map, or its type and settings except sizes and positions."""
    if isinstance(step, str):
        return step
    return (type(step).__name__, *(value for value in vars(step).values() if isinstance(value, (str, bool))))


def _without_numbers(source: Source) -> Hashable:
    """Return the settings of a source except scales and starts, some of which depend on sizes."""
    settings = [
        _without_numbers(value) if isinstance(value, Source) else value
        for value in (getattr(source, field.name) for field in dataclasses.fields(source))
        if isinstance(value, (Source, str, bool))
    ]
    return (type(source).__name__, *settings)
