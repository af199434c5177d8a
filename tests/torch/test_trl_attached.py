"""TRL's trainers on a model with an attached adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
trl = pytest.importorskip("trl")

import tnadapt.torch as tt
from tests.support.depth import in_depth
from tnadapt import presets

from .loops import bits, same, snapshot
from .tiny_language_model import llama, settings, tokenizer

# They are about TRL's own dependencies, and about options that it sets itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*attention implementation.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

CONFIGS = {"default": None, "lora": presets.lora(2), "unilora": presets.unilora(40, 2)}
# Two sentences, so that every batch is the same and the loss of the first and the last can be compared.
SENTENCES = [{"text": "w1 w2 w3 w4 w5 w6 w7"}, {"text": "w9 w8 w7 w6 w5"}] * 6
PAIRS = [
    {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6", "rejected": " w7 w8"},
    {"prompt": "w3 w2", "chosen": " w9", "rejected": " w17 w8 w5"},
]


def quiet(trainer: Any) -> Any:
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def shifted(adapter: Any) -> None:
    """Move an adapter, as training would have done."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for array in adapter.parameters():
            array.add_(0.3 * torch.randn(array.shape, generator=generator))


def sft(model: Any, folder: Path, **changes: Any) -> Any:
    arguments = trl.SFTConfig(**settings(folder, max_steps=6, max_length=16, **changes))
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=datasets.Dataset.from_list(SENTENCES), processing_class=tokenizer()
    )
    return quiet(trainer)


@pytest.mark.parametrize("config", in_depth(CONFIGS, ["default"]))
def test_sft_resumes_to_the_bit(config: str, tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> tuple[list[float], dict[str, Any]]:
        model = llama()
        adapter = tt.attach(model, CONFIGS[config])
        base = bits(model)
        trainer = sft(model, tmp_path, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2)
        tt.adapter_checkpoints(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert same(bits(model), base)
        return logged(trainer, "loss"), snapshot(adapter)

    losses, arrays = run(None)
    assert losses[-1] < losses[0]
    assert not list(tmp_path.rglob("model*"))
    again = run(str(tmp_path / "checkpoint-3"))
    assert again[0] == losses
    assert same(again[1], arrays)


@pytest.mark.parametrize("config", in_depth(CONFIGS, ["lora"]))
def test_sft_with_gradient_checkpointing(config: str, tmp_path: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = llama()
        adapter = tt.attach(model, CONFIGS[config])
        sft(model, tmp_path, gradient_checkpointing=checkpointing).train()
        found.append(snapshot(adapter))
    for name, array in found[0].items():
        torch.testing.assert_close(found[1][name], array, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{"packing": True}, {"bf16": True}])
@pytest.mark.filterwarnings("ignore:.*[Pp]ad.*:UserWarning")
def test_sft_packed_and_in_bfloat16(how: dict[str, bool], tmp_path: Path) -> None:
    model = llama()
    adapter = tt.attach(model)
    before = snapshot(adapter)
    trainer = sft(model, tmp_path, **how)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert all(not torch.equal(array, before[name]) for name, array in snapshot(adapter).items())
    assert {array.dtype for array in adapter.parameters()} == {torch.float32}


def dpo(model: Any, folder: Path, **others: Any) -> Any:
    return quiet(
        trl.DPOTrainer(
            model,
            args=trl.DPOConfig(**settings(folder, max_steps=3)),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
            **others,
        )
    )


@pytest.mark.parametrize("config", in_depth(CONFIGS, ["default", "unilora"]))
def test_dpo_against_a_reference_that_shares_the_base(config: str, tmp_path: Path) -> None:
    model = llama()
    adapter = tt.attach(model, CONFIGS[config])
    reference = tt.reference_model(model)
    base = bits(model)
    trainer = dpo(model, tmp_path, ref_model=reference)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert same(bits(model), base)
    assert same(bits(reference), base)
    assert any(bool(delta.any()) for delta in adapter.deltas())


def test_dpo_from_an_adapter_as_it_is(tmp_path: Path) -> None:
    model = llama()
    shifted(tt.attach(model))
    trainer = dpo(model, tmp_path, ref_model=tt.reference_model(model, with_adapters=True))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    # With the base for its reference it would not start there.
    other = llama()
    shifted(tt.attach(other))
    trainer = dpo(other, tmp_path, ref_model=tt.reference_model(other))
    trainer.train()
    assert abs(logged(trainer, "loss")[0] - math.log(2)) > 1e-3


def test_dpo_without_a_reference_loads_the_base(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    tt.attach(model)
    trainer = dpo(model, tmp_path)
    assert same(bits(trainer.ref_model), bits(model))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)


def grpo(model: Any, folder: Path, beta: float) -> Any:
    def number_of_fours(completions: list[str], **others: Any) -> list[float]:
        return [float(text.count("4")) for text in completions]

    arguments = trl.GRPOConfig(
        **settings(folder, max_steps=3, per_device_train_batch_size=4), beta=beta, num_generations=4,
        max_completion_length=6,
    )  # fmt: skip
    prompts = datasets.Dataset.from_list([{"prompt": "w1 w2 w3"}] * 4)
    return quiet(
        trl.GRPOTrainer(model, number_of_fours, args=arguments, train_dataset=prompts, processing_class=tokenizer())
    )


@pytest.mark.parametrize("config", in_depth(CONFIGS, ["unilora"]))
def test_grpo(config: str, tmp_path: Path) -> None:
    model = llama()
    adapter = tt.attach(model, CONFIGS[config])
    base = bits(model)
    trainer = grpo(model, tmp_path, beta=0.0)
    assert trainer.ref_model is None
    trainer.train()
    assert len(logged(trainer, "reward")) == 3
    assert same(bits(model), base)
    assert any(bool(delta.any()) for delta in adapter.deltas())


@pytest.mark.parametrize("shared", [False, True])
def test_grpo_with_a_divergence_from_the_base(shared: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapter = tt.attach(model)
    trainer = grpo(model, tmp_path, beta=0.1)
    if shared:
        trainer.ref_model = tt.reference_model(model)
    trainer.train()
    assert logged(trainer, "kl")[0] == 0.0
    assert logged(trainer, "kl")[-1] > 0.0
    shifted(adapter)
    assert same(bits(trainer.ref_model), bits(model))
