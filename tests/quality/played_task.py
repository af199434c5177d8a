"""A task whose trainings are played: scores are a function of method, rate and seed, so that a run takes no time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from benchmarks.quality.methods import Setting
from benchmarks.quality.tasks import Bench, Progress, QualityTask

#: The best rate of each method on the held-out part, and the one that the rule finds: it has steps, and ends.
BEST = {"base": 0.1, "dense": 0.01, "lora": 0.03, "lora_xs": 3.0, "unilora": 1e-6, "peft-lora": 9e-4}
FOUND = {"base": 0.09, "dense": 0.01, "lora": 0.03, "lora_xs": 2.4, "unilora": 4.1e-5, "peft-lora": 0.0009}


class PlayedTask(QualityTask):
    name = "played"
    title = "A played task"
    parts = "no samples"
    scales: ClassVar = {"small": {}}

    def model(self) -> nn.Module:
        layer = nn.Module()
        layer.query, layer.value = nn.Linear(8, 8), nn.Linear(8, 8)
        return layer

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        return PlayedBench()


class PlayedBench:
    def settings(self) -> dict[str, Any]:
        return {"task": "played", "samples": {"training": 3, "validation": 2, "test": 2}, "targets": "qv"}

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        away = abs(math.log10(rate / BEST[setting.method])) if rate else 1.0
        # The test score prefers another rate, which must not matter.
        score, test = 0.9 - 0.1 * away + 0.001 * seed, 0.5 + 0.1 * away + 0.01 * seed
        return {
            "kept": 5, "diverged": False, "validation": score, "validation_loss": away, "test": test, "seconds": 2.0,
        }  # fmt: skip


def setting_of(method: str, budget: int = 100) -> Setting:
    return Setting(method, budget, "r = 1", 90, '{"rank": 1}')
