"""Checkpoints of the Trainer that hold adapters alone."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import tnadapt.torch as tt
from tnadapt import presets
from tnadapt.errors import FileError, TargetError

from .loops import bits, same, snapshot

EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}


@pytest.fixture
def hf() -> Any:
    return importlib.import_module(".hugging_face", __package__)


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

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
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
