"""The interface of a method, and of the settings that it takes part with."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from tnadapt.algebra.units import RATE
from tnadapt.errors import TnadaptError

from ..facts import Facts


class UnfitError(TnadaptError):
    """A method has no setting for these weights and this budget; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method at one number of parameters."""

    #: The method's name.
    method: str
    #: The budget that it was found for; 0 for controls.
    budget: int
    #: Its settings, for people.
    label: str
    parameters: int
    #: Its settings as JSON, from which :meth:`Method.attach` makes the adapter.
    spec: str

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.method} {self.label}".strip()

    @property
    def values(self) -> Any:
        """The settings as JSON values."""
        return json.loads(self.spec)


class Method(abc.ABC):
    """One method of the comparison."""

    #: Unique, and part of the keys of results.
    name: str
    #: As its paper writes it.
    title: str
    #: "tnadapt", "PEFT" or "control".
    library: str
    #: The learning rate of Adam that its users get without a search.
    rate: float = RATE
    #: Whether that is for a base of usual weights, and scaled to others by :func:`tnadapt.learning_rate`.
    scaled: bool = False
    #: Whether there is something to train; else it is measured once.
    trains: bool = True

    @abc.abstractmethod
    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        """Return the setting with the most parameters within a budget."""

    @abc.abstractmethod
    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        """Freeze a model and attach the adapter."""

    def setting(self, budget: int, label: str, parameters: int, spec: Mapping[str, Any] | None) -> Setting:
        """Return a setting of this method."""
        return Setting(self.name, budget, label, parameters, json.dumps(spec, sort_keys=True))


def key_of(*parts: Any) -> str:
    """Return the key of a result: a digest of JSON values.

    Examples
    --------
    >>> key_of("digits", 0) == key_of("digits", 0) != key_of("digits", 1)
    True
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
