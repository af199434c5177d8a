"""TRL's trainers on a model with an attached adapter, and on one through PEFT, whose reference is that adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("tokenizers")
trl = pytest.importorskip("trl")

import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tests.support.depth import in_depth
from tnadapt import presets

from .loops import bits, same, snapshot
from .tiny_language_model import llama, peft_config, settings, shifted, through_peft, tokenizer

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


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register()


def quiet(trainer: Any) -> Any:
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logged(trainer: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


def sft(model: Any, folder: Path, peft_config: Any = None, **changes: Any) -> Any:
    return quiet(
        trl.SFTTrainer(
            model,
            trl.SFTConfig(**settings(folder, max_steps=6, max_length=16, **changes)),
            train_dataset=datasets.Dataset.from_list(SENTENCES),
            processing_class=tokenizer(),
            peft_config=peft_config,
        )
    )


def dpo(model: Any, folder: Path, ref_model: Any = None, **changes: Any) -> Any:
    return quiet(
        trl.DPOTrainer(
            model,
            ref_model=ref_model,
            args=trl.DPOConfig(**settings(folder, **{"max_steps": 3, **changes})),
            train_dataset=datasets.Dataset.from_list(PAIRS),
            processing_class=tokenizer(),
        )
    )


def grpo(model: Any, folder: Path, beta: float = 0.1, **changes: Any) -> Any:
    def number_of_fours(completions: list[str], **others: Any) -> list[float]:
        return [float(text.count("4")) for text in completions]

    arguments = trl.GRPOConfig(
        **settings(folder, **{"max_steps": 3, "per_device_train_batch_size": 4, **changes}), beta=beta,
        num_generations=4, max_completion_length=6,
    )  # fmt: skip
    prompts = datasets.Dataset.from_list([{"prompt": "w1 w2 w3"}] * 4)
    return quiet(
        trl.GRPOTrainer(model, number_of_fours, args=arguments, train_dataset=prompts, processing_class=tokenizer())
    )


# -- Supervised ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [*in_depth(CONFIGS, ["default"]), *in_depth(["superlora", "tinylora"], ["tinylora"])]
)
@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:.*gradient_checkpointing.*:UserWarning")
def test_sft_resumes_to_the_bit(config: str, tmp_path: Path) -> None:
    def run(checkpoint: str | None) -> tuple[list[float], dict[str, Any]]:
        model, how = llama(), {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
        if config in CONFIGS:
            tt.attach(model, CONFIGS[config])
            base = bits(model)
            trainer = sft(model, tmp_path, **how)
            tt.adapter_checkpoints(trainer)
        else:
            base = bits(model)
            trainer = sft(model, tmp_path, peft_config(config), gradient_checkpointing=True, **how)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert same(bits(model), base)
        (adapter,) = tt.adapters(trainer.model).values()
        return logged(trainer, "loss"), snapshot(adapter)

    losses, arrays = run(None)
    assert losses[-1] < losses[0]
    assert not list(tmp_path.rglob("model*"))
    again = run(str(tmp_path / "checkpoint-3"))
    assert again[0] == losses
    assert same(again[1], arrays)


@pytest.mark.parametrize("how", [{"packing": True}, {"bf16": True}, {"gradient_checkpointing": True}])
@pytest.mark.filterwarnings("ignore:.*[Pp]ad.*:UserWarning")
def test_sft_packed_in_bfloat16_and_with_checkpointing(how: dict[str, bool], tmp_path: Path) -> None:
    model = llama()
    adapter = tt.attach(model)
    before = snapshot(adapter)
    trainer = sft(model, tmp_path, **how)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert all(not torch.equal(array, before[name]) for name, array in snapshot(adapter).items())
    assert {array.dtype for array in adapter.parameters()} == {torch.float32}


# -- Against a reference ---------------------------------------------------------------------------


def from_a_folder(folder: Path) -> Any:
    llama().save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("config", in_depth(CONFIGS, ["default", "unilora"]))
@pytest.mark.parametrize("reference", ["shared", "loaded"])
def test_dpo_of_a_fresh_adapter(reference: str, config: str, tmp_path: Path) -> None:
    """Without a reference, TRL loads the base."""
    model = from_a_folder(tmp_path / "base")
    adapter = tt.attach(model, CONFIGS[config])
    base = bits(model)
    trainer = dpo(model, tmp_path, tt.reference_model(model) if reference == "shared" else None)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0]
    assert same(bits(model), base)
    assert same(bits(trainer.ref_model), base)
    assert any(bool(delta.any()) for delta in adapter.deltas())


@pytest.mark.parametrize("reference", [None, "shared", "loaded"])
def test_grpo(reference: str | None, tmp_path: Path) -> None:
    """With a divergence from the base that is shared or that TRL loads, or without."""
    model = from_a_folder(tmp_path / "base")
    adapter = tt.attach(model, None if reference else CONFIGS["unilora"])
    base = bits(model)
    trainer = grpo(model, tmp_path, beta=0.1 if reference else 0.0)
    assert (trainer.ref_model is None) == (reference is None)
    if reference == "shared":
        trainer.ref_model = tt.reference_model(model)
    trainer.train()
    assert len(logged(trainer, "reward")) == 3
    assert same(bits(model), base)
    assert any(bool(delta.any()) for delta in adapter.deltas())
    if reference:
        assert logged(trainer, "kl")[0] == 0.0
        assert logged(trainer, "kl")[-1] > 0.0
        shifted(adapter)
        assert same(bits(trainer.ref_model), base)


# -- Through PEFT, a trained adapter is its own reference ---------------------------------------------

#: Trainers, the first number that they log, and what it is where the reference is the adapter.
REFERENCED: dict[str, tuple[Any, str, float]] = {"dpo": (dpo, "loss", math.log(2)), "grpo": (grpo, "kl", 0.0)}
#: A preset of each format, source, map and way of changing a weight.
ONE_OF_EACH = ("lora", "superlora", "dora", "tinylora", "vera", "fourierft")


@pytest.mark.law("trl-reference")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("how", "preset", "other"),
    [
        *(("dpo", preset, False) for preset in in_depth(presets.__all__, ONE_OF_EACH[::2])),
        *(("grpo", preset, False) for preset in in_depth(presets.__all__, ONE_OF_EACH[1::2])),
        *((how, "superlora", True) for how in REFERENCED),
    ],
)
def test_a_trained_adapter_is_its_own_reference(how: str, preset: str, other: bool, tmp_path: Path) -> None:
    """Another reference would show: one at its start, to which nothing was copied."""
    make, key, start = REFERENCED[how]
    model = through_peft(preset)
    before = {name: p.detach().clone() for name, p in tt.adapters(model)["default"].named_parameters()}
    trainer = make(model, tmp_path, learning_rate=0.0, max_steps=1)
    if other:
        tt.adapters(trainer.model)["ref"].reset()
    trainer.train()
    if other:
        assert abs(logged(trainer, key)[0] - start) > 1e-3
        return
    assert logged(trainer, key)[0] == pytest.approx(start, abs=1e-6 if start else 0.0)
    policy, reference = (dict(tt.adapters(trainer.model)[name].named_parameters()) for name in ("default", "ref"))
    assert all(torch.equal(reference[name], before[name]) for name in before)
    assert all(torch.equal(policy[name], before[name]) for name in before)
    assert all(policy[name] is not reference[name] for name in before)
    assert all(array.requires_grad for array in policy.values())
    assert not any(array.requires_grad for array in reference.values())
