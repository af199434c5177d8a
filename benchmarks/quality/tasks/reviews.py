"""Reviews: a model of sentences learns whether one of a movie review is positive. Minutes a training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from paper.registries import fetch_part
from tnadapt.finetune import Spec, Training, open_problem

from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask


class _Reviews(QualityTask):
    #: The model's name in the registries.
    part: ClassVar[str]
    parts = "Sentences of movie reviews, positive or negative (PyPI's vaderSentiment 0.5), split by class"
    scales: ClassVar = {
        "smoke": {"limit": 60, "epochs": 1, "batch": 16, "head_rate": 0.001},
        "small": {"limit": 2000, "epochs": 4, "batch": 16, "head_rate": 0.001},
        "full": {"limit": None, "epochs": 3, "batch": 32, "head_rate": 0.001},
    }

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        model, data = fetch_part(self.part, cache), fetch_part("reviews.csv", cache)
        spec = Spec(model=str(model), data=str(data), limit=settings.pop("limit"))
        return ProblemBench(self, scale, open_problem(spec), Training(**settings, device=device))


class Reviews(_Reviews):
    name = "reviews"
    title = "MiniLM to movie reviews"
    part = "minilm"
    head_size = 32

    def model(self) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
        )
        return BertForSequenceClassification(config)  # type: ignore[no-any-return]


class ReviewsMPNet(_Reviews):
    name = "reviews-mpnet"
    title = "MPNet to movie reviews"
    part = "mpnet"
    rate = 0.02
    head_size = 64

    def model(self) -> nn.Module:
        from transformers import MPNetConfig, MPNetForSequenceClassification

        return MPNetForSequenceClassification(MPNetConfig(num_labels=2))  # type: ignore[no-any-return]
