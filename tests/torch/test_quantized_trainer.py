"""A model that transformers loads quantized: attach, its Trainer, save, load, merge, and the same bytes again."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .quantized_models import equal, library, values
from .small import stir

pytestmark = [
    pytest.mark.slow,
    # The libraries' own calls of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def hf() -> Any:
    """Return transformers, if its Trainer can run and bitsandbytes is there."""
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    library("bitsandbytes")
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def folder(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small Llama of random weights, whose sizes are multiples of nf4's blocks."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = tmp_path_factory.mktemp("llama")
    hf.LlamaForCausalLM(config).save_pretrained(found)
    return found


def four_bit(hf: Any, kind: str = "nf4") -> Any:
    return hf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def loaded(hf: Any, folder: Path, settings: Any) -> Any:
    torch.manual_seed(1)
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)


def texts() -> list[dict[str, Any]]:
    """Return rows that count upwards, which can be learned."""
    return [{"input_ids": row, "labels": row} for row in ((torch.arange(12) + start) % 60 + 3 for start in range(16))]


def trainer(made: Any, folder: Path) -> Any:
    helpers = importlib.import_module(".hugging_face", __package__)
    settings = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 0.03, "seed": 0}
    return helpers.trainer_of(made, folder, texts(), eval_strategy="steps", eval_steps=3, **settings)


def in_groups(hf: Any) -> Any:
    """Return the settings of a method that transformers does not call trainable."""
    own, groups = library("torchao.quantization"), library("torchao.quantization.granularity")
    return hf.TorchAoConfig(own.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups.PerGroup(32)))


#: The library and the settings of a way to quantize, and how far from the trained model the merged one may be.
KINDS: dict[str, tuple[str, Callable[[Any], Any], float]] = {
    "bitsandbytes nf4": ("bitsandbytes", lambda hf: four_bit(hf), 1.0),
    "bitsandbytes int8": ("bitsandbytes", lambda hf: hf.BitsAndBytesConfig(load_in_8bit=True), 0.2),
    "torchao int8": (
        "torchao.quantization",
        lambda hf: hf.TorchAoConfig(library("torchao.quantization").Int8WeightOnlyConfig()),
        0.2,
    ),
    "torchao int4": ("torchao.quantization", in_groups, 1.0),
    "quanto int8": ("optimum.quanto", lambda hf: hf.QuantoConfig(weights="int8"), 0.2),
}


def outputs(made: Any) -> Any:
    with torch.no_grad():
        return made.eval()(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("kind", KINDS)
def test_from_attach_to_the_same_bytes(kind: str, hf: Any, folder: Path, tmp_path: Path) -> None:
    needed, settings, near = KINDS[kind]
    library(needed)
    made = loaded(hf, folder, settings(hf))
    before = values(made)
    assert made.hf_quantizer.is_trainable == (kind != "torchao int4")
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(made, tmp_path)
    adapter = tt.attach(made, P.lora(4), "all-linear")
    assert not any(target.module == "lm_head" for target in adapter.targets)
    run = trainer(made, tmp_path)
    tt.adapter_checkpoints(run)
    run.train()
    losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert equal(values(made), before)
    trained = outputs(made)
    with adapter.disabled():
        base = outputs(made)
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    if kind != "quanto int8":  # which transformers does not save
        with pytest.warns(UserWarning, match="save_pretrained writes the whole LlamaForCausalLM"):
            made.save_pretrained(tmp_path / "whole")
        assert "quantization_config" in (tmp_path / "whole" / "config.json").read_text(encoding="utf-8")
    assert not adapter.merged

    again = loaded(hf, folder, settings(hf))
    second = tt.from_pretrained(again, tmp_path / "saved")
    assert torch.equal(outputs(again), trained)
    second.merge()
    report = second.merge_report
    assert report is not None
    assert len(report) == 14
    assert all(0.3 < row.kept < 1.7 for row in report)
    assert report.update_error < near
    merged = outputs(again)
    assert torch.linalg.norm(merged - trained) < near * torch.linalg.norm(base - trained)
    second.unmerge()
    assert equal(values(again), before)
    assert torch.equal(outputs(again), trained)
    second.detach()
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(again, tmp_path)


def test_generate_and_save_the_model_as_before(hf: Any, folder: Path, tmp_path: Path) -> None:
    made = loaded(hf, folder, four_bit(hf))
    made.save_pretrained(tmp_path / "plain")
    adapter = tt.attach(made, P.lora(2), "all-linear")
    start = torch.arange(3, 8)[None]
    tokens = made.generate(start, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 9)
    adapter.save(tmp_path / "a.safetensors")
    adapter.bake()
    made.save_pretrained(tmp_path / "baked")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("plain", "baked")]
    assert names[0] == names[1]
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    assert torch.allclose(outputs(again), outputs(made), atol=1e-5)
    # The fingerprint is that of the saved model.
    plain = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    tt.load(plain, tmp_path / "a.safetensors")
    with pytest.raises(tna.FileError, match="another base"):
        tt.load(loaded(hf, folder, four_bit(hf, "fp4")), tmp_path / "a.safetensors")


def test_exported_to_peft_it_computes_the_same_on_the_same_base(hf: Any, folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    made = loaded(hf, folder, four_bit(hf))
    adapter = tt.attach(made, P.lora(4), "all-linear")
    stir(adapter, 0.1)
    adapter.save(tmp_path / "a.safetensors")
    tna.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft-lora")
    other = peft.PeftModel.from_pretrained(loaded(hf, folder, four_bit(hf)), str(tmp_path / "peft"))
    for module in other.modules():
        # As attach() does: on some CPUs the first evaluation would round the scales.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(outputs(other), outputs(made), rtol=1e-4, atol=1e-4)
