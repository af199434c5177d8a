"""Adapter files of several configs: format version 2."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.checkpoints.adapter_format import content_of

TARGETS = [
    tna.Target("a.q", (6, 4), "q", layer="a"), tna.Target("a.v", (5, 4), "v", layer="a"),
    tna.Target("b.q", (6, 4), "q", layer="b"), tna.Target("b.up", (8, 4), "linear", layer="b"),
]  # fmt: skip
CONFIG = CompositeConfig([(P.superlora(2, groups="layer", projection="nonlinear"), 3), (P.lora(3, alpha=6, seed=9), 1)])


def made(config: tna.Config = CONFIG, targets: Any = TARGETS, **fields: Any) -> tna.AdapterFile:
    plan = tna.SuperLoRA(config, [t.shape for t in targets], [t.layer for t in targets], [t.role for t in targets])
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, targets, arrays, **fields)


def recipe_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["tnadapt"])


def forged(file: tna.AdapterFile, path: Path, **changes: Any) -> Path:
    """Write a file whose recipe is changed, and whose checksum is right."""
    tna.save(path, file)
    recipe = {key: value for key, value in {**recipe_of(path), **changes}.items() if value is not None}
    arrays = load_file(path)
    text = json.dumps({**recipe, "sha256": "0" * 64}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    total = hashlib.sha256(text.encode() + b"\0")
    for name in sorted(arrays):
        total.update(f"{name}\0F32\0{','.join(map(str, arrays[name].shape))}\0".encode() + arrays[name].tobytes())
    save_file(arrays, path, {"tnadapt": text.replace("0" * 64, total.hexdigest())})
    return path


@pytest.mark.law("file-round-trip", "file-bytes")
def test_a_round_trip(tmp_path: Path) -> None:
    file, path = made(model="Net"), tmp_path / "adapter.safetensors"
    tna.save(path, file)
    found = tna.load(path)
    assert found.config == CONFIG
    # The layers of the part that has groups of layers, and of no other.
    assert [target.layer for target in found.targets] == ["a", "a", "b", ""]
    assert all(np.array_equal(array, found.arrays[name]) for name, array in file.arrays.items())
    assert all(map(np.array_equal, found.deltas(), file.deltas()))
    tna.save(tmp_path / "again.safetensors", found)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    recipe = recipe_of(path)
    assert (recipe["version"], "config" in recipe) == (2, False)
    assert recipe["parts"] == [
        [{"fold": "hypercube", "groups": "layer", "projection": "nonlinear", "rank": 2}, 3],
        [{"alpha": 6.0, "rank": 3, "seed": 9}, 1],
    ]


def test_the_bytes_are_known() -> None:
    assert (
        hashlib.sha256(content_of(made(model="Net"))).hexdigest()
        == "2ffc9698515f91e310447dd50640563f6c2db5c4050d7908f05933cd22e67b02"
    )


def test_one_config_is_still_version_1(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tna.save(path, made(P.lora(2)))
    recipe = recipe_of(path)
    assert (recipe["version"], recipe["config"], "parts" in recipe) == (1, {"rank": 2}, False)


@pytest.mark.law("independent-readers")
def test_parts_are_adapters_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    file = made()
    tna.save(path, file)
    stored, found, first, group = load_file(path), [], 0, 0
    for settings, count in recipe_of(path)["parts"]:
        targets = TARGETS[first : first + count]
        plan = tna.SuperLoRA(tna.Config.from_dict(settings), [t.shape for t in targets], [t.layer for t in targets])
        arrays = {}
        for name in plan.param_shapes:
            number, rest = re.fullmatch(r"group(\d+)\.(.*)", name).groups()  # type: ignore[union-attr]
            arrays[name] = stored[f"group{int(number) + group}.{rest}"]
        found += plan.deltas(arrays)
        first, group = first + count, group + plan.num_groups
    assert all(map(np.array_equal, found, file.deltas()))


def test_frozen_arrays_of_some_parts_are_drawn_again(tmp_path: Path) -> None:
    config = CompositeConfig([(P.lora(2, seed=1), 2), (P.lora(3, seed=2), 2)])
    plan = tna.SuperLoRA(config, [target.shape for target in TARGETS])
    trained = [name for name in plan.param_shapes if name.startswith(("group0", "group2")) or name.endswith("factor0")]
    arrays = plan.init(trained=trained)
    file, path = tna.AdapterFile(config, TARGETS, arrays, trained=trained), tmp_path / "adapter.safetensors"
    assert file.left_out == ("group1.split0.factor1", "group3.split0.factor1")
    tna.save(path, file)
    assert not set(file.left_out) & load_file(path).keys()
    found = tna.load(path)
    assert all(np.array_equal(found.arrays[name], arrays[name]) for name in arrays)
    with pytest.raises(tna.FileError, match="was trained with fixed draws whose digest is"):
        tna.load(forged(file, path, parts=[[{"rank": 2, "seed": 5}, 2], [{"rank": 3, "seed": 2}, 2]]))


@pytest.mark.law("bad-tensors")
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"version": 1}, "the tnadapt entry has unknown keys: 'parts'; lacks: 'config'"),
        ({"config": {"rank": 2}}, "the tnadapt entry has unknown keys: 'config'; lacks: none"),
        ({"parts": None}, "has unknown keys: none; lacks: 'parts'"),
        ({"version": 3}, "has format version 3, and this tnadapt reads up to 2: update tnadapt"),
        ({"version": 0}, "the tnadapt entry has the format version 0; expected 1 or 2"),
        ({"parts": {}}, "the tnadapt entry's parts must be a list; got {}"),
        ({"parts": []}, "parts: parts must be a list of two or more pairs"),
        ({"parts": [[{"rank": 3}, 4]]}, "parts: parts must be a list of two or more pairs"),
        ({"parts": [[{"rank": 3}, 4], 3]}, "part 1 must be a list of a config and a number of targets; got 3"),
        ({"parts": [[{"rank": 3}, 3], [{"rnak": 3}, 1]]}, "part 1: config has unknown fields: 'rnak'"),
        ({"parts": [[{"rank": 3}, 3], [[], 1]]}, "part 1: the tnadapt entry's config must be an object; got []"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 0}, 1]]}, "part 1: config: rank must be from 1"),
        (
            {"parts": [[{"rank": 3}, 3], [{"rank": 3}, 2]]},
            "parts: items must be one for each of the 5 weights of the configs; got",
        ),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, 1.0]]}, "parts: the weights of part 1 must be an integer; got 1.0"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, -1]]}, "parts: the weights of part 1 must be from 1 to"),
        ({"parts": [[{"rank": 1}, 1]] * 5}, "has more than 4 parts, and each has a target"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3, "apply": "hadamard"}, 1]]}, "must have the same apply"),
        ({"parts": [[{"terms": 60000}, 3], [{"rank": 3}, 1]]}, "config and targets require 360002 arrays; there are"),
        ({"parts": [[{"rank": 3}, 3], [{"rank": 3}, 1]]}, "the arrays must be those of config and targets; missing:"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    path = forged(made(), tmp_path / "adapter.safetensors", **changes)
    with pytest.raises(tna.FileError, match=re.escape(text)):
        tna.load(path)


def test_info(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    tna.save(path, made())
    found = tna.info(path)
    assert found["version"] == 2
    assert CompositeConfig.from_dict(found["config"]) == CONFIG
    assert json.loads(json.dumps(found))["config"] == found["config"]


def test_a_merge_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    base = {target.name: rng.standard_normal(target.stored).astype(np.float32) for target in TARGETS}
    save_file(base, tmp_path / "model.safetensors")
    file = made()
    tna.save(tmp_path / "adapter.safetensors", file)
    tna.merge(tmp_path / "model.safetensors", tmp_path / "adapter.safetensors", tmp_path / "out.safetensors")
    merged = load_file(tmp_path / "out.safetensors")
    for target, delta in zip(TARGETS, file.deltas(), strict=True):
        np.testing.assert_allclose(merged[target.name], base[target.name] + delta, rtol=1e-5, atol=1e-5)
