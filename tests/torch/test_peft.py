"""The PEFT plug-in on transformers' BERT and Llama, as users of PEFT use it."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import tnadapt as tna
import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tnadapt.torch.peft import TnadaptConfig

from .small import stir as stir_arrays

# PEFT 0.21 asks transformers 5 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

plugin.register()

SUPERLORA = {"preset": "superlora", "settings": {"rank": 3, "projection": "linear", "ratio": 0.5}}
LORA = {"preset": "lora", "settings": {"rank": 2}}


def bert(seed: int = 0, **settings: Any) -> BertForSequenceClassification:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, **settings}
    config = BertConfig(num_hidden_layers=2, num_labels=3, max_position_embeddings=16, **sizes)
    return seeded(seed, lambda: BertForSequenceClassification(config))


def llama(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Return a grouped-query model, where v has half the rows of q."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, **settings}
    config = LlamaConfig(num_hidden_layers=2, intermediate_size=24, bos_token_id=1, eos_token_id=2, **sizes)
    return seeded(seed, lambda: LlamaForCausalLM(config))


def seeded(seed: int, make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


MODELS: dict[str, tuple[Callable[..., Any], str]] = {"bert": (bert, "SEQ_CLS"), "llama": (llama, "CAUSAL_LM")}
models = pytest.mark.parametrize("kind", MODELS)


def adapted(kind: str, model: Any = None, **settings: Any) -> PeftModel:
    make, task = MODELS[kind]
    return get_peft_model(model or make(), TnadaptConfig(task_type=task, **(settings or SUPERLORA)))


def config_of(**settings: Any) -> TnadaptConfig:
    return TnadaptConfig(task_type="CAUSAL_LM", **settings)


def ids() -> torch.Tensor:
    return torch.randint(3, 50, (4, 7), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    return model(input_ids=ids()).logits


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def stir(model: PeftModel, seed: int = 0, name: str = "default") -> PeftModel:
    """Change an adapter and the modules that are trained with it, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if f"tnadapt_arrays.{name}." in path or f"modules_to_save.{name}." in path:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


# -- Registering ---------------------------------------------------------------------------------


def test_register_is_needed_and_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    assert plugin.register() is None
    monkeypatch.delitem(CONFIGS, "TNADAPT")
    with pytest.raises(tna.ConfigError, match=r"call tnadapt\.torch\.peft\.register\(\)"):
        TnadaptConfig()
    monkeypatch.setitem(CONFIGS, "TNADAPT", PeftConfig)
    with pytest.raises(tna.ConfigError, match="already has a method 'TNADAPT'"):
        plugin.register()


def test_missing_peft_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tnadapt.torch.peft")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "tnadapt\[peft\]"') as error:
        importlib.import_module("tnadapt.torch.peft")
    assert isinstance(error.value, tna.TnadaptError)


# -- The config ----------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return settings


