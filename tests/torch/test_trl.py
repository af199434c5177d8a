"""TRL's trainers on a trained adapter: their reference is that adapter rather than the base model."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
pytest.importorskip("trl")

from peft import PeftModel, get_peft_model

import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tests.support.depth import in_depth
from tnadapt import presets

from . import tiny_language_model

# They are about TRL's own dependencies, and about options that it sets itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZES = {
    "weights": 4, "rows": 16, "cols": 16, "heads": 4, "layers": 2, "n": 40, "block": 4, "r": 2, "parameters": 13,
    "digits": (4, 2),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_language_model.tokenizer()


def trained(preset: str) -> PeftModel:
    """Return a model with a trained adapter."""
    takes = inspect.signature(getattr(presets, preset)).parameters
    settings = {name: size for name, size in SIZES.items() if name in takes}
    model = get_peft_model(
        tiny_language_model.llama(), plugin.TnadaptConfig(task_type="CAUSAL_LM", preset=preset, settings=settings)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, array in tt.adapters(model)["default"].named_parameters():
            array.add_(0.3 * torch.randn(array.shape, generator=generator))
    return model


def settings(folder: Path) -> dict[str, Any]:
    return tiny_language_model.settings(folder, learning_rate=0.0)


def first_log(trainer: Any) -> dict[str, float]:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]


def dpo(model: PeftModel, tokenizer: Any, folder: Path) -> Any:
    from trl import DPOConfig, DPOTrainer

    pairs = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5 w6", "rejected": " w7 w8"},
        {"prompt": "w3 w2", "chosen": " w9", "rejected": " w17 w8 w5"},
    ]
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings(folder)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )


def grpo(model: PeftModel, tokenizer: Any, folder: Path) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    def number_of_fours(completions: list[str], **others: Any) -> list[float]:
        return [float(text.count("4")) for text in completions]

    arguments = GRPOConfig(**settings(folder), beta=0.1, num_generations=2, max_completion_length=4)
    return GRPOTrainer(
        model=model,
        args=arguments,
        reward_funcs=number_of_fours,
        train_dataset=datasets.Dataset.from_list([{"prompt": "w1 w2 w3"}] * 2),
        processing_class=tokenizer,
    )


def arrays(trainer: Any, name: str) -> dict[str, Any]:
    return dict(tt.adapters(trainer.model)[name].named_parameters())


#: A preset of each format, source, map and way of changing a weight.
ONE_OF_EACH = ("lora", "superlora", "dora", "tinylora", "vera", "fourierft")


def assert_reference_is_the_adapter(trainer: Any, before: dict[str, Any]) -> None:
    policy, reference = arrays(trainer, "default"), arrays(trainer, "ref")
    assert all(torch.equal(reference[name], before[name]) for name in before)
    assert all(torch.equal(policy[name], before[name]) for name in before)
    assert all(policy[name] is not reference[name] for name in before)
    assert all(array.requires_grad for array in policy.values())
    assert not any(array.requires_grad for array in reference.values())


@pytest.mark.law("trl-reference")
@pytest.mark.parametrize("preset", in_depth(presets.__all__, ONE_OF_EACH))
def test_dpo_starts_at_log_2(preset: str, tokenizer: Any, tmp_path: Path) -> None:
    model = trained(preset)
    before = {name: p.detach().clone() for name, p in tt.adapters(model)["default"].named_parameters()}
    trainer = dpo(model, tokenizer, tmp_path)
    assert first_log(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_reference_is_the_adapter(trainer, before)


@pytest.mark.law("trl-reference")
@pytest.mark.parametrize("preset", in_depth(presets.__all__, ONE_OF_EACH[::2]))
def test_grpo_starts_without_divergence(preset: str, tokenizer: Any, tmp_path: Path) -> None:
    model = trained(preset)
    before = {name: p.detach().clone() for name, p in tt.adapters(model)["default"].named_parameters()}
    trainer = grpo(model, tokenizer, tmp_path)
    found = first_log(trainer)["kl"]
    assert found == 0.0
    assert_reference_is_the_adapter(trainer, before)


@pytest.mark.law("trl-reference")
def test_another_reference_would_show(tokenizer: Any, tmp_path: Path) -> None:
    for make, key, start in ((dpo, "loss", math.log(2)), (grpo, "kl", 0.0)):
        trainer = make(trained("superlora"), tokenizer, tmp_path)
        # At its start, as a reference is to which nothing was copied.
        tt.adapters(trainer.model)["ref"].reset()
        assert abs(first_log(trainer)[key] - start) > 1e-3


@pytest.mark.parametrize("preset", in_depth(["superlora", "tinylora"], ["tinylora"]))
def test_sft_resumes_to_the_bit(preset: str, tokenizer: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    def run(checkpoint: str | None) -> tuple[list[float], dict[str, Any]]:
        how = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": True}
        sizes = {name: SIZES[name] for name in inspect.signature(getattr(presets, preset)).parameters if name in SIZES}
        trainer = SFTTrainer(
            tiny_language_model.llama(),
            args=SFTConfig(**tiny_language_model.settings(tmp_path, max_length=16, **how)),
            train_dataset=datasets.Dataset.from_list([{"text": "w1 w2 w3 w4 w5"}] * 4),
            processing_class=tokenizer,
            peft_config=plugin.TnadaptConfig(task_type="CAUSAL_LM", preset=preset, settings=sizes),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], arrays(trainer, "default")

    losses, ended = run(None)
    assert losses[-1] < losses[0]
    assert not list(tmp_path.rglob("model*.safetensors"))
    again = run(str(tmp_path / "checkpoint-2"))
    assert again[0] == losses
    assert all(torch.equal(again[1][name], ended[name]) for name in ended)
