"""Diffusion: the paper's U-Net, pretrained on Fashion-MNIST, learns to draw the digits of MNIST. Minutes a training."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tnadapt.finetune import Method as Family
from tnadapt.finetune import Task

from .. import methods
from ..methods import Setting
from ._quality_task import Bench, Progress, QualityTask


class Diffusion(QualityTask):
    name = "diffusion"
    title = "Diffusion U-Net, Fashion-MNIST to MNIST"
    parts = "Images of MNIST; the FID of generated images to its test images, by a classifier of MNIST"
    metric = "FID"
    chosen_by = "loss"
    lower = True
    chosen_lower = True
    percent = False
    has_head = False
    scales: ClassVar = {
        "smoke": {"pretrain_steps": 2, "held_out": 32, "limit": 64, "steps": 2, "samples": 40, "real": 100},
        "small": {},
        "full": {
            "pretrain_steps": 20_000, "pretrain_batch": 64, "steps": 4000, "limit": 40_000, "samples": 5000,
            "real": 5000,
        },
    }  # fmt: skip

    def model(self) -> nn.Module:
        from paper import open_recipe
        from paper.diffusion.unet import Generator

        settings = open_recipe("svhn-mnist", "mini").settings
        return Generator(settings["channels"], settings["base"])

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        from paper import open_recipe
        from paper.diffusion.opening import generation_of

        recipe = open_recipe("svhn-mnist", "mini")
        recipe = dataclasses.replace(recipe, settings={**recipe.settings, **self.scaled(scale)})
        return DiffusionBench(self, scale, generation_of(recipe, cache, device=device))


class DiffusionBench:
    """The bench of the paper's recipe, with adapters of any library."""

    def __init__(self, task: QualityTask, scale: str, generation: Any) -> None:
        self.task, self.scale = task, scale
        self.bench, self.how, self.outline = generation.bench, generation.how, generation.settings()
        self.facts = task.check(task.facts(self.bench.model()))

    def settings(self) -> dict[str, Any]:
        outline = dict(self.outline)
        samples = {**outline.pop("samples"), "generated": outline["generated"], "test": len(self.bench.test)}
        modules = list(self.facts.modules)
        return {"task": self.task.name, "scale": self.scale, "samples": samples, "modules": modules, **outline}

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        began = time.perf_counter()
        method, bench = methods.find(setting.method), self.bench
        device = torch.device(bench.setup.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model = method.attach(bench.model(), setting, self.facts, self.task.targets, seed).to(device)
            torch.manual_seed(seed)
            trained, value = methods.trained(model), 0.0
            if trained:
                job = Task(Family(method.title, setting.label, None), seed, rate)
                value = bench._fit(model, self.how, job, lambda done: progress(0.9 * done))
            loss = bench._loss(model) if math.isfinite(value) else math.nan
            diverged = not math.isfinite(loss)
            metrics = {} if diverged else bench._measured(model, self.how, seed)[0]
        fid = metrics.get("fid")
        return {
            "kept": trained - setting.parameters,
            "diverged": diverged or fid is None,
            "validation": None if diverged else round(loss, 6),
            "validation_loss": None if diverged else round(loss, 6),
            "test": None if fid is None else float(f"{fid:.6g}"),
            "metrics": {name: None if one is None else float(f"{one:.6g}") for name, one in metrics.items()},
            "seconds": round(time.perf_counter() - began, 2),
        }
