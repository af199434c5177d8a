"""The interface of a task: what is adapted, how it is measured, and how one training is run."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from tnadapt.algebra.units import RATE
from tnadapt.errors import TnadaptError, safe_repr

from ..facts import Facts, facts_of
from ..methods import BASE, BIASES, FEW_SHOT, FITTED_HEAD, REFERENCES, Setting

Progress = Callable[[float], None]


class Bench(Protocol):
    """A task that is ready to train on: a base, data, and the settings of a training."""

    def settings(self) -> dict[str, Any]:
        """Return everything that an outcome depends on, except method, seed and rate, as JSON values."""
        ...

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        """Adapt a fresh copy of the base and measure it.

        Returns JSON values, among them ``validation`` and ``test``, the scores on the held-out part and on the test
        part (None if not finite); ``validation_loss``, which decides between rates of equal scores (or None); ``kept``,
        the number of parameters trained in addition to the adapter; ``diverged``; and ``seconds``.
        """
        ...


class QualityTask(abc.ABC):
    """A pretrained model and data, from package registries."""

    name: ClassVar[str]
    #: One line for tables and figures.
    title: ClassVar[str]
    #: What is trained on, held out and tested, in words.
    parts: ClassVar[str]
    #: Names of the measure on the test part, and of the one on the held-out part by which rates are chosen.
    metric: ClassVar[str] = "accuracy"
    chosen_by: ClassVar[str] = "accuracy"
    #: Whether lower is better.
    lower: ClassVar[bool] = False
    chosen_lower: ClassVar[bool] = False
    #: Whether scores are fractions, shown in percent.
    percent: ClassVar[bool] = True
    #: As in :func:`tnadapt.torch.attach`; methods of PEFT adapt the same layers.
    targets: ClassVar[str] = "qv"
    #: The learning rate that suits the base, by :func:`tnadapt.learning_rate`; a bench checks it.
    rate: ClassVar[float] = RATE
    #: Rows of an attention head.
    head_size: ClassVar[int | None] = None
    #: Settings of data and training by the name of the scale: ``smoke`` only shows that everything runs, ``small`` is
    #: for two cores, ``full`` for a GPU.
    scales: ClassVar[Mapping[str, Mapping[str, Any]]]
    #: Whether a new head is trained with every adapter.
    has_head: ClassVar[bool] = True

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the controls and of the references."""
        asked = FITTED_HEAD if self.has_head else FEW_SHOT
        return tuple(method.name for method in (BASE, asked, BIASES, *REFERENCES))

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """Return a model of the same structure, with any weights; nothing may be downloaded."""

    @abc.abstractmethod
    def open(self, scale: str, cache: Path, device: str) -> Bench:
        """Fetch model and data into the cache, unless they are there, and return the bench."""

    def sketch(self) -> nn.Module:
        """Return the model on the meta device, on which methods are counted."""
        with torch.device("meta"):
            return self.model()

    def facts(self, model: nn.Module) -> Facts:
        """Return the weights that are adapted."""
        return facts_of(model, self.targets, self.head_size)

    def check(self, facts: Facts) -> Facts:
        """Return the facts of the opened model if they are those that methods were counted on."""
        if facts != self.facts(self.sketch()):
            raise TnadaptError(
                f"the model of task {self.name} has other weights than its sketch, on which parameters are counted"
            )
        return facts

    def scaled(self, scale: str) -> dict[str, Any]:
        """Return the settings of a scale."""
        if scale not in self.scales:
            raise TnadaptError(f"task {self.name} has the scales {', '.join(self.scales)}; got {safe_repr(scale)}")
        return dict(self.scales[scale])

    def quality(self, value: float) -> float:
        """Return a number that is higher for better test scores."""
        return -value if self.lower else value

    def held_out_quality(self, value: float) -> float:
        """Return a number that is higher for better scores on the held-out part."""
        return -value if self.chosen_lower else value
