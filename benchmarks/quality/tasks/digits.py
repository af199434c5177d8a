"""Digits: the small ViT of ``tnadapt finetune``, pretrained on the digits 0 to 4, learns 5 to 9. Seconds a training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tnadapt.finetune import Problem, Spec, Training, open_problem

from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask


class Separate(nn.Module):
    """The attention of the ViT with its fused weight cut into three layers, so that PEFT can adapt two of them."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.heads, self.proj = fused.heads, fused.proj
        width = fused.qkv.in_features
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        with torch.no_grad():
            for place, layer in enumerate((self.query, self.key, self.value)):
                layer.weight.copy_(fused.qkv.weight[place * width : (place + 1) * width])
                layer.bias.copy_(fused.qkv.bias[place * width : (place + 1) * width])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, width)`` to the same shape."""
        n, tokens, width = x.shape
        q, k, v = (
            layer(x).view(n, tokens, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed: Tensor = self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        )
        return mixed


def separated(model: Any) -> nn.Module:
    """Return a ViT after cutting its fused weights."""
    with torch.random.fork_rng(devices=[]):
        for block in model.blocks:
            block.attn = Separate(block.attn)
    return model  # type: ignore[no-any-return]


class Digits(QualityTask):
    name = "digits"
    title = "Small ViT, digits 0 to 4 to digits 5 to 9"
    parts = "scikit-learn's digits 5 to 9, split by class"
    head_size = 16
    scales: ClassVar = {
        "smoke": {"pretrain_epochs": 1, "epochs": 1, "batch": 64, "head_rate": 0.02},
        "small": {"epochs": 30, "batch": 32, "head_rate": 0.06},
        "full": {"epochs": 30, "batch": 32, "head_rate": 0.06},
    }

    def model(self) -> nn.Module:
        problem = open_problem(Spec())
        assert problem.sketch is not None
        return separated(problem.sketch())

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        pretraining = {name: settings.pop(name) for name in ("pretrain_epochs",) if name in settings}
        problem = open_problem(Spec(cache=cache, **pretraining))
        return ProblemBench(self, scale, _cut(problem), Training(**settings, device=device))


def _cut(problem: Problem) -> Problem:
    return dataclasses.replace(problem, build=lambda seed: separated(problem.build(seed)), sketch=None)
