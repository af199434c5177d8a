"""The presets of tnadapt, with settings in order of size that :mod:`tnadapt.planning` searches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tnadapt import torch as tnt
from tnadapt.algebra.config import Config
from tnadapt.planning import known_as
from tnadapt.planning.families import Family, Search, projected
from tnadapt.presets import PRESETS as RECORDS
from tnadapt.presets import AdaptedWeights

from ..facts import Facts
from ._method import Method, Setting, UnfitError


class Preset(Method):
    """A preset with the settings that it offers for given weights."""

    library = "tnadapt"
    scaled = True

    def __init__(self, name: str, title: str, family: Callable[[AdaptedWeights], Family]) -> None:
        self.name, self.title, self.family = name, title, family

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        family = self.family(facts.weights)
        search = _search(facts)
        found = search.largest(family, budget) if family else None
        if found is None:
            least = search.least(family) if family else None
            raise UnfitError(
                f"needs at least {least.parameters:,} parameters" if least else "does not fit the shapes of the weights"
            )
        return self.setting(budget, self.label(found.config), found.parameters, found.config.to_dict())

    def label(self, config: Config) -> str:
        """Return the settings of a config, for people."""
        return _short(known_as(config).label)

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        config = Config.from_dict(setting.values).replace(seed=seed)
        tnt.attach(model, config, targets)
        return model


def _short(label: str) -> str:
    """Return the rank alone of a setting that has no name, whose other fields say which preset it is.

    Examples
    --------
    >>> _short("TT, M = 4, weights/2 × 2 × rows × cols, axes 3, 0, 1, 2, r = 6"), _short("K = 2, f = 30, r = 7")
    ('r = 6', 'K = 2, f = 30, r = 7')
    """
    return label.rpartition(", ")[2] if label.startswith(("TT", "Tucker", "batched", "weighted", "M = 5, w")) else label


@functools.lru_cache(maxsize=8)
def _search(facts: Facts) -> Search:
    return Search(facts.shapes, facts.layers, facts.roles)


PRESETS = (
    *(Preset(name, record.title, record.ladders) for name, record in RECORDS.items() if name != "dense"),
    Preset("superlora-projected", "SuperLoRA + F", projected),
)
