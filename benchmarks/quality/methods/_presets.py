"""The presets of tnadapt, with settings in order of size that :mod:`tnadapt.planning` searches, and the controls.

Methods are compared with the controls: the head alone, the base as it is, and dense updates of the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from tnadapt import presets
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


# -- Controls -----------------------------------------------------------------------------------


class Control(Method):
    """A control that has no budget."""

    library = "control"

    def __init__(self, name: str, title: str) -> None:
        self.name, self.title = name, title

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        return self.setting(0, "", 0, None)

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        return model.requires_grad_(False)


class Dense(Control):
    """A dense update of each weight."""

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        return self.setting(0, "", facts.size, presets.dense().to_dict())

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        tnt.attach(model, presets.dense(seed=seed), targets)
        return model


#: No adapter; a new head is trained if the task has one. Without one, nothing is trained.
BASE = Control("base", "no adapter")
DENSE = Dense("dense", "dense")
CONTROLS = (BASE, DENSE)
