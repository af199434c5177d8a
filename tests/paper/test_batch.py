"""Several recipes in one run: what is checked before the first training, and that one's failure is not the others'."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from paper import RecipeOutcome, batch, names, open_recipe
from paper import run as run_recipe
from paper.__main__ import main
from paper.recipe import SCALES, Recipe
from tests.support.in_process import run_here

pytest.importorskip("typer")

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
            return run_recipe(recipe, out)
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
def test_counts_that_differ_are_told_before_the_first_recipe(
    given: list[str], runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = open_recipe("cifar100")
    (what, paper, config), *others = recipe.stated
    wrong = dataclasses.replace(recipe, stated=((what, paper + 1, config), *others))
    told = f"recipe cifar100: the paper states {paper + 1:,} for {what}, and here it has {paper:,}. Nothing was trained"
    monkeypatch.setattr(batch, "open_recipe", lambda name, scale: wrong if name == "cifar100" else open_recipe(name))
    done = run_here(main, *given)
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
    done = run_here(main, "all", "--scale", "mini", "--out", tmp_path, "--seeds", 2)
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
    again = run_here(main, "all", "--scale", "mini", "--out", tmp_path, "--json")
    assert again.returncode == 0
    assert [one["recipe"] for one in json.loads(again.stdout)] == MINI


def test_an_interrupt_ends_all(tmp_path: Path, runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    runs.failing = {"digits": KeyboardInterrupt()}
    done = run_here(main, "all", "--scale", "mini", "--out", tmp_path)
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
    done = run_here(main, *arguments)
    assert (done.returncode, runs.seen) == (2, [])
    assert message in " ".join(done.stderr.split())
