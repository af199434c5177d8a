"""A preset of another package, with a format of its own: everywhere that a built-in preset is."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.planning import known_as, preset_call
from tnadapt.plugins import forget_registered
from tnadapt.presets import PRESETS, AdaptedWeights, Ladder, Preset
from tnadapt.testing import FormatContract

from .conftest import command

SHAPES = [(12, 8)] * 4


@pytest.mark.usefixtures("plugins")
class TestBlockTerm(FormatContract):
    @property
    def kind(self) -> Any:  # type: ignore[override]
        tna.Config(format="block-term")  # finds the plug-in
        return importlib.import_module("tnadapt_block_term").BlockTerm


@pytest.mark.usefixtures("plugins")
def test_a_registered_preset_has_its_name() -> None:
    assert "btd" not in PRESETS
    with pytest.raises(AttributeError, match=r"'tnadapt\.presets' has no attribute 'btdd'; did you mean 'btd'\? If"):
        print(tna.presets.btdd)
    forget_registered()
    assert tna.presets.btd(3, 2).rank == (3, 2)
    assert "btd" in dir(tna.presets)
    assert "btd" not in tna.presets.__all__
    config = tna.presets.btd(3, 2, alpha=4.0, seed=5)
    assert str(known_as(config)) == "BTD B = 3, r = 2"
    assert str(preset_call(config)).startswith("btd(")
    assert eval(str(preset_call(config)), {"btd": tna.presets.btd}) == config


@pytest.mark.usefixtures("plugins")
def test_a_plan_and_verify_have_a_row_of_it() -> None:
    found = tna.plan(SHAPES, 60)
    rows = [row for row in found.rows if row.name.family == "BTD"]
    assert rows
    assert all(row.parameters <= 60 and row.call is not None and row.call.preset == "btd" for row in rows)
    report = tna.verify(backends=["numpy"])
    laws = {law.name: law for law in report.laws if law.subject == "btd"}
    assert laws["ΔW = the method's own formula"].holds
    assert all(law.holds for law in laws.values())
    wrong = dataclasses.replace(PRESETS["btd"], formula=lambda params, config, shapes: [np.zeros(s) for s in shapes])
    tna.register_preset(wrong)
    report = tna.verify(backends=["numpy"])
    broken = [(law.subject, law.name) for law in report.laws if not law.holds]
    assert broken == [("btd", "ΔW = the method's own formula")]


def test_commands_take_its_name(plugins: Path) -> None:
    pytest.importorskip("typer")
    weights = ("--shape", "12x8*4")
    listed = command(plugins, "presets", *weights, "--json")
    assert listed.returncode == 0, listed.stderr
    (row,) = [row for row in json.loads(listed.stdout)["presets"] if row["preset"] == "btd"]
    assert row["arguments"] == "blocks=2, side=2"
    assert row["from"] == 1 + 4 + 12 + 8
    checked = command(plugins, "verify", "--preset", "btd", "--set", "blocks=3", *weights, "--backend", "numpy")
    assert checked.returncode == 0, checked.stderr
    assert "all laws hold" in checked.stdout
    planned = command(plugins, "plan", "--budget", "60", *weights, "--all", "--json")
    assert planned.returncode == 0, planned.stderr
    assert "BTD" in planned.stdout
    missing = command(None, "verify", "--preset", "btd", *weights)
    assert missing.returncode == 2
    assert "no preset 'btd'" in missing.stderr
    assert "install the plug-in" in " ".join(missing.stderr.split())
    assert "Traceback" not in missing.stderr


@pytest.mark.usefixtures("plugins")
def test_attach_and_a_study_take_its_name() -> None:
    torch = pytest.importorskip("torch")
    adapter = tna.torch.attach(torch.nn.Sequential(torch.nn.Linear(8, 8)), "btd", blocks=3, targets="all-linear")
    assert adapter.plan.config == tna.presets.btd(3)
    grid = importlib.import_module("tnadapt.finetune.grid")
    assert [str(method.name) for method in grid.methods_of(["btd"], [], {"blocks": 3}, SHAPES, 2)] == ["BTD blocks = 3"]
    assert "BTD" in {method.family for method in grid.within(100, SHAPES)}


# -- What is no preset ----------------------------------------------------------------------------


def lora(rank: int = 4, **changes: Any) -> tna.Config:
    return tna.presets.lora(rank, **changes)


MINE = {"name": "mine", "make": lora, "title": "Mine", "reference": "a paper"}


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    yield
    forget_registered()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lora"}, "preset 'lora' is built in and cannot be replaced: choose another name"),
        *(
            ({"name": name}, r"must be a Python identifier of at most 64 lower-case letters, .* tnadapt\.presets\.NAME")
            for name in ("my-lora", "MyLoRA", "class", "", "2lora", "_mine", "a" * 65)
        ),
        ({"name": "annotations"}, r"tnadapt\.presets\.annotations is something else than a preset: choose another"),
        ({"name": 3}, "name must be a string; got 3"),
        ({"make": "lora"}, "make must be a function; got 'lora'"),
        ({"make": lambda rank: lora(rank)}, r"make of preset 'mine' must take fields .*: define it as def mine\(…, "),
        ({"example": [3]}, "example must be a mapping"),
        ({"sizes": 3}, "sizes must be a function"),
        ({"formula": "B A"}, "formula must be a function"),
    ],
)  # fmt: skip
def test_what_is_no_preset_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.register_preset(Preset(**{**MINE, **changes}))
    assert "mine" not in PRESETS
    with pytest.raises(tna.ConfigError, match=r"register_preset takes a tnadapt\.presets\.Preset; got <function lora"):
        tna.register_preset(lora)  # type: ignore[arg-type]


def test_a_preset_that_returns_no_config_is_named() -> None:
    tna.register_preset(Preset(**{**MINE, "make": lambda **changes: changes}))
    with pytest.raises(tna.ConfigError, match=r"preset 'mine' must return a tnadapt\.Config; got \{\}"):
        tna.verify(backends=["numpy"])


def test_two_packages_cannot_have_the_same_preset() -> None:
    tna.register_preset(Preset(**MINE))
    tna.register_preset(Preset(**MINE))  # as a cell that is run again
    other = lora.__class__(lora.__code__, {"__name__": "another"}, "lora")
    with pytest.raises(tna.ConfigError, match=rf"preset 'mine' is already registered, by {__name__}\.lora: choose"):
        tna.register_preset(Preset(**{**MINE, "make": other}))


def test_a_preset_without_sizes_has_its_ranks() -> None:
    tna.register_preset(Preset(**MINE))
    (ladder,) = PRESETS["mine"].ladders(AdaptedWeights([(12, 8), (6, 4)]))
    assert isinstance(ladder, Ladder)
    assert (ladder.config(3), ladder.most(tna.SuperLoRA(ladder.config(1), SHAPES))) == (lora(3), 4)
