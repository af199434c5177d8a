"""The recipes of ViT-base at their full scale, on stand-ins: images as the hub has them, and as a user may."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.reproduce import open_recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

from tnadapt.finetune.data import Data, Samples, divide  # noqa: E402
from tnadapt.finetune.sources import read  # noqa: E402
from tnadapt.reproduce import classification  # noqa: E402

#: Of ten classes: so many images each, to train on and to test with.
TRAINING, TEST = 4, 1
FINE = [f"fine {label}" for label in range(10)]


def hub(label: str, *others: str) -> Any:
    """As the hub has CIFAR: a column of images, and its columns of labels."""
    random = np.random.default_rng(0)
    features = {"img": datasets.Image(), label: datasets.ClassLabel(names=FINE)}
    features |= {other: datasets.ClassLabel(names=["coarse 0", "coarse 1"]) for other in others}

    def part(each: int) -> Any:
        labels = list(range(10)) * each
        columns = {"img": list(random.integers(0, 256, (len(labels), 8, 8, 3), np.uint8)), label: labels}
        columns |= {other: [number % 2 for number in labels] for other in others}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    return datasets.DatasetDict({"train": part(TRAINING), "test": part(TEST)})


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    hub("label").save_to_disk(folder / "cifar10")
    hub("fine_label", "coarse_label").save_to_disk(folder / "cifar100")
    return {name: folder / name for name in ("cifar10", "cifar100")}


# -- Images ----------------------------------------------------------------------------------------


def folders(path: Path) -> Path:
    for part, each in (("train", TRAINING), ("test", TEST)):
        for label in FINE:
            (path / part / label).mkdir(parents=True)
            for index in range(each):
                image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / part / label / f"{index}.png")
    return path


def arrays(path: Path) -> Path:
    names = np.array(FINE)
    np.savez(
        path, x_train=np.zeros((10 * TRAINING, 8, 8, 3), np.uint8), y_train=np.repeat(names, TRAINING),
        x_test=np.zeros((10 * TEST, 8, 8, 3), np.uint8), y_test=np.repeat(names, TEST),
    )  # fmt: skip
    return path


def usual(path: Path) -> Path:
    hub("label", "coarse_label").save_to_disk(path)
    return path


def hubs(path: Path) -> Path:
    hub("fine_label", "coarse_label").save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["cifar100", "groups-dense", "geometry"])
@pytest.mark.parametrize("form", [None, hubs, usual, folders, arrays])
def test_the_fine_classes_of_cifar100_are_read_in_every_form(
    name: str, form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load_dataset(*name: Any) -> Any:
        asked.append(name)
        return hub("fine_label", "coarse_label")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(classification, "Study", lambda spec, *others: spec)
    given = None if form is None else str(form(tmp_path / "images.npz"))
    spec: Any = classification.study_of(open_recipe(name), tmp_path, data=given)
    data = read(spec.data, spec.text_column, spec.label_column, spec.label_names)
    assert (data.kind, list(data.classes)) == ("image", FINE)
    assert data.test is not None
    assert (len(data.samples), len(data.test)) == (10 * TRAINING, 10 * TEST)
    assert asked == ([("cifar100", None)] if form is None else [])


# -- What is trained on ----------------------------------------------------------------------------


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


def test_the_miniatures_are_divided_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classification, "Study", lambda spec, *others: spec)
    monkeypatch.setattr(classification, "fetch", lambda name, folder: (folder / "model", folder / "data"))
    for name in ("cifar10", "digits", "geometry", "reviews"):
        for rates in ((), (0.05,)):
            spec: Any = classification.study_of(open_recipe(name, "mini"), tmp_path, rates=rates)
            assert spec.holdout == 0.2


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, float("nan"), 1, "0.1"])
def test_what_is_no_fraction_cannot_be_held_out(holdout: Any, tmp_path: Path) -> None:
    recipe = open_recipe("cifar100")
    recipe = dataclasses.replace(recipe, settings={**recipe.settings, "holdout": holdout})
    with pytest.raises(tna.ConfigError, match="recipe cifar100: holdout is a fraction, above 0 and below 1; got"):
        classification.study_of(recipe, tmp_path)
