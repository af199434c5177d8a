"""Files of adapters whose numbers come from elsewhere: small ones cannot ask for much work; what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt.checkpoints.adapter_format import content_of
from tnadapt.sources import Given, Scaled, Seeded, Tied

TARGETS = [tna.Target("m", (6, 4))]
# SHA-256 of a file that was written before sources, θ, axes, roles and maps with settings existed.
VERSION_ONE = "f30149f7478eb61551e536df2e8aa3d0efdfcd4069668c7b98f6f1018564e52e"
THETA = {"theta": np.ones(3, np.float32)}


def loaded(config: tna.Config, arrays: dict[str, np.ndarray], folder: Path, **settings: Any) -> tna.AdapterFile:
    tna.save(folder / "adapter.safetensors", tna.AdapterFile(config, TARGETS, arrays, **settings))
    return tna.load(folder / "adapter.safetensors")


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize("before", ["one-hot", "signed-one-hot", "normal", "linear"])
@pytest.mark.parametrize("projection", ["identity", "nonlinear"])
def test_a_file_of_theta_is_read_without_forming_what_it_makes(before: str, projection: str, tmp_path: Path) -> None:
    config = tna.Config(rank=1 << 30, projection=projection, before=before, parameters=3)
    began = time.perf_counter()
    assert loaded(config, THETA, tmp_path).num_parameters == 3
    assert time.perf_counter() - began < 20.0


@pytest.mark.law("allocation-limit")
@pytest.mark.parametrize(
    "settings",
    [
        {"before": "one-hot", "parameters": 3},
        {"sources": {f"factor{m}": Tied(f"term0.split0.factor{m}") for m in range(2)}},
    ],
)
def test_a_small_file_cannot_ask_for_many_arrays(settings: dict[str, Any]) -> None:
    config = tna.Config(rank=1, terms=1 << 15, **settings)
    with pytest.raises(tna.ShapeError, match=r"make 65536 arrays; at most \d+ can come from so few that are stored"):
        tna.AdapterFile(config, TARGETS, THETA)


@pytest.mark.law("allocation-limit")
def test_sources_nested_in_a_file(tmp_path: Path) -> None:
    file = tna.AdapterFile(
        tna.Config(rank=1, sources={"factor1": Scaled(Seeded("normal"), start=1.0)}),
        TARGETS,
        {"group0.split0.factor0": np.zeros((6, 1), np.float32), "group0.split0.factor1.size": np.ones(4, np.float32)},
    )
    content = content_of(file)
    source = {"distribution": "normal", "scale": None, "shared": True, "source": "seeded"}
    inner = json.dumps(source, separators=(",", ":"))
    escaped = inner.replace('"', '\\"').encode()
    assert escaped in content
    deep = inner
    for _ in range(40):
        deep = '{"of":' + deep + ',"source":"scaled"}'
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(escaped, deep.replace('"', '\\"').encode())
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(tna.FileError, match=r"nested more than 4 deep|nested|deep"):
        tna.load(path)


def test_given_arrays_in_a_file(tmp_path: Path) -> None:
    config = tna.Config(rank=1, sources={"factor1": Given()})
    arrays = {"group0.split0.factor0": np.ones((6, 1), np.float64)}
    brought = {"group0.split0.factor1": np.arange(4.0).reshape(4, 1)}
    found = loaded(config, arrays, tmp_path, given=brought)
    assert found.given["group0.split0.factor1"].dtype == np.float32
    assert found.arrays["group0.split0.factor0"].dtype == np.float64
    np.testing.assert_array_equal(found.deltas()[0], np.ones((6, 1)) @ np.arange(4.0)[None])
    assert tna.info(tmp_path / "adapter.safetensors")
    with pytest.raises(tna.ShapeError, match=r"missing: 'group0.split0.factor1'"):
        tna.AdapterFile(config, TARGETS, arrays)
    with pytest.raises(tna.ShapeError, match=r"unknown: 'group0.split0.factor0.size'"):
        tna.AdapterFile(config, TARGETS, {**arrays, "group0.split0.factor0.size": np.ones(6)}, given=brought)


def test_files_of_version_one_keep_their_bytes(tmp_path: Path) -> None:
    plan = tna.SuperLoRA(P.lora(2, alpha=4, seed=3), [(6, 4)])
    shapes = plan.param_shapes.items()
    arrays = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes}
    tna.save(tmp_path / "a.safetensors", tna.AdapterFile(plan.config, TARGETS, arrays, model="ViT"))
    assert hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest() == VERSION_ONE
