"""Running recipes, one or several: what is checked first, counts and figure 2 without torch, training on the digits."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from paper import RecipeOutcome, batch, names, open_recipe, redraw, run
from paper.__main__ import main
from paper.recipe import SCALES, Recipe, parse
from tests.support.in_process import run_here

pytest.importorskip("typer")
pytest.importorskip("matplotlib")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_here(main, *arguments)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_without_a_name_the_recipes_are_listed_and_h_is_help() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "paper"], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in names())
    assert [one["name"] for one in json.loads(command("--json").stdout)] == names()
    short, long = command("-h"), command("--help")
    assert (short.returncode, short.stdout) == (0, long.stdout)
    assert "--dry-run" in short.stdout


def test_a_dry_run_lists_every_setting_and_the_papers_counts() -> None:
    done = command("svhn-mnist", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the paper states 31 for LoRTA 5D with projection, '31': the same here" in done.stdout
    found = json.loads(command("svhn-mnist", "--dry-run", "--json", "--scale", "mini").stdout)
    points = open_recipe("svhn-mnist", "mini").points()
    assert [one["parameters"] for one in found["points"]] == [point.parameters for point in points]
    assert [tna.Config.from_dict(one["config"]) for one in found["points"]] == [point.config for point in points]


def test_figure_2_is_drawn(tmp_path: Path) -> None:
    done = command("params", "--out", tmp_path / "run", "--scale", "mini")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")
    rows = lines(tmp_path / "run" / "counts.jsonl")
    assert {"arm": "SuperLoRA 2D", "rank": 1, "parameters": 364} in rows
    assert len(rows) == len(open_recipe("params", "mini").points())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["imagenet"], "expected one of"), (["svhn-mnist"], "give --features"),
        (["digits", "--scale", "mini", "--engine", "rey"], "no engine 'rey'; expected one of local, ray, slurm"),
        (["svhn-mnist", "--scale", "mini", "--engine-option", "gpus=1"], "engine local has no option 'gpus'"),
        (["geometry", "--scale", "mini", "--features", "classifier"], "so --features does not apply"),
        (["params", "--out", "file"], "file"), (["cifar10", "--arm", "LoRa", "--dry-run"], "no arm 'LoRa'"),
        *(([name, "--scale", "mini", "--redraw"], f"cannot read the results of recipe {name}")
          for name in ("digits", "geometry", "svhn-mnist")),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    done = command(*arguments)
    assert done.returncode == 2, done.stdout
    told = " ".join(done.stderr.split())
    assert word in told
    assert "run it first" in told or "--redraw" not in arguments
    assert "Traceback" not in told


# -- Training, on the digits -----------------------------------------------------------------------

SMALL = """
title = "digits"
paper = "none"
kind = "{kind}"

[mini]
weights = "digits"
epochs = 1
pretrain_epochs = 1
batch = 64
{how}
rates = [0.02]
seeds = 2

[[arms]]
name = "dense"
settings = {{ groups = "weight", order = 1, format = "dense" }}
mini = {{}}

[[arms]]
name = "LoRA"
settings = {{ rank = 5 }}
mini = {{}}

[[arms]]
name = "SuperLoRA 2D, reshape"
settings = {{ groups = 1, fold = "hypercube" }}
mini = {{ rank = [1, 14] }}
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from tnadapt.finetune import Spec, open_problem

    folder = tmp_path_factory.mktemp("cache")
    open_problem(Spec(cache=folder, pretrain_epochs=1)).build(0)
    return folder


@pytest.mark.slow
def test_a_classification_is_run_and_goes_on(cache: Path, tmp_path: Path) -> None:
    recipe = parse("small", SMALL.format(kind="classification", how='optimiser = "sgd"\nshape = "onecycle"'), "mini")
    first = run(recipe, tmp_path / "run", cache=cache)
    assert [(row["arm"], row["parameters"]) for row in first.rows] == [
        ("head alone", 0), ("dense", 32768), ("LoRA", 5120), ("SuperLoRA 2D, reshape", 364),
        ("SuperLoRA 2D, reshape", 5096),
    ]  # fmt: skip
    assert all(len(row["test"]) == 2 and min(row["test"]) > 10 for row in first.rows)
    before = first.results.read_bytes()
    first.picture.unlink()
    again = run(recipe, tmp_path / "run", cache=cache)
    assert again.results.read_bytes() == before, "what was finished is not trained again"
    assert again.rows == first.rows
    assert first.picture.is_file()
    (tmp_path / "pictures").mkdir()
    alone = redraw(recipe, tmp_path / "run", tmp_path / "pictures")
    assert alone.rows == first.rows
    assert alone.picture == tmp_path / "pictures" / "figure.png"
    assert alone.picture.read_bytes() == first.picture.read_bytes()


