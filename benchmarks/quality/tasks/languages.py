"""Languages: SmolLM2-135M, which learned English, continues technical prose in another one. Minutes a training.

The base cannot gain by the form of an answer: its own loss is the control.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import nn

from paper.registries import fetch_part
from tnadapt.finetune import Spec, Training, open_problem

from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask


def sketch() -> nn.Module:
    """Return a model of SmolLM2's structure."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


class _Language(QualityTask):
    #: The file of texts.
    texts: ClassVar[str]
    metric = "loss per token"
    chosen_by = "loss per token"
    lower = True
    chosen_lower = True
    percent = False
    #: With queries and values alone, the biases of all layers learn more in 64 steps than a dense update.
    targets = "all-linear"
    rate = 0.16
    has_head = False
    head_size = 64
    scales: ClassVar = {
        "smoke": {"limit": 16, "epochs": 1, "batch": 4, "steps": 2},
        "small": {"limit": 512, "epochs": 1, "batch": 4, "steps": 64},
        "full": {"limit": None, "epochs": 3, "batch": 16},
    }

    def model(self) -> nn.Module:
        return sketch()

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        model, texts = fetch_part("smollm2", cache), fetch_part(self.texts, cache)
        spec = Spec(
            model=str(model), data=str(texts), limit=settings.pop("limit"), task="causal-lm", max_length=128
        )  # fmt: skip
        return ProblemBench(self, scale, open_problem(spec), Training(**settings, device=device))


class German(_Language):
    name = "german"
    title = "SmolLM2-135M to German technical prose"
    parts = "Pieces of the German installation guide of Debian, 128 tokens each"
    texts = "guide-de.csv"


class Hungarian(_Language):
    name = "hungarian"
    title = "SmolLM2-135M to Hungarian technical prose"
    parts = "Pieces of the Hungarian installation guide of Debian, 128 tokens each"
    texts = "guide-hu.csv"
