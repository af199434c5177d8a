"""GRPO: SmolLM2-135M answers sums that a checker rewards, with TRL's trainer. Many minutes a training; for a GPU."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from tnadapt.errors import TnadaptError
from tnadapt.finetune.problem import base_digest

from .. import methods
from ..methods import Setting
from ._quality_task import Bench, Progress, QualityTask
from .smollm2_sft import HEAD_SIZE, fetched, sketch

PROMPT = "Question: What is {} + {}?\nAnswer:"
#: Tokens of an answer.
TOKENS = 6


class SmolLM2GRPO(QualityTask):
    name = "smollm2-grpo"
    title = "SmolLM2-135M, reinforced by GRPO: sums"
    parts = "Sums of two numbers; the answer must be right, to the digit"
    metric = "right answers"
    chosen_by = "right answers"
    has_head = False
    head_size = HEAD_SIZE
    scales: ClassVar = {
        "smoke": {"largest": 9, "held_out": 5, "test": 5, "steps": 1, "prompts": 1, "generations": 4},
        "small": {"largest": 20, "held_out": 60, "test": 120, "steps": 30, "prompts": 4, "generations": 8},
        "full": {"largest": 99, "held_out": 500, "test": 1000, "steps": 300, "prompts": 16, "generations": 8},
    }

    def model(self) -> nn.Module:
        return sketch()

    def open(self, scale: str, cache: Path, device: str) -> Bench:
        try:
            import datasets  # noqa: F401
            import trl  # noqa: F401
        except ImportError as error:
            raise TnadaptError(f"task {self.name} needs TRL: pip install 'tnadapt[quality]' ({error})") from None
        return GRPOBench(self, scale, self.scaled(scale), fetched(cache)[0], device)


class GRPOBench:
    """The model, the sums and the settings of a training."""

    def __init__(self, task: QualityTask, scale: str, how: dict[str, Any], folder: Path, device: str) -> None:
        self.task, self.scale, self.how, self.folder, self.device = task, scale, how, folder, device
        self.parts = sums(how["largest"], how["held_out"], how["test"])
        model, _ = self._pretrained()
        self.facts = task.check(task.facts(model))
        self.digest = base_digest(model)

    def _pretrained(self) -> tuple[Any, Any]:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        return model.to(self.device), tokenizer

    def settings(self) -> dict[str, Any]:
        data = hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()
        samples = {name: len(own) for name, own in self.parts.items()}
        return {
            "task": self.task.name, "scale": self.scale, "samples": samples, "modules": list(self.facts.modules),
            **self.how, "data_digest": data, "base_digest": self.digest,
        }  # fmt: skip

    def train(self, setting: Setting, seed: int, rate: float, progress: Progress) -> dict[str, Any]:
        from examples.language_models.smollm2 import answers

        began = time.perf_counter()
        method = methods.find(setting.method)
        model, tokenizer = self._pretrained()
        model = method.attach(model, setting, self.facts, self.task.targets, seed)
        rewards = self._reinforced(model, tokenizer, seed, rate, progress) if methods.trained(model) else []
        model.eval()
        found: dict[str, Any] = {"kept": methods.trained(model) - setting.parameters, "rewards": rewards}
        for part in ("validation", "test"):
            own = self.parts[part]
            texts = answers(model, tokenizer, [prompt for prompt, _ in own], tokens=TOKENS)
            found[part] = sum(right(texts, [total for _, total in own])) / len(own)
        return {
            **found, "diverged": False, "validation_loss": None, "seconds": round(time.perf_counter() - began, 2)
        }  # fmt: skip

    def _reinforced(self, model: Any, tokenizer: Any, seed: int, rate: float, progress: Progress) -> list[float]:
        """Train with TRL, and return the mean reward of each step."""
        import datasets
        import transformers
        import trl

        how = self.how
        rows = datasets.Dataset.from_list(
            [{"prompt": prompt, "total": total} for prompt, total in self.parts["training"]]
        )
        with tempfile.TemporaryDirectory() as out:
            arguments = trl.GRPOConfig(
                out, learning_rate=rate, max_steps=how["steps"], num_generations=how["generations"],
                per_device_train_batch_size=how["prompts"] * how["generations"], max_completion_length=TOKENS,
                temperature=1.0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", seed=seed,
                report_to="none", bf16=False, gradient_checkpointing=False, disable_tqdm=True,
                use_cpu=self.device == "cpu",
            )  # fmt: skip

            class Told(transformers.TrainerCallback):  # type: ignore[misc]
                def on_step_end(self, arguments: Any, state: Any, control: Any, **more: Any) -> None:
                    progress(state.global_step / how["steps"])

            trainer = trl.GRPOTrainer(
                model, _reward, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Told()]
            )
            trainer.train()
            return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


def sums(largest: int, held_out: int, test: int) -> dict[str, list[tuple[str, int]]]:
    """Return prompts and totals of each part; no sum is in two of them, whatever the order of its numbers.

    Examples
    --------
    >>> {name: len(own) for name, own in sums(9, 10, 10).items()}
    {'training': 25, 'validation': 10, 'test': 10}
    """
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1)]
    random.Random(0).shuffle(pairs)
    rows = [(PROMPT.format(a, b), a + b) for a, b in pairs]
    return {
        "training": rows[held_out + test :],
        "validation": rows[:held_out],
        "test": rows[held_out : held_out + test],
    }


def right(texts: list[str], totals: list[int]) -> list[float]:
    """Return whether the first number of each text is the total, as 1 or 0.

    Examples
    --------
    >>> right([" 12.", " 3 + 4 = 7", "none"], [12, 7, 1])
    [1.0, 0.0, 0.0]
    """
    found = [re.search(r"\d+", text) for text in texts]
    return [float(one is not None and int(one[0]) == total) for one, total in zip(found, totals, strict=True)]


def _reward(completions: list[str], total: list[int], **others: Any) -> list[float]:
    return right(completions, total)