def test_config_survives_its_file(tmp_path: Path) -> None:
    names = ["v_proj", "q_proj", "k_proj", "o_proj", "up_proj"]
    config = TnadaptConfig(
        task_type="SEQ_CLS", preset="lotr", settings={"rank": 2, "weights": 4, "rows": 16, "cols": 16},
        modules_to_save="x", target_modules=names, exclude_modules=names[:1], layers_to_transform=0,
        layers_pattern="layers",
    )  # fmt: skip
    config.save_pretrained(str(tmp_path))
    again = PeftConfig.from_pretrained(str(tmp_path))
    assert again == config
    assert type(again) is TnadaptConfig
    assert tna.Config.from_dict(again.settings) == tna.presets.lotr(2, weights=4, rows=16, cols=16)
    # Names are a set, and are written in order.
    assert (config.target_modules, config.exclude_modules) == (set(names), {"v_proj"})
    text = written(tmp_path)
    assert (text["target_modules"], text["exclude_modules"]) == (sorted(names), ["v_proj"])
    # A file that a later release wrote may have fields that this one does not know: PEFT warns.
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "new": 1}))
    with pytest.warns(UserWarning, match="Unexpected keyword arguments"):
        assert PeftConfig.from_pretrained(str(tmp_path)) == config
    # Settings may be a config.
    cfg = tna.Config(rank=3, groups=[[0, 1], [2, 3]])
    assert tna.Config.from_dict(TnadaptConfig(settings=cfg).settings) == cfg


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"preset": "superlorra"}, r"no preset 'superlorra'; did you mean 'superlora'\?"),
    ({"preset": "lora", "settings": {"rnak": 2}}, "did you mean 'rank'"),
    ({"preset": "lora", "settings": {"rank": 0}}, "rank must be at least 1"),
    ({"preset": "lora", "settings": {"r": 8}}, r"Config has no field 'r'; PEFT's 'r' is 'rank' here"),
    ({"preset": "lora", "settings": tna.Config()}, "settings must be a mapping"),
    ({"preset": "lotr", "settings": {"weights": 2}}, "weights given without rows, cols: give all of weights"),
    ({"preset": "cara", "settings": {"rank": 2}}, "give heads, or head_size where weights have different"),
    ({"settings": {"format": "cpp"}}, "format must be one of"),
    ({"settings": 3}, "expected a mapping"),
    ({"target_modules": lambda path, module: True}, "target_modules must be a name or a list of names"),
    ({"target_modules": []}, "target_modules must be a name or a list of names"),
    ({"modules_to_save": [3]}, "modules_to_save must be"),
    ({"strategy": "fast"}, "strategy must be one of"),
    ({"activation": "sine"}, "activation must be one of"),
    ({"init_weights": "gaussian"}, "init_weights must be True or False; got 'gaussian'"),
    ({"detach_norm": "yes"}, "detach_norm must be True or False"),
    ({"trained": 3}, "trained must be a name or a list of names; got 3"),
    *(({name: "mine"}, f"{name} must be a dict that save_pretrained wrote") for name in ("base", "computed_from")),
    ({"target_modules": ".*foo", "layers_to_transform": [0]},
     r"`layers_to_transform` cannot be used when `target_modules` is a str\. It is '\.\*foo': give a list"),
    ({"target_modules": "all-linear", "layers_to_transform": 0}, "cannot be used when `target_modules` is a str"),
    ({"target_modules": ".*foo", "layers_pattern": ["bar"]},
     r"`layers_pattern` cannot be used when `target_modules` is a str\."),
    ({"target_modules": ["foo"], "layers_pattern": ["bar"]},
     r"When `layers_pattern` is specified, `layers_to_transform` must also be specified\. .*add the numbers"),
    ({"layers_to_transform": "0"}, "layers_to_transform must be the number of a layer, from 0, or a list of them"),
    ({"layers_to_transform": [0, -1]}, r"layers_to_transform must be .*; got \[0, -1\]"),
    ({"layers_to_transform": True}, "layers_to_transform must be .*; got True"),
    ({"layers_to_transform": 0, "layers_pattern": [3]}, "layers_pattern must be a name or a list of names"),
    ({"layers_to_transform": 0, "layers_pattern": "("}, r"layers_pattern='\(' is not a valid regular expression"),
    ({"exclude_modules": "*"}, r"exclude_modules='\*' is not a valid regular expression: nothing to repeat"),
    ({"exclude_modules": [3]}, "exclude_modules must be a name or a list of names"),
]  # fmt: skip


