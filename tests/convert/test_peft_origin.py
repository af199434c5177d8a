"""What folders of PEFT say about the base, as PEFT's own AutoPeftModel reads it."""

from __future__ import annotations

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
    file = made(tna.presets.lora(2), SHAPES)
    kept = {f"{name}.weight": np.ones((3, 4), "f4") for name in saved}
    file = tna.AdapterFile(file.config, file.targets, file.arrays, pretrained=about, kept=kept)
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
        file = made(config, {"a.q": (8, 8)})
        file = type(file)(
            file.config, file.targets, file.arrays, pretrained=Pretrained(NAME, task="text-generation")
        )  # fmt: skip
        tna.convert(file, tmp_path / form, to=form)
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == (NAME, "CAUSAL_LM")
        assert tna.convert(tmp_path / form, base={"a.q": (8, 8)}).exact


def test_a_file_that_records_no_base_says_nothing() -> None:
    config = written(None)
    assert (config["base_model_name_or_path"], config["task_type"]) == (None, None)
    assert "auto_mapping" not in config


# -- PEFT's own loading ------------------------------------------------------------------------


# The stand-in's name is none of the hub's, where PEFT looks it up if there is a network.
OFFLINE = pytest.mark.filterwarnings("ignore:Unable to fetch remote file:UserWarning")


def loaded_by_peft(
    folder: Path, monkeypatch: pytest.MonkeyPatch, model: str, auto: str, keep: str = "", task: str = ""
) -> tuple[Any, Any]:
    """Train nothing, save, convert, and load with AutoPeftModel; return both models.

    The name of the base on the hub is that of a folder here.
    """
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import tnadapt.torch as tt

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    kind = "GPT2" if model.startswith("GPT2") else "Bert"
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **(gpt2 if kind == "GPT2" else sizes))
    torch.manual_seed(0)
    monkeypatch.chdir(folder)
    getattr(transformers, model)(config).save_pretrained(NAME)
    ours = getattr(transformers, model).from_pretrained(NAME).eval()
    adapter = tt.attach(ours, tna.presets.lora(2), "qv", keep_trainable=keep or ())
    fill(adapter.parameters(), scale=0.5)
    assert adapter.pretrained is not None
    assert (adapter.pretrained.task, adapter.pretrained.local) == (task, True)
    adapter.pretrained = Pretrained(NAME, task=task)
    adapter.save("ours.safetensors")
    tna.convert("ours.safetensors", "theirs", to="peft-lora", base=NAME)
    return ours, getattr(peft, auto).from_pretrained("theirs")


def same(ours: Any, theirs: Any) -> None:
    import torch

    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        one, other = ours(input_ids=tokens), theirs.eval()(input_ids=tokens)
    assert torch.allclose(one[0], other[0], atol=1e-5)


def saved_modules(theirs: Any) -> list[str]:
    return [name for name, module in theirs.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"]


@OFFLINE
def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = loaded_by_peft(
        tmp_path, monkeypatch, "GPT2LMHeadModel", "AutoPeftModelForCausalLM", task="text-generation"
    )
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    same(ours, theirs)


@OFFLINE
def test_a_classifier_whose_head_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = loaded_by_peft(
        tmp_path, monkeypatch, "BertForSequenceClassification", "AutoPeftModelForSequenceClassification", "classifier",
        "text-classification",
    )  # fmt: skip
    assert saved_modules(theirs) == ["base_model.model.classifier"]
    same(ours, theirs)


@OFFLINE
def test_a_classifier_whose_head_is_the_base_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = loaded_by_peft(
        tmp_path, monkeypatch, "BertForSequenceClassification", "AutoPeftModel", task="text-classification"
    )
    assert type(theirs).__name__ == "PeftModel"
    assert saved_modules(theirs) == []
    same(ours, theirs)
