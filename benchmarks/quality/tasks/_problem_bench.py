"""Tasks of ``tnadapt finetune``: its data, its training loop and its metrics, with adapters of any library."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tnadapt import presets
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Problem, Training
from tnadapt.finetune._inputs import IGNORED, Texts, token_targets
from tnadapt.finetune.loop import OwnRates, evaluate
from tnadapt.finetune.problem import base_digest, samples_digest, under
from tnadapt.finetune.together import Trainee, fit_each, share_base
from tnadapt.torch import adapters, attach

from .. import methods
from ..methods import FEW_SHOT, FITTED_HEAD, Setting
from ._quality_task import Progress, QualityTask

#: Training samples in the context of the few-shot control.
SHOTS = 4
#: Inverse strengths of the penalty of a fitted head, of which held-out samples choose one.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class ProblemBench:
    """A problem of :mod:`tnadapt.finetune`."""

    def __init__(
        self, task: QualityTask, scale: str, problem: Problem, training: Training, score: str | None = None
    ) -> None:
        self.task, self.scale, self.problem, self.training, self.score = task, scale, problem, training, score
        self.base = problem.build(0)
        self.facts = task.check(task.facts(self.base))
        suited = attach(problem.build(0), presets.lora(1), task.targets).learning_rate()
        if suited != task.rate:
            raise TnadaptError(f"the rate that suits the base of task {task.name} is {suited:g}, and not {task.rate:g}")

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
        untrained = {FEW_SHOT.name: self._few_shot, FITTED_HEAD.name: self._fitted_head}
        if setting.method in untrained:
            began = time.perf_counter()
            measured = untrained[setting.method]()
            return {**measured, "kept": 0, "diverged": False, "seconds": round(time.perf_counter() - began, 2)}
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
        adapter, head = list[nn.Parameter](), list[nn.Parameter]()
        for name, parameter in model.named_parameters():
            if under(name, problem.keep_trainable):
                head.append(parameter.requires_grad_(True))
            elif parameter.requires_grad:
                adapter.append(parameter)
        # Without an adapter, the head is trained at the rate that is tuned.
        own = OwnRates(head, self.training.head_rate if adapter else None)
        ours = next(iter(adapters(model).values()), None)
        return Trainee(model, ours, [*adapter, *head], own, self.training.schedule(rate), seed)

    def _measured(self, model: nn.Module, device: torch.device) -> dict[str, Any]:
        """Measure the held-out and the test part; numbers that are not finite are None."""
        problem, measured = self.problem, dict[str, Any]()
        for name in ("validation", "test"):
            part = problem.parts[name]
            rows = evaluate(model, problem.logits, problem.task, part, device, self.training.batch)
            measured |= self._scores(name, rows, part.labels)
        return {**measured, "predictions": problem.task.digest(rows)}

    def _scores(self, name: str, rows: Sequence[Tensor], labels: Tensor) -> dict[str, Any]:
        """Return score and loss of a part, from what the task keeps of its logits."""
        measured = self.problem.task.measure(rows, labels)
        score = measured.score if self.score is None else measured.more[self.score]
        return {name: finite(score), f"{name}_loss": finite(measured.loss)}

    # -- Controls that train nothing ------------------------------------------------------------------

    def _few_shot(self) -> dict[str, Any]:
        """Measure the base after the first training samples; the same tokens count as without them."""
        problem, device = self.problem, torch.device(self.training.device)
        training, measured = problem.parts["training"], dict[str, Any]()
        assert isinstance(training, Texts)
        model = problem.build(0).to(device)
        before = list(itertools.chain(*(tokens.tolist() for tokens in training.tokens[:SHOTS])))
        for name in ("validation", "test"):
            part = problem.parts[name]
            assert isinstance(part, Texts)
            # Without them, nothing predicts the first token.
            targets = [
                [IGNORED] * (len(before) + 1) + truth[1 : len(tokens)].tolist()
                for tokens, truth in zip(part.tokens, part.labels, strict=True)
            ]
            longer = Texts([before + tokens.tolist() for tokens in part.tokens], token_targets(targets), part.pad)
            rows = evaluate(model, problem.logits, problem.task, longer, device, self.training.batch)
            measured |= self._scores(name, rows, longer.labels)
        return measured

    def _fitted_head(self) -> dict[str, Any]:
        """Fit a logistic regression to what the base gives its head, and measure its predictions."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        features = {name: self._head_inputs(name) for name in ("training", "validation", "test")}
        truth = {name: self.problem.parts[name].labels for name in features}

        def scores(name: str, head: Any) -> dict[str, Any]:
            logits = torch.from_numpy(head.predict_log_proba(features[name])).clamp(min=-100.0)
            return self._scores(name, list(logits), truth[name])

        heads = [
            make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000)).fit(
                features["training"], truth["training"].numpy()
            )
            for penalty in PENALTIES
        ]
        best = min(heads, key=lambda head: scores("validation", head)["validation_loss"])
        return scores("validation", best) | scores("test", best)

    def _head_inputs(self, name: str) -> NDArray[np.float32]:
        """Return what the base computes of each sample of a part: the head's inputs, or of tokens their mean, too."""
        problem, part = self.problem, self.problem.parts[name]
        device = torch.device(self.training.device)
        model: Any = problem.build(0).to(device).eval()
        head = next(layer for path, layer in model.named_modules() if under(path, problem.keep_trainable))
        seen: list[Tensor] = []
        pooled = []
        with torch.no_grad(), head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0])):
            for some in torch.arange(len(part.labels)).split(self.training.batch):
                inputs = part.batch(some, device)
                problem.logits(model, inputs)
                states = seen.pop()
                if isinstance(part, Texts):
                    mask = inputs["attention_mask"][..., None]
                    tokens = model.base_model(**inputs)[0]
                    states = torch.cat([states, (tokens * mask).sum(1) / mask.sum(1)], 1)
                pooled.append(states.cpu())
        return torch.cat(pooled).numpy()


def finite(value: float) -> float | None:
    """Return a rounded number, or None if it is not finite: JSON has no NaN."""
    return round(value, 6) if math.isfinite(value) else None
