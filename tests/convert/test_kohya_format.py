"""Files under kohya's names: the component's prefix, and what the loaders of LyCORIS and diffusers make of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt import ConfigError

from .conversions import SHAPES, TOLERANCE, error, made, model, tiny_unet, updates

PATHS = {
    "unet": {"down_blocks.0.attn.to_q": (8, 6), "mid_block.attn.to_q": (8, 6)},
    "text encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (8, 6)},
    "transformer": {"transformer_blocks.0.attn.to_q": (8, 6)},
}
PREFIXES = {"unet": "lora_unet", "text encoder": "lora_te", "transformer": "lora_transformer"}


@pytest.mark.parametrize("name", PATHS)
def test_the_prefix_is_that_of_the_component(name: str, tmp_path: Path) -> None:
    file = made(P.lora(2, alpha=3), PATHS[name])
    found = tna.convert(file, tmp_path / "out.safetensors", to="kohya")
    flat = [f"{PREFIXES[name]}_{path.replace('.', '_')}" for path in PATHS[name]]
    assert sorted(found.tensors) == sorted(
        f"{one}.{own}" for one in flat for own in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    again = tna.convert(tmp_path / "out.safetensors")
    assert again.origin == "lycoris-lora"
    assert again.file is not None
    assert again.file.config == file.config
    assert {target.module for target in again.file.targets} == set(PATHS[name])


def test_the_caller_names_the_second_text_encoder() -> None:
    file = made(P.lora(2), PATHS["text encoder"])
    found = tna.convert(file, to="kohya-lora", part="lora_te2")
    assert all(name.startswith("lora_te2_text_model_encoder") for name in found.tensors)
    again = tna.convert(file, to="kohya-lora", part="text_encoder_2")  # diffusers' name
    assert again.tensors.keys() == found.tensors.keys()


def test_the_method_is_the_adapters_own() -> None:
    for config, kind in ((P.lokr(2), "lokr"), (P.loha(2), "loha"), (P.lora(2), "lora")):
        found = tna.convert(made(config), to="kohya", part="transformer")
        assert (found.kind, found.exact) == (f"kohya-{kind}", True)


@pytest.mark.parametrize("preset", [P.dora, P.hira])
def test_what_is_no_sum_is_refused(preset: Any) -> None:
    with pytest.raises(ConfigError, match="does more than add ΔW to the weight, and kohya-lora can only add"):
        tna.convert(made(preset(rank=2)), to="kohya-lora", part="unet")


def test_a_lossy_one_must_be_asked_for() -> None:
    file = made(P.krona(), {"mid_block.attn.to_q": (12, 18)})
    with pytest.raises(ConfigError, match="the conversion to kohya-lora would change the updates by a relative error"):
        tna.convert(file, to="kohya-lora", rank=2)
    assert 0 < tna.convert(file, to="kohya-lora", rank=2, max_error=1).error < 1


@pytest.mark.slow  # its import takes long
@pytest.mark.parametrize("form", ["kohya-lora", "kohya-lokr", "kohya-loha"])
def test_lycoris_loads_it_by_its_loader_of_kohyas_names(form: str, tmp_path: Path) -> None:
    pytest.importorskip("lycoris")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lycoris.kohya import create_network_from_weights
    file = made(P.lora(2, alpha=3), SHAPES)
    tna.convert(file, tmp_path / "out.safetensors", to=form, part="lora_unet")
    own = model(SHAPES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = create_network_from_weights(1.0, str(tmp_path / "out.safetensors"), None, None, own)[0]
    assert len(network.unet_loras) == len(SHAPES)
    by_name = {module.lora_name: module for module in network.unet_loras}
    for path, delta in updates(file).items():
        got = by_name[f"lora_unet_{path.replace('.', '_')}"].get_diff_weight(1.0)[0]
        assert error(got, delta) <= TOLERANCE


@pytest.mark.slow
def test_diffusers_loads_it_into_a_unet(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    unet, shapes = tiny_unet()
    file = made(P.lora(2, alpha=3), shapes)
    tna.convert(file, tmp_path / "out.safetensors", to="kohya")
    before = {path: unet.get_submodule(path).weight.detach().clone() for path in shapes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Mixin
        from safetensors.torch import load_file

        state, alphas = Mixin.lora_state_dict(load_file(tmp_path / "out.safetensors"), unet_config=unet.config)
        Mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
        unet.fuse_lora()
        unet.unload_lora()
    for path, delta in updates(file).items():
        assert error(unet.get_submodule(path).weight - before[path], delta) <= TOLERANCE
