"""``tnadapt predict``: the other half of ``tnadapt finetune``."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
typer_testing = pytest.importorskip("typer.testing")

import tnadapt as tna
from tnadapt.cli import app
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Spec, Task, Training, open_problem, predict
from tnadapt.finetune._learning_task import LearningTask
from tnadapt.finetune.data import Samples, divide, open_source
from tnadapt.finetune.grid import Method
from tnadapt.finetune.loop import evaluate
from tnadapt.finetune.problem import Problem
from tnadapt.finetune.training import train

from . import tiny_models as tiny

LORA = Method("LoRA", "r = 1", tna.presets.lora(1))


def trained(folder: Path, model: str, data: str, **options: Any) -> tuple[Problem, dict[str, Any], Path]:
    """Train an adapter for a few steps; return the problem, its result line and its file."""
    problem = open_problem(Spec(model=model, data=data, **options))
    record = train(problem, Task(LORA, 0, 0.05), Training(2, 8), folder / "adapters")
    return problem, record, folder / "adapters" / record["adapter"]


def invoke(*arguments: Any) -> Any:
    return typer_testing.CliRunner().invoke(app, ["predict", *map(str, arguments)], catch_exceptions=True)


MODELS = {
    "classification": (tiny.bert, tiny.classes),
    "multi-label": (tiny.bert, tiny.several),
    "regression": (tiny.bert, tiny.numbers),
    "token-classification": (tiny.bert, tiny.tags),
    "causal-lm": (tiny.gpt2, tiny.completions),
    "image-classification": (tiny.vit, tiny.shades),
}


def held_out(path: Path, task: LearningTask) -> str:
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


@pytest.mark.parametrize("name", MODELS)
def test_predictions_and_metrics_are_those_of_the_study(tmp_path: Path, name: str) -> None:
    make, write = MODELS[name]
    data = write(tmp_path / ("a.npz" if name.startswith("image") else "a.jsonl"))
    problem, record, file = trained(tmp_path, make(tmp_path / "model"), data)
    found = predict(file, held_out(Path(data), problem.task), new_tokens=3)
    fresh = problem.build(7)
    tna.torch.load(fresh, file)
    expected = evaluate(fresh, problem.logits, problem.task, problem.parts["test"], torch.device("cpu"))
    assert found.task == name
    assert len(found.rows) == len(problem.parts["test"].labels)
    for row, one in zip(found.rows, expected, strict=True):
        for column, value in problem.task.answer(one).items():
            assert row[column] == (value if column == "prediction" and name != "regression" else approximately(value))
    metrics = {problem.task.metric.name: record["test"], **record.get("test_metrics", {})}
    assert found.metrics == approximately(metrics)


def approximately(value: Any) -> Any:
    # Other batches give other roundings.
    return pytest.approx(value, rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Return a base, data and an adapter's file."""
    folder = tmp_path_factory.mktemp("classifier")
    model, data = tiny.bert(folder / "bert"), tiny.classes(folder / "a.jsonl")
    return Path(model), Path(data), trained(folder, model, data)[2]


