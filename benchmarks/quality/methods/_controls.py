"""The controls, which are reached without an adapter, and the references, whatever their number of parameters.

A gain counts over the best control: the base asked as well as it can be without training, a new head alone, or the
biases alone. It is given as a share of the gain of dense updates of the same weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tnadapt import presets
from tnadapt import torch as tnt
from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan

from ..facts import Facts
from ._method import Method, Setting


class Control(Method):
    """A control that adapts nothing; the bench of a task measures it by its name."""

    library = "control"

    def __init__(self, name: str, title: str, trains: bool = True) -> None:
        self.name, self.title, self.trains = name, title, trains

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        return self.setting(0, "", 0, None)

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        return model.requires_grad_(False)


class Biases(Control):
    """All biases (BitFit, arXiv 2106.10199); linear layers without one get one that starts at zero."""

    #: The smallest rate of that paper's search is 1e-4, the largest 1e-2.
    rate = 1e-3

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        given = sum(bias.numel() for name, bias in sketch.named_parameters() if _is_bias(name))
        added = sum(layer.out_features for layer in _without_bias(sketch))
        return self.setting(0, "", given + added, None)

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        for layer in _without_bias(model):
            layer.bias = nn.Parameter(torch.zeros_like(layer.weight[:, 0]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_bias(name))
        return model


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] == "bias"


def _without_bias(model: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers without a bias, but not the one whose outputs are the logits of tokens."""
    last = getattr(model, "get_output_embeddings", lambda: None)()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and layer is not last:
            yield layer


class Reference(Control):
    """A setting that everybody knows, whatever its number of parameters."""

    scaled = True

    def __init__(self, name: str, title: str, config: Config) -> None:
        super().__init__(name, title)
        self.config = config

    def largest(self, facts: Facts, sketch: nn.Module, budget: int) -> Setting:
        count = UpdatePlan(self.config, facts.shapes, facts.layers, facts.roles).num_parameters
        return self.setting(0, "", count, self.config.to_dict())

    def attach(self, model: nn.Module, setting: Setting, facts: Facts, targets: Any, seed: int) -> nn.Module:
        tnt.attach(model, Config.from_dict(setting.values).replace(seed=seed), targets)
        return model


#: No adapter; a new head is trained if the task has one.
BASE = Control("base", "no adapter")
#: The head that fits best to what the base computes: a logistic regression.
FITTED_HEAD = Control("fitted-head", "fitted head", trains=False)
#: The base after training samples in its context.
FEW_SHOT = Control("few-shot", "few-shot", trains=False)
BIASES = Biases("biases", "biases alone")
CONTROLS = (BASE, FITTED_HEAD, FEW_SHOT, BIASES)
LORA_1, LORA_8 = (Reference(f"lora-{rank}", f"LoRA, r = {rank}", presets.lora(rank)) for rank in (1, 8))
DENSE = Reference("dense", "dense", presets.dense())
REFERENCES = (LORA_1, LORA_8, DENSE)
