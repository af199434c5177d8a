"""The recipes of ViT-base at full scale, on stand-ins: images in the hub's format, and one layer of the same width."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from paper import open_recipe, run
from paper.adapted_weights import WEIGHTS, AdaptedWeights
from paper.recipe import Recipe
from tests.support.depth import in_depth

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL.Image")

import tnadapt.torch as tnt
from paper import classification
from tnadapt.finetune.data import Data, Samples, divide, open_source

pytestmark = pytest.mark.slow

#: Of ten classes: so many images each, to train on and to test with.
TRAINING, TEST = 4, 1
FINE = [f"fine {label}" for label in range(10)]


def hub(label: str) -> Any:
    """A data set like the hub's CIFAR: a column of images, and its label columns."""
    random = np.random.default_rng(0)
    coarse = datasets.ClassLabel(names=["coarse 0", "coarse 1"])
    features = {"img": datasets.Image(), label: datasets.ClassLabel(names=FINE), "coarse_label": coarse}

    def part(each: int) -> Any:
        labels = list(range(10)) * each
        images = list(random.integers(0, 256, (len(labels), 8, 8, 3), np.uint8))
        columns = {"img": images, label: labels, "coarse_label": [number % 2 for number in labels]}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    return datasets.DatasetDict({"train": part(TRAINING), "test": part(TEST)})


@pytest.mark.parametrize("name", ["cifar100", "groups-dense", "geometry"])
@pytest.mark.parametrize("label", [None, "fine_label", "label"])
def test_the_fine_classes_of_cifar100_are_read_in_either_form(
    name: str, label: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*name: Any) -> Any:
        asked.append(name)
        return hub("fine_label")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(classification, "Study", lambda spec, *others: spec)
    if label:
        hub(label).save_to_disk(tmp_path / "images")
    given = str(tmp_path / "images") if label else None
    spec: Any = classification.study_of(open_recipe(name), tmp_path, data=given)
    data: Any = open_source(spec.data, spec.text_column, spec.label_column, spec.label_names)
    assert (data.kind, list(data.classes)) == ("image", FINE)
    assert (len(data.samples), len(data.test)) == (10 * TRAINING, 10 * TEST)
    assert asked == ([] if label else [("cifar100", None)])


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar100", 100), ("cifar10", 10), ("groups-dense", 100), ("geometry", 100)]
)
def test_where_nothing_is_chosen_nearly_all_is_trained_on(
    name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "Study", lambda spec, *others: spec)
    labels, test = (np.arange(count) % classes for count in (50_000, 10_000))
    every = tuple(map(str, range(classes)))
    cifar = Data("CIFAR", "image", every, Samples(np.empty((50_000, 0)), labels), Samples(np.empty((10_000, 0)), test))

    def sizes(*rates: float) -> list[int]:
        spec: Any = classification.study_of(open_recipe(name), tmp_path, rates=rates)
        return [len(part) for part in divide(cifar, validation=spec.holdout).values()]

    assert sizes() == sizes(0.1) == sizes(0.1, 0.1) == [49_900, 100, 10_000]
    assert sizes(0.05, 0.1) == [40_000, 10_000, 10_000], "rates are chosen by a fifth"


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, float("nan"), 1, "0.1"])
def test_what_is_no_fraction_cannot_be_held_out(holdout: Any, tmp_path: Path) -> None:
    recipe = open_recipe("cifar100")
    recipe = dataclasses.replace(recipe, settings={**recipe.settings, "holdout": holdout})
    with pytest.raises(tna.ConfigError, match="recipe cifar100: holdout must be a fraction above 0 and below 1; got"):
        classification.study_of(recipe, tmp_path)


