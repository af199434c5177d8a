"""Running recipes: counts and figure 2 without torch; real training of classification and geometry on the digits."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from paper import names, open_recipe, plots, redraw, run
from paper.__main__ import main
from paper.recipe import parse
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


# -- Figures --------------------------------------------------------------------------------------

CURVES = (plots.Curve("LoRA", (plots.Dot(9, (0.5,)), plots.Dot(20, (0.6,)))),)
PICTURES = {
    "fronts": lambda path: plots.fronts(CURVES, path),
    "fronts_grid": lambda path: plots.fronts_grid([plots.Panel(CURVES, "accuracy")], path),
    "generated": lambda path: plots.generated([("a", np.zeros((2, 4, 4, 1), np.uint8))], path),
    "similarity": lambda path: plots.similarity(
        [{"arm": "LoRA", "role": role, "d_left": 0.1, "d_right": 0.2, "d_euclid": 0.3} for role in "qv"], path
    ),
}


def test_every_kind_of_picture_is_tried() -> None:
    assert PICTURES.keys() == {name for name in plots.__all__ if inspect.isfunction(getattr(plots, name))}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_replaces_the_old_one_at_once(name: str, tmp_path: Path) -> None:
    """The old file is not written to: open handles and hard links keep its content."""
    path, kept = tmp_path / "a.png", tmp_path / "kept.png"
    path.write_bytes(b"an old picture")
    os.link(path, kept)
    PICTURES[name](path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert kept.read_bytes() == b"an old picture"
    assert {found.name for found in tmp_path.iterdir()} == {"a.png", "kept.png"}


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
    assert first.picture is not None
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
    assert outcome.picture is not None
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
