"""Reasoning: SmolLM2-135M learns from answers to continue number sequences. Minutes a training.

The questions are those of reinforcement learning in ``benchmarks/rl_drift.py``, chosen by the same rule: the base
answers at most 20 % with four examples.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import nn

from paper.registries import fetch_part
from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Spec, Training, open_problem
from tnadapt.finetune._inputs import tokenizer_of
from tnadapt.finetune.data import Samples

from ...reasoning import Entry, Questions, prompt
from ._problem_bench import ProblemBench
from ._quality_task import Bench, QualityTask
from .languages import sketch

LONGEST = 96
#: Tokens of an answer that are read.
TOKENS = 16


class NumberSequence(QualityTask):
    name = "number-sequence"
    title = "SmolLM2-135M to number sequences"
    parts = "Questions of reasoning-gym's number_sequence, with the next number as the answer"
    #: The name in reasoning-gym.
    questions: ClassVar[str] = "number_sequence"
    metric = "exact match"
    chosen_by = "exact match"
    targets = "all-linear"  # as in benchmarks/rl_drift.py
    rate = 0.16
    has_head = False
    head_size = 64
    scales: ClassVar = {
        "smoke": {"limit": 16, "epochs": 1, "batch": 4, "steps": 2},
        "small": {"limit": None, "epochs": 6, "batch": 16},
        "full": {"limit": None, "epochs": 10, "batch": 16},
    }

    def model(self) -> nn.Module:
        return sketch()

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        settings = self.scaled(scale)
        limit = settings.pop("limit")
        if importlib.util.find_spec("reasoning_gym") is None:
            raise TnadaptError(f"task {self.name} needs the package reasoning-gym: pip install reasoning-gym")
        return ReasoningBench(self, scale, Questions(self.questions), limit, cache, Training(**settings, device=device))


class ReasoningBench(ProblemBench):
    """Questions, in the parts that they have in reinforcement learning."""

    def __init__(
        self, task: QualityTask, scale: str, questions: Questions, limit: int | None, cache: Path, training: Training
    ) -> None:
        import transformers

        self.questions, self.model = questions, fetch_part("smollm2", cache)
        tokenizer: Any = tokenizer_of(str(self.model), transformers)
        table = cache / f"{task.name}.csv"
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("prompt", "completion"), *map(_pair, questions.training)])
        replace_file(str(table), text.getvalue().encode())
        problem = open_problem(Spec(model=str(self.model), data=str(table), task="causal-lm", max_length=LONGEST))
        entries = {"training": questions.training, "validation": questions.asked, "test": questions.tests}
        parts = {}
        for name, some in entries.items():
            pairs = [_pair(entry) for entry in some[:limit]]
            parts[name] = problem.task.encode(Samples(pairs, np.zeros(len(pairs), np.int64)), tokenizer, LONGEST)
        super().__init__(task, scale, dataclasses.replace(problem, parts=parts), training, task.metric)

    def _few_shot(self) -> dict[str, Any]:
        """Ask the base after examples, and count an answer as right if its first line is."""
        import transformers

        from examples.language_models.smollm2 import answers

        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model, padding_side="left")
        model, measured = self.problem.build(0).to(self.training.device).eval(), dict[str, Any]()
        for name, entries in (("validation", self.questions.asked), ("test", self.questions.tests)):
            some = entries[: len(self.problem.parts[name].labels)]
            texts = answers(model, tokenizer, [self.questions.shots + prompt(entry) for entry in some], tokens=TOKENS)
            measured |= {name: self.questions.right(texts, some), f"{name}_loss": None}
        return measured


def _pair(entry: Entry) -> tuple[str, str]:
    """Return prompt and completion."""
    return prompt(entry), f" {entry['answer']}"
