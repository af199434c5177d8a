"""What methods are compared with: the head alone, the base as it is, and dense updates of the same weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnadapt import presets
from tnadapt import torch as tnt

from ..facts import Facts
from ._method import Method, Setting

__all__ = ["CONTROLS", "Control"]


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