UNKNOWN = {
    "r": r"use settings=\{'rank': …\}",
    "rank": r"use settings=\{'rank': …\}",
    "lora_alpha": r"use settings=\{'alpha': …\}",
    "ratio": r"use settings=\{'ratio': …\}",
    "targets": "use target_modules",
    "keep_trainable": "use modules_to_save",
    "target_parameters": "use target_modules, which also accepts names of parameters",
    "bias": "biases are not trained",
    "target_module": "did you mean 'target_modules'",
    "xyz": "There are: .*, settings, target_modules, exclude_modules, .*, modules_to_save,",
    "use_dora": r"use preset='dora' or settings=\{'apply': 'magnitude'\}; .*detach_norm=True",
}


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        *WRONG,
        *(({word: 8}, f"got an unexpected keyword argument '{word}': .*{way}") for word, way in UNKNOWN.items()),
    ],
)
def test_a_wrong_config_is_refused_when_it_is_made(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(tna.ConfigError, match=match) as error:
        TnadaptConfig(**wrong)
    assert isinstance(error.value, TypeError) == (wrong.keys() <= UNKNOWN.keys())


# -- A fresh adapter -----------------------------------------------------------------------------


@pytest.mark.law("fresh-is-zero")
@models
@pytest.mark.parametrize("settings", [{}, SUPERLORA, LORA, {"preset": "lokr", "strategy": "weight"}])
def test_fresh_changes_nothing(kind: str, settings: dict[str, Any]) -> None:
    base = MODELS[kind][0]()
    before, expected = bits(base), run(base)
    own = sum(parameter.numel() for parameter in base.parameters())
    model = adapted(kind, base, **settings or {"target_modules": "qv"})
    assert torch.equal(run(model), expected)
    handle = tt.adapters(model)["default"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = {name for name in trained if "modules_to_save" in name}
    assert len(head) == (2 if kind == "bert" else 0)
    assert trained - head == {name for name, _ in model.named_parameters() if ".tnadapt_arrays.default." in name}
    beside = 3 * 16 + 3 if kind == "bert" else 0
    assert model.get_nb_trainable_parameters() == (
        handle.num_parameters + beside,
        own + handle.num_parameters + beside,
    )
    assert all(torch.equal(base.state_dict()[name], before[name]) for name in before.keys() & base.state_dict().keys())
    assert len(handle.targets) == 4
    # The parts that PEFT reports on.
    status, layer = model.get_model_status(), model.get_layer_status()[-1]
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert (status.peft_types, status.adapter_model_type) == ({"default": "TNADAPT"}, "TnadaptModel")
    assert (status.requires_grad, status.devices) == ({"default": True}, {"default": ["cpu"]})
    assert (layer.name, layer.module_type) == ("tnadapt", "TnadaptLayer")
    assert "<tnadapt adapter 'default'" in repr(model)
    assert not model.supports_lora_conversion()
    assert not hasattr(model.base_model.tnadapt, "weight")
    if not settings:
        assert handle.config == tt.attach(MODELS[kind][0]()).config
        assert tna.Config.from_dict(model.peft_config["default"].settings) == handle.config


def test_modules_to_save_are_not_adapted() -> None:
    model = adapted("bert", target_modules="all-linear", modules_to_save=["pooler"], **LORA)
    # A second one finds PEFT's copies of them in the model.
    model.add_adapter(
        "second", TnadaptConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA), low_cpu_mem_usage=True
    )
    assert {p.device.type for _, p in tt.adapters(model)["second"].named_parameters()} == {"meta"}
    assert {p.device.type for _, p in tt.adapters(model)["default"].named_parameters()} == {"cpu"}
    names = [target.name for target in tt.adapters(model)["default"].targets]
    assert len(names) == 12
    assert not any("pooler" in name or "classifier" in name for name in names)
    assert [target.name for target in tt.adapters(model)["second"].targets] == names
    with pytest.raises(tna.TargetError, match="names nothing outside of modules_to_save"):
        adapted("bert", target_modules=["pooler.dense"], modules_to_save=["pooler"])


# -- Training and files --------------------------------------------------------------------------


def train(model: Any, kind: str) -> list[float]:
    labels = ids() if kind == "llama" else torch.tensor([0, 1, 2, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@models
def test_train_save_load(kind: str, tmp_path: Path) -> None:
    base = MODELS[kind][0]()
    before = bits(base)
    model = adapted(kind, base)
    losses = train(model, kind)
    assert losses[-1] < losses[0]
    frozen = {name: tensor for name, tensor in base.state_dict().items() if name in before}
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.items())
    model.save_pretrained(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    arrays = {"base_model.model.tnadapt.group0.split0.factor0", "base_model.model.tnadapt.group0.split0.factor1"}
    head = {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    assert set(kept) == (arrays | head if kind == "bert" else arrays)
    assert same(kept, get_peft_model_state_dict(model))
    config = written(tmp_path)
    assert config["settings"]["rank"] == 3
    assert config["base"]["weights"] == ({"16x16": 4} if kind == "bert" else {"16x16": 2, "8x16": 2})
    for low in (False, True):
        again = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path, low_cpu_mem_usage=low)
        assert torch.equal(run(again), run(model))
        assert not any(parameter.requires_grad for parameter in again.parameters())
    again = PeftModel.from_pretrained(MODELS[kind][0](), tmp_path, is_trainable=True)
    assert train(again, kind) == train(model, kind)


# -- Merging -------------------------------------------------------------------------------------


@pytest.mark.law("merge-is-attached", "disabled")
@models
def test_merged_unmerged_and_disabled(kind: str) -> None:
    plain, model = run(MODELS[kind][0]()), stir(adapted(kind))
    before, expected, free = bits(model), run(model), [p.requires_grad for p in model.parameters()]
    for _ in range(3):
        model.merge_adapter()
        assert model.get_layer_status()[-1].merged_adapters == ["default"]
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter()
        model.unmerge_adapter()
        assert same(bits(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged") as told:
        model.base_model.tnadapt.unmerge()
    assert told[0].filename == __file__
    assert torch.equal(run(model), expected)
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert [p.requires_grad for p in model.parameters()] == free
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(run(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(run(model), plain)
    assert torch.equal(run(model), expected)


def traces(model: torch.nn.Module) -> list[str]:
    """Return what is left of tnadapt or PEFT on a model."""
    found = [name for name in model.state_dict() if "tnadapt" in name or "modules_to_save" in name]
    for path, module in model.named_modules():
        found += [
            f"{path}.{name}" for name in module.__dict__ if "tnadapt" in name or name in ("forward", "peft_config")
        ]
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        found += [f"{path}: {hook}" for hook in hooks if "tnadapt" in str(hook)]
        found += [f"{path}: {type(module)}"] if "peft" in type(module).__module__ else []
    return found


@models
@pytest.mark.parametrize("how", ["merge_and_unload", "unload", "merge_adapter, unload"])
def test_unload(kind: str, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    base = MODELS[kind][0]()
    before, free = bits(base), [p.requires_grad for p in base.parameters()]
    model = stir(adapted(kind, base))
    expected = run(model)
    assert traces(base) != []
    if how == "merge_adapter, unload":
        model.merge_adapter()
    capfd.readouterr()
    found = model.merge_and_unload(safe_merge=True) if how == "merge_and_unload" else model.unload()
    assert capfd.readouterr() == ("", "")
    assert found is base
    assert not model.base_model.tnadapt.handles
    assert traces(found) == []
    after = bits(found)
    if how == "merge_and_unload":
        assert set(after) == set(before)
        assert [p.requires_grad for p in found.parameters()] == free
        torch.testing.assert_close(run(found), expected, rtol=0, atol=1e-5)
        return
    if kind == "bert":
        # PEFT leaves what was trained whole.
        assert not torch.equal(after.pop("classifier.weight"), before.pop("classifier.weight"))
        del after["classifier.bias"], before["classifier.bias"]
    assert same(after, before)


@pytest.mark.law("merge-not-finite")
def test_what_cannot_be_merged_is_refused() -> None:
    model = stir(adapted("llama"))
    model.add_adapter("second", config_of(**LORA))
    with torch.no_grad():
        next(iter(dict(tt.adapters(model)["second"].named_parameters()).values())).fill_(float("nan"))
    loda = stir(adapted("llama", activation="relu", **LORA))
    not_finite = "NaNs detected in the merged weights. The adapter second seems to be broken: .* no weight was changed"
    several = {"adapter_names": ["default", "second"]}
    for refused, merge, settings, error, match in (
        (model, model.merge_adapter, several, tna.BackendError, not_finite),
        (model, model.merge_and_unload, several, tna.BackendError, not_finite),
        (loda, loda.merge_and_unload, {}, tna.ConfigError, "LoDA"),
    ):
        before, expected = bits(refused), run(refused)
        with pytest.raises(error, match=match):
            merge(**settings)
        torch.testing.assert_close(bits(refused), before, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(run(refused), expected)
        assert refused.get_model_status().merged_adapters == []
    expected = run(loda)
    assert not torch.equal(run(loda.unload()), expected)


# -- Switching -----------------------------------------------------------------------------------


def test_several_adapters(tmp_path: Path) -> None:
    model = stir(adapted("bert"))
    plain, first = run(bert()), run(model)
    free = {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("second", TnadaptConfig(task_type="SEQ_CLS", **LORA))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == free
    assert torch.equal(run(model), first)
    model.set_adapter("second")
    assert torch.equal(run(model), plain)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".tnadapt_arrays.second." in name or ".modules_to_save.second." in name for name in names)
    assert len(names) == 2 * 4 + 2
    second = run(stir(model, 1, "second"))
    assert not torch.equal(second, plain)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "third")
    model.load_adapter(tmp_path / "second", "fourth", low_cpu_mem_usage=True)
    assert torch.equal(run(model), second)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names
    for name, expected in {"third": first, "fourth": second, "default": first, "second": second}.items():
        model.set_adapter(name)
        assert torch.equal(run(model), expected)
        assert tt.adapters(model)[name].weight == 1.0
        model.merge_adapter()
        torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="Unmerging the model first"):
            model.set_adapter(name)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("fifth")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("second", TnadaptConfig(task_type="SEQ_CLS"))
    assert torch.equal(run(model), second)
    model.delete_adapter("third")
    assert torch.equal(run(model), second)
    model.merge_adapter()
    merged = run(model)
    model.delete_adapter("fourth")
    assert torch.equal(run(model), merged)
    message = "Cannot delete adapter(s) ['second'] while they are merged. Please unmerge them first."
    with pytest.raises(tna.TargetError, match=re.escape(message)):
        model.delete_adapter("second")
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Setting active adapter to default"):
        model.delete_adapter("second")
    assert model.active_adapters == ["default"]
    assert torch.equal(run(model), first)
    assert not any("second" in name for name in model.state_dict())


def test_together_and_mixed() -> None:
    model = stir(adapted("llama"))
    model.add_adapter("second", config_of(**LORA))
    stir(model, 1, "second")
    model.base_model.set_adapter(["default", "second"])
    assert all(p.requires_grad == ("tnadapt_arrays" in name) for name, p in model.named_parameters())
    both = run(model)
    model.merge_adapter()
    torch.testing.assert_close(run(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(run(model), both)
    # One merged: the other does not act beside it, as with PEFT's own layers.
    model.set_adapter("second")
    second = run(model)
    model.set_adapter("default")
    model.merge_adapter(adapter_names=["second"])
    torch.testing.assert_close(run(model), second, rtol=0, atol=1e-5)
    with pytest.warns(UserWarning, match="Unmerging them first"):
        model.add_adapter("third", config_of(**LORA))
    model.base_model.set_adapter(["default", "second"])
    tt.mix(model, {"default": 0.25, "second": 0.75})
    mixed = run(model)
    assert not torch.equal(mixed, both)
    with model.disable_adapter():
        assert torch.equal(run(model), run(llama()))
    assert torch.equal(run(model), mixed)
    torch.testing.assert_close(run(copy.deepcopy(model).merge_and_unload()), mixed, rtol=0, atol=1e-5)
    # A new adapter begins with weight 1, whatever one of its name had.
    model.set_adapter("default")
    model.delete_adapter("second")
    model.add_adapter("second", config_of(**LORA))
    model.set_adapter("second")
    assert (tt.adapters(model)["second"].weight, tt.adapters(model)["default"].weight) == (1.0, 0.0)


# -- What is refused -----------------------------------------------------------------------------


@pytest.mark.law("draws-digest", "wrong-base")
@pytest.mark.parametrize(
    ("make", "change", "match"),
    [
        (
            lambda: llama(hidden_size=32), {},
            r"shapes \{'16x16': 2, '8x16': 2\}, .* find \{'32x32': 2, '16x32': 2\}",
        ),
        (lambda: llama(1), {}, "another base model than this LlamaForCausalLM"),
        (llama, {"draws": "0" * 64}, "digest is '0000"),
        (llama, {"fingerprint": {"sha256": "mine"}}, "fingerprint of the base model"),
    ],
)  # fmt: skip
def test_wrong_base_is_refused(make: Callable[[], Any], change: dict[str, Any], match: str, tmp_path: Path) -> None:
    adapted("llama").save_pretrained(tmp_path)
    text = written(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "base": {**text["base"], **change}}))
    base = make()
    before = bits(base)
    with pytest.raises(tna.FileError, match=match):
        PeftModel.from_pretrained(base, tmp_path)
    assert same(bits(base), before)
    assert traces(base) == []
    assert all(parameter.requires_grad for parameter in base.parameters())


def model_base(model: Any) -> dict[str, Any]:
    found = adapted("llama", model)
    get_peft_model_state_dict(found)
    return found.peft_config["default"].to_dict()["base"]


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_arrays_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    model = stir(adapted("llama"))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    arrays = load_file(path)
    name = min(arrays)
    if change == "missing":
        del arrays[name]
    elif change == "unknown":
        arrays[name.replace("group0", "group1")] = torch.zeros(2)
    else:
        arrays[name] = arrays[name][:-1].clone()
    save_file(arrays, path)
    before, expected = bits(model), run(model)
    with pytest.raises(tna.FileError, match=r"none was loaded; they differ in: .*split0\.factor0"):
        model.load_adapter(tmp_path, "default")
    assert same(bits(model), before)
    assert torch.equal(run(model), expected)


def test_saved_while_merged(tmp_path: Path) -> None:
    model = stir(adapted("llama"))
    expected = run(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(tna.TargetError, match="unmerge_adapter"):
        model.load_adapter(tmp_path / "one", "default")
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path / "one")), expected)
    assert written(tmp_path / "one")["base"] == model_base(llama())
    # Where the weights hold another one's update, they are not the base's.
    model.unmerge_adapter()
    model.add_adapter("second", config_of(**LORA))
    stir(model, 1, "second").merge_adapter(adapter_names=["default", "second"])
    model.save_pretrained(tmp_path)
    assert written(tmp_path / "second")["base"] is None
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    assert written(tmp_path / "second")["base"]["fingerprint"] == model_base(llama())["fingerprint"]


def test_wrapping_twice_wrong_targets_and_what_peft_does_with_its_own_methods_only() -> None:
    base = llama()
    with pytest.raises(tna.TargetError, match="nothing_such"):
        adapted("llama", base, target_modules=["nothing_such"])
    with pytest.raises(ValueError, match="shared state"):
        inject_adapter_in_model(TnadaptConfig(), base)
    with pytest.raises(ValueError, match="TNADAPT"):
        get_peft_model(base, config_of(), mixed=True)
    assert traces(base) == []
    model = adapted("llama", base)
    there = pytest.raises(tna.TargetError, match="this model already has an adapter 'default'")
    with there, pytest.warns(UserWarning, match="Already found a `peft_config`"):
        adapted("llama", base)
    for name in ("tnadapt_arrays", "group0_split0_factor0"):
        text = f"cannot be called '{name}': the arrays of all adapters have this word"
        with pytest.raises(tna.TargetError, match=text):
            model.add_adapter(name, config_of())
    text = r"without a new adapter, .*: tnadapt\.torch\.mix\(model, \{'first': 0\.5, 'second': 0\.5\}\)"
    with pytest.raises(tna.ConfigError, match=text):
        model.add_weighted_adapter(["default"], [0.5], "other")
    assert list(model.peft_config) == ["default"]


def test_attach_beside_the_plug_in() -> None:
    """The plug-in's arrays are not weights of the base: they stay trainable, are not counted, and are not kept."""
    model = adapted("llama")
    (first,) = tt.adapters(model).values()
    base = first.summary().base
    second = tt.attach(model, tna.presets.lora(2), name="second")
    assert all(parameter.requires_grad for _, parameter in first.named_parameters())
    assert second.summary().base == base == sum(p.numel() for p in llama().parameters())
    with pytest.raises(tna.TargetError, match="no parameter is at or below 'tnadapt_arrays'"):
        tt.attach(model, tna.presets.lora(2), name="third", keep_trainable="tnadapt_arrays")
    second.detach()
    assert all(parameter.requires_grad for _, parameter in first.named_parameters())


# -- Arrays that are computed from the base weights, and DoRA ----------------------------------------------

COMPUTED: dict[str, dict[str, Any]] = {
    "lora_xs": {"preset": "lora_xs", "settings": {"rank": 2}},
    "tinylora": {"preset": "tinylora", "settings": {"parameters": 5}},
    "pissa": {"preset": "lora", "settings": {"rank": 2, "start": "pissa"}},
}


@pytest.mark.parametrize("name", COMPUTED)
def test_another_base_is_refused_whatever_the_config_says_of_the_base(name: str, tmp_path: Path) -> None:
    model = stir(get_peft_model(llama(), config_of(**COMPUTED[name])))
    expected = run(model)
    model.save_pretrained(tmp_path)
    assert written(tmp_path)["computed_from"] == written(tmp_path)["base"]["fingerprint"]
    assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path)), expected)
    for named in (True, False):
        given = PeftConfig.from_pretrained(str(tmp_path))
        if not named:
            given.base = None
            # On its own base it loads, and in another precision that is the same base.
            assert torch.equal(run(PeftModel.from_pretrained(llama(), tmp_path, config=given)), expected)
            PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path, config=given)
        base = llama(1)
        before = bits(base)
        with pytest.raises(
            tna.FileError,
            match=r"another base model than this LlamaForCausalLM: .* Arrays such as '(start\.)?group0\.split0\."
            r"factor0' are computed .*store_bases=True",
        ):
            PeftModel.from_pretrained(base, tmp_path, config=given)
        assert same(bits(base), before)
        assert traces(base) == []
    # As a further adapter of a PEFT model, too.
    other = get_peft_model(llama(1), config_of(**LORA))
    with pytest.raises(tna.FileError, match="another base model"):
        other.load_adapter(str(tmp_path), "second")
    assert list(other.peft_config) == ["default"]


def test_the_fingerprint_in_a_file(tmp_path: Path) -> None:
    get_peft_model(llama(), config_of(**COMPUTED["lora_xs"])).save_pretrained(tmp_path)
    text = written(tmp_path)
    given = PeftConfig.from_pretrained(str(tmp_path))
    given.base, given.computed_from = None, {"sha256": 1}
    with pytest.raises(tna.FileError, match="fingerprint of the base model in the adapter's config is invalid"):
        PeftModel.from_pretrained(llama(), tmp_path, config=given)
    # Files without it load as before; saved again, the config describes the base that the adapter is on.
    del text["computed_from"]
    for base in (None, text["base"]):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "base": base}))
        if base is None:
            PeftModel.from_pretrained(llama(1), tmp_path)
        PeftModel.from_pretrained(llama(), tmp_path).save_pretrained(tmp_path / "again")
        assert written(tmp_path / "again")["computed_from"] == text["base"]["fingerprint"]
    # It is in files that need it alone.
    get_peft_model(llama(), config_of(**LORA)).save_pretrained(tmp_path)
    assert not {"computed_from", "detach_norm"} & written(tmp_path).keys()
    PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)  # the same base in another precision
    # An adapter that computes nothing from the base may be put on another one, by explicit wish.
    given = PeftConfig.from_pretrained(str(tmp_path))
    given.base, given.computed_from = None, {"sha256": "0" * 64, "dtype": "float32", "sketch": [0.0] * 8}
    PeftModel.from_pretrained(llama(1), tmp_path, config=given)


