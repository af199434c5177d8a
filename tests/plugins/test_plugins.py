"""Plug-ins that touch nothing of ours, through everything that takes a config: formats, maps, sources, presets."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import on_every_library
from tests.support.depth import in_depth
from tnadapt.algebra.formats import CP, Format
from tnadapt.backends import Backend
from tnadapt.planning import known_as, largest_rank, preset_call, step_cost
from tnadapt.plugins import forget_registered
from tnadapt.presets import PRESETS, AdaptedWeights, Ladder, Preset
from tnadapt.testing import FormatContract, MapContract

from .conftest import command

SHAPES = [(12, 10), (12, 10)]
RING = {"format": "tensor-ring", "order": 3, "groups": 1, "fold": "hypercube"}
SKETCH = {"projection": "count-sketch", "groups": 1, "fold": "hypercube"}
CONFIGS: dict[str, dict[str, Any]] = {
    "ring": {"rank": 2, **RING},
    "ring of ranks": {"rank": (1, 2, 3), **RING},
    "ring, Kronecker": {"rank": 2, "splits": 2, "leading": "same", **RING},
    "ring, Hadamard, terms": {"rank": 2, "splits": 2, "combine": "hadamard", "terms": 2, **RING},
    "ring, shuffled": {"rank": 2, "projection": "shuffle", **RING},
    "sketch": {"rank": 2, "ratio": 0.3, **SKETCH},
    "sketch of a group each": {"rank": 2, "ratio": 0.5, **SKETCH, "groups": "weight", "shared": False},
    "sketch of a ring": {"rank": 2, "ratio": 0.3, **RING, **SKETCH, "order": 3},
}
CONFIGS["blocks"] = {**CONFIGS["ring"], "rank": (2, 2), "format": "block-term"}
named = pytest.mark.parametrize("name", CONFIGS)


def plan_of(name: str, shapes: list[tuple[int, int]] = SHAPES) -> tna.UpdatePlan:
    return tna.UpdatePlan(tna.Config(**CONFIGS[name]), shapes)


def drawn(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}


@pytest.mark.usefixtures("plugins")
class TestTensorRing(FormatContract):
    @property
    def kind(self) -> Any:  # type: ignore[override]
        return importlib.import_module("tnadapt_tensor_ring").TensorRing


@pytest.mark.usefixtures("plugins")
class TestCountSketch(MapContract):
    @property
    def kind(self) -> Any:  # type: ignore[override]
        return importlib.import_module("tnadapt_count_sketch").CountSketch


def test_without_them_the_names_are_refused() -> None:
    for settings, message in (
        ({"format": "tensor-ring"}, r"one of 'dense', .*got 'tensor-ring'.*install the plug-in"),
        ({"projection": "count-sketch"}, r"one of 'identity', .*got 'count-sketch'"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tna.Config.from_dict(settings)


@pytest.mark.usefixtures("plugins")
def test_a_name_is_found_when_it_is_first_asked_for() -> None:
    tna.Config(format="tt")
    assert "tnadapt_tensor_ring" not in sys.modules
    assert tna.Config(format="tensor-ring").format == "tensor-ring"
    assert "tnadapt_tensor_ring" in sys.modules


@on_every_library("name", in_depth(CONFIGS, [*CONFIGS][::3]), ["ring"])
@pytest.mark.usefixtures("plugins")
def test_verify_holds_the_laws(name: str, backend: Backend) -> None:
    if not backend.usable():
        pytest.skip(f"{backend.name} finds no device to compute on")
    report = tna.verify(tna.Config(**CONFIGS[name]), SHAPES, backends=[backend.name])
    assert report.holds, str(report)


@pytest.mark.parametrize("name", in_depth(["ring", "ring of ranks", "sketch", "sketch of a ring"], ["ring", "sketch"]))
@pytest.mark.usefixtures("plugins")
def test_decompose_recovers_what_it_made(name: str) -> None:
    plan = plan_of(name)
    deltas = plan.deltas(drawn(plan))
    _, report = tna.decompose(deltas, plan.config, max_iterations=300, tol=1e-9)
    assert report.error < 0.02, report


@named
@pytest.mark.usefixtures("plugins")
def test_what_the_planner_says_is_so_and_its_network_is_drawn(name: str, tmp_path: Path) -> None:
    plan = plan_of(name)
    rank = largest_rank(plan)
    delta = plan.deltas(drawn(plan, seed=7))[0]
    assert rank.exact
    assert np.linalg.matrix_rank(delta, rtol=1e-9) == rank.value
    assert step_cost(plan) > 0
    pytest.importorskip("matplotlib")
    plot = importlib.import_module("tnadapt.plot")
    plot.network(plan.config, SHAPES, tmp_path / "network.svg")
    assert (tmp_path / "network.svg").read_text(encoding="utf-8").count("<path") > 10


@pytest.mark.usefixtures("plugins")
def test_settings_of_a_plug_in_have_a_name_and_a_count() -> None:
    config = tna.Config(**CONFIGS["ring"])
    assert str(known_as(config)) == "SuperLoRA tensor ring, M = 3, r = 2"
    assert tna.parameter_count(config, SHAPES) == 3 * 2 * 2 * 7


def saved(plan: tna.UpdatePlan, path: Path) -> dict[str, np.ndarray]:
    targets = [tna.Target(f"layer{i}.weight", shape) for i, shape in enumerate(SHAPES)]
    arrays = {key: array.astype(np.float32) for key, array in drawn(plan).items()}
    tna.save(path, tna.AdapterFile(plan.config, targets, arrays))
    return arrays


def test_commands_in_a_process_of_their_own(plugins: Path, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    path = tmp_path / "adapter.safetensors"
    saved(plan_of("sketch of a ring"), path)
    shown, without = command(plugins, "info", path), command(None, "info", path)
    assert shown.returncode == 0, shown.stderr
    assert "tensor-ring" in shown.stdout
    assert without.returncode == 2
    assert "install the plug-in" in without.stderr
    assert "Traceback" not in without.stderr


@named
def test_a_file_needs_the_plug_in_and_says_so(name: str, plugins: Path, tmp_path: Path) -> None:
    plan, path = plan_of(name), tmp_path / "adapter.safetensors"
    arrays = saved(plan, path)
    again = tna.load(path)
    assert again.config == plan.config
    for found, expected in zip(again.deltas(), plan.deltas(arrays), strict=True):
        assert np.array_equal(found, expected)
    of = {"blocks": "block-term", "ring": "tensor-ring", "sketch": "count-sketch"}
    missing = next(plug_in for word, plug_in in of.items() if word in name)
    sys.path.remove(str(plugins))
    forget_registered()
    with pytest.raises(tna.FileError, match=rf"adapter\.safetensors.*got '{missing}'.*install the plug-in"):
        tna.load(path)


@named
@pytest.mark.usefixtures("plugins")
def test_attach_train_merge_unmerge_save_load(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tt = pytest.importorskip("tnadapt.torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10))
    base = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(5, 10)
    before = model(x)
    adapter = tt.attach(model, tna.Config(**CONFIGS[name]), targets="all-linear")
    assert torch.equal(model(x), before)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - 1.0).square().mean().backward()
        optimizer.step()
    assert (model(x) - 1.0).square().mean() < 0.9 * (before - 1.0).square().mean()
    attached = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), attached, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    fresh = torch.nn.Sequential(torch.nn.Linear(10, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10))
    fresh.load_state_dict(base)
    tt.load(fresh, path)
    assert torch.equal(fresh(x), model(x))
    adapter.detach()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())


# -- A plug-in that is broken -----------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Return a function that installs a plug-in of this code, as far as this process can see."""

    def written(code: str) -> None:
        info = tmp_path / "mine-2.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 2.5\n")
        (info / "entry_points.txt").write_text("[tnadapt.plugins]\nring = my_plug_in:register\n")
        (tmp_path / "my_plug_in.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        forget_registered()

    yield written
    sys.modules.pop("my_plug_in", None)


def test_a_plug_in_that_fails_is_named(install: Callable[[str], None]) -> None:
    install("def register():\n    raise RuntimeError('no license')\n")
    assert tna.Config(format="cp").format == "cp"
    failed = r"plug-in 'ring' of mine 2\.5 failed to load: RuntimeError: no license"
    with pytest.raises(tna.ConfigError, match=rf"got 'tensor-ring'.*{failed}"):
        tna.Config(format="tensor-ring")
    with pytest.raises(AttributeError, match=rf"no attribute 'ringlora'.* install the plug-in; {failed}"):
        print(tna.presets.ringlora)


SOURCE = """
import dataclasses
import numpy as np
import tnadapt as tna
from tnadapt.sources import Source

@dataclasses.dataclass(frozen=True)
class Halves(Source):
    def array(self, shape, stream):
        return np.full(shape, 0.5, np.float32)

def register():
    tna.register_source("halves", Halves)
"""


def test_a_source_is_found_when_it_is_first_asked_for(install: Callable[[str], None]) -> None:
    settings: Any = {"rank": 2, "sources": {"factor1": {"source": "halves"}}}
    with pytest.raises(tna.ConfigError, match=r"source must be one of 'trained', .*got 'halves'"):
        tna.Config(**settings)
    install(SOURCE)
    plan = tna.UpdatePlan(tna.Config(**settings), SHAPES)
    (factor,) = (array for name, array in drawn(plan).items() if name.startswith("group0."))
    rows = 0.5 * plan.config.scale * factor.sum(axis=1)
    np.testing.assert_allclose(plan.deltas(drawn(plan))[0], np.repeat(rows[:, None], 10, axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "cls", "message"),
    [
        ("Ring", Format, "lower-case letters"),
        ("", Format, "lower-case letters"),
        (3, Format, "lower-case letters"),
        ("tt", Format, "format 'tt' is built in and cannot be replaced"),
        ("mine", dict, r"inherits from tnadapt\.algebra\.formats\.Format; got"),
    ],
)
def test_what_is_no_format_is_refused(name: Any, cls: Any, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.register_format(name, cls)


def test_two_packages_cannot_have_the_same_name() -> None:
    tna.register_format("mine", type("First", (CP,), {"__module__": "one_package"}))
    tna.register_format("mine", type("First", (CP,), {"__module__": "one_package"}))  # as a cell that is run again
    message = r"format 'mine' is already registered, by one_package\.First: choose another name for another\.Second"
    with pytest.raises(tna.ConfigError, match=message):
        tna.register_format("mine", type("Second", (CP,), {"__module__": "another"}))
    assert tna.Config(format="mine").format == "mine"


# -- A preset of another package, with a format of its own ------------------------------------------

WEIGHTS = [(12, 8)] * 4


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
    found = tna.plan(WEIGHTS, 60)
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
    assert [str(method.name) for method in grid.methods_of(["btd"], [], {"blocks": 3}, WEIGHTS, 2)] == [
        "BTD blocks = 3"
    ]
    assert "BTD" in {method.family for method in grid.within(100, WEIGHTS)}


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
    assert (ladder.config(3), ladder.most(tna.UpdatePlan(ladder.config(1), WEIGHTS))) == (lora(3), 4)
