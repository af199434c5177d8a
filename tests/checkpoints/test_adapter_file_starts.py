"""Adapter files whose updates are differences to a start: what is stored, and what is computed again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.checkpoints.adapter_file import AdapterFile

P = tna.presets
TARGETS = [tna.Target("q", (12, 8), "q"), tna.Target("v", (12, 8), "v")]
SHAPES = [target.shape for target in TARGETS]
LEFT, RIGHT = "group0.split0.factor0", "group0.split0.factor1"


def arrays_of(plan: tna.SuperLoRA, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.array_shapes.items()}


def plan_of(config: tna.Config) -> tna.SuperLoRA:
    plan = tna.SuperLoRA(config, SHAPES)
    plan = plan.with_base([np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(SHAPES)])
    return plan.with_start(arrays_of(plan, 0)) if plan.point.brought else plan


def file_of(plan: tna.SuperLoRA, given: Any = None, **more: Any) -> AdapterFile:
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(plan.config, TARGETS, params, given=plan.given if given is None else given, **more)


CONFIGS = {
    "lora": P.lora(3, alpha=5, start="given"),
    "lokr": P.lokr(2, start="given"),
    "linear": P.superlora(2, projection="linear", ratio=0.4, start="given"),
    "nonlinear": P.superlora(2, projection="nonlinear", start="given"),
    "θ": P.unilora(7, rank=2, start="given"),
    "vera": P.vera(3, start="given"),
    **{start: P.lora(3, alpha=5, start=start) for start in ("pissa", "milora", "olora")},
}


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    plan, path = plan_of(CONFIGS[name]), tmp_path / "a.safetensors"
    file = file_of(plan)
    tna.save(path, file)
    found = tna.load(path)
    assert found.config == file.config
    assert found.given.keys() == plan.given.keys()
    assert all(map(np.array_equal, found.deltas(), file.deltas()))
    tna.save(tmp_path / "b.safetensors", found)
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    told = tna.info(path)
    assert told["start"] == {"name": CONFIGS[name].start, "stored": len(plan.start_shapes)}
    assert told["draws_here"] in (True, None)
    json.dumps(told)


@pytest.mark.law("file-bytes")
def test_the_usual_start_leaves_no_trace(tmp_path: Path) -> None:
    file = file_of(tna.SuperLoRA(P.lora(2), SHAPES))
    tna.save(tmp_path / "a.safetensors", file)
    assert b"start" not in (tmp_path / "a.safetensors").read_bytes()
    assert "start" not in tna.info(tmp_path / "a.safetensors")


@pytest.mark.parametrize("start", ["pissa", "milora", "olora"])
def test_what_the_base_gives_is_not_stored(start: str, tmp_path: Path) -> None:
    plan, path = plan_of(CONFIGS[start]), tmp_path / "a.safetensors"
    tna.save(path, file_of(plan, given={}))
    found = tna.load(path)
    assert not found.complete
    assert found.draws is None
    with pytest.raises(
        tna.ConfigError, match=r"the start of 'group0.split0.factor0' is computed from the base weights"
    ):
        found.deltas()
    whole = found.with_base([np.random.default_rng(i).normal(size=shape) for i, shape in enumerate(SHAPES)])
    assert all(map(np.array_equal, whole.deltas(), file_of(plan).deltas()))


def test_what_is_not_brought_is_drawn_again(tmp_path: Path) -> None:
    # One array of six is brought, the others are in the digest of the draws.
    whole = tna.SuperLoRA(P.lora(3, start="given"), SHAPES)
    plan = whole.with_start({RIGHT: np.ones((8, 3))})
    file = file_of(plan)
    tna.save(tmp_path / "a.safetensors", file)
    found = tna.load(tmp_path / "a.safetensors")
    assert found.given.keys() == {f"start.{RIGHT}"}
    assert found.draws == file.draws
    assert None is not file.draws != file_of(whole).draws
    other = file_of(whole.with_start({RIGHT: np.full((8, 3), 2.0)}))
    assert other.draws == file.draws  # of another start, the same is drawn


@pytest.mark.parametrize("kind", ["bfloat16", "float64", "float16"])
def test_the_start_is_stored_in_float32(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    plan = plan_of(P.lora(3, start="given"))
    made = plan.init("torch", kind)
    host = {n: a.float().numpy() if kind == "bfloat16" else a.numpy() for n, a in made.items()}
    dtypes = dict.fromkeys(host, kind) if kind == "bfloat16" else {}
    file = tna.AdapterFile(plan.config, TARGETS, host, dtypes=dtypes, given=plan.given)
    tna.save(tmp_path / "a.safetensors", file)
    found = tna.load(tmp_path / "a.safetensors")
    assert {array.dtype.name for array in found.given.values()} == {"float32"}
    assert not any(delta.any() for delta in found.deltas())
    assert isinstance(made[LEFT], torch.Tensor)


def test_frozen_arrays_are_stored_where_there_is_a_start(tmp_path: Path) -> None:
    plan = plan_of(P.lora(3, start="pissa"))
    file = tna.AdapterFile(plan.config, TARGETS, plan.init(), given=plan.given, trained=[LEFT])
    assert file.left_out == ()
    tna.save(tmp_path / "a.safetensors", file)
    assert tna.load(tmp_path / "a.safetensors").trained == (LEFT,)


@pytest.mark.law("bad-tensors")
def test_arrays_of_a_start_that_do_not_belong() -> None:
    plan = plan_of(P.lora(3, start="given"))
    usual = tna.SuperLoRA(P.lora(3), SHAPES)
    with pytest.raises(tna.ShapeError, match=r"unknown: 'start.group0.split0.factor0'"):
        file_of(usual, given={f"start.{LEFT}": np.ones((12, 3), np.float32)})
    with pytest.raises(tna.ShapeError, match=r"start.group0.split0.factor0 has shape \(3, 12\)"):
        file_of(plan, given={f"start.{LEFT}": np.ones((3, 12), np.float32)})
    with pytest.raises(
        tna.ConfigError, match="activation='tanh' depends on the input, so that the update of a start ca"
    ):
        file_of(plan, activation="tanh")


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("name", ["lora", "pissa", "olora"])
def test_it_exports_exactly_as_lora_of_twice_the_rank(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name].replace(rank=2)
    targets = [tna.Target("q", (24, 16), "q")]
    plan = tna.SuperLoRA(config, [(24, 16)]).with_base([np.random.default_rng(0).normal(size=(24, 16))])
    if plan.point.brought:
        plan = plan.with_start(arrays_of(plan, 0))
    rng = np.random.default_rng(1)
    params = {n: (a + 0.1 * rng.normal(size=a.shape)).astype(np.float32) for n, a in plan.init().items()}
    file = tna.AdapterFile(config, targets, params, given=plan.given)
    assert plan.lora_rank == 4
    found = tna.convert(file, to="peft-lora", dtype="float64")
    assert found.exact
    assert found.error == 0.0
    assert found.config is not None
    assert found.config["r"] == 4
    b, a = (found.tensors[f"base_model.model.q.lora_{x}.weight"] for x in "BA")
    scale = found.config["lora_alpha"] / found.config["r"]
    wide = {name: array.astype(np.float64) for name, array in params.items()}
    assert relative_error(scale * b @ a, plan.deltas(wide, "float32")[0]) < 1e-12
