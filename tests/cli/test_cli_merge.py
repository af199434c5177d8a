"""``tnadapt merge`` and ``tnadapt info``, run as by a user."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.in_process import main, run_here

pytest.importorskip("typer")

P, T = tna.presets, tna.Target
TARGETS = [T(f"layers.{n}.self_attn.q_proj", (6, 4), "q") for n in range(3)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(main, *arguments)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tensors = cp.base(TARGETS)
    kept = {"head.weight": np.ones((2, 4), np.float32)}
    tna.save(tmp_path / "adapter.safetensors", cp.adapter(P.lora(2), TARGETS, tensors, kept=kept))
    return cp.write(tmp_path / "base", tensors, 2)


def test_it_merges_and_says_what(base: Path, tmp_path: Path) -> None:
    (base / "pytorch_model.bin").write_bytes(b"")
    done = run("merge", base, tmp_path / "adapter.safetensors", "-o", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'out'}: ")
    assert lines[0].endswith(" in 2 files")
    assert "3 updates added to 3 of 9 tensors" in lines[1]
    assert "added: head.weight" in lines[2]
    assert lines[4].endswith("links out of BASE, or not regular files): pytorch_model.bin")
    again = run("merge", base, tmp_path / "adapter.safetensors", "--out", tmp_path / "out")
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"tnadapt: {tmp_path / 'out'}: already exists: choose another name, or overwrite=True (--overwrite)\n"
    )
    forced = run("merge", base, tmp_path / "adapter.safetensors", "-o", tmp_path / "out", "--overwrite", "--json")
    assert forced.returncode == 0
    other = cp.write(tmp_path / "other", cp.base(TARGETS, seed=5))
    refused = run("merge", other, tmp_path / "adapter.safetensors", "-o", tmp_path / "any")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "is another base model" in refused.stderr
    wished = run("merge", other, tmp_path / "adapter.safetensors", "-o", tmp_path / "any", "--no-check-base")
    assert wished.returncode == 0
    assert "not checked whether it was trained on this base (--no-check-base)" in wished.stdout
    report = json.loads(forced.stdout)
    assert (report["out"], report["changed"], report["base_checked"]) == (str(tmp_path / "out"), 3, True)


def test_info_prints_what_there_is(base: Path, tmp_path: Path) -> None:
    done = run("info", tmp_path / "adapter.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "a tnadapt adapter, format version 1", "60 float32 in 6 arrays", "72 elements of 3 weights in 3 groups",
        "rank=2", "float32, SHA-256 of the weights", "head.weight 2×4",
        "3 ×  q  layers.{0-2}.self_attn.q_proj.weight  6×4",
    ):  # fmt: skip
        assert words in done.stdout, words
    assert "layers.1.self_attn.q_proj.weight" in run("info", tmp_path / "adapter.safetensors", "--all").stdout
    assert json.loads(run("info", tmp_path / "adapter.safetensors", "--json").stdout)["parameters"] == 60
    # What it records of its base model, as text that cannot move the cursor.
    about = tna.Pretrained(
        "user/base", "0a1b", task="text-classification", labels=["no", "y\x1b[1mes", *"abcdefg"],
        settings={"problem_type": "single_label_classification"}, inputs={"max_length": 16},
    )  # fmt: skip
    file = tna.load(tmp_path / "adapter.safetensors")
    tna.save(tmp_path / "about.safetensors", dataclasses.replace(file, pretrained=about))
    done = run("info", tmp_path / "about.safetensors")
    assert {
        "pretrained user/base, revision 0a1b, transformers",
        "task text-classification",
        r"labels 9: no, y\x1b[1mes, a, b, c, d and 3 more",
        'settings problem_type="single_label_classification", max_length=16',
    } <= {" ".join(line.split()) for line in done.stdout.splitlines()}
    assert json.loads(run("info", tmp_path / "about.safetensors", "--json").stdout)["pretrained"] == about.to_dict()
    done = run("info", base)
    assert "a checkpoint of" in done.stdout
    assert "model-00001-of-00002.safetensors" in done.stdout
    assert json.loads(run("info", base, "--json", "--all").stdout)["kind"] == "checkpoint"
