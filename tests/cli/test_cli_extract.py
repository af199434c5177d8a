"""What ``tnadapt extract`` says of two checkpoints with the same weights; other tests are with ``tnadapt.extract``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.support.in_process import main, run_here

pytest.importorskip("typer")

NAMES = [f"attn.{name}_proj.weight" for name in "qkv"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(main, "extract", *map(str, arguments))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    save_file({name: rng.normal(size=(8, 8)).astype(np.float32) for name in NAMES}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def tuned(base: Path, name: str) -> Path:
    """Return a checkpoint with one weight that differs."""
    rng = np.random.default_rng(0)
    tensors = {one: rng.normal(size=(8, 8)).astype(np.float32) for one in NAMES}
    tensors[name] = tensors[name] + 1
    save_file(tensors, base.parent / "tuned.safetensors")
    return base.parent / "tuned.safetensors"


@pytest.mark.parametrize("options", [[], ["--no-compare"], ["--json"]])
def test_equal_weights_are_warned_of(base: Path, tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "adapter.safetensors"
    done = run(base, base, "-o", out, *options)
    assert done.returncode == 0
    assert done.stderr == (
        f"warning: {base} and {base} have equal weights, so the adapter adds nothing; are they the same model?\n"
    )
    assert not any(delta.any() for delta in tna.load(out).deltas())
    if "--json" in options:
        assert json.loads(done.stdout)["parameters"] == tna.load(out).num_parameters


def test_equal_weights_among_others_are_warned_of(base: Path, tmp_path: Path) -> None:
    done = run(base, tuned(base, NAMES[1]), "-o", tmp_path / "adapter.safetensors")
    assert done.returncode == 0
    assert done.stderr.endswith("so the adapter adds nothing; --targets chooses among others that differ\n")
    done = run(base, tuned(base, NAMES[1]), "-o", tmp_path / "k.safetensors", "--targets", "k_proj")
    assert (done.returncode, done.stderr) == (0, "")
    assert [target.role for target in tna.load(tmp_path / "k.safetensors").targets] == ["linear"]


def test_weights_that_differ_are_not(base: Path, tmp_path: Path) -> None:
    done = run(base, tuned(base, NAMES[2]), "-o", tmp_path / "adapter.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
