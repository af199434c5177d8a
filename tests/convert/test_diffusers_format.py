"""Files of diffusers and kohya, folders for vLLM: names, parts of pipelines, scales, and what loaders make of them."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt import ConfigError, FileError

from .conversions import CONVS, SHAPES, assert_same_updates, converted, made, model, tiny_unet


def rewritten(path: Path, metadata: dict[str, str], extra: dict[str, np.ndarray]) -> Path:
    arrays = {
        "unet.mid_block.to_q.lora_A.weight": np.ones((2, 6), "f4"),
        "unet.mid_block.to_q.lora_B.weight": np.ones((8, 2), "f4"),
    }
    save_file({**arrays, **extra}, path, metadata)
    return path


@pytest.mark.parametrize("to", ["diffusers", "vllm"])
def test_all_factors_have_one_rank(to: str) -> None:
    # diffusers before α = r for each module scaled all of them by the first one's rank.
    shapes = {"down_blocks.0.to_q": (12, 9), "mid_block.to_q": (2, 9)}
    found = tna.convert(made(tna.presets.lotr(3, groups="weight"), shapes), to=to, rank=3)
    served = 3 if to == "diffusers" else 8  # vLLM takes a few ranks alone
    assert {array.shape[1] for name, array in found.tensors.items() if "lora_B" in name} == {served}
    assert found.exact
    assert found.config is None or (found.config["r"], found.config["rank_pattern"]) == (served, {})


def test_scales_are_those_of_diffusers(tmp_path: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 9}
    for metadata, extra, scale in (
        ({}, {}, 1.0),
        ({}, {"unet.mid_block.to_q.alpha": np.array(1.0, "f4")}, 0.5),
        ({"lora_adapter_metadata": json.dumps(settings)}, {}, 3.0),
    ):
        file = converted(rewritten(tmp_path / "in.safetensors", metadata, extra))
        np.testing.assert_array_equal(file.deltas()[0], np.full((8, 6), 2 * scale))
    more = {f"text_encoder.x.to_q.lora_{which}.weight": np.ones((2, 2), "f4") for which in "AB"}
    file = converted(rewritten(tmp_path / "in.safetensors", {}, more), part="unet")
    assert [target.module for target in file.targets] == ["mid_block.to_q"]
    for part, metadata, extra, message in (
        (None, {}, more, r"has adapters of several models: text_encoder, unet\. Choose one, for"),
        ("transformer", {}, more, "has no part 'transformer'; its parts are text_encoder, unet"),
        (
            None, {}, {"unet.mid_block.to_q.lokr_w1": np.ones((2, 2), "f4")},
            "has tensors that do not belong to a LoRA of diffusers: 'unet.mid_block",
        ),
        (None, {"lora_adapter_metadata": "["}, {}, "the entry lora_adapter_metadata of its metadata is not a JSON obj"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=message):
            tna.convert(rewritten(tmp_path / "in.safetensors", metadata, extra), part=part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "to"),
    [
        (P.lora(2, alpha=3), "diffusers"),
        (P.lotr(2, groups="weight", alpha=3), "diffusers"),
        (P.lora(2, alpha=3), "kohya"),
    ],
)
def test_diffusers_loads_it_into_a_unet(config: tna.Config, to: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    unet, shapes = tiny_unet()
    file = made(config, shapes)
    tna.convert(file, tmp_path / "out.safetensors", to=to)
    before = {path: unet.get_submodule(path).weight.detach().clone() for path in shapes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if to == "diffusers":
            unet.load_lora_adapter(str(tmp_path / "out.safetensors"), prefix="unet")
        else:
            from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Mixin
            from safetensors.torch import load_file

            state, alphas = Mixin.lora_state_dict(load_file(tmp_path / "out.safetensors"), unet_config=unet.config)
            Mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet)
        unet.fuse_lora()
        unet.unload_lora()
    assert_same_updates({path: unet.get_submodule(path).weight - before[path] for path in shapes}, file)


# -- Files under kohya's names: the component's prefix, and what the loaders of LyCORIS and diffusers make of them -----


PATHS = {
    "unet": {"down_blocks.0.attn.to_q": (8, 6), "down_blocks.0.conv": (4, 3, 3, 3), "mid_block.attn.to_q": (8, 6)},
    "text encoder": {"text_model.encoder.layers.0.self_attn.q_proj": (8, 6)},
    "transformer": {"transformer_blocks.0.attn.to_q": (8, 6)},
}
PREFIXES = {"unet": "lora_unet", "text encoder": "lora_te", "transformer": "lora_transformer"}


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("name", PATHS)
def test_the_prefix_is_that_of_the_component(name: str, to: str, tmp_path: Path) -> None:
    file, out = made(P.lora(2, alpha=3), PATHS[name]), tmp_path / "out.safetensors"
    found = tna.convert(file, out, to=to)
    if to == "kohya":
        flat = [f"{PREFIXES[name]}_{path.replace('.', '_')}" for path in PATHS[name]]
        ends = ("alpha", "lora_down.weight", "lora_up.weight")
    else:
        flat = [f"{name.replace(' ', '_')}.{path}" for path in PATHS[name]]
        ends = ("lora_A.weight", "lora_B.weight")
    assert sorted(found.tensors) == sorted(f"{one}.{end}" for one in flat for end in ends)
    assert tna.convert(out).origin == ("lycoris-lora" if to == "kohya" else "diffusers-lora")
    if to == "kohya":
        assert converted(out).config == file.config
    assert_same_updates(converted(out), file)


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
    by_name = {module.lora_name: module.get_diff_weight(1.0)[0] for module in network.unet_loras}
    assert_same_updates({path: by_name[f"lora_unet_{path.replace('.', '_')}"] for path in SHAPES}, file)


# -- Parts of diffusion pipelines, from files of kohya to those of diffusers and back, and wherever there are none -----


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
    assert found.file is None
    back = tna.convert(out, to="kohya")
    (delta,) = converted(out).deltas()
    np.testing.assert_array_equal(delta, np.full((8, 6), 2.0 * number))
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[component]
    assert all(name.startswith(f"{prefix}_") for name in back.tensors)


def test_kohyas_unet_may_be_a_transformer(tmp_path: Path) -> None:
    flux = kohya_file(tmp_path / "flux.safetensors", {"lora_unet": BLOCK})
    for part in (None, "lora_unet", "transformer"):
        found = tna.convert(flux, to="diffusers", base=BASE, part=part)
        assert all(name.startswith("transformer.") for name in found.tensors)
    other = kohya_file(tmp_path / "other.safetensors", {"lora_unet": "double_blocks.0.img_attn.qkv"})
    message = "lora_unet may be unet or transformer, and the module names do not show which: 'd"
    with pytest.raises(ConfigError, match=message):
        tna.convert(other, to="diffusers", base=BASE)
    found = tna.convert(other, to="diffusers", base=BASE, part="transformer")
    assert all(name.startswith("transformer.double_blocks") for name in found.tensors)
    for to in ("diffusers", "kohya"):
        found = tna.convert(made(P.lora(2), {"blocks.0.attn.q": (8, 6)}), to=to, part="transformer")
        assert found.exact
        assert all(name.startswith(("transformer.blocks", "lora_transformer_blocks")) for name in found.tensors)


FORMS = ("tnadapt", "peft-lora", "kohya", "diffusers", "lycoris", "gguf-lora", "vllm")
SEVERAL = r"several models: lora_te1, lora_te2, lora_unet\. Choose one, for example part='lora_te1' \(--part l"


@pytest.mark.parametrize(
    ("source", "forms", "part", "message"),
    [
        ("kohya", ("tnadapt", "diffusers", "kohya", "peft-lora"), None, SEVERAL),
        ("kohya", FORMS[:1], "transformer_2", "has no part 'transformer_2'; its parts are lora_te1, lora_te2, lor"),
        ("kohya", FORMS[:5], "nonsense", r"part \(--part\) must be one of .*text_encoder_2.*; got 'nonsense'"),
        ("blocks.0.attn.q", FORMS[2:4], None, r"a file of .* do not show which .*: 'blocks.0.attn.q'.*example part="),
        (f"{UNET} {TEXT}", FORMS[2:4], None, "the module names do not show which"),
        (UNET, ("kohya",), "controlnet", "kohya has no prefix for controlnet; its prefixes are lora_unet, lora"),
        *(
            (source, FORMS[2:4], "unett", r"part \(--part\) must be .*lora_te2.*; got 'unett'; did you mean .*'unet'")
            for source in (UNET, "peft")
        ),
        *(
            (
                source, ("tnadapt", "peft-lora", "lycoris", "gguf-lora", "vllm"), "unet",
                rf"part='unet' \(--part\) has no effect on a conversion from {library} to TO: only",
            )
            for source, library in ((UNET, "tnadapt"), ("peft", "peft"))
        ),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_chosen_is_refused(
    source: str, forms: Sequence[str], part: str | None, message: str, tmp_path: Path
) -> None:
    adapter: Any = made(P.lora(2), dict.fromkeys(source.split() if "." in source else [UNET], (8, 6)))
    if source == "peft":
        tna.convert(adapter, tmp_path / "peft", to="peft-lora")
        adapter = tmp_path / "peft"
    elif source == "kohya":
        adapter = both(tmp_path)
    for to in forms:
        with pytest.raises((ConfigError, FileError), match=message.replace("TO", to.partition("-")[0])):
            tna.convert(adapter, to=to, part=part, base=BASE if source == "kohya" else None)


FLAT = "encoder.layers.0.self_attn.q_proj"  # of CLIPTextModel since transformers 5.6


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_files_name_the_modules_of_clip_as_loaders_expect(to: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    file = made(tna.presets.lora(2), {FLAT: (8, 6)})
    found = tna.convert(file, out, to=to)
    name = f"lora_te_text_model_{FLAT.replace('.', '_')}." if to == "kohya" else f"text_encoder.{TEXT}."
    assert all(one.startswith(name) for one in found.tensors)
    for base, path in ((None, FLAT), ([FLAT], FLAT), ([TEXT], TEXT), ([FLAT, TEXT], TEXT)):
        back = converted(out, base=base)
        assert [target.module for target in back.targets] == [path]
        np.testing.assert_allclose(back.deltas()[0], file.deltas()[0], rtol=0, atol=1e-6)


def test_the_part_is_in_the_names(tmp_path: Path) -> None:
    second = kohya_file(tmp_path / "te2.safetensors", {"lora_te2": TEXT})
    t5 = "encoder.block.0.layer.0.SelfAttention.q"
    for source, to, part, start in (
        (TEXT, "kohya", "lora_te2", "lora_te2_text_model_encoder"),
        (TEXT, "kohya", "text_encoder_2", "lora_te2_text_model_encoder"),  # diffusers' name
        # The file names the part where the modules do not.
        (second, "diffusers", None, "text_encoder_2."),
        (second, "kohya", None, "lora_te2_"),
        # Other encoders keep their names.
        (t5, "diffusers", "text_encoder_2", "text_encoder_2.encoder.block.0"),
        (FLAT, "kohya", "unet", "lora_unet_encoder_layers_0"),
    ):
        adapter = source if isinstance(source, Path) else made(P.lora(2), {source: (8, 6)})
        found = tna.convert(adapter, to=to, part=part, base=BASE if source is second else None)
        assert all(name.startswith(start) for name in found.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["kohya", "diffusers"])
def test_diffusers_loads_it_into_a_text_encoder(to: str, tmp_path: Path) -> None:
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


# -- Folders for vLLM: one rank of its list, a scale of 1, and nothing that it does not serve -------------------------


SQUARE = {f"layers.{layer}.q_proj": (80, 80) for layer in range(2)}


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64)])
def test_the_rank_is_padded_to_one_that_vllm_takes(rank: int, served: int, tmp_path: Path) -> None:
    file = made(tna.presets.lora(rank, alpha=3), SQUARE)
    found = tna.convert(file, tmp_path / "out", to="vllm", rank=None if rank < 33 else 33)
    assert found.config is not None
    assert (found.config["r"], found.config["lora_alpha"]) == (served, served)
    assert (found.config["rank_pattern"], found.config["alpha_pattern"]) == ({}, {})
    assert {min(array.shape) for array in found.tensors.values()} == {served}
    assert found.exact
    assert tna.convert(tmp_path / "out").origin == "peft-lora"
    assert_same_updates(converted(tmp_path / "out"), file)


def test_what_vllm_does_not_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"apply='magnitude' of this adapter does more than add ΔW .*vllm-lora"):
        tna.convert(made(tna.presets.dora(rank=2)), to="vllm")
    with pytest.raises(ConfigError, match=r"'stem.conv' is a convolution, and vLLM has no lora of convolutions: merge"):
        tna.convert(made(tna.presets.lora(2), CONVS), to="vllm")
    wide = {"layers.0.q_proj": (1200, 1200)}
    with pytest.raises(ConfigError, match="the LoRA of this adapter has rank 513, and vLLM takes ranks up to 512"):
        tna.convert(made(tna.presets.lora(513), wide), to="vllm")
    plain = made(tna.presets.lora(2), SHAPES)
    kept = {"lm_head.weight": np.ones((3, 4), "f4")}
    other = dataclasses.replace(plain, kept=kept)
    message = "besides LoRA, vLLM loads only trained modules named classifier or score, and"
    with pytest.raises(ConfigError, match=message):
        tna.convert(other, to="vllm")
    assert tna.convert(other, to="vllm", without_kept=True).exact
    head = dataclasses.replace(plain, kept={"score.weight": np.ones((3, 4), "f4")})
    found = tna.convert(head, to="vllm")
    assert found.config is not None
    assert found.config["modules_to_save"] == ["score"]
    bias = dataclasses.replace(plain, kept={"score.bias": np.ones(3, "f4")})
    with pytest.raises(ConfigError, match=r"this adapter has 'score\.bias'"):
        tna.convert(bias, to="vllm")
