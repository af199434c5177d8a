"""Parts of diffusion pipelines, from files of kohya to those of diffusers and back, and wherever there are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import ConfigError, FileError

from .conversions import made

UNET, TEXT = "mid_block.attn.to_q", "text_model.encoder.layers.0.self_attn.q_proj"
BLOCK = "transformer_blocks.0.attn.to_q"
BASE = [UNET, TEXT, BLOCK, "double_blocks.0.img_attn.qkv"]


def kohya_file(path: Path, modules: dict[str, str]) -> Path:
    """A file of kohya's: path of a module by prefix, each with numbers of its own."""
    tensors: dict[str, Any] = {}
    for number, (prefix, module) in enumerate(modules.items(), 1):
        flat = f"{prefix}_{module.replace('.', '_')}"
        tensors[f"{flat}.lora_up.weight"] = np.full((8, 2), number, "f4")
        tensors[f"{flat}.lora_down.weight"] = np.ones((2, 6), "f4")
        tensors[f"{flat}.alpha"] = np.array(2.0, "f4")
    save_file(tensors, path)
    return path


def both(path: Path) -> Path:
    return kohya_file(path / "kohya.safetensors", {"lora_unet": UNET, "lora_te1": TEXT, "lora_te2": TEXT})


@pytest.mark.parametrize(
    ("part", "component", "module", "number"),
    [
        ("unet", "unet", UNET, 1), ("lora_unet", "unet", UNET, 1),
        ("text_encoder", "text_encoder", TEXT, 2), ("lora_te1", "text_encoder", TEXT, 2),
        ("text_encoder_2", "text_encoder_2", TEXT, 3), ("lora_te2", "text_encoder_2", TEXT, 3),
    ],
)  # fmt: skip
def test_either_name_selects_a_part_of_kohyas_and_names_that_of_diffusers(
    part: str, component: str, module: str, number: int, tmp_path: Path
) -> None:
    source, out = both(tmp_path), tmp_path / "diffusers.safetensors"
    found = tna.convert(source, out, to="diffusers", part=part, base=BASE)
    assert sorted(found.tensors) == [f"{component}.{module}.lora_{which}.weight" for which in "AB"]
    back = tna.convert(out, to="kohya")
    assert found.file is None
    (delta,) = tna.convert(out).file.deltas()  # type: ignore[union-attr]
    np.testing.assert_array_equal(delta, np.full((8, 6), 2.0 * number))
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[component]
    assert all(name.startswith(f"{prefix}_") for name in back.tensors)


def test_a_part_must_be_chosen_where_a_file_has_several(tmp_path: Path) -> None:
    for to in ("tnadapt", "diffusers", "kohya", "peft-lora"):
        with pytest.raises(
            FileError,
            match=r"several models: lora_te1, lora_te2, lora_unet\. Choose one, for example part='lora_te1' \(--part l",
        ):
            tna.convert(both(tmp_path), to=to, base=BASE)
    with pytest.raises(FileError, match="has no part 'transformer_2'; its parts are lora_te1, lora_te2, lora_unet"):
        tna.convert(both(tmp_path), part="transformer_2", base=BASE)


def test_the_file_names_the_part_where_the_modules_do_not(tmp_path: Path) -> None:
    second = kohya_file(tmp_path / "te2.safetensors", {"lora_te2": TEXT})
    found = tna.convert(second, to="diffusers", base=BASE)
    assert all(name.startswith("text_encoder_2.") for name in found.tensors)
    assert all(name.startswith("lora_te2_") for name in tna.convert(second, to="kohya", base=BASE).tensors)


def test_kohyas_unet_may_be_a_transformer(tmp_path: Path) -> None:
    flux = kohya_file(tmp_path / "flux.safetensors", {"lora_unet": BLOCK})
    for part in (None, "lora_unet", "transformer"):
        found = tna.convert(flux, to="diffusers", base=BASE, part=part)
        assert all(name.startswith("transformer.") for name in found.tensors)
    other = kohya_file(tmp_path / "other.safetensors", {"lora_unet": "double_blocks.0.img_attn.qkv"})
    with pytest.raises(
        ConfigError, match="lora_unet may be unet or transformer, and the module names do not show which: 'd"
    ):
        tna.convert(other, to="diffusers", base=BASE)
    found = tna.convert(other, to="diffusers", base=BASE, part="transformer")
    assert all(name.startswith("transformer.double_blocks") for name in found.tensors)


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_modules_of_no_known_part_are_refused_until_it_is_named(to: str) -> None:
    file = made(tna.presets.lora(2), {"blocks.0.attn.q": (8, 6)})
    with pytest.raises(ConfigError, match=rf"a file of {to} .* do not show which .*: 'blocks.0.attn.q'.*example part="):
        tna.convert(file, to=to)
    mixed = made(tna.presets.lora(2), {UNET: (8, 6), TEXT: (8, 6)})
    with pytest.raises(ConfigError, match="the module names do not show which"):
        tna.convert(mixed, to=to)
    assert tna.convert(file, to=to, part="transformer").exact


