"""``tnadapt presets``, run as by a user."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna

pytest.importorskip("typer")

from pathlib import Path

from tests.support.in_process import main, run_here


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(main, "presets", *arguments)


def listed(*arguments: str) -> dict[str, dict[str, object]]:
    done = run("--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {row["preset"]: row for row in json.loads(done.stdout)["presets"]}


def test_every_preset_is_listed_with_its_arguments_and_its_method() -> None:
    found = listed()
    assert list(found) == list(tna.presets.__all__)
    assert found["lora"] == {
        "preset": "lora", "arguments": "rank=4", "from": 36864,
        "method": "LoRA: ΔW = (alpha / r) B A (table 1; Hu et al., arXiv 2106.09685)",
    }  # fmt: skip
    assert found["randlora"]["arguments"] == "rank=32, rows, cols"
    assert [name for name, row in found.items() if row["from"] is None] == ["cara", "lorta_cp"]


def test_the_fewest_parameters_are_those_of_a_setting() -> None:
    shapes = [(64, 48)] * 4
    found = listed("--shape", "64x48*4")
    for name, config in {
        "lora": tna.presets.lora(1),
        "dense": tna.presets.dense(),
        "unilora": tna.presets.unilora(1),
    }.items():
        assert found[name]["from"] == tna.SuperLoRA(config, shapes).num_parameters


def test_a_table() -> None:
    done = run("--shape", "64x64*8")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["preset", "arguments", "from", "method"]
    assert len(lines) == 1 + len(tna.presets.__all__) + 3
    assert lines[-3] == "from: the fewest parameters on 8 weights of 64 x 64"
    assert "1 weight of 64 x 64" in run("--shape", "64x64").stdout
    assert "on 2 weights\n" in run("--shape", "64x64", "--shape", "8x8").stdout


def test_a_model(tmp_path: Path) -> None:
    tensors = {f"h.{layer}.attn.{x}_proj.weight": np.zeros((16, 24), np.float32) for layer in (0, 1) for x in "qkvo"}
    save_file(tensors, str(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    assert listed(str(tmp_path))["lora"]["from"] == 4 * 40
    assert listed(str(tmp_path), "--targets", "qkvo")["lora"]["from"] == 8 * 40


@pytest.mark.parametrize(("arguments", "message"), [
    (["--shape", "3x"], "--shape takes ROWSxCOLS, e.g. 768x768 or 768x768*24; got '3x'"),
    (["--targets", "qv"], "give a model, or the shapes of weights by --shape ROWSxCOLS; one of them"),
    (["a", "--shape", "3x3"], "give a model, or the shapes of weights by --shape ROWSxCOLS; one of them"),
])  # fmt: skip
def test_mistakes(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (2, f"tnadapt: {message}\n")
