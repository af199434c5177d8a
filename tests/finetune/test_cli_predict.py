"""``tnadapt predict`` as a user sees it: what it writes, what it never replaces, and which part it predicts."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
typer_testing = pytest.importorskip("typer.testing")

from tnadapt.cli import app
from tnadapt.cli._predict_command import _written
from tnadapt.errors import FileError
from tnadapt.finetune import _prediction as prediction
from tnadapt.finetune import predict

from . import tiny_models as tiny
from .untrained import untrained


def invoke(*arguments: Any) -> Any:
    return typer_testing.CliRunner().invoke(app, ["predict", *map(str, arguments)], catch_exceptions=True)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return an adapter's file and data."""
    folder = tmp_path_factory.mktemp("classifier")
    data = tiny.classes(folder / "a.jsonl")
    return untrained(folder / "a.safetensors", tiny.bert(folder / "bert"), data), Path(data)


def test_a_base_that_has_moved(tmp_path: Path) -> None:
    data = tiny.classes(tmp_path / "a.jsonl")
    adapter = untrained(tmp_path / "a.safetensors", tiny.bert(tmp_path / "bert"), data)
    (tmp_path / "bert").rename(tmp_path / "moved")
    done = invoke(adapter, "--data", data)
    assert "there is no such folder here; give base= (--base) with a folder, a name or a model" in str(done.exception)
    assert invoke(adapter, "--data", data, "--base", tmp_path / "moved").exit_code == 0


# -- Files that are there already --------------------------------------------------------------


