"""The recipes of ViT-base at their full scale, on stand-ins: images as the hub has them, and as a user may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tnadapt.reproduce import open_recipe

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")
image = pytest.importorskip("PIL.Image")

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
