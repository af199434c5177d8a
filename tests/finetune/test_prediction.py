"""``tnadapt predict``: what is predicted, written and never replaced, which part it is, and what files say."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
typer_testing = pytest.importorskip("typer.testing")

import tnadapt as tna
from tnadapt import finetune
from tnadapt.cli import app
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Predictions, Spec, Task, Training, open_problem, predict
from tnadapt.finetune.data import Samples, Table, divide, open_source
from tnadapt.finetune.grid import Method
from tnadapt.finetune.loop import evaluate
from tnadapt.finetune.problem import Problem
from tnadapt.finetune.training import train

from . import tiny_models as tiny
from .internals import prediction

LORA = Method("LoRA", "r = 1", tna.presets.lora(1))
AdapterOf = Callable[[str], tuple[Path, str]]


def trained(folder: Path, model: str, data: str, **options: Any) -> tuple[Problem, dict[str, Any], Path]:
    """Train an adapter for a few steps; return the problem, its result line and its file."""
    problem = open_problem(Spec(model=model, data=data, **options))
    record = train(problem, Task(LORA, 0, 0.05), Training(2, 8), folder / "adapters")
    return problem, record, folder / "adapters" / record["adapter"]


def invoke(*arguments: Any) -> Any:
    return typer_testing.CliRunner().invoke(app, ["predict", *map(str, arguments)], catch_exceptions=True)


def held_out(path: Path, task: Any) -> str:
    """Write the samples of the test part of a study to a file of their own, in their order."""
    data = type(task).read(open_source(str(path)), Spec())
    places = Samples(list(range(len(data.samples))), data.samples.labels)
    some = divide(dataclasses.replace(data, samples=places), stratified=task.stratified)["test"].inputs
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            np.savez(path.with_name("test.npz"), x=arrays["x"][some], y=arrays["y"][some])
        return str(path.with_name("test.npz"))
    lines = path.read_text().splitlines()
    return tiny.rows(path.with_name("test.jsonl"), [json.loads(lines[place]) for place in some])


@pytest.mark.parametrize("name", tiny.JOBS)
def test_predictions_and_metrics_are_those_of_the_study(tmp_path: Path, name: str) -> None:
    make, write, suffix = tiny.JOBS[name]
    data = write(tmp_path / f"a{suffix}")
    problem, record, file = trained(tmp_path, make(tmp_path / "model"), data)
    predictions = predict(file, held_out(Path(data), problem.task), new_tokens=3)
    fresh = problem.build(7)
    tna.torch.load(fresh, file)
    outputs = evaluate(fresh, problem.logits, problem.task, problem.parts["test"], torch.device("cpu"))
    assert predictions.task == name
    assert len(predictions.rows) == len(problem.parts["test"].labels)
    for row, output in zip(predictions.rows, outputs, strict=True):
        for column, value in problem.task.answer(output).items():
            exact = column == "prediction" and name != "regression"
            # Other batches give other roundings.
            assert row[column] == (value if exact else pytest.approx(value, rel=1e-4, abs=1e-4))
    metrics = {problem.task.metric.name: record["test"], **record.get("test_metrics", {})}
    assert predictions.metrics == pytest.approx(metrics, rel=1e-4, abs=1e-4)


def test_a_table_and_lines_of_predictions_replace_others_only_if_asked(adapter_of: AdapterOf, tmp_path: Path) -> None:
    file, data = adapter_of("classification")
    table, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    done = invoke(file, "--data", data, "--out", table, "--limit", 5)
    assert done.exit_code == 0, done.output
    assert f"5 predictions: {table}" in done.stdout
    assert "classification: accuracy 0." in done.stdout
    assert " part" not in done.output
    assert invoke(file, "--data", data, "--out", lines, "--limit", 5).exit_code == 0
    printed = invoke(file, "--data", data, "--limit", 5)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [json.loads(line) for line in printed.stdout.splitlines() if line.startswith("{")] == rows
    assert "accuracy" not in printed.stdout
    assert "classification: accuracy 0." in printed.stderr
    with table.open(newline="") as opened:
        read = list(csv.DictReader(opened))
    assert [row["prediction"] for row in read] == [row["prediction"] for row in rows]
    assert list(read[0]) == ["text", "label", "prediction", "score"]
    before = table.read_bytes()
    refused = invoke(file, "--data", data, "--out", table, "--limit", 2)
    assert isinstance(refused.exception, FileError), refused.output
    assert str(refused.exception) == f"{table} exists; give another --out, or --overwrite to replace it"
    assert table.read_bytes() == before
    assert invoke(file, "--data", data, "--out", table, "--limit", 2, "--overwrite").exit_code == 0
    assert len(table.read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("columns", "once", "twice"),
    [("id,review,note", "", "_2"), ("id,review,score", "_2", "_3"), ("prediction_2,review,score", "_3", "_4")],
)
def test_columns_of_the_data_stay_and_new_ones_do_not_replace_them(
    adapter_of: AdapterOf, tmp_path: Path, columns: str, once: str, twice: str
) -> None:
    file, _ = adapter_of("classification")
    data, first, second = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.jsonl"
    data.write_text(columns + '\n007,good film,"a, b"\n8,bad film,\n')
    assert invoke(file, "--data", data, "--out", first, "--text-column", "review").exit_code == 0
    with first.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [list(row.values())[:3] for row in rows] == [["007", "good film", "a, b"], ["8", "bad film", ""]]
    assert list(rows[0]) == [*columns.split(","), f"prediction{once}", f"score{once}"]
    # The predictions of one adapter are data for the next.
    assert invoke(file, "--data", first, "--out", second, "--text-column", "review").exit_code == 0
    again = [json.loads(line) for line in second.read_text().splitlines()]
    assert list(again[0]) == [*rows[0], f"prediction{twice}", f"score{twice}"]
    for row, before in zip(again, rows, strict=True):
        assert {name: row[name] for name in before} == before
        assert row[f"prediction{twice}"] == before[f"prediction{once}"]


def test_data_without_targets(adapter_of: AdapterOf, tmp_path: Path) -> None:
    file, data = adapter_of("classification")
    texts = [{"text": json.loads(line)["text"]} for line in Path(data).read_text().splitlines()]
    unlabelled = predict(file, tiny.rows(tmp_path / "b.jsonl", texts))
    labelled = predict(file, data)
    assert (unlabelled.metrics, labelled.part) == ({}, "")
    assert unlabelled.rows == [{name: row[name] for name in ("text", "prediction", "score")} for row in labelled.rows]
    # A word that is cut off, or has no token, keeps its place.
    rows = [{"tokens": ["good", "\u200b", "film", *["very"] * 60]}]
    tagged = predict(adapter_of("token-classification")[0], tiny.rows(tmp_path / "t.jsonl", rows))
    assert tagged.metrics == {}
    tags = tagged.rows[0]["prediction"]
    assert len(tags) == len(tagged.rows[0]["scores"]) == 63
    assert [place for place, tag in enumerate(tags) if tag is None] == [1, *range(31, 63)]
    file, _ = adapter_of("causal-lm")
    prompts = tiny.rows(tmp_path / "d.jsonl", [{"prompt": "what is"}, {"prompt": "the"}])
    completed = predict(file, prompts, new_tokens=4)
    assert completed.metrics == {}
    assert [set(row) for row in completed.rows] == [{"prompt", "prediction"}] * 2
    with pytest.raises(TnadaptError, match="--max-new-tokens must be below the 48 positions of the model; got 48"):
        predict(file, prompts, new_tokens=48)


def test_images_without_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    _, _, file = trained(tmp_path, tiny.vit(tmp_path / "vit"), tiny.shades(tmp_path / "a.npz"))
    (tmp_path / "new").mkdir()
    paths = [tmp_path / "new" / f"{place}.png" for place in range(2)]
    for path, shade in zip(paths, (30, 220), strict=True):
        image.fromarray(np.full((12, 20, 3), shade, np.uint8)).save(path)
    predictions = predict(file, str(tmp_path / "new"))
    assert [(row["image"], row["prediction"]) for row in predictions.rows] == [
        (str(paths[0]), "0"),
        (str(paths[1]), "1"),
    ]
    assert predictions.metrics == {}
    assert predict(file, str(paths[1])).rows == predictions.rows[1:]
    done = invoke(file, "--data", paths[1])
    (row,) = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert (row["image"], row["prediction"]) == (str(paths[1]), "1")
    (tmp_path / "sound.mp3").touch()
    refused = invoke(file, "--data", tmp_path / "sound.mp3")
    assert str(refused.exception).endswith(".json or .npz file, or an image or a folder of images")
    with pytest.raises(FileError, match=r"is a table, .* and the adapter was trained for image-classification"):
        predict(file, tiny.classes(tmp_path / "b.jsonl"))


def test_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **sizes)
    timm.models.save_for_hf(model, str(tmp_path / "vit"), model_args=sizes, safe_serialization=True)
    name, data = f"timm:local-dir:{tmp_path / 'vit'}", tiny.shades(tmp_path / "a.npz")
    with pytest.raises(TnadaptError, match=r"^--image-size 40 is not .* patches of 16 pixels; give 32 or 48$"):
        open_problem(Spec(model=name, data=data, image_size=40))
    problem, record, file = trained(tmp_path, name, data)
    assert problem.keep_trainable == ("head",)
    assert problem.parts["test"].batch(torch.arange(1), torch.device("cpu")).shape == (1, 3, 32, 32)
    assert len(tna.load(file).targets) == 4
    assert record["test"] == 1
    predictions = predict(file, data)
    assert predictions.metrics == {"accuracy": 1.0}
    assert [row["prediction"] for row in predictions.rows] == ["0", "1"] * 20


def test_a_member_of_a_population_predicts_as_it_would_alone(adapter_of: AdapterOf, tmp_path: Path) -> None:
    data, file = tiny.classes(tmp_path / "a.jsonl"), tna.load(adapter_of("classification")[0])
    other = dataclasses.replace(file, arrays={name: array + 1 for name, array in file.arrays.items()})
    tna.save(users := tmp_path / "users.safetensors", tna.PopulationFile.from_members([file, other], ["ann", "bob"]))
    tna.save(tmp_path / "bob.safetensors", other)
    expected = predict(tmp_path / "bob.safetensors", data).rows
    assert predict(users, data, member="bob").rows == expected
    done = invoke(users, "--data", data, "--member", "1", "--out", tmp_path / "p.jsonl")
    assert done.exit_code == 0, done.output
    assert [strict(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == expected
    assert predict(users, data, member=0).rows != expected


def test_a_base_that_moved_and_another_base(adapter_of: AdapterOf, tmp_path: Path) -> None:
    data = tiny.classes(tmp_path / "a.jsonl")
    (file, _), moved = adapter_of("classification"), tmp_path / "moved"
    expected, place = predict(file, data).rows, file.parent / "model"
    place.rename(moved)
    try:
        done = invoke(file, "--data", data)
        words = "there is no such folder here; give base= (--base) with a folder, a name or a model"
        assert words in str(done.exception)
        assert invoke(file, "--data", data, "--base", moved).exit_code == 0
        assert predict(file, data, base=str(moved)).rows == expected
    finally:
        tiny.bert(place)
    changed = transformers.BertModel.from_pretrained(moved)
    with torch.no_grad():
        changed.encoder.layer[0].attention.self.query.weight.add_(1.0)
    changed.save_pretrained(moved)
    with pytest.raises(FileError, match="another base model"):
        predict(file, data, base=str(moved))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "good", "label": "perhaps"}, {}, "b.jsonl has the label 'perhaps'; the adapter knows 'no', 'yes'"),
        ({"words": "good"}, {}, "which column of .* is the text\\? It has 'words'"),
        ({"text": 3}, {}, "the text of sample 0 of b.jsonl is 3"),
        ({"text": "good"}, {"text_column": "txt"}, "has no column 'txt'"),
        (None, {}, r"a\.npz has images, and the adapter was trained for classification"),
    ],
)
def test_data_that_the_adapter_does_not_take(
    adapter_of: AdapterOf, tmp_path: Path, row: dict[str, Any] | None, options: dict[str, Any], message: str
) -> None:
    data = tiny.shades(tmp_path / "a.npz") if row is None else tiny.rows(tmp_path / "b.jsonl", [row])
    with pytest.raises(FileError, match=message):
        predict(adapter_of("classification")[0], data, **options)


# -- Files that are there already --------------------------------------------------------------


@pytest.mark.parametrize("how", ["the same", "a link", "another way", "the adapter"])
@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_the_data_and_the_adapter_are_never_replaced(
    adapter_of: AdapterOf, tmp_path: Path, how: str, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, source = adapter_of("classification")
    data, adapter = tmp_path / "new.jsonl", tmp_path / "adapter.csv"
    data.write_bytes(Path(source).read_bytes())
    adapter.write_bytes(file.read_bytes())
    os.link(data, "link.jsonl")
    ways = {"the same": data, "a link": "link.jsonl", "the adapter": adapter}
    out = ways.get(how, f"../{tmp_path.name}/new.jsonl")
    done = invoke(adapter, "--data", data, "--out", out, *more)
    assert isinstance(done.exception, FileError), done.output
    what = how if how == "the adapter" else "--data"
    assert str(done.exception) == f"--out {out} is {what}, which predictions would replace; give another file"
    assert data.read_bytes() == Path(source).read_bytes()
    assert adapter.read_bytes() == file.read_bytes()


# -- Parts -------------------------------------------------------------------------------------


def divided(folder: Path, **parts: dict[str, list[Any]]) -> str:
    """Save a data set of several parts, whose labels are those of the adapters' classes, as datasets does."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("PIL")
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    if "img" in parts["test"]:
        features = {"img": datasets.Image(), "label": datasets.Value("int64")}
    every = {name: datasets.Dataset.from_dict(rows, datasets.Features(features)) for name, rows in parts.items()}
    datasets.DatasetDict(every).save_to_disk(folder)
    return str(folder)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_test_part_is_predicted_and_named(adapter_of: AdapterOf, tmp_path: Path, hidden: bool) -> None:
    file, _ = adapter_of("classification")
    labels = {"train": [0, 1, 0], "validation": [1], "test": [-1, -1] if hidden else [0, 1]}
    parts = {name: {"text": [f"{name} good film"] * len(y), "label": y} for name, y in labels.items()}
    data, out = divided(tmp_path / "data", **parts), tmp_path / "p.jsonl"
    done = invoke(file, "--data", data, "--out", out)
    assert done.exit_code == 0, done.output
    assert f"predicting the test part of {data}" in done.stderr
    assert f"2 predictions of the test part: {out}" in done.stdout
    assert ("classification of the test part: accuracy 0.5" in done.stdout) == (not hidden)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["test good film"] * 2
    images = {"img": [np.zeros((16, 16, 3), np.uint8)] * 2}
    data = divided(tmp_path / "images", train={**images, "label": [0, 1]}, test={**images, "label": labels["test"]})
    predictions = predict(adapter_of("image-classification")[0], data)
    assert (predictions.part, len(predictions.rows)) == ("test", 2)
    assert (predictions.metrics == {}) == hidden


