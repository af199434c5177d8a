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


import tnadapt.torch as tt
from tests.support.depth import in_depth
from tnadapt import presets
from tnadapt.errors import FileError, TargetError
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


def trained(hf: Any, folder: Path, config: str = "default", **settings: Any) -> tuple[list[float], Adapter]:
    """Return losses and adapter of a run, in which only the adapter and the head may change."""
    model = hf.bert()
    adapter = attach(model, CONFIGS[config], keep_trainable=("classifier",))
    base, before = bits(model, "classifier"), {**snapshot(adapter), "head": model.classifier.weight.detach().clone()}
    trainer = hf.trainer_of(model, folder, **settings)
    trainer.train()
    assert same(bits(model, "classifier"), base)
    after = {**snapshot(adapter), "head": model.classifier.weight.detach()}
    assert all(not torch.equal(after[name], before[name]) for name in before)
    return logged(trainer), adapter


def test_trainer_in_bfloat16(hf: Any, tmp_path: Path) -> None:
    losses, _ = trained(hf, tmp_path / "plain")
    rounded, adapter = trained(hf, tmp_path / "bf16", bf16=True)
    assert rounded != losses
    assert rounded == pytest.approx(losses, rel=2e-2)
    assert {array.dtype for array in adapter.arrays().values()} == {torch.float32}


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


NEW_PROCESS = """
import sys
import torch, transformers, tnadapt.torch

folder, *names = sys.argv[1:]
model = transformers.BertForSequenceClassification.from_pretrained(folder + "/base").eval()
logits = {}
for name in names:
    adapter = tnadapt.torch.load(model, f"{folder}/{name}.safetensors")
    with torch.no_grad():
        logits[name] = model(torch.load(folder + "/words.pt")).logits
    adapter.detach()
torch.save(logits, folder + "/logits.pt")
"""


@pytest.mark.slow
def test_from_trainer_to_a_new_process(hf: Any, tmp_path: Path) -> None:
    """An adapter of each config is trained, and loaded in a new process."""
    words = torch.stack([sentence["input_ids"] for sentence in hf.sentences()])
    torch.save(words, tmp_path / "words.pt")
    hf.bert().save_pretrained(tmp_path / "base")
    expected, names = {}, in_depth(CONFIGS, [*CONFIGS][::4])
    for name in names:
        model = hf.bert()
        adapter = attach(model, CONFIGS[name], keep_trainable=("classifier",))
        trainer = hf.trainer_of(model, tmp_path / "run", max_steps=12)
        start = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * start
        adapter.save(tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            expected[name] = model.eval()(words).logits
            with adapter.disabled():
                assert relative(model(words).logits, expected[name]) > 1e-2, name
    run = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, str(tmp_path), *names],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert run.returncode == 0, run.stderr
    logits = torch.load(tmp_path / "logits.pt")
    assert logits.keys() == expected.keys()
    for name in names:
        assert torch.equal(logits[name], expected[name]), name


