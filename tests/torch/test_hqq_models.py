"""Models of transformers in HQQ: attach, its Trainer, save, load, merge, and the same bytes again.

transformers 5.24 cannot quantize to HQQ when it loads a model, on any device; HQQ's own loader can. What transformers
would set on the model is set here.
"""

from __future__ import annotations

import contextlib
import importlib
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tnadapt as tna
import tnadapt.torch as tt

from .hugging_face import trainer_of
from .quantized_models import equal, library, values

pytestmark = [
    pytest.mark.slow,
    # The libraries' own calls of torch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]
P = tna.presets


@pytest.fixture(scope="module")
def hf() -> Any:
    for needed in ("accelerate", "transformers"):
        pytest.importorskip(needed)
    library("hqq.core.quantize")
    return importlib.import_module("transformers")


@pytest.fixture(scope="module")
def folder(hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    found = tmp_path_factory.mktemp("llama")
    hf.LlamaForCausalLM(config).save_pretrained(found)
    return found


def loaded(hf: Any, folder: Path, marked: bool) -> Any:
    """Return the model with HQQ's layers; marked as transformers marks a model that it quantizes itself."""
    settings = hf.HqqConfig(nbits=8, group_size=64)
    if marked:
        with contextlib.suppress(NotImplementedError):  # "HQQ is not available yet and will be supported soon"
            return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings)
    made = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    own, how = library("hqq.models.hf.base"), library("hqq.core.quantize").BaseQuantizeConfig(nbits=8, group_size=64)
    own.AutoHQQHFModel.quantize_model(made, quant_config=how, compute_dtype=torch.float32, device="cpu")
    if marked:
        made.is_quantized = True
        made.hf_quantizer = importlib.import_module("transformers.quantizers.quantizer_hqq").HqqHfQuantizer(settings)
        made.quantization_method = settings.quant_method
    return made


def outputs(made: Any) -> Any:
    with torch.no_grad():
        return made.eval()(torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("marked", [False, True], ids=["by hqq", "as by transformers"])
def test_from_attach_to_the_same_bytes(marked: bool, hf: Any, folder: Path, tmp_path: Path) -> None:
    numbers = [(torch.arange(12) + start) % 60 + 3 for start in range(16)]
    rows = [{"input_ids": row, "labels": row} for row in numbers]
    settings = {"per_device_train_batch_size": 8, "max_steps": 20, "learning_rate": 0.03, "seed": 0}
    made = loaded(hf, folder, marked)
    before = values(made)
    if marked:
        with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
            trainer_of(made, tmp_path, rows, **settings)
    adapter = tt.attach(made, P.lora(4), "all-linear")
    assert len(adapter.targets) == 14
    # HQQ fits its scales to the numbers, and would round its own to others: a fresh adapter changes nothing.
    adapter.merge()
    assert equal(values(made), before)
    assert adapter.merge_report is not None
    assert {row.error for row in adapter.merge_report} == {0.0}
    adapter.unmerge()
    run = trainer_of(made, tmp_path, rows, **settings)
    run.train()
    losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert equal(values(made), before)
    trained = outputs(made)
    adapter.save(tmp_path / "a.safetensors")

    again = loaded(hf, folder, marked)
    base = outputs(again)
    second = tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(outputs(again), trained)
    second.merge()
    assert second.merge_report is not None
    assert len(second.merge_report) == 14
    assert second.merge_report.update_error < 0.2
    assert torch.linalg.norm(outputs(again) - trained) < 0.2 * torch.linalg.norm(base - trained)
    second.unmerge()
    assert equal(values(again), before)
    assert torch.equal(outputs(again), trained)
    with pytest.raises(tna.FileError, match="another base"):
        tt.load(hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "a.safetensors")
