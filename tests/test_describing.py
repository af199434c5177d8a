"""``tnadapt.info``: what a file is, told from the file alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna

from . import checkpoints as cp

P, T = tna.presets, tna.Target


def test_an_adapter(tmp_path: Path) -> None:
    targets = [T(f"h.{n}.attn", (12, 4), role, rows=tna.Rows(start, 4, 12)) for n in (0, 1, 2, 5) for role, start in
               (("q", 0), ("v", 8))]  # fmt: skip
    targets.append(T("h.5.mlp.out", (4, 7), "linear", transposed=True))
    tensors = cp.base(targets, "bfloat16")
    config = P.superlora(2, groups=3, projection="nonlinear", ratio=0.5, seed=7)
    file = cp.adapter(config, targets, tensors, "bfloat16", kept={"head.weight": np.ones((2, 4), np.float32)})
    file = dataclasses.replace(file, model="Tiny")
    tna.save(tmp_path / "adapter.safetensors", file)
    for path in (tmp_path / "adapter.safetensors", tmp_path):
        found = tna.info(path)
        assert json.loads(json.dumps(found)) == found
        assert (found["kind"], found["version"], found["model"], found["dtype"]) == ("adapter", 1, "Tiny", "bfloat16")
        assert tna.Config.from_dict(found["config"]) == config
        assert found["parameters"] == file.num_parameters == file.plan.num_parameters
        assert found["updated"] == file.plan.size
        assert (found["groups"], found["arrays"]) == (3, len(file.arrays))
        assert found["bytes"] == (tmp_path / "adapter.safetensors").stat().st_size
        assert found["base"]["sha256"] == file.base.sha256
        assert (found["draws"], found["draws_here"]) == (file.draws, True)
        assert found["kept"] == [{"name": "head.weight", "shape": [2, 4], "dtype": "float32"}]
        assert "every" not in found
    assert [(one["count"], one["role"], one["name"]) for one in found["targets"]] == [
        (4, "q", "h.{0-2,5}.attn.weight"), (4, "v", "h.{0-2,5}.attn.weight"), (1, "linear", "h.5.mlp.out.weight"),
    ]  # fmt: skip
    assert found["targets"][0]["rows"] == [0, 4, 12, 1]
    assert found["targets"][2]["transposed"] is True
    assert [one["name"] for one in tna.info(tmp_path, every=True)["every"]] == [target.name for target in targets]


def test_other_draws_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tna.save(tmp_path / "a.safetensors", cp.adapter(P.fastfood(0.5), [T("a", (4, 4))]))
    monkeypatch.setattr("tnadapt.adapter_file.AdapterFile.draws", "0" * 64)
    assert tna.info(tmp_path / "a.safetensors")["draws_here"] is False


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint(shards: int, tmp_path: Path) -> None:
    targets = [T(f"layers.{n}.self_attn.{role}_proj", (8, 8), role) for n in range(12) for role in "qkv"]
    tensors = cp.base(targets, "float16")
    folder = cp.write(tmp_path / "base", tensors, shards)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Llama"]}')
    found = tna.info(folder)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["model_type"], found["architectures"]) == ("checkpoint", "llama", ["Llama"])
    assert found["tensors"] == len(tensors)
    assert found["bytes"] == sum(array.nbytes for _, array in tensors.values())
    assert [one["bytes"] for one in found["files"]] == [
        path.stat().st_size for path in sorted(folder.glob("*.safetensors"))
    ]
    assert sum(one["tensors"] for one in found["files"]) == len(tensors)
    assert found["dtypes"]["F16"] == {"tensors": 36, "bytes": 36 * 128}
    assert [(one["count"], one["name"]) for one in found["targets"]] == [
        (12, "layers.{0-11}.self_attn.q_proj.weight"), (12, "layers.{0-11}.self_attn.v_proj.weight"),
    ]  # fmt: skip
    assert {one["name"] for one in tna.info(folder, every=True)["every"]} == tensors.keys()


def test_a_checkpoint_of_which_little_is_known(tmp_path: Path) -> None:
    folder = cp.write(tmp_path, {"x": ("F32", np.ones((2, 2), "<f4"))})
    (folder / "config.json").write_text('{"limit": Infinity}')
    found = tna.info(folder)
    assert "not finite" in found["no_config"]
    assert found["targets"] == []
    assert "no tensor of the checkpoint is a target" in found["no_targets"]


def test_adapters_of_others(tmp_path: Path) -> None:
    for name, what in (("base_model.model.q.lora_A.weight", "PEFT"), ("lycoris_q.lora_down.weight", "LyCORIS")):
        cp.write_file(tmp_path / "adapter_model.safetensors", {name: ("F32", np.ones((2, 2), "<f4"))})
        found = tna.info(tmp_path)
        assert found["kind"] == "other adapter"
        assert what in found["what"]
        with pytest.raises(tna.FileError, match="tnadapt convert makes it one"):
            tna.load(tmp_path / "adapter_model.safetensors")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    tna.save(tmp_path / "a.safetensors", cp.adapter(P.lora(1), [T("a", (4, 4))]))
    whole = (tmp_path / "a.safetensors").read_bytes()
    for content, why in (
        (whole[:-1], "cut off"), (whole[:-1] + b"x", "SHA-256"), (b"\x80\x02", "pickle"), (b"", "0 bytes"),
    ):  # fmt: skip
        (tmp_path / "a.safetensors").write_bytes(content)
        with pytest.raises(tna.FileError, match=rf"a\.safetensors: .*{why}"):
            tna.info(tmp_path / "a.safetensors")
    with pytest.raises(tna.FileError, match="No such file"):
        tna.info(tmp_path / "none")
