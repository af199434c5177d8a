"""The interface of a method, and of the settings that it takes part with."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from tnadapt.errors import TnadaptError

from ..facts import Facts

__all__ = ["Method", "Setting", "UnfitError"]


class UnfitError(TnadaptError):
    """A method has no setting for these weights and this budget; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """A method at one number of parameters.

    Attributes
    ----------
    method : str
        The method's name.
    budget : int
        The budget that it was found for; 0 for controls.
    label : str
        Its settings, for people.
    parameters : int
    spec : str
        Its settings as JSON, from which :meth:`Method.attach` makes the adapter.
    """

    method: str
    budget: int
    label: str
    parameters: int
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
    """One method of the comparison.

    Attributes
    ----------
    name : str
        Unique, and part of the keys of results.
    title : str
        As its paper writes it.
    library : {"tnadapt", "PEFT", "new", "control"}
        "new" is a combination that tnadapt has no preset for.
    """

    name: str
    title: str
    library: str

    @abc.abstractmethod
    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        """Return the setting with the most parameters within a budget.

        Parameters
        ----------
        facts : Facts
        sketch : nn.Module
            The model on the meta device; it must not be changed.
        budget : int

        Raises
        ------
        UnfitError
            If there is none.
        """

    @abc.abstractmethod
    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        """Freeze a model and attach the adapter.

        Parameters
        ----------
        model : nn.Module
            It is changed.
        setting : Setting
        facts : Facts
        targets : str or sequence of str
            As :func:`tnadapt.torch.attach` takes them.
        seed : int

        Returns
        -------
        nn.Module
            The model to train, whose trainable parameters are those of the adapter.
        """

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
