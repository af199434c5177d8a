"""Tasks of ``tnadapt finetune``: its data, its training loop and its metrics, with adapters of any library."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from tnadapt.finetune import Method as Family
from tnadapt.finetune import Problem, Task, Training
from tnadapt.finetune.problem import base_digest, samples_digest
from tnadapt.finetune.training import train

from .. import methods
from ..methods import Setting
from ._quality_task import Progress, QualityTask

__all__ = ["ProblemBench"]


class ProblemBench:
    """A problem of :mod:`tnadapt.finetune`.

    Parameters
    ----------
    task : QualityTask
    scale : str
    problem : Problem
    training : Training
    score : str, optional
        The further metric that is the score, instead of the problem's own.
    """

    def __init__(
        self, task: QualityTask, scale: str, problem: Problem, training: Training, score: str | None = None
    ) -> None:
        self.task, self.scale, self.problem, self.training, self.score = task, scale, problem, training, score
        self.base = problem.build(0)
        self.facts = task.check(task.facts(self.base))

    def settings(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "task": self.task.name,
            "scale": self.scale,
            "problem": problem.name,
            "samples": {name: len(part.labels) for name, part in problem.parts.items()},
            "keep": list(problem.keep_trainable),
            "modules": list(self.facts.modules),
            **self.training.settings(),
            "data_digest": samples_digest(problem.parts),
            "base_digest": base_digest(self.base, problem.drawn),
        }

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        method = methods.find(setting.method)
        model = method.attach(self.problem.build(seed), setting, self.facts, self.task.targets, seed)
        adapter = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

        def build(seed: int) -> nn.Module:
            return model

        # The training frees what a problem keeps trainable: here, the adapter of any library as well.
        keep = (*self.problem.keep_trainable, *adapter)
        problem = dataclasses.replace(self.problem, build=build, keep_trainable=keep)
        record = train(
            problem, Task(Family(method.title, setting.label, None), seed, rate), self.training, None, progress
        )
        found: dict[str, Any] = {
            "kept": record["parameters"] + record["kept"] - setting.parameters,
            **{name: record[name] for name in ("diverged", "training_loss", "predictions", "seconds")},
            "validation_loss": record["validation_loss"],
        }
        for part in ("validation", "test"):
            found[part] = record[part] if self.score is None else record[f"{part}_metrics"].get(self.score)
            found[f"{part}_loss"] = record[f"{part}_loss"]
        return found
