"""Methods whose weights stay low-rank are exported as LoRA exactly, from their own factors, and load in PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import AdapterFile, Config, Rows, SuperLoRA, Target
from tnadapt.convert._updates import Unpacked, modules_of
from tnadapt.sources import Seeded

from .conversions import TOLERANCE, error, model, updates

P = tna.presets
# Grouped-query attention of three layers: four query heads and two key and value heads of 6 rows.
SHAPES: dict[str, tuple[int, ...]] = {
    f"layers.{layer}.{name}_proj": (rows, 20) for layer in range(3) for name, rows in (("q", 24), ("v", 12))
}

METHODS: dict[str, Config] = {
    "lora": P.lora(2, alpha=3),
    "lora, terms": P.lora(1, terms=3),
    "lotr": P.lotr(2, groups="role", alpha=3),
    "lotr, train": P.lotr(2, train=True, groups="role"),
    "lotr, terms": P.lotr(1, terms=2, groups="role", alpha=0.3),
    "fact_tt": P.fact_tt(3, groups="role"),
    "fact_tk": P.fact_tk(2, groups="role"),
    "fact_tk, unequal": P.fact_tk((2, 2, 3), groups="role"),
    "cara": P.cara(2, head_size=6, groups="role"),
    "cara, terms": P.cara(1, head_size=6, terms=3, groups="role"),
    "lorta_cp": P.lorta_cp(3, head_size=6, groups="role"),
    "metatt": P.metatt(2, groups="role", alpha=3),
    "metatt, heads": P.metatt(2, head_size=6, groups="role"),
    "metatt, terms": P.metatt(1, terms=2, groups="role"),
    "miss": P.miss(5, alpha=3),
    "miss that is cut": P.miss(3),
    "miss of rows": P.miss(8, 4),
    "low rank, cosines": Config(2, projection="dct2", on="weight"),
    "Hadamard across weights": P.lotr(1, splits=2, combine="hadamard", leading="same", groups="role"),
}
FROZEN = {
    "lora": {"factor1": Seeded("normal")},
    "lotr": {"factor1": Seeded("normal"), "factor2": Seeded("orthonormal")},
    "lotr, train": {"core1": Seeded("normal")},
    "fact_tk": {"factor2": Seeded("signs")},
    "cara": {"factor0": Seeded("uniform")},
    "lorta_cp": {"factor4": Seeded("normal", shared=False)},
    "metatt": {"core0": Seeded("normal"), "core3": Seeded("normal")},
}
CASES = {**METHODS, **{f"{name}, frozen": METHODS[name].replace(sources=own) for name, own in FROZEN.items()}}


def adapter(config: Config, dtype: str = "float32") -> AdapterFile:
    targets = [Target(path, shape, path[-6]) for path, shape in SHAPES.items()]
    plan = SuperLoRA(config, [target.shape for target in targets], roles=[target.role for target in targets])
    rng = np.random.default_rng(0)
    return AdapterFile(config, targets, {n: rng.normal(size=s).astype(dtype) for n, s in plan.param_shapes.items()})


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("no singular value decomposition is needed")


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("name", CASES)
def test_the_factors_are_the_networks_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = adapter(CASES[name])
    unpacked = Unpacked(file)
    if name != "fact_tk, unequal":  # narrowed to the smaller of two ranks
        monkeypatch.setattr(np.linalg, "svd", refuse)
    found = tna.convert(file, to="peft-lora")
    assert found.exact
    assert found.error <= TOLERANCE
    for module in modules_of(file):
        form = module.form(unpacked)
        assert form is not None
        assert form.kind == "lora"
        assert form.rank == file.plan.largest_rank(module.targets[0][0])
        # Before anything is rounded.
        assert error(form.delta(), unpacked.delta(module.targets[0][0])) < 1e-12
        assert found.tensors[f"base_model.model.{module.path}.lora_B.weight"].shape == (module.shape[0], form.rank)
    assert found.config is not None
    assert found.config["r"] == file.plan.lora_rank
    assert not found.config["rank_pattern"]


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", CASES)
def test_the_error_is_zero_where_nothing_is_rounded(name: str) -> None:
    for file in (adapter(CASES[name], "float64"), adapter(CASES[name])):
        found = tna.convert(file, to="peft-lora", dtype="float64")
        assert found.exact
        assert found.error == 0.0
        assert set(found.errors.values()) == {0.0}


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("name", CASES)
def test_peft_loads_the_same_updates(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    file = adapter(CASES[name])
    tna.convert(file, tmp_path / "out", to="peft-lora")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model(SHAPES), tmp_path / "out")
    for path, delta in updates(file).items():
        assert error(wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default"), delta) <= TOLERANCE
    again = tna.convert(tmp_path / "out").file
    assert again is not None
    assert again.config.format == "cp"


def test_ranks_that_differ_are_patterns(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    # Three rows hold no rank above 3.
    shapes: dict[str, tuple[int, ...]] = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (3, 40)}
    config = P.lotr(5, groups="role")
    targets = [Target(path, shape, path[-6]) for path, shape in shapes.items()]
    plan = SuperLoRA(config, list(shapes.values()), roles="qv")
    assert [plan.largest_rank(weight) for weight in range(2)] == [5, 3]
    rng = np.random.default_rng(0)
    file = AdapterFile(config, targets, {n: rng.normal(size=s).astype("f4") for n, s in plan.param_shapes.items()})
    found = tna.convert(file, tmp_path / "out", to="peft-lora", rank=5)
    assert found.exact
    assert found.config is not None
    assert {found.config["r"], *found.config["rank_pattern"].values()} == {5, 3}
    wrapped = peft.PeftModel.from_pretrained(model(shapes), tmp_path / "out")
    for path, delta in updates(file).items():
        assert error(wrapped.get_submodule(f"base_model.model.{path}").get_delta_weight("default"), delta) <= TOLERANCE


def test_rows_of_a_fused_weight_are_one_update_of_the_sum_of_their_ranks() -> None:
    # q of 24 rows and v of 12 in one weight, with keys between them.
    targets = [
        Target(f"layers.{layer}.qkv", (48, 20), role, rows=Rows(start, length, 48))
        for layer in range(2)
        for role, start, length in (("q", 0, 24), ("v", 36, 12))
    ]
    config = P.lotr(2, groups="role")
    plan = SuperLoRA(config, [target.shape for target in targets], roles=[target.role for target in targets])
    rng = np.random.default_rng(0)
    file = AdapterFile(config, targets, {n: rng.normal(size=s).astype("f4") for n, s in plan.param_shapes.items()})
    found = tna.convert(file, to="peft-lora", dtype="float64")
    assert (found.exact, found.error) == (True, 0.0)
    assert found.config is not None
    assert found.config["r"] == 4


def test_a_slice_of_high_rank_is_left_to_the_other_ways() -> None:
    file = adapter(P.lotr(12, groups="role"))
    assert file.plan.lora_rank is None
    with pytest.raises(
        tna.ConfigError, match=r"give rank= \(--rank\) or max_error= \(--max-error\) for the nearest of lower rank"
    ):
        tna.convert(file, to="peft-lora")
    assert tna.convert(file, to="lycoris-full").exact


@pytest.mark.parametrize("to", ["lycoris-lora", "peft-loha", "lycoris-lokr"])
@pytest.mark.parametrize("name", ["lotr", "cara", "lorta_cp"])
def test_other_forms_that_hold_low_rank_are_exact_too(name: str, to: str) -> None:
    found = tna.convert(adapter(CASES[name]), to=to)
    assert found.exact
    assert found.error <= TOLERANCE
