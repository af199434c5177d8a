"""What folders of PEFT say about the base, as PEFT's own AutoPeftModel reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import Pretrained

from .conversions import SHAPES, fill, made

# What PEFT reads of transformers 5 is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

NAME = "someone/tiny"


def written(about: Pretrained | None, saved: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of PEFT for an adapter of this base with these modules trained as a whole."""
    kept = {f"{name}.weight": np.ones((3, 4), "f4") for name in saved}
    file = dataclasses.replace(made(tna.presets.lora(2), SHAPES), pretrained=about, kept=kept)
    config = tna.convert(file, to="peft-lora").config
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        (None, {}),
        (Pretrained(NAME), {"base_model_name_or_path": NAME}),
        (Pretrained(NAME, "a" * 40), {"base_model_name_or_path": NAME, "revision": "a" * 40}),
        (Pretrained("bert-base-uncased"), {"base_model_name_or_path": "bert-base-uncased"}),
        (Pretrained("/home/someone/model", "a" * 40), {}),
        (Pretrained("C:\\model"), {}),
        (Pretrained("~/model"), {}),
        (Pretrained("https://example.org/model"), {}),
        (Pretrained("vit_tiny_patch16_224", library="timm", task="image-classification"), {}),
    ],
)
def test_a_name_on_the_hub_is_written_and_no_path(about: Pretrained | None, expected: dict[str, Any]) -> None:
    config = written(about)
    assert {name: config[name] for name in ("base_model_name_or_path", "revision") if config.get(name)} == expected
    if about is None:
        assert config["task_type"] is None
        assert "auto_mapping" not in config


@pytest.mark.parametrize(
    ("task", "saved", "expected"),
    [
        ("text-generation", [], "CAUSAL_LM"),
        ("text2text-generation", [], "SEQ_2_SEQ_LM"),
        ("feature-extraction", [], "FEATURE_EXTRACTION"),
        ("text-classification", ["score"], "SEQ_CLS"),
        ("token-classification", ["classifier"], "TOKEN_CLS"),
        ("question-answering", ["qa_outputs"], "QUESTION_ANS"),
        ("text-classification", [], None),
        ("text-classification", ["classifier.dense", "classifier.out_proj"], None),
        ("token-classification", ["qa_outputs"], None),
        ("question-answering", [], None),
        ("image-classification", ["classifier"], None),
    ],
)
def test_a_task_of_peft_only_with_its_head(task: str, saved: list[str], expected: str | None) -> None:
    config = written(Pretrained(task=task), saved)
    assert config["task_type"] == expected
    assert ("auto_mapping" in config) == (expected is None)
    if expected is None:
        assert config["auto_mapping"]["parent_library"] == "transformers"


def test_methods_of_peft_and_vllm_say_it_too(tmp_path: Path) -> None:
    for form, config in (("peft-c3a", tna.presets.c3a(2)), ("vllm-lora", tna.presets.lora(2))):
        about = Pretrained(NAME, task="text-generation")
        file = dataclasses.replace(made(config, {"a.q": (8, 8)}), pretrained=about)
        tna.convert(file, tmp_path / form, to=form)
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == (NAME, "CAUSAL_LM")
        assert tna.convert(tmp_path / form, base={"a.q": (8, 8)}).exact


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")
@pytest.mark.parametrize(
    ("model", "auto", "loaded_as", "keep", "task"),
    [
        ("GPT2LMHeadModel", "AutoPeftModelForCausalLM", "PeftModelForCausalLM", [], "text-generation"),
        (
            "BertForSequenceClassification", "AutoPeftModelForSequenceClassification",
            "PeftModelForSequenceClassification", ["classifier"], "text-classification",
        ),
        # The head is the base's.
        ("BertForSequenceClassification", "AutoPeftModel", "PeftModel", [], "text-classification"),
    ],
)  # fmt: skip
def test_peft_loads_the_model_of_its_task(
    model: str, auto: str, loaded_as: str, keep: list[str], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in's name on the hub, where PEFT looks it up if there is a network, is that of a folder here."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import tnadapt.torch as tt

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = (
        transformers.GPT2Config(vocab_size=40, **sizes)
        if model.startswith("GPT2")
        else transformers.BertConfig(vocab_size=40, intermediate_size=32, **sizes)
    )
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    getattr(transformers, model)(config).save_pretrained(NAME)
    ours = getattr(transformers, model).from_pretrained(NAME).eval()
    adapter = tt.attach(ours, tna.presets.lora(2), "qv", keep_trainable=keep)
    fill(adapter.parameters(), scale=0.5)
    assert adapter.pretrained is not None
    assert (adapter.pretrained.task, adapter.pretrained.local) == (task, True)
    adapter.pretrained = Pretrained(NAME, task=task)
    adapter.save("ours.safetensors")
    tna.convert("ours.safetensors", "theirs", to="peft-lora", base=NAME)
    theirs = getattr(peft, auto).from_pretrained("theirs").eval()
    assert type(theirs).__name__ == loaded_as
    saved = [name for name, module in theirs.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]
    assert saved == [f"base_model.model.{name}" for name in keep]
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=tokens)[0], theirs(input_ids=tokens)[0], rtol=0, atol=1e-5)
