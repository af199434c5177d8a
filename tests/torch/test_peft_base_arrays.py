"""The PEFT plug-in with arrays that are computed from the base weights, and with DoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import tnadapt as tna
import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tnadapt.torch.peft import TnadaptConfig

from .test_peft import bits, ids, llama, run, same, stir, traces

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

plugin.register()

COMPUTED: dict[str, dict[str, Any]] = {
    "lora_xs": {"preset": "lora_xs", "settings": {"rank": 2}},
    "tinylora": {"preset": "tinylora", "settings": {"parameters": 5}},
    "pissa": {"preset": "lora", "settings": {"rank": 2, "start": "pissa"}},
}


def config(**settings: Any) -> TnadaptConfig:
    return TnadaptConfig(task_type="CAUSAL_LM", **settings)


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize("name", COMPUTED)
def test_another_base_is_refused_whatever_the_config_says_of_the_base(name: str, tmp_path: Path) -> None:
    model = stir(get_peft_model(llama(), config(**COMPUTED[name])))
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
    other = get_peft_model(llama(1), config(preset="lora", settings={"rank": 2}))
    with pytest.raises(tna.FileError, match="another base model"):
        other.load_adapter(str(tmp_path), "second")
    assert list(other.peft_config) == ["default"]


def test_the_way_out_that_is_named_works(tmp_path: Path) -> None:
    model = stir(get_peft_model(llama(), config(**COMPUTED["lora_xs"])))
    handle = tt.adapters(model)["default"]
    handle.save(tmp_path / "adapter.safetensors", store_bases=True)
    again = tt.load(llama(1), tmp_path / "adapter.safetensors", check_base=False)
    for found, expected in zip(again.deltas(), handle.deltas(), strict=True):
        torch.testing.assert_close(found, expected)


def test_files_without_the_fingerprint_load_as_before(tmp_path: Path) -> None:
    model = stir(get_peft_model(llama(), config(**COMPUTED["lora_xs"])))
    model.save_pretrained(tmp_path)
    text = written(tmp_path)
    del text["computed_from"]
    (tmp_path / "adapter_config.json").write_text(json.dumps({**text, "base": None}))
    PeftModel.from_pretrained(llama(1), tmp_path)
    # Saved again, the config describes the base that the adapter is on.
    again = PeftModel.from_pretrained(llama(), tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert written(tmp_path / "again")["computed_from"] == text["base"]["fingerprint"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    PeftModel.from_pretrained(llama(), tmp_path).save_pretrained(tmp_path / "third")
    assert written(tmp_path / "third")["computed_from"] == text["base"]["fingerprint"]


def test_the_fingerprint_is_in_files_that_need_it_alone(tmp_path: Path) -> None:
    model = get_peft_model(llama(), config(preset="lora", settings={"rank": 2}))
    model.save_pretrained(tmp_path)
    assert not {"computed_from", "detach_norm"} & written(tmp_path).keys()
    # An adapter that computes nothing from the base may be put on another one, by explicit wish.
    given = PeftConfig.from_pretrained(str(tmp_path))
    given.base, given.computed_from = None, {"sha256": "0" * 64, "dtype": "float32", "sketch": [0.0] * 8}
    PeftModel.from_pretrained(llama(1), tmp_path, config=given)


def test_a_damaged_fingerprint_is_reported(tmp_path: Path) -> None:
    get_peft_model(llama(), config(**COMPUTED["lora_xs"])).save_pretrained(tmp_path)
    given = PeftConfig.from_pretrained(str(tmp_path))
    given.base, given.computed_from = None, {"sha256": 1}
    with pytest.raises(tna.FileError, match="fingerprint of the base model in the adapter's config is invalid"):
        PeftModel.from_pretrained(llama(), tmp_path, config=given)
    for name in ("base", "computed_from"):
        with pytest.raises(tna.ConfigError, match=f"{name} must be a dict that save_pretrained wrote"):
            config(**{name: "x"})


def test_magnitudes_are_saved_and_loaded(tmp_path: Path) -> None:
    model = stir(get_peft_model(llama(), config(preset="dora", settings={"rank": 2})))
    model.save_pretrained(tmp_path)
    assert "base_model.model.tnadapt.weight3.magnitude" in load_file(tmp_path / "adapter_model.safetensors")
    again = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(run(again), run(model))
    for (name, array), (other, found) in zip(
        *(tt.adapters(m)["default"].named_parameters() for m in (model, again)), strict=True
    ):
        assert name == other
        assert torch.equal(array, found)


def test_the_norm_is_detached_as_by_attach(tmp_path: Path) -> None:
    def gradients(model: Any, handle: tt.Adapter) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, parameter in handle.named_parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        model(input_ids=ids()).logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in handle.named_parameters()}

    found = {}
    for detach in (False, True):
        model = get_peft_model(llama(), config(preset="dora", settings={"rank": 2}, detach_norm=detach))
        found[detach] = gradients(model, tt.adapters(model)["default"])
        base = llama()
        plain = gradients(base, tt.attach(base, tna.presets.dora(2), "qv", detach_norm=detach))
        assert found[detach].keys() == plain.keys()
        for name, gradient in plain.items():
            assert torch.equal(found[detach][name], gradient)
    factors = [name for name in found[True] if "factor" in name]
    assert not any(torch.allclose(found[True][name], found[False][name]) for name in factors)
    # It is kept in the file, since it is a setting of the training that goes on.
    model.save_pretrained(tmp_path)
    assert written(tmp_path)["detach_norm"] is True
    again = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert tt.adapters(again)["default"]._state.detach_norm
    assert torch.equal(run(again), run(model))
    assert any("magnitude" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_detach_norm_is_a_bool_and_use_dora_says_what_to_use() -> None:
    with pytest.raises(tna.ConfigError, match="detach_norm must be True or False"):
        config(detach_norm="yes")
    with pytest.raises(TypeError, match=r"use preset='dora' or settings=\{'apply': 'magnitude'\}; .*detach_norm=True"):
        config(use_dora=True)