def test_a_part_without_a_prefix_of_kohyas_is_refused() -> None:
    with pytest.raises(ConfigError, match="kohya has no prefix for controlnet; its prefixes are lora_unet, lora"):
        tna.convert(made(tna.presets.lora(2), {UNET: (8, 6)}), to="kohya", part="controlnet")


def test_unknown_parts_are_refused_everywhere(tmp_path: Path) -> None:
    file = made(tna.presets.lora(2), {UNET: (8, 6)})
    tna.convert(file, tmp_path / "peft", to="peft-lora")
    for source in (file, tmp_path / "peft"):
        for to in ("kohya", "diffusers"):
            with pytest.raises(
                ConfigError, match=r"part \(--part\) must be one of .*lora_te2.*; got 'unett'; did you mean .*'unet'"
            ):
                tna.convert(source, to=to, part="unett")
    for to in ("tnadapt", "peft", "kohya", "diffusers", "lycoris"):
        with pytest.raises(ConfigError, match=r"part \(--part\) must be one of .*text_encoder_2.*; got 'nonsense'"):
            tna.convert(both(tmp_path), to=to, part="nonsense", base=BASE)


@pytest.mark.parametrize("to", ["tnadapt", "peft-lora", "lycoris", "gguf-lora", "vllm"])
def test_a_part_where_there_are_none_is_refused(to: str, tmp_path: Path) -> None:
    file = made(tna.presets.lora(2), {UNET: (8, 6)})
    tna.convert(file, tmp_path / "peft", to="peft-lora")
    tna.save(tmp_path / "own.safetensors", file)
    for source, name in ((file, "tnadapt"), (tmp_path / "own.safetensors", "tnadapt"), (tmp_path / "peft", "peft")):
        with pytest.raises(
            ConfigError,
            match=rf"part='unet' \(--part\) has no effect on a conversion from {name} to {to.partition('-')[0]}: only",
        ):
            tna.convert(source, to=to, part="unet")


FLAT = "encoder.layers.0.self_attn.q_proj"  # of CLIPTextModel since transformers 5.6


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_files_name_the_modules_of_clip_as_loaders_expect(to: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    file = made(tna.presets.lora(2), {FLAT: (8, 6)})
    found = tna.convert(file, out, to=to)
    name = f"lora_te_text_model_{FLAT.replace('.', '_')}." if to == "kohya" else f"text_encoder.{TEXT}."
    assert all(one.startswith(name) for one in found.tensors)
    for base, path in ((None, FLAT), ([FLAT], FLAT), ([TEXT], TEXT), ([FLAT, TEXT], TEXT)):
        back = tna.convert(out, base=base).file
        assert back is not None
        assert [target.module for target in back.targets] == [path]
        np.testing.assert_allclose(back.deltas()[0], file.deltas()[0], rtol=0, atol=1e-6)


def test_other_encoders_keep_their_names() -> None:
    t5 = {"encoder.block.0.layer.0.SelfAttention.q": (8, 6)}
    (name, *_) = tna.convert(made(tna.presets.lora(2), t5), to="diffusers", part="text_encoder_2").tensors
    assert name.startswith("text_encoder_2.encoder.block.0")
    (name, *_) = tna.convert(made(tna.presets.lora(2), {FLAT: (8, 6)}), to="kohya", part="unet").tensors
    assert name.startswith("lora_unet_encoder_layers_0")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_diffusers_loads_it_into_a_text_encoder(to: str, tmp_path: Path) -> None:
    import warnings

    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers imports
        diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=20,
        max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    encoder = transformers.CLIPTextModel(config).requires_grad_(False)
    # diffusers recognizes kohya's names of a text encoder by out_proj alone.
    paths = [path for path, _ in encoder.named_modules() if path.endswith(("q_proj", "v_proj", "out_proj"))]
    file = made(tna.presets.lora(2, alpha=3), dict.fromkeys(paths, (8, 8)))
    tna.convert(file, tmp_path / "out.safetensors", to=to, part="text_encoder")
    before = {path: encoder.get_submodule(path).weight.detach().clone() for path in paths}
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = mixin.lora_state_dict(str(tmp_path / "out.safetensors"))
        mixin.load_lora_into_text_encoder(state, alphas, encoder)
    deltas = {target.module: delta for target, delta in zip(file.targets, file.deltas(), strict=True)}
    for path in paths:
        layer = encoder.get_submodule(path)
        got = layer.get_delta_weight(layer.active_adapters[0])
        assert torch.equal(layer.base_layer.weight, before[path])
        np.testing.assert_allclose(got.numpy(), deltas[path], rtol=0, atol=1e-6 * float(np.abs(deltas[path]).max()))