@pytest.mark.parametrize("how", ["the same", "a link", "another way"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_data_are_never_replaced(
    classifier: tuple[Path, Path], tmp_path: Path, how: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "new.jsonl"
    data.write_bytes(classifier[1].read_bytes())
    out = {"the same": str(data), "a link": "link.jsonl", "another way": "../" + tmp_path.name + "/new.jsonl"}[how]
    if how == "a link":
        os.link(data, "link.jsonl")
    done = invoke(classifier[0], "--data", data, "--out", out, *more)
    assert isinstance(done.exception, FileError), done.output
    assert str(done.exception) == f"--out {out} is --data, which predictions would replace; give another file"
    assert data.read_bytes() == classifier[1].read_bytes()


def test_the_adapter_is_never_replaced(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.csv"
    adapter.write_bytes(classifier[0].read_bytes())
    done = invoke(adapter, "--data", classifier[1], "--out", adapter, "--overwrite")
    assert isinstance(done.exception, FileError), done.output
    assert str(done.exception).startswith(f"--out {adapter} is the adapter, which predictions would replace; ")
    assert adapter.read_bytes() == classifier[0].read_bytes()


def test_another_file_is_replaced_only_if_asked(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "p.csv"
    out.write_text("mine")
    given = [classifier[0], "--data", classifier[1], "--out", out, "--limit", 2]
    done = invoke(*given)
    assert isinstance(done.exception, FileError), done.output
    assert str(done.exception) == f"{out} exists; give another --out, or --overwrite to replace it"
    assert out.read_text() == "mine"
    assert invoke(*given, "--overwrite").exit_code == 0
    assert len(out.read_text().splitlines()) == 3


# -- Parts -------------------------------------------------------------------------------------


def saved(folder: Path, labels: list[int], **parts: list[int]) -> str:
    """Save texts with numbers of classes as ``datasets`` does, in the parts train and others."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )  # fmt: skip
    made = {
        name: datasets.Dataset.from_dict(
            {"text": [f"{name} good film"] * len(some), "label": some}, features=features
        )
        for name, some in {"train": labels, **parts}.items()
    }  # fmt: skip
    datasets.DatasetDict(made).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_test_part_is_predicted_and_named(classifier: tuple[Path, Path], tmp_path: Path, hidden: bool) -> None:
    data = saved(tmp_path / "data", [0, 1, 0], validation=[1], test=[-1, -1] if hidden else [0, 1])
    out = tmp_path / "p.jsonl"
    done = invoke(classifier[0], "--data", data, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"predicting the test part of {data}" in done.stderr
    assert f"2 predictions of the test part: {out}" in done.stdout
    assert ("classification of the test part: accuracy 0.5" in done.stdout) == (not hidden)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["test good film"] * 2
    assert predict(classifier[0], data).part == "test"


def test_data_without_parts_name_none(classifier: tuple[Path, Path]) -> None:
    done = invoke(classifier[0], "--data", classifier[1])
    assert done.exit_code == 0, done.output
    assert " part" not in done.output
    assert predict(classifier[0], str(classifier[1])).part == ""


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    return untrained(folder / "a.safetensors", tiny.vit(folder / "vit"), tiny.shades(folder / "a.npz"))


def test_images_of_a_test_part(of_images: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.zeros((4, 16, 16, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=pixels, y_train=[0, 1] * 2, x_test=pixels[:3], y_test=[0, 1, 1])
    found = predict(of_images, str(tmp_path / "a.npz"))
    assert (found.part, len(found.rows)) == ("test", 3)
    assert set(found.metrics) == {"accuracy"}
    for part, count in (("train", 2), ("val", 1)):
        for name in "01":
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for place in range(count):
                image.fromarray(pixels[0]).save(tmp_path / "photos" / part / name / f"{place}.png")
    found = predict(of_images, str(tmp_path / "photos"))
    assert found.part == "val"
    assert [Path(row["image"]).parts[-3:-1] for row in found.rows] == [("val", "0"), ("val", "1")]


@pytest.mark.parametrize("hidden", [False, True])
def test_images_whose_labels_are_hidden(of_images: Path, tmp_path: Path, hidden: bool) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})

    def part(*labels: int) -> Any:
        pixels = [np.zeros((16, 16, 3), np.uint8)] * len(labels)
        return datasets.Dataset.from_dict({"img": pixels, "label": list(labels)}, features=features)

    test = part(-1, -1, -1) if hidden else part(0, 1, 1)
    parts = datasets.DatasetDict({"train": part(0, 1), "validation": part(1), "test": test})
    parts.save_to_disk(tmp_path / "data")
    found = predict(of_images, str(tmp_path / "data"))
    assert (found.part, len(found.rows)) == ("test", 3)
    assert (found.metrics == {}) == hidden


# -- Numbers that are not finite, and lists ----------------------------------------------------


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Return an adapter's file and data for tasks of texts."""
    folder = tmp_path_factory.mktemp("files")
    bert, found = tiny.bert(folder / "bert"), {}
    for name, write in {
        "multi-label": tiny.several,
        "regression": tiny.numbers,
        "token-classification": tiny.tags,
    }.items():
        data = write(folder / f"{name}.jsonl")
        found[name] = (untrained(folder / f"{name}.safetensors", bert, data), data)
    return found


@pytest.fixture
def not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every logit be NaN."""
    logits_of = prediction.logits_of
    monkeypatch.setattr(
        prediction, "logits_of", lambda *given: lambda *inputs: logits_of(*given)(*inputs) * float("nan")
    )  # fmt: skip


@pytest.mark.usefixtures("not_finite")
@pytest.mark.parametrize("name", ["classification", "multi-label", "regression", "token-classification"])
def test_a_number_that_is_not_finite_is_none(
    files: dict[str, tuple[Path, str]], classifier: tuple[Path, Path], name: str
) -> None:
    file, data = {**files, "classification": classifier}[name]
    found = predict(file, str(data), limit=2)
    assert "null" in json.dumps(found.rows, allow_nan=False)
    assert all(len(row) == len(found.rows[0]) for row in found.rows)


@pytest.mark.usefixtures("not_finite")
def test_json_that_is_written_has_no_nan(classifier: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "p.jsonl"
    assert invoke(classifier[0], "--data", classifier[1], "--out", out, "--limit", 3).exit_code == 0
    rows = [strict(line) for line in out.read_text().splitlines()]
    assert [row["score"] for row in rows] == [None] * 3
    printed = invoke(classifier[0], "--data", classifier[1], "--limit", 3).stdout
    assert [strict(line) for line in printed.splitlines() if line.startswith("{")] == rows


def test_lists_in_a_table_are_json() -> None:
    rows = [
        {"tokens": ["a|b", "c,d"], "prediction": ["X", None], "scores": [0.5, None]},
        {"tokens": ["a", '"'], "prediction": ["X", "Y"], "scores": [0.5, 0.25]},
        {"tokens": ["é"], "prediction": [], "scores": [1]},
    ]
    read = list(csv.DictReader(_written(rows, ".csv").splitlines()))
    assert [{name: strict(cell) for name, cell in row.items()} for row in read] == rows


def test_a_table_has_the_columns_of_all_rows() -> None:
    rows = [{"text": "a", "label": "x"}, {"text": "b", "score": 0.5}, {"other": "c"}]
    read = list(csv.DictReader(_written(rows, ".csv").splitlines()))
    assert list(read[0]) == ["text", "label", "score", "other"]
    assert [{name: cell for name, cell in row.items() if cell} for row in read] == [
        {name: str(value) for name, value in row.items()} for row in rows
    ]


@pytest.mark.parametrize("name", ["multi-label", "token-classification"])
def test_a_table_of_lists_is_read_back(files: dict[str, tuple[Path, str]], name: str) -> None:
    rows = predict(*files[name]).rows
    read = list(csv.DictReader(_written(rows, ".csv").splitlines()))
    lists = [column for column, value in rows[0].items() if not isinstance(value, str)]
    assert {"prediction", "scores"} <= set(lists)
    assert [[strict(row[column]) for column in lists] for row in read] == [[row[c] for c in lists] for row in rows]


def test_a_spreadsheet_finds_no_formula_in_a_table() -> None:
    formulas = [
        "=1+2",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "\uff0b1",
        "-",
        "-a",
    ]
    plain = ["-1.5", "+3", "-.5e-3", "a=b", "", "'=1", " =1", "0"]
    rows = [{"=text": text, "score": -0.5, "tags": ["=a"]} for text in formulas + plain]
    read = list(csv.reader(io.StringIO(_written(rows, ".csv"), newline="")))
    assert read[0] == ["'=text", "score", "tags"]
    assert [row[0] for row in read[1:]] == [f"'{text}" for text in formulas] + plain
    assert {tuple(row[1:]) for row in read[1:]} == {("-0.5", '["=a"]')}
    assert [json.loads(line)["=text"] for line in _written(rows, ".jsonl").splitlines()] == formulas + plain
