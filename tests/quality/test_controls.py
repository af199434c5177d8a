"""Controls that train nothing, against the same computed in another way."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("sklearn")
pytest.importorskip("transformers")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

import torch
from torch import nn

from benchmarks.quality import methods, tasks
from benchmarks.quality.tasks import QualityTask
from benchmarks.quality.tasks._problem_bench import SHOTS, ProblemBench
from tests.finetune.tiny_models import films, gpt2
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Spec, Training, open_problem


def measured(bench: Any, name: str) -> dict[str, Any]:
    """Return what a control scores."""
    setting = methods.find(name).largest(bench.facts, bench.base, 0)
    scores: dict[str, Any] = bench.train(setting, 0, 0.0, lambda done: None)
    assert (scores["kept"], scores["diverged"]) == (0, False)
    return scores


def test_few_shot_is_the_loss_of_the_same_tokens_after_training_samples(tmp_path: Path) -> None:
    with (tmp_path / "texts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], *([text] for text in films())])
    spec = Spec(model=str(gpt2(tmp_path / "model")), data=str(tmp_path / "texts.csv"), task="causal-lm")
    problem = open_problem(spec)
    base: Any = problem.build(0)

    class Tiny(QualityTask):
        name = "tiny"
        targets = ".*c_fc"
        rate = 0.02
        has_head = False
        lower = chosen_lower = True
        scales: ClassVar = {"small": {}}

        def model(self) -> nn.Module:
            return type(base)(base.config)

        def open(self, scale: str, cache: Path, device: str) -> Any:
            return ProblemBench(self, scale, problem, Training(epochs=1, batch=4))

    bench: Any = Tiny().open("small", tmp_path, "cpu")
    scores = measured(bench, "few-shot")
    model, shots = problem.build(0).eval(), torch.cat(problem.parts["training"].tokens[:SHOTS])  # type: ignore[attr-defined]
    for part in ("validation", "test"):
        losses = []
        for tokens in problem.parts[part].tokens:  # type: ignore[attr-defined]
            whole = torch.cat([shots, tokens])
            with torch.no_grad():
                logits = model(input_ids=whole[None]).logits[0, :-1].double()
            each = nn.functional.cross_entropy(logits, whole[1:], reduction="none")
            losses.append(each[len(shots) :])
        assert scores[part] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    Tiny.rate = 0.01
    with pytest.raises(TnadaptError, match=r"^the rate that suits the base of task tiny is 0\.02, and not 0\.01$"):
        Tiny().open("small", tmp_path, "cpu")
    # As many tokens count as without them.
    assert sum(len(each) for each in losses) == sum(len(tokens) - 1 for tokens in problem.parts["test"].tokens)  # type: ignore[attr-defined]


def test_a_fitted_head_reads_what_a_head_reads_and_beats_one_that_is_trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    bench: Any = tasks.find("digits").open("smoke", tmp_path_factory.getbasetemp() / "quality-cache", "cpu")
    scores = measured(bench, "fitted-head")
    model: Any = bench.problem.build(0).eval()
    for name, part in bench.problem.parts.items():
        pixels = part.batch(torch.arange(len(part.labels)), torch.device("cpu"))
        with torch.no_grad():
            logits = model.head(torch.from_numpy(bench._head_inputs(name)))
            torch.testing.assert_close(logits, bench.problem.logits(model, pixels), rtol=1e-4, atol=1e-4)
    alone = bench.train(methods.find("base").largest(bench.facts, bench.base, 0), 0, 0.02, lambda done: None)
    assert scores["validation_loss"] < alone["validation_loss"]
    assert np.isfinite([scores["test"], scores["test_loss"]]).all()
