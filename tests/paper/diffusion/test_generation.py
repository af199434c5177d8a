"""The diffusion recipes really train, sample and measure, on tiny images; full recipes run their first steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from paper import open_recipe, redraw, run
from paper.recipe import Recipe
from tests.support.depth import long_only

torch = pytest.importorskip("torch")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")
pytest.importorskip("torch_fidelity")

from paper.diffusion.generation import chosen_rate, generated_in
from paper.diffusion.images import ImageSet, balanced, read_images
from paper.diffusion.metrics import METRICS
from paper.diffusion.opening import generation_of
from tnadapt.finetune import Reporter
from tnadapt.finetune.engines import threads

from .standins import write_idx, write_svhn

pytestmark = pytest.mark.slow

TINY = {
    "image_size": 8, "pretrain_steps": 2, "pretrain_batch": 4, "steps": 3, "batch": 4, "limit": 40, "samples": 20,
    "held_out": 16, "real": 40, "sampling_steps": 2, "rates": [0.001, 0.03], "seeds": 2,
}  # fmt: skip


def tiny(arms: tuple[str, ...] = ("LoRA", "dense"), **more: Any) -> Recipe:
    """Return a recipe with the first setting of some arms, and with minimal training."""
    recipe = open_recipe("svhn-mnist", "mini")
    kept = tuple(dataclasses.replace(arm, configs=arm.configs[:1]) for arm in recipe.arms if arm.name in arms)
    return dataclasses.replace(recipe, arms=kept, settings={**recipe.settings, **TINY, **more})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_idx(folder / "mnist", seed=0)
    write_idx(folder / "fashion-mnist", seed=3, pack=True)
    write_svhn(folder / "svhn", 40, 20)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def lines(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in found if "key" in line]


@pytest.fixture(scope="module")
def train(data: Path, cache: Path) -> Callable[..., Any]:
    """Return a function that runs a recipe on one thread."""

    def trained(recipe: Recipe, out: Path, **given: Any) -> Any:
        with threads(1):
            return run(recipe, out, cache=cache, data=str(data), **given)

    return trained


@pytest.fixture(scope="module")
def done(train: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("run")
    return out, train(tiny(), out)


@pytest.fixture
def copy(done: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy of what is done, in which a test may change something."""
    return Path(shutil.copytree(done[0], tmp_path / "copy"))


def test_every_setting_is_trained_sampled_and_measured(done: tuple[Path, Any], data: Path) -> None:
    out, outcome = done
    assert [(row["arm"], row["parameters"]) for row in outcome.rows] == [
        ("real images", 0), ("as pretrained", 0), ("dense", 141312), ("LoRA", 4736),
    ]  # fmt: skip
    for row in outcome.rows:
        assert len(row["loss"]) == (0 if row["arm"] == "real images" else 2)
        assert all(len(row[metric]) == 2 for metric in METRICS), row
    assert outcome.picture == out / "figure.png"
    assert (out / "generated.png").read_bytes().startswith(b"\x89PNG")
    records = lines(out)
    # Both rates with the first seed, one of them with the second; the base, for which there is no rate, with both.
    assert len(records) == 2 * (2 + 1) + 2
    for record in records:
        images = np.load(out / "images" / record["images"], allow_pickle=False)
        assert (images.shape, images.dtype) == ((20, 8, 8, 1), np.uint8)
        assert record["config"] is None or (out / "adapters" / record["adapter"]).is_file()
    # The rate is chosen with the first seed, by the loss held out.
    for row in outcome.rows[2:]:
        own = [one for one in records if one["family"] == row["arm"]]
        first = {one["rate"]: one["validation_loss"] for one in own if one["seed"] == 0}
        assert row["rate"] == min(first, key=lambda rate: first[rate])
        assert [one["rate"] for one in own if one["seed"] == 1] == [row["rate"]]
    # The base is measured as it is, and adapters move it.
    assert records[0]["config"] is None
    assert all(one["validation_loss"] != records[0]["validation_loss"] for one in records[1:] if one["rate"] == 0.03)
    # As many real images are measured, of none that are compared with.
    bases = [record for record in records if record["config"] is None]
    assert [outcome.rows[0][metric] for metric in METRICS] == [
        [base["real"]["metrics"][metric] for base in bases] for metric in METRICS
    ]
    # Images of 8 pixels are what the stand-ins are scaled to; 16 are held out, fewer than 20: they are of the others.
    every = read_images("mnist", data, 8, 1).pixels[TINY["held_out"] :]
    known = {bytes(((one + 1) * 127.5).round().to(torch.uint8).numpy()) for one in every}
    drawn = [np.load(out / "images" / base["real"]["images"], allow_pickle=False) for base in bases]
    assert all(bytes(np.ascontiguousarray(one.transpose(2, 0, 1))) in known for some in drawn for one in some)
    assert not np.array_equal(*drawn)