# -- What is written: columns, numbers that are not finite, lists, and no formulas --------------


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", ["classification", "multi-label", "regression", "token-classification"])
def test_a_number_that_is_not_finite_is_none(
    adapter_of: AdapterOf, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file, data), logits_of = adapter_of(name), prediction.logits_of
    nan = lambda *given: lambda *inputs: logits_of(*given)(*inputs) * float("nan")  # noqa: E731
    monkeypatch.setattr(prediction, "logits_of", nan)
    rows = predict(file, data, limit=2).rows
    assert "null" in json.dumps(rows, allow_nan=False)
    assert all(len(row) == len(rows[0]) for row in rows)
    assert invoke(file, "--data", data, "--out", tmp_path / "p.jsonl", "--limit", 2).exit_code == 0
    assert [strict(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == rows
    printed = invoke(file, "--data", data, "--limit", 2).stdout
    assert [strict(line) for line in printed.splitlines() if line.startswith("{")] == rows


@pytest.fixture
def written(adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that writes rows of predictions to a file, as the command does, and returns its content."""

    def write(rows: list[dict[str, Any]], suffix: str = ".csv") -> str:
        monkeypatch.setattr(finetune, "predict", lambda *given, **settings: Predictions("sorting", rows, {}))
        file, data = adapter_of("classification")
        out = tmp_path / f"written{suffix}"
        done = invoke(file, "--data", data, "--out", out, "--overwrite")
        assert done.exit_code == 0, done.output
        return out.read_bytes().decode()

    return write


def test_a_table_has_lists_as_json_and_columns_of_all_rows(adapter_of: AdapterOf, written: Callable[..., str]) -> None:
    rows: list[dict[str, Any]] = [
        {"tokens": ["a|b", "c,d"], "prediction": ["X", None], "scores": [0.5, None]},
        {"tokens": ["a", '"'], "prediction": ["X", "Y"], "scores": [0.5, 0.25]},
        {"tokens": ["é"], "prediction": [], "scores": [1]},
    ]
    read = list(csv.DictReader(written(rows).splitlines()))
    assert [{name: strict(cell) for name, cell in row.items()} for row in read] == rows
    rows = [{"text": "a", "label": "x"}, {"text": "b", "score": 0.5}, {"other": "c"}]
    read = list(csv.DictReader(written(rows).splitlines()))
    assert list(read[0]) == ["text", "label", "score", "other"]
    assert [{name: cell for name, cell in row.items() if cell} for row in read] == [
        {name: str(value) for name, value in row.items()} for row in rows
    ]
    rows = predict(*adapter_of("multi-label")).rows
    lists = [column for column, value in rows[0].items() if not isinstance(value, str)]
    assert {"prediction", "scores"} <= set(lists)
    read = list(csv.DictReader(written(rows).splitlines()))
    assert [[strict(row[column]) for column in lists] for row in read] == [[row[c] for c in lists] for row in rows]


def test_a_spreadsheet_finds_no_formula_in_a_table(written: Callable[..., str]) -> None:
    formulas = ["=1+2", "+cmd|' /C calc'!A0", "-2+3", "@A1", "\t=1", "\r=1", "\n=1", "\uff1d1", "\uff0b1", "-", "-a"]
    plain = ["-1.5", "+3", "-.5e-3", "a=b", "", "'=1", " =1", "0"]
    rows = [{"=text": text, "score": -0.5, "tags": ["=a"]} for text in formulas + plain]
    read = list(csv.reader(io.StringIO(written(rows), newline="")))
    assert read[0] == ["'=text", "score", "tags"]
    assert [row[0] for row in read[1:]] == [f"'{text}" for text in formulas] + plain
    assert {tuple(row[1:]) for row in read[1:]} == {("-0.5", '["=a"]')}
    assert [json.loads(line)["=text"] for line in written(rows, ".jsonl").splitlines()] == formulas + plain


def test_values_are_those_that_json_has_and_others_are_left_out() -> None:
    class Columns(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            assert name != "sound", "it would be decoded"
            return super().__getitem__(name)

    cells = {
        "day": datetime.date(2024, 1, 2), "time": datetime.datetime(2024, 1, 2, 3, 4, 5),
        "numbers": [1, float("nan"), None, True], "messages": [{"role": "user", "content": "é"}], "bytes": b"\0",
        "inside": [{"picture": object()}], "sound": "",
    }  # fmt: skip
    # Fewer samples than rows: the first ones.
    table = Table("a", "a", Columns({name: [cell, ""] for name, cell in cells.items()}), opaque=("sound",))
    (row,) = prediction.prediction_rows(table, ["a"], [{"prediction": float("inf")}])
    assert row == {
        "day": "2024-01-02", "time": "2024-01-02T03:04:05", "numbers": [1, None, None, True],
        "messages": [{"role": "user", "content": "é"}], "prediction": None,
    }  # fmt: skip
    json.dumps(row, allow_nan=False)
    # Images have their path or place.
    rows = prediction.prediction_rows(None, [Path("a.png"), object()], [{"prediction": "x"}] * 2)
    assert [row["image"] for row in rows] == ["a.png", 1]


TEXTS, NUMBERS, IMAGES = "classification", "regression", "image-classification"
LENGTH = "max_length of the inputs must be an integer from 1 to 2147483647, or None; got "
CUT = "; expected 3 to 32, for the base "
REMOTE = ", an address or network share, which is not opened"
FORM = "form of the task 'causal-lm' must be one of 'text', 'completion', 'messages'; got "
SIDE = "image_size of the inputs must be an integer from 1 to 8192; got "
MEAN = "pixel_mean of the inputs must be a list of one number per channel"
DEVIATION = "pixel_std of the inputs must be a list of one number per channel, from 1e-6 to 1e6"


@pytest.mark.parametrize(
    ("task", "inputs", "message"),
    [
        (TEXTS, {"max_length": "long"}, LENGTH + "'long'"),
        (TEXTS, {"max_length": True}, LENGTH),
        (TEXTS, {"max_length": 0}, LENGTH),
        (TEXTS, {"max_length": 33}, "has the max_length 33" + CUT),
        (TEXTS, {"max_length": 2}, "has the max_length 2" + CUT),
        (TEXTS, {"tokenizer": 5}, "tokenizer of the inputs must be text or None; got 5"),
        (TEXTS, {"tokenizer": "a\nb"}, "tokenizer of the inputs must be text or None; got 'a\\nb'"),
        (TEXTS, {"tokenizer": "//host/share"}, "names as its tokenizer '//host/share'" + REMOTE),
        (TEXTS, {"tokenizer": "https://host/a"}, "names as its tokenizer 'https://host/a'" + REMOTE),
        (TEXTS, {"task": "sorting"}, "was trained for a task that is unknown here: task must be one of 'classificat"),
        (TEXTS, {"task": NUMBERS, "task_mean": 1.0}, "the description of the task 'regression' is damaged"),
        (TEXTS, {"task": ...}, "does not say how inputs are prepared and outputs are read, as files of"),
        (NUMBERS, {"task_mean": "a"}, "mean of the task 'regression' must be a finite number; got 'a'"),
        (NUMBERS, {"task_mean": True}, "mean of the task 'regression' must be a finite number; got True"),
        (NUMBERS, {"task_deviation": 0}, "deviation of the task 'regression' must be a positive number; got 0"),
        (NUMBERS, {"task_deviation": None}, "deviation of the task 'regression' must be a positive number; got None"),
        ("causal-lm", {"task_form": "xyz"}, FORM),
        ("causal-lm", {"task_form": ["text"]}, FORM),
        (IMAGES, {"image_size": "big"}, SIDE + "'big'"),
        (IMAGES, {"image_size": -2}, SIDE + "-2"),
        (IMAGES, {"image_size": 1_000_000}, SIDE + "1000000"),
        (IMAGES, {"image_size": ...}, "does not say how images are scaled: its inputs have no image_size"),
        (IMAGES, {"channels": 7}, "channels of the inputs must be 1 or 3; got 7"),
        (
            IMAGES,
            {"channels": 1},
            "pixel_mean of the inputs must be a list of 1 numbers, one per channel; got [0.5,",
        ),
        (IMAGES, {"pixel_mean": [0, 0]}, MEAN),
        (IMAGES, {"pixel_mean": ["a", "b", "c"]}, MEAN),
        (IMAGES, {"pixel_std": "small"}, DEVIATION),
        (IMAGES, {"pixel_std": [1, 1, 0]}, DEVIATION),
    ],
)
def test_settings_that_cannot_be_used_are_named(
    adapter_of: AdapterOf, tmp_path: Path, task: str, inputs: dict[str, Any], message: str
) -> None:
    refused(adapter_of(task), tmp_path / "b.safetensors", message, inputs=inputs)


def refused(adapter: tuple[Path, str], path: Path, message: str, **about: Any) -> None:
    """Check that a file with these values is refused with its name and this message."""
    with pytest.raises(FileError) as caught:
        predict(tiny.changed(adapter[0], path, **about), adapter[1], new_tokens=2)
    assert str(caught.value).startswith(str(path)), caught.value
    assert message in str(caught.value)


@pytest.mark.parametrize("labels", [(), ("yes",), ("yes", "yes")])
@pytest.mark.parametrize("task", ["classification", "multi-label", "token-classification"])
def test_classes_that_are_none(adapter_of: AdapterOf, tmp_path: Path, task: str, labels: Any) -> None:
    message = f"classes of the task {task!r} must be two or more different names; got {labels!r}"
    file = tmp_path / "b.safetensors"
    refused(adapter_of("classification"), file, message, labels=labels, inputs={"task": task})


def test_a_study_is_refused_before_it_trains_what_no_file_may_hold(adapter_of: AdapterOf, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": label} for label in ["a" * 10_000, "b"] * 4]
    spec = Spec(model=str(adapter_of("classification")[0].parent / "model"), data=tiny.rows(tmp_path / "a.jsonl", rows))
    with pytest.raises(TnadaptError, match=r"cannot hold the task of .*: a label must be a string of at most \d+ lett"):
        open_problem(spec)


def test_an_adapter_without_a_description(adapter_of: AdapterOf, tmp_path: Path) -> None:
    model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    tna.torch.attach(model, tna.presets.lora(1)).save(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="does not say how inputs are prepared and outputs are read, as files of"):
        predict(tmp_path / "a.safetensors", adapter_of("classification")[1])


@pytest.mark.parametrize(
    ("task", "about", "write", "message"),
    [
        (
            TEXTS, {"library": "timm", "settings": {}}, tiny.classes,
            r"^{file} was trained for 'classification', a task of texts, but its model is one of timm, of images",
        ),
        (
            "causal-lm", {"labels": ("no", "yes"), "inputs": {"task": TEXTS, "task_form": ...}}, tiny.classes,
            r"^the model of {file} returned \(2, .*, 22\) logits for two samples of .*; expected \(2, 2\)",
        ),
        (
            TEXTS, {"inputs": {"task": "causal-lm", "task_form": "completion"}}, tiny.completions,
            "the adapter's task is 'causal-lm', but its model, a BertForSequenceClassification, cannot continue texts",
        ),
    ],
)  # fmt: skip
def test_a_task_that_its_model_does_not_do(
    adapter_of: AdapterOf, tmp_path: Path, task: str, about: dict[str, Any], write: Callable[[Path], str], message: str
) -> None:
    file = tiny.changed(adapter_of(task)[0], tmp_path / "b.safetensors", **about)
    with pytest.raises(TnadaptError, match=message.replace("{file}", re.escape(str(file)))):
        predict(file, write(tmp_path / "c.jsonl"))


@pytest.mark.parametrize(
    ("base", "tokenizer", "named", "expected"),
    [
        (False, None, None, ("{model}", "abc123")),
        (True, None, None, ("{model}", "abc123")),
        (False, None, "words", ("words", None)),
        (False, "mine", None, ("mine", None)),
        (False, "mine", "//host/share", ("mine", None)),
    ],
)
@pytest.mark.parametrize("task", [TEXTS, "token-classification"])
def test_the_bases_tokenizer_is_of_its_revision(
    adapter_of: AdapterOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: bool, tokenizer: str | None,
    named: str | None, expected: tuple[str, str | None], task: str,
) -> None:  # fmt: skip
    loaded = []

    def from_pretrained(name: str, **settings: Any) -> Any:
        loaded.append((name, settings))
        found = load(model)
        found.add_prefix_space = settings.get("add_prefix_space", False)
        return found

    load = transformers.AutoTokenizer.from_pretrained
    adapter, data = adapter_of(task)
    model = str(adapter.parent / "model")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    file = tiny.changed(adapter, tmp_path / "b.safetensors", revision="abc123", inputs={"tokenizer": named})
    predict(file, data, base=model if base else None, tokenizer=tokenizer, limit=2)
    name, revision = expected
    settings = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    spaced = [{**settings, "add_prefix_space": True}] * (task == "token-classification")
    assert loaded == [(name.format(model=model), one) for one in (settings, *spaced)]