# -- Checkpoints that hold adapters alone -----------------------------------------------------------


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def trainer_of(hf: Any, model: Any, folder: Path, alone: bool = True, **settings: Any) -> Any:
    """Return a Trainer, whose checkpoints hold adapters alone or the whole model."""
    trainer = hf.trainer_of(model, folder, **{**EVERY_STEP, **settings})
    if alone:
        tt.adapter_checkpoints(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore:save_pretrained writes the whole:UserWarning")
@pytest.mark.parametrize(("alone", "resumed_alone"), [(True, True), (False, False), (False, True)])
def test_a_resumed_run_equals_one_that_was_not_interrupted(
    alone: bool, resumed_alone: bool, hf: Any, tmp_path: Path
) -> None:
    """Also from a checkpoint of a whole model."""
    model, words = hf.bert(), torch.arange(4, 12).view(1, 8)
    adapter = tt.attach(model, keep_trainable="classifier")
    trainer = trainer_of(hf, model, tmp_path, alone)
    trainer.train()
    other = hf.bert()
    base = bits(other, "classifier")
    if alone:
        names = {file.name for file in (tmp_path / "checkpoint-2").iterdir()}
        own = {"adapter.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}
        assert own <= names
        assert not any(name.startswith(("model", "config", "pytorch")) for name in names)
        loaded = tt.load(other, tmp_path / "checkpoint-4" / "adapter.safetensors")
        with torch.no_grad():
            assert torch.equal(other.eval()(words).logits, model.eval()(words).logits)
        loaded.detach()
        other = hf.bert()
    resumed = tt.attach(other, keep_trainable="classifier")
    again = trainer_of(hf, other, tmp_path / "again", resumed_alone)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(again) == logged(trainer)
    assert same(snapshot(resumed), snapshot(adapter))
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert same(bits(other, "classifier"), base)


@pytest.mark.filterwarnings("ignore:save_pretrained writes the whole:UserWarning")
@pytest.mark.parametrize("alone", [True, False])
def test_the_best_is_loaded_at_the_end(alone: bool, hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    adapter = tt.attach(model, keep_trainable="classifier")
    base = bits(model, "classifier")
    # The loss falls. With its largest taken for the best, the Trainer has to go back.
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "load_best_model_at_end": True}
    trainer = trainer_of(hf, model, tmp_path, alone, max_steps=6, eval_strategy="steps", eval_steps=1, **best)
    seen = []

    class Look(hf.transformers.TrainerCallback):
        def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
            seen.append(snapshot(adapter))

    trainer.add_callback(Look())
    trainer.train()
    evaluated = logged(trainer, "eval_loss")
    first = evaluated.index(max(evaluated))
    assert first < len(evaluated) - 1
    assert same(snapshot(adapter), seen[first])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[first], rel=1e-6)
    assert same(bits(model, "classifier"), base)


def test_several_adapters_have_folders(hf: Any, tmp_path: Path) -> None:
    """A name is one folder, whatever it is."""
    model, outside = hf.bert(), str(tmp_path / "elsewhere")
    several = [tt.attach(model, presets.lora(2), name=name) for name in ("a.b", "other", "a/b", "..", outside)]
    trainer = trainer_of(hf, model, tmp_path)
    trainer.save_model(str(tmp_path / "end"))
    folders = {path.parent for path in tmp_path.rglob("adapter.safetensors")}
    assert {tmp_path / "end" / name for name in ("a%2Eb", "other")} < folders
    assert {path.parent for path in folders} == {tmp_path / "end"}
    assert len(folders) == len(several)
    before = [snapshot(adapter) for adapter in several]
    with torch.no_grad():
        for array in (array for adapter in several for array in adapter.parameters()):
            array.add_(1.0)
    trainer._load_from_checkpoint(str(tmp_path / "end"))
    assert all(same(snapshot(adapter), saved) for adapter, saved in zip(several, before, strict=True))
    # Without an adapter the whole model is saved.
    several[0].bake()
    for adapter in several[1:]:
        adapter.detach()
    trainer.save_model(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def refused(call: Any, message: str, error: type[Exception] = TargetError) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_training_that_would_reach_no_adapter_is_refused(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    one, other = tt.attach(model, name="one"), tt.attach(model, name="other")
    trainer = trainer_of(hf, model, tmp_path, max_steps=1)
    one.merge()
    refused(trainer.train, "adapter 'one' is merged, and would not be trained: call unmerge() before train()")
    one.unmerge()
    tt.mix(model, {})
    refused(trainer.train, "no adapter is active, so none would be trained: call activate() of one of 'one', 'other'")
    other.activate()
    before = snapshot(one), snapshot(other)
    trainer.train()
    assert same(snapshot(one), before[0])
    assert not same(snapshot(other), before[1])


# PEFT asks transformers' models for a property that they deprecate.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_refused(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    refused(
        lambda: tt.adapter_checkpoints(model),
        "adapter_checkpoints takes a transformers Trainer; BertForSequenceClassification has no '_save': in a training "
        "loop of your own, call adapter.save(path)",
    )
    trainer = hf.trainer_of(model, tmp_path)
    refused(
        lambda: tt.adapter_checkpoints(trainer),
        "BertForSequenceClassification has no adapter: call attach() before adapter_checkpoints()",
    )
    tt.attach(model)
    trainer.args.save_on_each_node = True
    with pytest.raises(TargetError, match="written by process 0 alone: leave save_on_each_node=True out"):
        tt.adapter_checkpoints(trainer)
    trainer.args.save_on_each_node = False
    trainer.is_fsdp_enabled = True
    refused(
        lambda: tt.adapter_checkpoints(trainer),
        "this trainer shards the model by FSDP, which writes checkpoints of its own: leave adapter_checkpoints out, "
        "and call adapter.save(path) in every process when it has trained",
    )
    peft, plugin = pytest.importorskip("peft"), importlib.import_module("tnadapt.torch.peft")
    plugin.register()
    model = peft.get_peft_model(hf.bert(), plugin.TnadaptConfig(preset="superlora", settings={"rank": 2}))
    with pytest.raises(TargetError, match="is a PEFT model, whose checkpoints hold PEFT's adapters alone"):
        tt.adapter_checkpoints(hf.trainer_of(model, tmp_path))
    inner = hf.bert()
    tt.attach(inner)
    below = hf.trainer_of(peft.get_peft_model(inner, peft.LoraConfig(target_modules=["query"])), tmp_path)
    refused(
        lambda: tt.adapter_checkpoints(below),
        "this trainer's model is a PEFT model, whose checkpoints hold PEFT's adapters alone, and one that was attached "
        "besides is frozen there: leave adapter_checkpoints out, and give a TnadaptConfig as peft_config in place of "
        "attach()",
    )


def test_other_adapters_are_refused_on_resuming(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    tt.attach(model, presets.lora(2))
    trainer = trainer_of(hf, model, tmp_path)
    tt.adapter_checkpoints(trainer)
    # Asked twice, it still falls back to the trainer.
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer._load_from_checkpoint(str(tmp_path))
    trainer.save_model(str(tmp_path))
    other = hf.bert()
    tt.attach(other, presets.lora(3))
    resumed = trainer_of(hf, other, tmp_path)
    with pytest.raises(FileError, match="its config differs from that of adapter 'default'"):
        resumed._load_from_checkpoint(str(tmp_path))
    tt.attach(other, presets.lora(2), name="second")
    refused(
        lambda: resumed._load_from_checkpoint(str(tmp_path)),
        f"{tmp_path}: it has no file of adapter 'default': attach the adapters that were trained, under the same names",
        FileError,
    )
