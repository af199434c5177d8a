"""Tasks of ``tnadapt finetune``: its data, its training loop and its metrics, with adapters of any library."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnadapt.finetune import Problem, Training
from tnadapt.finetune.loop import OwnRates, evaluate, fit
from tnadapt.finetune.problem import base_digest, samples_digest, under

from .. import methods
from ..methods import Setting
from ._quality_task import Progress, QualityTask


class ProblemBench:
    """A problem of :mod:`tnadapt.finetune`."""

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
        began = time.perf_counter()
        problem, device = self.problem, torch.device(self.training.device)
        method = methods.find(setting.method)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model = method.attach(problem.build(seed), setting, self.facts, self.task.targets, seed).to(device)
            adapter = [one for one in model.parameters() if one.requires_grad]
            head = [one for name, one in model.named_parameters() if under(name, problem.keep_trainable)]
            for parameter in head:
                parameter.requires_grad_(True)
            # The order of samples and dropout are the same for all methods.
            torch.manual_seed(seed)
            # Without an adapter, the head is trained at the rate that is tuned.
            own = OwnRates(head, self.training.head_rate if adapter else None)
            loss = self._fitted(model, [*adapter, *head], own, rate, progress) if adapter or head else 0.0
            found = self._measured(model, device)
        found["diverged"] = not math.isfinite(loss) or None in (found["validation"], found["test"])
        found["training_loss"] = finite(loss)
        found["kept"] = methods.trained(model) - setting.parameters
        return {**found, "seconds": round(time.perf_counter() - began, 2)}

    def _fitted(
        self, model: nn.Module, parameters: Sequence[nn.Parameter], own: OwnRates, rate: float, progress: Progress
    ) -> float:
        """Train with the loop of ``tnadapt finetune``, and return the last loss."""
        problem, training, value = self.problem, self.training, math.nan
        for step in fit(
            model, problem.logits, problem.task, problem.parts["training"], parameters, training.schedule(rate),
            training.epochs, training.batch, torch.device(training.device), training.steps, own,
        ):  # fmt: skip
            value = step.loss
            progress(step.done / step.total)
        return value

    def _measured(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Measure the held-out and the test part; numbers that are not finite are None."""
        problem, found = self.problem, dict[str, Any]()
        for name in ("validation", "test"):
            part = problem.parts[name]
            rows = evaluate(model, problem.logits, problem.task, part, device, self.training.batch)
            measured = problem.task.measure(rows, part.labels)
            score = measured.score if self.score is None else measured.more[self.score]
            found[name], found[f"{name}_loss"] = finite(score), finite(measured.loss)
        return {**found, "predictions": problem.task.digest(rows)}


def finite(value: float) -> float | None:
    """Return a rounded number, or None if it is not finite: JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
