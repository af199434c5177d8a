"""Commands describe a population, and take one adapter where one is meant."""

from __future__ import annotations

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
    member = tna.AdapterFile(config, TARGETS, tna.SuperLoRA(config, [(6, 4)] * 2).init())
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


@pytest.mark.parametrize("command", ["merge {base} {path} -o {out}", "convert {path} -o {out} --to peft-lora"])
def test_a_population_is_refused_where_one_adapter_is_meant(tmp_path: Path, command: str) -> None:
    path, base, out = saved(tmp_path / "population.safetensors", 2), tmp_path / "base.safetensors", tmp_path / "out"
    save_file({f"{target.module}.weight": np.ones(target.shape, np.float32) for target in TARGETS}, base)
    done = run_here(main, *(word.format(base=base, path=path, out=out) for word in command.split()))
    assert (done.returncode, done.stdout) == (2, "")
    why = "is a population of 2 members, and one adapter is expected: name a member, such as tnadapt.load(path)[0]"
    assert done.stderr == f"tnadapt: {path}: {why}\n"
    assert not out.exists()
