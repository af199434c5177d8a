"""The interface of a task: what is adapted, how it is measured, and how one training is run."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from tnadapt.errors import TnadaptError, safe_repr

from ..facts import Facts, facts_of
from ..methods import Setting

__all__ = ["Bench", "Progress", "QualityTask"]

Progress = Callable[[float], None]


class Bench(Protocol):
    """A task that is ready to train on: a base, data, and the settings of a training."""

    def settings(self) -> dict[str, Any]:
        """Return everything that an outcome depends on, except method, seed and rate, as JSON values."""
        ...

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        """Adapt a fresh copy of the base and measure it.

        Returns
        -------
        dict
            ``validation`` and ``test``, the scores on the held-out part and on the test part (None if not finite);
            ``validation_loss``, which decides between rates of equal scores (or None); ``kept``, the number of
            parameters trained in addition to the adapter; ``diverged``; ``seconds``; and further JSON values.
        """
        ...


class QualityTask(abc.ABC):
    """A pretrained model and data, from package registries.

    Attributes
    ----------
    name : str
    title : str
        One line for tables and figures.
    metric, chosen_by : str
        Names of the measure on the test part, and of the one on the held-out part by which rates are chosen.
    lower, chosen_lower : bool
        Whether lower is better.
    percent : bool
        Whether scores are fractions, shown in percent.
    targets : str
        As in :func:`tnadapt.torch.attach`; methods of PEFT adapt the same layers.
    head_size : int, optional
        Rows of an attention head.
    rates : tuple of float
        Learning rates that every method is tried at first.
    scales : mapping
        Settings of data and training by the name of the scale: ``smoke`` only shows that everything runs, ``small`` is
        for two cores, ``full`` for a GPU.
    has_head : bool
        Whether a new head is trained with every adapter.
    parts : str
        What is trained on, held out and tested, in words.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[str]
    metric: ClassVar[str] = "accuracy"
    chosen_by: ClassVar[str] = "accuracy"
    lower: ClassVar[bool] = False
    chosen_lower: ClassVar[bool] = False
    percent: ClassVar[bool] = True
    targets: ClassVar[str] = "qv"
    head_size: ClassVar[int | None] = None
    rates: ClassVar[tuple[float, ...]] = (1e-3, 1e-2, 1e-1, 1.0)
    scales: ClassVar[Mapping[str, Mapping[str, Any]]]
    has_head: ClassVar[bool] = True

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Return a model of the same structure, with any weights; nothing may be downloaded."""

    @abc.abstractmethod
    def open(self, scale: str, cache: Path, device: str) -> Bench:
        """Fetch model and data into the cache, unless they are there, and return the bench.

        Raises
        ------
        TnadaptError
            If they cannot be had, or a package is missing.
        """

    def sketch(self) -> nn.Module:
        """Return the model on the meta device, on which methods are counted."""
        with torch.device("meta"):
            return self.model()

    def facts(self, model: nn.Module) -> Facts:
        """Return the weights that are adapted."""
        return facts_of(model, self.targets, self.head_size)

    def check(self, facts: Facts) -> Facts:
        """Return the facts of the opened model if they are those that methods were counted on.

        Raises
        ------
        TnadaptError
            If they are not.
        """
        if facts != self.facts(self.sketch()):
            raise TnadaptError(
                f"the model of task {self.name} has other weights than its sketch, on which parameters are counted"
            )
        return facts

    def scaled(self, scale: str) -> dict[str, Any]:
        """Return the settings of a scale.

        Raises
        ------
        TnadaptError
            If the task has no such scale.
        """
        if scale not in self.scales:
            raise TnadaptError(f"task {self.name} has the scales {', '.join(self.scales)}; got {safe_repr(scale)}")
        return dict(self.scales[scale])

    def quality(self, value: float) -> float:
        """Return a number that is higher for better test scores."""
        return -value if self.lower else value

    def held_out_quality(self, value: float) -> float:
        """Return a number that is higher for better scores on the held-out part."""
        return -value if self.chosen_lower else value
