"""Commands describe a population, and take one adapter where one is meant."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.support.in_process import main, run_here

pytest.importorskip("typer")

TARGETS = [tna.Target(f"layers.{n}.self_attn.q_proj", (6, 4), "q") for n in range(2)]


def saved(path: Path, count: int, names: list[str | None] | None = None) -> Path:
    config = tna.presets.lora(2)
    member = tna.AdapterFile(config, TARGETS, tna.UpdatePlan(config, [(6, 4)] * 2).init())
    tna.save(path, tna.PopulationFile.from_members([member] * count, names))
    return path


def test_info_describes_a_population(tmp_path: Path) -> None:
    def shown(path: Path) -> str:
        done = run_here(main, "info", path)
        assert (done.returncode, done.stderr) == (0, "")
        return " ".join(done.stdout.split())

    path = saved(tmp_path / "population.safetensors", 10, [*[f"user-{k}" for k in range(9)], None])
    assert f"{path}: a tnadapt population of adapters, format version 3, " in shown(path)
    assert "members 10: user-0, user-1, user-2, user-3, user-4, user-5, user-6, user-7 and 2 more" in shown(path)
    assert "members 3: ann, 1, größe 7 parameters 40 float32" in shown(saved(path, 3, ["ann", None, "größe 7"]))
    assert "members 1,000, without names parameters 40" in shown(saved(path, 1000))


@pytest.mark.parametrize("command", ["merge {base} {path} -o {out}", "predict {path} --data {base}"])
def test_a_population_is_refused_where_one_adapter_is_meant(tmp_path: Path, command: str) -> None:
    if command.startswith("predict"):
        pytest.importorskip("transformers")
    path, base, out = saved(tmp_path / "population.safetensors", 2), tmp_path / "base.safetensors", tmp_path / "out"
    save_file({f"{target.module}.weight": np.ones(target.shape, np.float32) for target in TARGETS}, base)
    done = run_here(main, *(word.format(base=base, path=path, out=out) for word in command.split()))
    assert (done.returncode, done.stdout) == (2, "")
    why = "is a population of 2 members, and one adapter is expected: give one of them, such as member=0 (--member 0)"
    assert done.stderr == f"tnadapt: {path}: {why}\n"
    assert not out.exists()
    done = run_here(main, *(word.format(base=base, path=path, out=out) for word in command.split()), "--member", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"tnadapt: {path}: member must be from 0 to 1; got 2\n"


def test_commands_take_a_member_by_name_or_number(tmp_path: Path) -> None:
    path, base = saved(tmp_path / "adapter.safetensors", 4, ["ann", None, "3", "2"]), tmp_path / "base.safetensors"
    for number in range(4):
        tna.replace(path, number, {name: array + number for name, array in tna.load(path)[number].arrays.items()})
    save_file({f"{target.module}.weight": np.ones(target.shape, np.float32) for target in TARGETS}, base)
    for text, number in (("ann", 0), ("0", 0), ("1", 1), ("3", 2), ("2", 3)):  # names come first
        out, alone = tmp_path / "out.safetensors", tmp_path / "alone.safetensors"
        done = run_here(main, "merge", base, path, "-o", out, "--member", text, "--overwrite")
        assert (done.returncode, done.stderr) == (0, "")
        tna.merge(base, tna.load(path)[number], alone, overwrite=True)
        assert out.read_bytes() == alone.read_bytes()
        for source in (path, tmp_path):
            done = run_here(main, "convert", source, "-o", out, "--member", text, "--overwrite")
            assert (done.returncode, done.stderr) == (0, "")
            tna.save(alone, tna.load(path)[number])
            assert out.read_bytes() == alone.read_bytes()
    for text in ("9" * 5000, "bob", "-1", "01", "١"):
        done = run_here(main, "convert", path, "--member", text)
        assert (done.returncode, done.stderr[:60]) == (2, f"tnadapt: {path}: member: there is no member '"[:60])
    for source, why in ((alone, "has one adapter, and no members: leave out member= (--member)"), (base, "is not a")):
        done = run_here(main, "convert", source, "--member", "1")
        assert done.returncode == 2
        assert done.stderr.startswith(f"tnadapt: {source}: {why}")


def test_convert_writes_all_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, out = saved(tmp_path / "population.safetensors", 2, ["ann", None]), tmp_path / "out"
    counts = list[tuple[int, int]]()
    monkeypatch.setattr(tna.ProgressBar, "counts", lambda bar, done, total: counts.append((done, total)))
    done = run_here(main, "convert", path, "-o", out, "--to", "vllm")
    assert (done.returncode, done.stderr, counts) == (0, "", [(1, 2), (2, 2)])
    assert done.stdout == (
        "tnadapt -> vllm-lora, 2 members\nparameters 80 -> 320\nexact but for rounding: relative error 0\n"
        f"written to {out}\n"
    )
    assert sorted(place.name for place in out.iterdir()) == ["1", "ann"]
    done = run_here(main, "convert", path, "--to", "vllm", "--json")
    assert json.loads(done.stdout) == {
        "from": "tnadapt", "to": "vllm-lora", "exact": True, "error": 0.0, "errors": {"ann": 0.0, "1": 0.0},
        "parameters": {"before": 80, "after": 320}, "notes": [], "out": None,
    }  # fmt: skip
    done = run_here(main, "convert", path, "-o", tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr == (
        f"tnadapt: {path}: a population of 2 members does not fit in one file: give one of them, such as member='ann' "
        "(--member ann), or a form that is a folder, such as to='vllm-lora' (--to vllm-lora)\n"
    )
