"""A config by the name of its preset."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from typing import Any

import pytest

import tnadapt as tna
from tnadapt import errors
from tnadapt.algebra.named_config import config_of, named_config

# What presets need to know of the weights.
SIZES: dict[str, dict[str, Any]] = {
    "randlora": {"rows": 8, "cols": 4},
    "cara": {"heads": 2},
    "lorta_cp": {"heads": 2},
    "svft": {"rank": 2},
}


@pytest.mark.parametrize("name", tna.presets.__all__)
def test_a_name_is_its_preset(name: str) -> None:
    settings = {"seed": 7, **SIZES.get(name, {})}
    assert config_of(name, settings) == getattr(tna.presets, name)(**settings)


def test_all_of_a_presets_own_settings_are_taken() -> None:
    assert named_config("lonkr", {"rank": 1, "splits": 4, "groups": 2, "split_size": 6}) == tna.presets.lonkr(
        1, 4, 2, 6
    )
    # PEFT's word, where a preset has it itself.
    assert named_config("miss", {"r": 4}) == tna.presets.miss(r=4)


def test_without_a_name() -> None:
    config = tna.presets.lokr(2)
    assert config_of(config, {}) is config
    assert config_of(None, {}) == tna.presets.superlora(rank=8)


@pytest.mark.parametrize(
    ("cfg", "settings", "text"),
    [
        ("lroa", {}, "no preset 'lroa'; did you mean 'lora'? The presets are c3a, cara,"),
        ("qv", {}, "no preset 'qv'; to adapt these weights write attach(…, targets='qv'). The presets are"),
        ("conv", {}, "to adapt these weights write attach(…, targets='conv'). "),
        ("AdaLoRA", {}, "no preset 'AdaLoRA'; adalora is not available here; 'From PEFT' in the documentation lists"),
        ("pissa", {}, "pissa is 'lora' with another start: give start='pissa' with a preset of low rank. The presets"),
        ("qlora", {}, "no preset 'qlora'; QLoRA is 'lora' on a quantized model: load the model quantized and attach"),
        ("LoRA+", {}, "LoRA+ is 'lora' with two learning rates; with rate='adam', which presets have, one rate does."),
        ("nothing like it", {}, "no preset 'nothing like it'; the presets are"),
        (tna.presets.lora, {}, "got the preset lora itself: give its name, 'lora', or what it returns, "),
        ("LoRA", {}, "no preset 'LoRA'; did you mean 'lora'?"),
        (3, {}, "expected a tnadapt.Config, the name of a preset such as 'lora', or None; got int"),
        (
            "randlora",
            {"rows": 4},
            "preset 'randlora' needs cols, which depend on the weights of the model: give cols=…",
        ),
        ("lora", {"rank": 0}, "rank must be from 1"),
    ],
)
def test_refused(cfg: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(text)):
        config_of(cfg, settings)


@pytest.mark.parametrize(
    ("cfg", "settings", "text"),
    [
        (
            "lora",
            {"rnak": 2},
            "preset 'lora' has no setting 'rnak'; did you mean 'rank'? It takes rank, and any field of",
        ),
        ("dense", {"zzz": 2}, "preset 'dense' has no setting 'zzz'; it takes any field of tnadapt.Config"),
        ("lora", {"stratgy": 2}, "preset 'lora' has no setting 'stratgy'; did you mean 'strategy'? It takes"),
        ("lora", {"r": 2}, "preset 'lora' has no setting 'r'; PEFT's 'r' is 'rank' here, a setting of"),
        (None, {"r": 2}, "attach() got an unexpected keyword argument 'r': PEFT's 'r' is 'rank' here, a setting of"),
        (
            None,
            {"rank": 2},
            "argument 'rank': settings belong to a preset, so name one: attach(…, 'superlora', rank=…)",
        ),
        (None, {"blocks": 2}, "argument 'blocks': settings belong to a preset, so name one:"),
        (None, {"stratgy": 2}, "attach() got an unexpected keyword argument 'stratgy': did you mean 'strategy'?"),
        (None, {"zzzz": 2}, "argument 'zzzz': it has targets, strategy"),
        ("lora", {"network_dim": 4}, "no setting 'network_dim'; kohya-ss's 'network_dim' is 'rank' here, a setting of"),
        ("lora", {"linear_alpha": 4}, "LyCORIS's 'linear_alpha' is 'alpha' here, a setting of"),
        ("lora", {"task_type": "CAUSAL_LM"}, "PEFT's 'task_type' has no equivalent: attach takes any model, so leave"),
        (tna.Config(), {"rank": 2}, "a config has its settings already: use config.replace(rank=…), or the name of"),
    ],
)
def test_unexpected_keywords(cfg: Any, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=re.escape(text)) as error:
        config_of(cfg, settings, "attach", ["targets", "strategy"])
    assert isinstance(error.value, tna.ConfigError)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_what_a_preset_needs_is_said(name: str) -> None:
    with pytest.raises(tna.ConfigError, match=r"give (rows=…, cols=…|heads, or head_size|rank=r, or rows= and cols=)"):
        config_of(name, {})


def test_no_other_preset_needs_anything() -> None:
    for name in set(tna.presets.__all__) - SIZES.keys():
        assert isinstance(config_of(name, {}), tna.Config)


def test_every_setting_of_peft_has_an_answer() -> None:
    peft = pytest.importorskip("peft")
    # What PEFT keeps about a file, rather than a setting of LoRA.
    about = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)} - about
    assert {name for name in fields if errors.keyword_hint(name) is None} == set()
    with pytest.raises(
        tna.ConfigError, match=r"got LoraConfig\. PEFT's LoraConfig\(r=8\) is attach\(…, 'lora', rank=8\)"
    ):
        config_of(peft.LoraConfig(r=8), {})


def test_what_hints_name_exists() -> None:
    pytest.importorskip("torch")
    fields = [field.name for field in dataclasses.fields(tna.Config)]
    accepted = {*inspect.signature(tna.torch.attach).parameters, *fields}
    for library in errors._OTHER_KEYWORDS.values():
        for ours, _ in library.values():
            assert ours in accepted or ours in tna.presets.__all__
    places = [where for library in errors._OTHER_KEYWORDS.values() for _, where in library.values()]
    words = " ".join([*places, *errors._NOT_NEEDED.values()])
    named = set(re.findall(r"\btnadapt(?:\.\w+)+", words))
    assert {"tnadapt.torch.starts.eva", "tnadapt.torch.token_targets", "tnadapt.torch.mix"} <= named
    for name in named:
        assert functools.reduce(getattr, name.split(".")[1:], tna) is not None
    assert {"targets", "biases", "keep_trainable"} <= set(re.findall(r"\b(\w+)=", words)) <= accepted
    for method in re.findall(r"\badapter\.(\w+)", words):
        assert callable(getattr(tna.torch.Adapter, method))
