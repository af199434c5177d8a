"""``tnadapt convert``, and what ``tnadapt extract`` says of equal weights, run as by a user."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.convert.conversions import made
from tests.support.array_presets import P
from tests.support.in_process import main, run_here

pytest.importorskip("typer")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(main, *arguments)


def test_there_and_back(tmp_path: Path) -> None:
    file = made(P.lora(4, alpha=8))
    tna.save(tmp_path / "ours.safetensors", file)
    done = run("convert", str(tmp_path / "ours.safetensors"), "-o", str(tmp_path / "theirs"), "--to", "peft-lora")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "tnadapt -> peft-lora, 3 weights",
        f"parameters {file.num_parameters} -> {file.num_parameters}",
        "exact but for rounding: relative error 0",
        f"written to {tmp_path / 'theirs'}",
    ]
    done = run("convert", str(tmp_path / "theirs"), "-o", str(tmp_path / "again.safetensors"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["from"], report["to"], report["exact"], report["error"]) == ("peft-lora", "tnadapt", True, 0.0)
    again = tna.load(tmp_path / "again.safetensors")
    assert again.config == file.config
    assert all(map(np.array_equal, again.deltas(), file.deltas()))
    # What is there is replaced if asked.
    (tmp_path / "again.safetensors").write_bytes(b"old")
    arguments = ("convert", tmp_path / "theirs", "-o", tmp_path / "again.safetensors")
    refused = run(*arguments)
    assert refused.stderr.endswith("again.safetensors: exists; give another path, or overwrite=True (--overwrite)\n")
    assert (refused.returncode, (tmp_path / "again.safetensors").read_bytes()) == (2, b"old")
    assert run(*arguments, "--overwrite").returncode == 0
    assert tna.load(tmp_path / "again.safetensors").config == file.config


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    tna.save(tmp_path / "ours.safetensors", made(P.lora(4)))
    source = str(tmp_path / "ours.safetensors")
    refused = run("convert", source, "-o", str(tmp_path / "theirs"), "--to", "peft-lora", "--rank", "2")
    assert refused.returncode == 2
    assert "would change the updates by a relative error of" in refused.stderr
    assert "give a larger rank or a wider dtype, max_error=0." in refused.stderr
    assert "(--max-error 0." in refused.stderr
    assert "or to='lycoris-full' (--to lycoris-full)" in refused.stderr
    assert not (tmp_path / "theirs").exists()
    done = run("convert", source, "--to", "peft-lora", "--rank", "2", "--max-error", "0.9")
    assert done.returncode == 0, done.stderr
    assert "NOT exact: relative error 0." in done.stdout
    assert "blocks.0.attn.q_proj.weight" in done.stdout
    assert done.stdout.endswith("nothing was written: give -o OUT to write it\n")


def test_messages_name_options(tmp_path: Path) -> None:
    arrays = {}
    for prefix, path in (("lora_unet", "mid"), ("lora_te", "text")):
        arrays[f"{prefix}_{path}.lora_up.weight"] = np.ones((4, 2), "f4")
        arrays[f"{prefix}_{path}.lora_down.weight"] = np.ones((2, 3), "f4")
    save_file(arrays, source := tmp_path / "kohya.safetensors")
    tna.save(dora := tmp_path / "dora.safetensors", made(P.dora(rank=2)))
    lora_te = (source, "--part", "lora_te", "--to")
    for arguments, message in (
        (
            (source,),
            "has adapters of several models: lora_te, lora_unet. Choose one, for example part='lora_te' (--part",
        ),
        ((*lora_te, "diffusers", "-o", source), "another path, or overwrite=True (--overwrite)"),
        ((*lora_te, "gguf-lora"), "give base= (--base), a folder of the base model with its"),
        ((dora, "--to", "vllm"), "tnadapt.merge (tnadapt merge), or convert it to 'peft-lora' (--to peft-lora)"),
    ):
        refused = run("convert", *arguments)
        assert refused.returncode == 2
        assert refused.stderr.startswith("tnadapt: ")
        assert message in refused.stderr
    done = run("convert", str(source), "--part", "lora_te", "--to", "diffusers")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("to", "library"), [("peft", "PEFT"), ("kohya", "LyCORIS or kohya"), ("diffusers", "diffusers")]
)
def test_info_says_whose_adapter_it_is(to: str, library: str, tmp_path: Path) -> None:
    tna.convert(made(P.lora(2), {"mid_block.attn.to_q": (8, 6)}), tmp_path / "out", to=to)
    path = tmp_path / "out" / "adapter_model.safetensors" if to == "peft" else tmp_path / "out"
    done = run("info", str(path))
    assert done.returncode == 0, done.stderr
    assert f"an adapter of {library}: " in done.stdout
    assert done.stdout.endswith("tnadapt convert reads it\n")


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (P.lora(4), "LoRA r = 4"),
        (P.vera(4), "VeRA r = 4"),
        (
            P.superlora(2, groups="layer").replace(order=3, fold="balanced"),
            "SuperLoRA M = 3, G = layer, balanced, r = 2",
        ),
    ],
    ids=["LoRA", "VeRA", "SuperLoRA"],
)
def test_info_names_the_method(config: tna.Config, method: str, tmp_path: Path) -> None:
    tna.save(tmp_path / "a", made(config))
    assert f"  method      {method}\n" in run("info", tmp_path / "a").stdout


NAMES = [f"attn.{name}_proj.weight" for name in "qkv"]


def checkpoint(path: Path, other: str = "") -> Path:
    """Write a checkpoint, with one weight that differs."""
    rng = np.random.default_rng(0)
    save_file({name: (rng.normal(size=(8, 8)) + (name == other)).astype("f4") for name in NAMES}, path)
    return path


SAME = "are they the same model?"


@pytest.mark.parametrize(
    ("other", "options", "way"),
    [
        ("", [], SAME),
        ("", ["--no-compare"], SAME),
        ("", ["--json"], SAME),
        (NAMES[1], [], "--targets chooses among others that differ"),
        (NAMES[1], ["--targets", "k_proj"], ""),
        (NAMES[2], [], ""),
    ],
)
def test_equal_weights_are_warned_of(other: str, options: list[str], way: str, tmp_path: Path) -> None:
    out = tmp_path / "adapter.safetensors"
    base, tuned = checkpoint(tmp_path / "base.safetensors"), checkpoint(tmp_path / "tuned.safetensors", other)
    done = run("extract", base, tuned, "-o", out, *options)
    warning = f"warning: {base} and {tuned} have equal weights, so the adapter adds nothing; {way}\n" if way else ""
    assert (done.returncode, done.stderr) == (0, warning)
    file = tna.load(out)
    assert any(delta.any() for delta in file.deltas()) == (not way)
    if "--json" in options:
        assert json.loads(done.stdout)["parameters"] == file.num_parameters
    if "--targets" in options:
        assert [target.role for target in file.targets] == ["linear"]