def test_a_table_and_lines_of_predictions(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, data, file = classifier
    table, lines = tmp_path / "p.csv", tmp_path / "p.jsonl"
    done = invoke(file, "--data", data, "--out", table, "--limit", 5)
    assert done.exit_code == 0, done.output
    assert f"5 predictions: {table}" in done.stdout
    assert "classification: accuracy 0." in done.stdout
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


def test_columns_of_the_data_stay_and_new_ones_do_not_replace_them(
    classifier: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    data, first, second = tmp_path / "a.csv", tmp_path / "b.csv", tmp_path / "c.jsonl"
    data.write_text('id,review,note\n007,good film,"a, b"\n8,bad film,\n')
    given = ("--text-column", "review")
    assert invoke(classifier[2], "--data", data, "--out", first, *given).exit_code == 0
    with first.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [list(row.values())[:3] for row in rows] == [["007", "good film", "a, b"], ["8", "bad film", ""]]
    assert list(rows[0]) == ["id", "review", "note", "prediction", "score"]
    # The predictions of one adapter are data for the next.
    assert invoke(classifier[2], "--data", first, "--out", second, *given).exit_code == 0
    again = [json.loads(line) for line in second.read_text().splitlines()]
    assert list(again[0]) == [*rows[0], "prediction_2", "score_2"]
    for row, before in zip(again, rows, strict=True):
        assert {name: row[name] for name in before} == before
        assert row["prediction_2"] == before["prediction"]


def test_data_without_labels(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, data, file = classifier
    texts = [{"text": json.loads(line)["text"]} for line in data.read_text().splitlines()]
    found = predict(file, tiny.rows(tmp_path / "b.jsonl", texts))
    assert found.metrics == {}
    labelled = predict(file, str(data)).rows
    assert found.rows == [{name: row[name] for name in ("text", "prediction", "score")} for row in labelled]


@pytest.mark.slow
def test_words_without_tags_and_prompts_without_completions(tmp_path: Path) -> None:
    _, _, file = trained(tmp_path, tiny.bert(tmp_path / "bert"), tiny.tags(tmp_path / "a.jsonl"))
    found = predict(file, tiny.rows(tmp_path / "b.jsonl", [{"tokens": ["good", "film"]}]))
    assert found.metrics == {}
    assert len(found.rows[0]["prediction"]) == 2
    # A word that is cut off, or has no token, keeps its place.
    long = predict(file, tiny.rows(tmp_path / "e.jsonl", [{"tokens": ["good", "\u200b", "film", *["very"] * 60]}]))
    tags = long.rows[0]["prediction"]
    assert len(tags) == len(long.rows[0]["scores"]) == 63
    assert [place for place, tag in enumerate(tags) if tag is None] == [1, *range(31, 63)]
    _, _, file = trained(tmp_path, tiny.gpt2(tmp_path / "gpt2"), tiny.completions(tmp_path / "c.jsonl"))
    found = predict(file, tiny.rows(tmp_path / "d.jsonl", [{"prompt": "what is"}, {"prompt": "the"}]), new_tokens=4)
    assert found.metrics == {}
    assert [set(row) for row in found.rows] == [{"prompt", "prediction"}] * 2
    with pytest.raises(TnadaptError, match="--max-new-tokens must be below the 48 positions of the model; got 48"):
        predict(file, str(tmp_path / "d.jsonl"), new_tokens=48)


@pytest.mark.slow
def test_completions_are_those_of_generate(tmp_path: Path) -> None:
    problem, _, file = trained(tmp_path, tiny.gpt2(tmp_path / "gpt2"), tiny.completions(tmp_path / "c.jsonl"))
    found = predict(file, str(tmp_path / "c.jsonl"), new_tokens=5, limit=6)
    model = problem.build(0)
    tna.torch.load(model, file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for row in found.rows:
        tokens = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        made = model.eval().generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False, pad_token_id=3
        )
        assert row["prediction"] == tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)


def test_a_folder_of_images_without_classes(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    _, _, file = trained(tmp_path, tiny.vit(tmp_path / "vit"), tiny.shades(tmp_path / "a.npz"))
    (tmp_path / "new").mkdir()
    for place, shade in enumerate((30, 220)):
        image.fromarray(np.full((12, 20, 3), shade, np.uint8)).save(tmp_path / "new" / f"{place}.png")
    found = predict(file, str(tmp_path / "new"))
    assert [row["prediction"] for row in found.rows] == ["0", "1"]
    assert [row["image"] for row in found.rows] == [str(tmp_path / "new" / f"{place}.png") for place in (0, 1)]
    assert found.metrics == {}
    assert predict(file, str(tmp_path / "new" / "1.png")).rows == found.rows[1:]
    with pytest.raises(FileError, match=r"is a table; the adapter predicts images: give a folder of them"):
        predict(file, tiny.classes(tmp_path / "b.jsonl"))


@pytest.mark.slow
def test_a_model_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32}
    made = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=10, **sizes)
    timm.models.save_for_hf(made, str(tmp_path / "vit"), model_args=sizes, safe_serialization=True)
    data = tiny.shades(tmp_path / "a.npz")
    _, record, file = trained(tmp_path, f"timm:local-dir:{tmp_path / 'vit'}", data)
    assert record["test"] == 1
    found = predict(file, data)
    assert found.metrics == {"accuracy": 1.0}
    assert [row["prediction"] for row in found.rows] == ["0", "1"] * 20


def test_an_adapter_of_an_unknown_task(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "a.safetensors"
    file = tna.load(classifier[2])
    for inputs, message in (
        ({"task": "sorting"}, "was trained for a task that is unknown here: task must be one of 'classification'"),
        ({"task": "regression", "task_mean": 1.0}, "the description of the task 'regression' is damaged"),
    ):
        about = dataclasses.replace(file.pretrained, inputs=inputs)
        tna.save(broken, dataclasses.replace(file, pretrained=about))
        with pytest.raises(FileError, match=message):
            predict(broken, str(classifier[1]))


def test_a_base_that_moved_and_another_base(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model, data, file = classifier
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in model.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert predict(file, str(data), base=str(moved)).rows == predict(file, str(data)).rows
    changed = transformers.BertModel.from_pretrained(moved)
    with torch.no_grad():
        changed.encoder.layer[0].attention.self.query.weight.add_(1.0)
    changed.save_pretrained(moved)
    with pytest.raises(FileError, match="another base model"):
        predict(file, str(data), base=str(moved))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"text": "good", "label": "perhaps"}, {}, "b.jsonl has the label 'perhaps'; the adapter knows 'no', 'yes'"),
        ({"words": "good"}, {}, "which column of .* is the text\\? It has 'words'"),
        ({"text": 3}, {}, "the text of sample 0 of b.jsonl is 3"),
        ({"text": "good"}, {"text_column": "txt"}, "has no column 'txt'"),
    ],
)  # fmt: skip
def test_data_that_the_adapter_does_not_take(
    classifier: tuple[Path, Path, Path], tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FileError, match=message):
        predict(classifier[2], tiny.rows(tmp_path / "b.jsonl", [row]), **options)


