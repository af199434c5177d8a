"""Measured accuracy of methods, from ``benchmarks/quality``: what applies to given weights, and to a setting."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.sources import Source

__all__ = ["DATA", "Measurements", "TaskMeasurements", "measurements"]

#: Written by ``python -m benchmarks.quality page`` from the published results.
DATA = "measured.json"
#: Results apply to weights with at least a tenth, and at most ten times, as many elements,
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
    share : float
        Its gain over no adapter, divided by that of dense updates.
    """

    kind: Hashable
    parameters: int
    share: float


@dataclasses.dataclass(frozen=True)
class TaskMeasurements:
    """The measured settings of a task.

    Attributes
    ----------
    title : str
    elements : int
        Of the weights that were adapted.
    settings : tuple of Setting
    """

    title: str
    elements: int
    settings: tuple[Setting, ...]

    def kinds(self, parameters: int) -> set[Hashable]:
        """Return the kinds that were measured with about as many parameters."""
        kinds = {one.kind for one in self.settings}
        return {kind for kind in kinds if self.share(kind, parameters) is not None}

    def known(self, kind: Hashable, parameters: int) -> float:
        """Return the share of one of :meth:`kinds`."""
        share = self.share(kind, parameters)
        assert share is not None
        return share

    def share(self, kind: Hashable, parameters: int) -> float | None:
        """Return the share of the setting of a kind that is nearest in parameters; None if there is none near."""

        def distance(one: Setting) -> float:
            return abs(math.log(one.parameters / parameters))

        same = [one for one in self.settings if one.kind == kind]
        nearest = min(same, key=distance, default=None)
        return None if nearest is None or distance(nearest) > math.log(_PARAMETERS) else nearest.share


@dataclasses.dataclass(frozen=True)
class Measurements:
    """The results that apply to given weights.

    Attributes
    ----------
    tasks : tuple of TaskMeasurements
    """

    tasks: tuple[TaskMeasurements, ...]

    def share(self, config: Config, parameters: int) -> float | None:
        """Return what part of the gain of dense updates a setting reached, as a mean over tasks; None if unknown.

        Tasks differ in how much any method gains, and not all methods are measured on all tasks. So a setting that was
        not measured on a task is assumed to differ from the methods that were measured on all tasks as it does on the
        others.
        """
        tasks = [task for task in self.tasks if task.kinds(parameters)]
        kind = kind_of(config)
        found = {task: share for task in tasks if (share := task.share(kind, parameters)) is not None}
        if not found:
            return None
        common = set[Hashable].intersection(*(task.kinds(parameters) for task in tasks))
        if not common:
            return statistics.fmean(found.values())
        levels = {task: statistics.fmean(task.known(one, parameters) for one in common) for task in tasks}
        ahead = statistics.fmean(share - levels[task] for task, share in found.items())
        return ahead + statistics.fmean(levels.values())


def measurements(elements: int) -> Measurements:
    """Return the results that apply to weights with this many elements in sum.

    Parameters
    ----------
    elements : int
        Above 0.

    Examples
    --------
    >>> measurements(10**15)
    Measurements(tasks=())
    """
    return Measurements(tuple(task for task in _measured() if 1 / _SIZES <= task.elements / elements <= _SIZES))


@functools.cache
def _measured() -> tuple[TaskMeasurements, ...]:
    text = (importlib.resources.files("tnadapt.planning") / DATA).read_text(encoding="utf-8")
    return read(json.loads(text)["tasks"])


def read(tasks: Iterable[Mapping[str, Any]]) -> tuple[TaskMeasurements, ...]:
    """Return the tasks of a file's content."""
    return tuple(
        TaskMeasurements(
            task["title"],
            task["elements"],
            tuple(
                Setting(kind_of(Config.from_dict(one["config"])), one["parameters"], one["share"])
                for one in task["settings"]
            ),
        )
        for task in tasks
    )


def kind_of(config: Config) -> Hashable:
    """Return what settings of one method have in common, whatever their sizes and seeds.

    Examples
    --------
    >>> from tnadapt import presets
    >>> kind_of(presets.lora(4)) == kind_of(presets.lora(8, seed=5))
    True
    >>> kind_of(presets.lora(4)) == kind_of(presets.superlora(4))
    False
    """
    sources = tuple(sorted((name, _without_numbers(source)) for name, source in config.sources.items()))
    named = config.fold if isinstance(config.fold, str) else tuple(map(str, config.fold))
    return (
        config.groups, named, config.axes, config.format, config.combine, config.leading, config.projection, config.on,
        config.shared, config.alpha, sources, config.before, config.scope, config.offset, config.apply,
        config.magnitude_axis, config.start, min(config.order, 3), min(config.splits, 2), min(config.terms, 2),
    )  # fmt: skip


def _without_numbers(source: Source) -> Hashable:
    """Return the settings of a source but its scales and starts, some of which depend on sizes."""
    settings = [
        _without_numbers(value) if isinstance(value, Source) else value
        for value in (getattr(source, field.name) for field in dataclasses.fields(source))
        if isinstance(value, (Source, str, bool))
    ]
    return (type(source).__name__, *settings)
