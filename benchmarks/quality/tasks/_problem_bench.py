"""Tasks of ``tnadapt finetune``: its data, its training loop and its metrics, with adapters of any library."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnadapt.finetune import Problem, Training
from tnadapt.finetune.loop import OwnRates, evaluate
from tnadapt.finetune.problem import base_digest, samples_digest, under
from tnadapt.finetune.together import Trainee, fit_each, share_base
from tnadapt.torch import adapters

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
        return self.train_together(setting, [(seed, rate)], progress)[0]

    def train_together(
        self, setting: Setting, trials: Sequence[tuple[int, float]], progress: Progress
    ) -> list[dict[str, Any]]:
        """Train with several seeds and rates, as members of one run where ``tnadapt finetune`` does."""
        began = time.perf_counter()
        problem, training, device = self.problem, self.training, torch.device(self.training.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            trainees: list[Trainee] = []
            for seed, rate in trials:
                trainees.append(self._adapted(setting, seed, rate))
                share_base(trainees[0].model, trainees[-1].model)
            losses, done = [math.nan if one.parameters else 0.0 for one in trainees], [0.0] * len(trials)
            for place, step in fit_each(problem, trainees, training.epochs, training.batch, device, training.steps):
                losses[place], done[place] = step.loss, step.done / step.total
                progress(sum(done) / len(done))
            share, lines = (time.perf_counter() - began) / len(trials), list[dict[str, Any]]()
            for trainee, loss in zip(trainees, losses, strict=True):
                began = time.perf_counter() - share
                found = self._measured(trainee.model, device)
                found["diverged"] = not math.isfinite(loss) or None in (found["validation"], found["test"])
                found["training_loss"] = finite(loss)
                found["kept"] = methods.trained(trainee.model) - setting.parameters
                lines.append({**found, "seconds": round(time.perf_counter() - began, 2)})
        return lines

    def _adapted(self, setting: Setting, seed: int, rate: float) -> Trainee:
        """Return a copy of the base with the adapter of a setting."""
        problem, method = self.problem, methods.find(setting.method)
        model = method.attach(problem.build(seed), setting, self.facts, self.task.targets, seed)
        model = model.to(self.training.device)
        adapter = [one for one in model.parameters() if one.requires_grad]
        head = [one for name, one in model.named_parameters() if under(name, problem.keep_trainable)]
        for parameter in head:
            parameter.requires_grad_(True)
        # Without an adapter, the head is trained at the rate that is tuned.
        own = OwnRates(head, self.training.head_rate if adapter else None)
        ours = next(iter(adapters(model).values()), None)
        return Trainee(model, ours, [*adapter, *head], own, self.training.schedule(rate), seed)

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