def test_what_is_done_is_not_done_again_and_results_alone_give_the_same(
    done: tuple[Path, Any], copy: Path, train: Callable[..., Any]
) -> None:
    out, outcome = done
    before = (out / "results.jsonl").read_bytes()
    again = train(tiny(), out)
    assert (out / "results.jsonl").read_bytes() == before
    assert again.rows == outcome.rows
    points = {point.arm: point for point in generated_in(out / "results.jsonl")}
    for row in outcome.rows[1:]:
        point = points[row["arm"]]
        assert (point.setting, point.parameters, point.rate) == (row["setting"], row["parameters"], row["rate"])
        assert list(point.values("fid")) == row["fid"]
    with pytest.raises(tna.errors.FileError, match="another study"):
        train(tiny(samples=30), out)
    train(tiny(arms=("dense",), samples=10, seeds=1, rates=[0.03]), copy, fresh=True)
    assert len(list((copy / "adapters").iterdir())) == 1
    assert len(list((copy / "images").iterdir())) == 3


def test_other_rates_and_seeds_in_one_folder(done: tuple[Path, Any], copy: Path, train: Callable[..., Any]) -> None:
    (was,) = (row["rate"] for row in done[1].rows if row["arm"] == "LoRA")
    other = next(rate for rate in TINY["rates"] if rate != was)
    # At a rate that was tried with the first seed alone, and with more seeds than the file has for others.
    found = train(tiny(arms=("LoRA",), rates=[other]), copy)
    assert [(row["arm"], row["rate"], len(row["fid"])) for row in found.rows] == [
        ("real images", 0.0, 2), ("as pretrained", 0.0, 2), ("LoRA", other, 2),
    ]  # fmt: skip
    alone = {row["arm"]: row["rate"] for row in redraw(tiny(), copy).rows}
    assert alone["LoRA"] == was, "of what is whole, the better by the first seed"
    told: list[tuple[int, int]] = []

    class Told(Reporter):
        def begins(self, tasks: int, finished: int) -> None:
            told.append((tasks, finished))

    train(tiny(arms=("LoRA",), seeds=1, rates=[was]), copy, reporter=Told())
    assert told == [(2, 2)], "others' trainings are not counted"