@pytest.mark.parametrize(
    ("how", "weights", "word"),
    [("", "minilm", "12 of 384 × 384"), ("colour = 3", "digits", "colour"), ('optimiser = "lion"', "digits", "lion"),
     ('shape = "square"', "digits", "square")],
)  # fmt: skip
def test_other_weights_and_settings_are_refused(how: str, weights: str, word: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    text = SMALL.format(kind="classification", how=how).replace('weights = "digits"', f'weights = "{weights}"')
    with pytest.raises(tna.TnadaptError, match=word):
        run(parse("small", text, "mini"), tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists(), "nothing was pretrained"


@pytest.mark.slow
def test_the_geometry_is_that_of_the_adapters(cache: Path, tmp_path: Path) -> None:
    recipe = parse("small", SMALL.format(kind="geometry", how=""), "mini")
    outcome = run(recipe, tmp_path / "run", cache=cache)
    assert outcome.picture.is_file()
    rows = lines(outcome.results)
    # Three settings beside the dense one, two seeds, eight weights.
    assert len(rows) == 2 * 3 * 2 * 8  # at each one's own rate, and at the dense update's
    assert {row["role"] for row in rows} == {"q", "v"}
    trained = [line for line in lines(tmp_path / "run" / "results.jsonl") if "key" in line]

    def updates(family: str, seed: int) -> list[np.ndarray]:
        (name,) = [one["adapter"] for one in trained if (one["family"], one["seed"]) == (family, seed)]
        return tna.load(tmp_path / "run" / "adapters" / str(name)).deltas()

    row = next(row for row in rows if (row["arm"], row["seed"]) == ("LoRA", 1))
    dense, lora = updates("dense", 1)[0].astype(np.float64), updates("LoRA", 1)[0].astype(np.float64)
    assert row["d_euclid"] == pytest.approx(np.linalg.norm(dense - lora) / np.linalg.norm(dense), abs=2e-6)
    left = np.linalg.svd(dense)[0][:, :5].T @ np.linalg.svd(lora)[0][:, :5]
    assert row["d_left"] == pytest.approx(np.linalg.norm(left) / np.sqrt(5), abs=2e-5)
    assert {one["arm"] for one in outcome.rows} == {"LoRA", "SuperLoRA 2D, reshape"}
    # Without its adapters it says so.
    for path in (tmp_path / "run" / "adapters").iterdir():
        path.unlink()
    with pytest.raises(tna.TnadaptError, match="--fresh"):
        run(recipe, tmp_path / "run", cache=cache)


MINI = ["cifar10", "digits", "geometry", "mnist-svhn", "params", "reviews", "svhn-mnist"]


class Runs:
    """Runs nothing but counts; some recipes fail."""

    def __init__(self) -> None:
        self.failing: dict[str, BaseException] = {}
        self.seen: list[tuple[str, Path]] = []
        self.given: dict[str, Any] = {}

    def __call__(self, recipe: Recipe, out: Path, **given: Any) -> RecipeOutcome:
        self.seen.append((recipe.name, out))
        self.given = given
        if recipe.name in self.failing:
            raise self.failing[recipe.name]
        if recipe.kind == "counts":
            return run(recipe, out)
        return RecipeOutcome([{"arm": "a", "parameters": 7}], out / "results.jsonl", None)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """What the command runs in place of recipes."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    played = Runs()
    monkeypatch.setattr("paper.command.run", played)
    return played


@pytest.mark.parametrize("scale", SCALES)
def test_all_are_those_of_the_scale_each_once(scale: str) -> None:
    found = batch.recipes_of(["params", "all"], scale)
    assert found[0].name == "params"
    assert len(found) == len({recipe.name for recipe in found})
    assert {recipe.scale for recipe in found} == {scale}
    others = set(names()) - {recipe.name for recipe in found}
    for name in others:
        with pytest.raises(tna.TnadaptError, match=f"recipe {name} has no scale '{scale}'"):
            batch.recipes_of(["params", name], scale)


def test_inputs_are_found_by_the_names_of_the_recipes(tmp_path: Path) -> None:
    models, data = tmp_path / "models", tmp_path / "data"
    vit = models / "vit-base-patch16-224-in21k"
    vit.mkdir(parents=True)
    (data / "cifar10").mkdir(parents=True)
    given = (str(models), str(data))
    for name, scale, expected in (
        ("cifar100", "full", (str(vit), None)),
        ("geometry", "full", (str(vit), None)),
        ("cifar10", "full", (None, str(data / "cifar10"))),
        ("svhn-mnist", "full", (None, str(data))),
        ("digits", "mini", (None, None)),
    ):
        assert batch.inputs_of(open_recipe(name, scale), *given) == expected
    assert batch.inputs_of(open_recipe("cifar10"), None, None) == (None, None)


@pytest.mark.law("parameter-count")
@pytest.mark.parametrize("given", [["cifar100"], ["params", "cifar100"]])
def test_differing_counts_are_told_first(given: list[str], runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = open_recipe("cifar100")
    (what, paper, config), *others = recipe.stated
    wrong = dataclasses.replace(recipe, stated=((what, paper + 1, config), *others))
    told = f"recipe cifar100: the paper states {paper + 1:,} for {what}, and here it has {paper:,}. Nothing was trained"
    monkeypatch.setattr(batch, "open_recipe", lambda name, scale: wrong if name == "cifar100" else open_recipe(name))
    done = command(*given)
    assert (done.returncode, runs.seen) == (2, [])
    assert told in " ".join(done.stderr.split())


def test_everything_that_is_missing_is_told_at_once(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    recipes = [open_recipe(name) for name in ("params", "svhn-mnist", "mnist-svhn", "cifar100")]

    def told(*given: Any) -> str:
        with pytest.raises(tna.TnadaptError) as caught:
            batch.check_inputs(recipes, *given)
        message = str(caught.value)
        assert message.endswith(". Nothing was trained; give these, or name the recipes that need none of them")
        return message

    needs = "it needs --features, a file of Inception's weights or classifier"
    assert told(None, None).startswith(
        f"svhn-mnist: {needs}; it needs --data, with the folders svhn and mnist. "
        f"mnist-svhn: {needs}; it needs --data, with the folders mnist and svhn. Nothing"
    )
    nowhere = tmp_path / "inception.pth"
    for name in ("svhn/train_32x32.mat", "svhn/test_32x32.mat", "mnist/t10k-images-idx3-ubyte"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert told(str(tmp_path), str(nowhere)).startswith(
        f"svhn-mnist: --features {nowhere} is not there; no train-images-idx3-ubyte, "
    )
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        (tmp_path / "mnist" / name).touch()
    batch.check_inputs(recipes, str(tmp_path), "classifier")
    nowhere.touch()
    batch.check_inputs(recipes, str(tmp_path), str(nowhere))
    batch.check_inputs([open_recipe("svhn-mnist", "mini")], None, None)  # which fetches its images


def test_all_recipes_run_though_some_fail(tmp_path: Path, runs: Runs) -> None:
    runs.failing = {"digits": tna.TnadaptError("the disk is full"), "geometry": ImportError("no module named scipy")}
    done = command("all", "--scale", "mini", "--out", tmp_path, "--seeds", 2)
    assert done.returncode == 2
    assert runs.seen == [(name, tmp_path / f"{name}-mini") for name in MINI]
    assert (runs.given["cache"], runs.given["seeds"]) == (tmp_path / "cache", 2)
    told = " ".join(done.stderr.split())
    settings = sum(len(open_recipe(name, "mini").points()) for name in MINI)
    assert f"7 recipes with {settings} settings; no count differs from the paper's" in told
    assert "digits failed: the disk is full" in told
    assert "geometry failed: recipes that train need an extra: pip install 'tnadapt[paper]' (no module named" in told
    assert told.endswith(
        "2 of 7 recipes failed: digits, geometry; the others are finished. What is finished is kept: run the same "
        "command again to continue"
    )
    assert f"results: {tmp_path / 'params-mini' / 'counts.jsonl'}" in done.stdout
    assert f"results: {tmp_path / 'svhn-mnist-mini' / 'results.jsonl'}" in done.stdout
    runs.failing = {}
    again = command("all", "--scale", "mini", "--out", tmp_path, "--json")
    assert again.returncode == 0
    assert [one["recipe"] for one in json.loads(again.stdout)] == MINI


def test_an_interrupt_ends_all(tmp_path: Path, runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.failing = {"digits": KeyboardInterrupt()}
    done = command("all", "--scale", "mini", "--out", tmp_path)
    assert done.returncode == 130
    assert [name for name, _ in runs.seen] == ["cifar10", "digits"]
    told = capfd.readouterr().err
    assert f"finished trainings are in {tmp_path / 'digits-mini'}; run the same command again" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["all", "--scale", "mini", "--engine", "rey"], "no engine 'rey'; expected one of local, ray, slurm"),
        (["params", "cifar10", "--arm", "LoRA"], "--arm takes one recipe at a time"),
        (["all"], "svhn-mnist: it needs --features"),
        (["params", "reviews"], "recipe reviews has no scale 'full'; it has mini"),
        (["cifar100", "--scale", "mini"], "recipe cifar100 has no scale 'mini'; it has full"),
        (["all", "imagenet"], "no recipe 'imagenet'; expected one of cifar10"),
        (["all", "--scale", "giant"], "scale must be one of full, mini; got 'giant'"),
    ],
)
def test_a_mistake_is_told_before_the_first_recipe(arguments: list[str], message: str, runs: Runs) -> None:
    done = command(*arguments)
    assert (done.returncode, runs.seen) == (2, [])
    assert message in " ".join(done.stderr.split())