def test_the_norm_is_detached_as_by_attach(tmp_path: Path) -> None:
    def gradients(model: Any, handle: tt.Adapter, size: float = 0.3) -> dict[str, torch.Tensor]:
        stir_arrays(handle, size)
        model(input_ids=ids()).logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in handle.named_parameters()}

    by_setting = {}
    for detach in (False, True):
        model = get_peft_model(llama(), config_of(preset="dora", settings={"rank": 2}, detach_norm=detach))
        by_setting[detach] = gradients(model, tt.adapters(model)["default"])
        base = llama()
        plain = gradients(base, tt.attach(base, tna.presets.dora(2), "qv", detach_norm=detach))
        torch.testing.assert_close(by_setting[detach], plain, rtol=0, atol=0)
    factors = [name for name in plain if "factor" in name]
    assert not any(torch.allclose(by_setting[True][name], by_setting[False][name]) for name in factors)
    # It is kept in the file, since it is a setting of the training that goes on.
    model.save_pretrained(tmp_path)
    assert written(tmp_path)["detach_norm"] is True
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert torch.equal(run(again), run(model))
    torch.testing.assert_close(gradients(again, tt.adapters(again)["default"], 0.0), plain, rtol=0, atol=0)
    assert any("magnitude" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


# -- adapter_names=: forward, generate with caches and beams, saved modules, PEFT's checks -----------------

NAMES = ["default", "__base__", "other", "default"]
#: Settings of the second adapter, next to the first with a map F.
OTHERS: dict[str, dict[str, Any]] = {
    "lora": LORA, "superlora": SUPERLORA, "lokr": {"preset": "lokr", "settings": {"rank": 2}},
    "dora": {"preset": "dora", "settings": {"rank": 2}}, "hira": {"preset": "hira", "settings": {"rank": 2}},
}  # fmt: skip


def two(kind: str, other: str = "lora", model: Any = None, task: str = "CAUSAL_LM") -> Any:
    made = stir(adapted(kind, model, **LORA), 1)
    made.add_adapter("other", TnadaptConfig(task_type=task, **OTHERS[other]))
    return stir(made, 2, "other").eval()


@torch.no_grad()
def alone(model: Any, name: str, call: Any) -> Any:
    if name == "__base__":
        with model.disable_adapter():
            return call(model)
    model.set_adapter(name)
    return call(model)


# In a BERT, each sample has its adapter's own classifier.
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("other", OTHERS)
def test_forward_for_named_adapters(kind: str, other: str) -> None:
    model = two(kind, other, task=MODELS[kind][1])
    with torch.no_grad():
        found = model(input_ids=ids(), adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        expected = alone(model, name, lambda model: model(input_ids=ids()).logits)
        torch.testing.assert_close(found[row], expected[row], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], alone(model, "other", lambda model: model(input_ids=ids()).logits)[0])


def test_only_the_first_argument_has_one_row_for_each_sample() -> None:
    model, names = stir(get_peft_model(llama(), TnadaptConfig(**LORA)), 1).eval(), ["default", "__base__"] * 2
    with torch.no_grad():
        by_place = model(ids(), None, torch.arange(7)[None], adapter_names=names).logits
        assert torch.equal(by_place, model(input_ids=ids(), adapter_names=names).logits)


def bart() -> BartForConditionalGeneration:
    sizes = {"vocab_size": 50, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    layers = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = BartConfig(
        **sizes, **layers, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return seeded(0, lambda: BartForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *((llama, how) for how in ({}, {"num_beams": 3}, {"use_cache": False})),
        (llama, {"num_beams": 2, "num_return_sequences": 2}),
        # With beams the encoder sees each sample once, and the decoder every beam.
        *((bart, {"num_beams": beams}) for beams in (1, 3)),
    ],
)
def test_generate_for_named_adapters(make: Callable[[], Any], settings: dict[str, Any]) -> None:
    model = two("llama", "superlora", make(), "CAUSAL_LM" if make is llama else "SEQ_2_SEQ_LM")
    for seed in range(20 if make is bart else 0):
        stir(stir(model, seed), 100 + seed, "other")
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    mask = torch.ones_like(ids())

    def call(model: Any, **more: Any) -> Any:
        return model.generate(input_ids=ids(), attention_mask=mask, **settings, **more)

    found = call(model, adapter_names=NAMES).unflatten(0, (4, -1))
    several = {name: alone(model, name, call).unflatten(0, (4, -1)) for name in dict.fromkeys(NAMES)}
    for row, name in enumerate(NAMES):
        assert torch.equal(found[row], several[name][row])
    assert len({str(several[name].tolist()) for name in several}) == 3


def test_it_is_peft_s_own_mixed_batch() -> None:
    """The same arrays give the outputs of PEFT's LoRA for the same ``adapter_names``."""
    theirs = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    theirs.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    ours = two("llama")
    for name, handle in tt.adapters(ours).items():
        for index, target in enumerate(handle.targets):
            layer = theirs.base_model.model.get_submodule(target.module)
            with torch.no_grad():
                arrays = handle.arrays()
                layer.lora_B[name].weight.copy_(arrays[f"group{index}.split0.factor0"])
                layer.lora_A[name].weight.copy_(arrays[f"group{index}.split0.factor1"].T)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids(), adapter_names=NAMES).logits
        torch.testing.assert_close(ours(input_ids=ids(), adapter_names=NAMES).logits, expected, rtol=1e-4, atol=1e-5)


def test_names_that_peft_refuses() -> None:
    model = two("llama")
    for names, text in (
        (["default"] * 3, "Length of `adapter_names` should be the same as the number of inputs, but got 3 and 4"),
        (["default", "x", "y", "x"], r"Trying to infer with non-existing adapter\(s\): x, y"),
        ("default", "adapter_names must be a list with a name for each sample; got 'default'"),
        ([None] * 4, r"non-existing adapter\(s\): None"),
    ):
        with pytest.raises(ValueError, match=text):
            model(input_ids=ids(), adapter_names=names)
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(input_ids=ids(), adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters, please call `unmerge_adapter` first"):
        model(input_ids=ids(), adapter_names=NAMES)
    model.unmerge_adapter()
    with model.disable_adapter(), torch.no_grad():
        # PEFT ignores names while adapters are disabled.
        assert torch.equal(model(input_ids=ids(), adapter_names=NAMES).logits, model(input_ids=ids()).logits)