def test_a_line_cut_off_is_not_read_and_other_damage_is_one_message(done: tuple[Path, Any], copy: Path) -> None:
    with (copy / "results.jsonl").open("ab") as file:
        file.write(b'{"key": "12')
    assert redraw(tiny(), copy).rows == done[1].rows
    for path in (copy / "images").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(tna.errors.FileError, match="cannot draw what is in"):
        redraw(tiny(), copy)
    for damage in ("[1]", '{"format": "x", "study": 3}', '{"study": {}}\n{"key": "1", "metrics": null}'):
        (copy / "results.jsonl").write_text(f"{damage}\n")
        with pytest.raises(tna.TnadaptError, match="cannot read the results of recipe svhn-mnist"):
            redraw(tiny(), copy)


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        *(({}, {"rates": [rate]}, "finite number above 0") for rate in (-1.0, 0.0, float("nan"), float("inf"))),
        ({}, {"features": "nowhere.pth"}, r"cannot load Inception's weights from nowhere\.pth"),
        ({"base": 64}, {}, "its U-Net of width 64 has 42 weights of other shapes, the first of"),
    ],
)
def test_what_is_wrong_is_refused_before_the_base_is_trained(
    settings: dict[str, Any], given: dict[str, Any], message: str, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(tna.TnadaptError, match=message):
        run(tiny(**settings), tmp_path, data=str(data), **given)
    assert not (tmp_path / "cache").exists()


def test_real_images_have_the_classes_in_turn_whatever_their_order() -> None:
    labels = torch.cat([torch.zeros(70, dtype=torch.int64), torch.arange(1, 10).repeat(5)])
    images = ImageSet(torch.arange(115.0).reshape(-1, 1, 1, 1), labels)
    found = balanced(images, 50)
    assert torch.bincount(found.labels).tolist() == [5] * 10
    assert len(set(found.pixels.reshape(-1).tolist())) == 50
    assert torch.equal(found.pixels, balanced(images, 115).pixels[:50])
    assert len(balanced(images, 1000)) == 115
    assert not torch.equal(found.pixels[::10].reshape(-1), torch.arange(5.0)), "not the first of the file"


def test_a_rate_at_which_all_diverge_is_still_one() -> None:
    from tnadapt.finetune import Method, Task

    method = Method("LoRA", "r = 1", tna.presets.lora(1))
    records = {Task(method, 0, rate).key: {"validation_loss": None} for rate in (0.1, 0.2)}
    assert chosen_rate(records, method, [0.2, 0.1]) == 0.1
    records[Task(method, 0, 0.2).key]["validation_loss"] = 3.0  # type: ignore[assignment]
    assert chosen_rate(records, method, [0.2, 0.1]) == 0.2


# The others are like svhn-mnist: see tests/paper/test_recipes.py.
@long_only
@pytest.mark.parametrize("name", ["svhn-mnist", "mnist-svhn"])
def test_full_recipes_make_their_first_steps_on_stand_ins(name: str, data: Path, cache: Path, tmp_path: Path) -> None:
    recipe = open_recipe(name)
    first = tuple(dataclasses.replace(arm, configs=arm.configs[:1]) for arm in recipe.arms[4:6] + recipe.arms[-3:-2])
    steps = {"pretrain_steps": 1, "pretrain_batch": 2, "steps": 1, "batch": 2, "samples": 10, "sampling_steps": 1}
    steps |= {"held_out": 8}
    if name == "mnist-svhn":
        write_svhn(tmp_path / "data" / "svhn", 20, 12)
        (tmp_path / "data" / "mnist").symlink_to(data / "mnist")
        data = tmp_path / "data"
    settings = {**recipe.settings, **steps, "real": 12, "image_size": 16}
    shown = dataclasses.replace(recipe, arms=first, settings=settings)
    outcome = run(shown, tmp_path / "run", cache=cache, data=str(data), features="classifier")
    assert [row["arm"] for row in outcome.rows] == ["real images", "as pretrained", *(arm.name for arm in first)]
    assert all(len(row["fid"]) == 1 for row in outcome.rows)


def test_a_model_of_ones_own(done: tuple[Path, Any], data: Path, cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with threads(1):
        base = tmp_path / "base.safetensors"
        save_file(generation_of(tiny(), cache, data=str(data)).bench.weights, base)
    found = generation_of(tiny(), tmp_path, data=str(data), model=str(base)).bench
    assert found.weights.keys() == found.model().state_dict().keys()
    assert sum(weight.numel() for weight in found.model().parameters()) == 2612941
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, word in (
        ("other.safetensors", "is not a U-Net of 1 channels and width 32"),
        ("none", "cannot read the model"),
    ):
        with pytest.raises(tna.TnadaptError, match=word):
            generation_of(tiny(), tmp_path, data=str(data), model=str(tmp_path / name))