SHORT = AdaptedWeights("query and value of one layer of 768", ((768, 768),) * 2, ("0", "0"))


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One layer of ViT-base in the original format: ImageNet-21k without a head, ImageNet-1k with one."""
    folder = tmp_path_factory.mktemp("models")
    config = transformers.ViTConfig(num_hidden_layers=1, intermediate_size=16, image_size=32, num_labels=1000)
    torch.manual_seed(0)
    transformers.ViTModel(config).save_pretrained(folder / "in21k")
    transformers.ViTForImageClassification(config).save_pretrained(folder / "in1k")
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name in ("in21k", "in1k"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return {name: folder / ("in1k" if name == "cifar10" else "in21k") for name in STARTS}


#: Of each recipe arms, of which one setting is tried: the last where the first takes a minute.
STARTS = {
    "cifar100": (("LoRA",), 0),
    "cifar10": (("LoRA",), 0),
    "groups-dense": (("SuperLoRA 1D, dense, with projection, G = 12",), -1),
    "geometry": (("dense", "LoRA"), 0),
}


def short(name: str) -> Recipe:
    """Return a full recipe on one layer, for two steps with two small images."""
    recipe, (arms, place) = open_recipe(name), STARTS[name]
    kept = tuple(dataclasses.replace(arm, configs=(arm.configs[place],)) for arm in recipe.only(arms).arms)
    settings = {**recipe.settings, "steps": 2, "batch": 2, "image_size": 32}
    return dataclasses.replace(recipe, weights=SHORT, arms=kept, settings=settings)


def test_vit_base_has_the_weights_of_its_recipes() -> None:
    with torch.device("meta"):
        model = transformers.ViTForImageClassification(transformers.ViTConfig())
    targets = tnt.find_targets(model)
    assert tuple(target.shape for target in targets) == WEIGHTS["vit-base"].shapes == ((768, 768),) * 24
    assert len({target.layer for target in targets}) == 12


@pytest.mark.parametrize("name", in_depth(STARTS, ["cifar10", "groups-dense"]))
def test_a_full_recipe_makes_its_first_steps(name: str, makers: dict[str, Path], tmp_path: Path) -> None:
    hub("label" if name == "cifar10" else "fine_label").save_to_disk(tmp_path / "images")
    outcome = run(short(name), tmp_path / "run", model=str(makers[name]), data=str(tmp_path / "images"))
    first, *records = (json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines())
    study, trained = first["study"], {line["family"]: line for line in records if "key" in line}
    assert study["classes"] == FINE
    assert study["samples"] == {"training": 30, "validation": 10, "test": 10}
    assert (study["optimiser"], study["shape"], study["steps"]) == ("sgd", "onecycle", 2)
    arms = STARTS[name][0]
    assert set(trained) == {"head alone", *arms}
    for record in trained.values():
        assert not record["diverged"]
        # A new head is trained beside every adapter; ImageNet's own is frozen.
        assert record["kept"] == (0 if name == "cifar10" else 10 * (768 + 1))
    expected = {"LoRA": 2 * 2 * 768 * (4 if name == "geometry" else 1), "dense": 2 * 768**2}
    # A vector a group, each a hundredth of its twelfth of all, rounded up.
    expected["SuperLoRA 1D, dense, with projection, G = 12"] = 12 * math.ceil(2 * 768**2 / 12 / 100)
    assert {arm: trained[arm]["parameters"] for arm in arms} == {arm: expected[arm] for arm in arms}
    assert outcome.picture is not None
    assert [row["arm"] for row in outcome.rows] == (["LoRA"] if name == "geometry" else ["head alone", *arms])


def test_the_frozen_head_is_the_rows_that_the_recipe_names(makers: dict[str, Path], tmp_path: Path) -> None:
    hub("label").save_to_disk(tmp_path / "images")
    inputs = {"model": str(makers["cifar10"]), "data": str(tmp_path / "images")}
    study = classification.study_of(short("cifar10"), tmp_path, **inputs)
    whole = transformers.ViTForImageClassification.from_pretrained(makers["cifar10"]).classifier
    cut: Any = study.problem.build(0).classifier
    rows = open_recipe("cifar10").settings["head_rows"]
    assert torch.equal(cut.weight, whole.weight[rows])
    assert torch.equal(cut.bias, whole.bias[rows])
    assert study.problem.keep_trainable == ()
