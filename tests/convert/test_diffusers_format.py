"""Files of diffusers: names of components, scales, and what its own loader makes of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tnadapt import ConfigError, FileError

from .conversions import TOLERANCE, error, made, tiny_unet, updates

SHAPES = {"down_blocks.0.attn.to_q": (8, 6), "down_blocks.0.conv": (4, 3, 3, 3), "mid_block.attn.to_q": (8, 6)}


def test_it_reads_back_what_it_writes(tmp_path: Path) -> None:
    file = made(tna.presets.lora(2, alpha=3), SHAPES)
    found = tna.convert(file, tmp_path / "out.safetensors", to="diffusers")
    assert sorted(found.tensors) == sorted(
        f"unet.{path}.lora_{which}.weight" for path in SHAPES for which in ("A", "B")
    )
    again = tna.convert(tmp_path / "out.safetensors")
    assert again.origin == "diffusers-lora"
    assert again.file is not None
    for path, delta in updates(again.file).items():
        assert error(delta, updates(file)[path].reshape(delta.shape)) <= TOLERANCE


def test_all_factors_have_one_rank() -> None:
    # diffusers before α = r for each module scaled all of them by the first one's rank.
    shapes = {"down_blocks.0.to_q": (12, 9), "mid_block.to_q": (2, 9)}
    found = tna.convert(made(tna.presets.lora(3), shapes), to="diffusers", rank=3)
    assert {array.shape[1] for name, array in found.tensors.items() if "lora_B" in name} == {3}
    assert found.exact


def rewritten(path: Path, metadata: dict[str, str], extra: dict[str, np.ndarray]) -> None:
    arrays = {
        "unet.mid_block.to_q.lora_A.weight": np.ones((2, 6), "f4"),
        "unet.mid_block.to_q.lora_B.weight": np.ones((8, 2), "f4"),
    }
    save_file({**arrays, **extra}, path, metadata)


def test_scales_are_those_of_diffusers(tmp_path: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 9}
    for metadata, extra, scale in (
        ({}, {}, 1.0),
        ({}, {"unet.mid_block.to_q.alpha": np.array(1.0, "f4")}, 0.5),
        ({"lora_adapter_metadata": json.dumps(settings)}, {}, 3.0),
    ):
        rewritten(tmp_path / "in.safetensors", metadata, extra)
        file = tna.convert(tmp_path / "in.safetensors").file
        assert file is not None
        np.testing.assert_array_equal(file.deltas()[0], np.full((8, 6), 2 * scale))


def test_one_component_at_a_time(tmp_path: Path) -> None:
    more = {f"text_encoder.x.to_q.lora_{which}.weight": np.ones((2, 2), "f4") for which in "AB"}
    rewritten(tmp_path / "in.safetensors", {}, more)
    with pytest.raises(FileError, match=r"has adapters of several models: text_encoder, unet\. Choose one, for"):
        tna.convert(tmp_path / "in.safetensors")
    with pytest.raises(FileError, match="has no part 'transformer'; its parts are text_encoder, unet"):
        tna.convert(tmp_path / "in.safetensors", part="transformer")
    file = tna.convert(tmp_path / "in.safetensors", part="unet").file
    assert file is not None
    assert [target.module for target in file.targets] == ["mid_block.to_q"]
    again = tna.convert(made(tna.presets.lora(2), SHAPES), to="diffusers", part="transformer")
    assert all(name.startswith("transformer.") for name in again.tensors)


def test_what_it_cannot_hold_is_refused(tmp_path: Path) -> None:
    rewritten(tmp_path / "in.safetensors", {}, {"unet.mid_block.to_q.lokr_w1": np.ones((2, 2), "f4")})
    with pytest.raises(FileError, match=r"has tensors that do not belong to a LoRA of diffusers: 'unet.mid_block"):
        tna.convert(tmp_path / "in.safetensors")
    rewritten(tmp_path / "in.safetensors", {"lora_adapter_metadata": "["}, {})
    with pytest.raises(FileError, match="the entry lora_adapter_metadata of its metadata is not a JSON object"):
        tna.convert(tmp_path / "in.safetensors")
    with pytest.raises(ConfigError, match=r"can only add: merge it into the base with tnadapt.merge"):
        tna.convert(made(tna.presets.dora(rank=2), SHAPES), to="diffusers-lora")


@pytest.mark.slow
def test_diffusers_loads_it_into_a_unet(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    unet, shapes = tiny_unet()
    for config in (tna.presets.lora(2, alpha=3), tna.presets.lotr(2, groups="weight", alpha=3)):
        file = made(config, shapes)
        tna.convert(file, tmp_path / "out.safetensors", to="diffusers", overwrite=True)
        before = {path: unet.get_submodule(path).weight.detach().clone() for path in shapes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unet.load_lora_adapter(str(tmp_path / "out.safetensors"), prefix="unet")
            unet.fuse_lora()
            unet.unload_lora()
        for path, delta in updates(file).items():
            assert error(unet.get_submodule(path).weight - before[path], delta) <= TOLERANCE
            unet.get_submodule(path).weight.data.copy_(before[path])