def test_images_for_an_adapter_of_texts(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"a\.npz has images, and the adapter was trained on texts \(classification\)"):
        predict(classifier[2], tiny.shades(tmp_path / "a.npz"))


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.safetensors", "--data", "a.csv"], "no adapter at none.safetensors: there is no such file"),
        ([".", "--data", "a.csv"], "no adapter at .: it is a folder; give a file such as best.safetensors"),
        (["{file}", "--data", "a.csv"], "no data at a.csv: there is no such file or folder"),
        (["{file}", "--data", "a.csv", "--out", "p.txt"], "--out must end in .csv or .jsonl; got p.txt"),
        (["{file}", "--data", "a.csv", "--out", "none/p.csv"], "is in a folder that does not exist"),
        (["{data}", "--data", "{data}"], "a.jsonl: "),
    ],
)
def test_a_users_mistake(
    classifier: tuple[Path, Path, Path], tmp_path: Path, arguments: list[str], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = invoke(*(one.format(file=classifier[2], data=classifier[1]) for one in arguments))
    assert isinstance(done.exception, TnadaptError), done.output
    assert message in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_one_image_is_predicted_on_the_command_line(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    _, _, file = trained(tmp_path, tiny.vit(tmp_path / "vit"), tiny.shades(tmp_path / "a.npz"))
    path = tmp_path / "one.png"
    image.fromarray(np.full((12, 20, 3), 220, np.uint8)).save(path)
    done = invoke(file, "--data", path)
    (row,) = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert (row["image"], row["prediction"]) == (str(path), "1")
    (tmp_path / "sound.mp3").touch()
    refused = invoke(file, "--data", tmp_path / "sound.mp3")
    assert str(refused.exception).endswith(".json or .npz file, or an image or a folder of images")


def test_an_adapter_that_says_no_task(classifier: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
    tna.torch.attach(model, tna.presets.lora(1)).save(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="does not say how inputs are prepared and outputs are read, as files of"):
        predict(tmp_path / "a.safetensors", str(classifier[1]))


def test_interrupted_it_writes_nothing(
    classifier: tuple[Path, Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from tnadapt import finetune

    def interrupted(*given: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "predict", interrupted)
    done = invoke(classifier[2], "--data", classifier[1], "--out", tmp_path / "p.csv")
    assert done.exit_code == 130
    assert "stopped; nothing was written" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
