"""The task that data are evidence of, the refusals of data that fit another, several or none, and its samples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.errors import ConfigError, FileError, TnadaptError
from tnadapt.plugins import forget_registered

pytest.importorskip("torch")

from tnadapt.finetune import Spec
from tnadapt.finetune.data import Data, Samples, Table, facts_of, open_source, read_table
from tnadapt.finetune.tasks import TASKS, register_task

from . import tiny_models as tiny
from .internals import choose_task
from .tiny_models import read


def chosen(path: str, **options: Any) -> Any:
    spec = Spec(model="any", data=str(path), **options)
    source = open_source(str(path), spec.text_column, spec.label_column)
    task = choose_task(source, spec)
    return task, task.read(source, spec)


def table(folder: Path, labels: list[Any], options: dict[str, Any]) -> str:
    """Write texts with these labels as a .csv of plain cells, with the columns that the options name."""
    lines = [f"{options.get('text_column', 'text')},{options.get('label_column', 'label')}"]
    lines += [f"text {place},{label}" for place, label in enumerate(labels)]
    (folder / "data.csv").write_text("\n".join(lines))
    return str(folder / "data.csv")


def test_the_command_lists_all_tasks() -> None:
    typer = pytest.importorskip("typer")
    from tnadapt.cli import app

    commands: Any = typer.main.get_command(app)
    (option,) = (option for option in commands.commands["finetune"].params if option.name == "task")
    assert option.help == f"{', '.join(TASKS.built_in)}."


@pytest.mark.parametrize("name", tiny.JOBS)
def test_the_task_is_evident(tmp_path: Path, name: str) -> None:
    _, write, suffix = tiny.JOBS[name]
    path = write(tmp_path / f"data{suffix}")
    task, data = chosen(path)
    assert task.name == name
    assert len(data.samples) == 40
    for other in TASKS.built_in:
        if other == name:
            assert chosen(path, task=name)[0] is task
        elif suffix == ".npz":
            with pytest.raises(TnadaptError, match=f"--task {other} does not fit: data.npz has images; these"):
                chosen(path, task=other)


NAMED = {"text_column": "review", "label_column": "stars"}


@pytest.mark.parametrize(
    ("labels", "options", "name", "classes"),
    [
        (["yes", "no"] * 4, {}, "classification", ("no", "yes")),
        ([0, 1] * 4, {}, "classification", ("0", "1")),
        ([1, 2, 3, 4] * 2, {"task": "classification"}, "classification", ("1", "2", "3", "4")),
        ([1.5, 2.5, 2.0, 1.0] * 2, {"task": "classification"}, "classification", ("1.0", "1.5", "2.0", "2.5")),
        ([1, 2, 3, 4] * 2, {"task": "regression"}, "regression", ()),
        ([1.0, 3.5, 2.0, 0.5] * 2, {}, "regression", ()),
        ([1000 + 7 * i for i in range(60)], {}, "regression", ()),
        (["a|b", "a", "b", "b|a"] * 2, {}, "multi-label", ("a", "b")),
        (["a;b", "a", "b", "c; a", "c"] * 2, {}, "multi-label", ("a", "b", "c")),
        (["a/b", "a", "b", "c"] * 2, {"separator": "/"}, "multi-label", ("a", "b", "c")),
        (["R|B", "soul", "soul", "R|B"] * 2, {"task": "classification"}, "classification", ("R|B", "soul")),
        (["R|B", "soul", "soul", "R|B"] * 2, {"separator": "|"}, "multi-label", ("B", "R", "soul")),
        (["x", "y"] * 4, {"task": "causal-lm"}, "causal-lm", ()),
        (["good", "bad"] * 4, NAMED, "classification", ("bad", "good")),
        ([0.5, 1.25, 2.5, 3.75] * 2, NAMED, "regression", ()),
    ],
)  # fmt: skip
def test_labels_of_a_csv(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], name: str, classes: tuple[str, ...]
) -> None:
    task, data = chosen(table(tmp_path, labels, options), **options)
    assert (task.name, data.classes) == (name, classes)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1.5, "", 2.5], {"task": "regression"}, "data.csv, line 3: nothing in column 'label'"),
        (
            [1, 2, 3, 5] * 2, {},
            "the task is not evident from data.csv: the 4 different numbers in 'label', 1 to 5, may be classes (--task "
            "classification); the 4 different numbers in 'label', 1 to 5, may be quantities (--task regression); give "
            "--task classification or --task regression",
        ),
        (
            ["R|B", "soul", "soul"] * 2, {},
            "the task is not evident from data.csv: 'R|B' in 'label' may be one class (--task classification); 'R|B' "
            "in 'label' may be several labels, separated by '|', but 'R' is in no other label (--task multi-label); "
            "give --task classification or --task multi-label",
        ),
        (
            ["yes", "no", "yes"], {"task": "regression"},
            "--task regression does not fit: 'label' has labels that are not numbers; these data fit --task "
            "classification",
        ),
        (
            [0.5, 1.25, "n/a", 3.5], {},
            "the task is not evident from data.csv: most of the 4 different labels in 'label' are numbers, but not "
            "'n/a' (--task classification)",
        ),
        (
            [0.5, 1.25, "nan", 3.5], {"task": "regression"},
            "--task regression does not fit: 'label' has labels that are not numbers, such as 'nan'; these data fit",
        ),
        (
            ["yes", "no", "yes"], {"task": "multi-label"},
            "--task multi-label does not fit: no label in 'label' has '|' or ';'; give --separator if there is another",
        ),
        (
            ["yes", "no", "yes"], {"task": "multi-label", "separator": "/"},
            "--task multi-label does not fit: no label in 'label' has '/'; these data fit --task classification",
        ),
        (
            ["yes", "no", "yes"], {"task": "token-classification"},
            "--task token-classification does not fit: data.csv has 'text', 'label'; it needs columns tokens and tags",
        ),
        (
            ["yes", "no", "yes"], {"task": "image-classification"},
            "--task image-classification does not fit: data.csv is a table, not a folder of images or an .npz",
        ),
        (["yes", "no", "yes"], {"task": "sorting"}, "--task must be one of 'classification', 'multi-label',"),
        (
            ["yes", "no", "yes", "no"], {"separator": "/"},
            "--separator is for --task multi-label; the task of data.csv is classification",
        ),
        (
            ["yes", "no"] * 4, {"text_column": "review", "label_column": "answer"},  # completions are few words, too
            "'review' and 'answer' are prompts and completions (--task causal-lm",
        ),
        ([f"answer {i}" for i in range(8)], {}, "'label' has 8 different labels in 8 rows (--task classification)"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(tmp_path: Path, labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TnadaptError) as caught:
        chosen(table(tmp_path, labels, options), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"a": "x", "b": 1}, {}, "which column of .* is the text\\? It has 'a', 'b': give --text-column NAME"),
        (
            {"text": "x", "stars": 1}, {},
            "which column of .* is the label\\? It has 'text', 'stars': give --label-column NAME, or --task causal-lm",
        ),
        ({"text": "x", "label": [1]}, {"task": "classification"}, "does not fit: 'label' has lists"),
        ({"text": "x", "label": None}, {}, r"fits no task \(classification: 'label' has no words or integers; "),
        ({"tokens": ["x"], "tags": ["O", "O"]}, {}, "row 0 of .*: 1 words and 2 tags; each word needs one"),
        ({"tokens": ["x"], "tags": ["O"]}, {}, "has the tag 'O' alone; --task token-classification needs two"),
        ({"messages": [{"role": "user"}]}, {}, "is not a conversation; expected"),
        ({"prompt": "x", "completion": 3}, {}, "row 0 of .*: 3 in 'completion' is not a text"),
        ({"text": "x", "label": ["", "a"]}, {}, "has an empty label"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit(tmp_path: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        chosen(tiny.rows(tmp_path / "data.jsonl", [row] * 4), **options)


NAMES = ["no", "maybe", "yes"]


@pytest.mark.parametrize(
    ("column", "labels", "name", "classes", "expected"),
    [
        ("label", [0, 1, 2] * 2, "classification", ("no", "maybe", "yes"), [0, 1, 2] * 2),
        ("label", [2, 0, 2, 0], "classification", ("no", "yes"), [1, 0, 1, 0]),
        ("labels", [[0], [0, 2], []], "multi-label", ("no", "yes"), [[1, 0], [1, 1], [0, 0]]),
        ("ner_tags", [[0, 2], [1]], "token-classification", ("maybe", "no", "yes"), [[1, 2], [0]]),
    ],
)
def test_classes_that_datasets_names_are_evident(
    column: str, labels: list[Any], name: str, classes: tuple[str, ...], expected: list[Any], tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    text, label = datasets.Value("string"), datasets.ClassLabel(names=NAMES)
    if column != "label":
        label = datasets.Sequence(label)
    rows: dict[str, Any] = {"text": list("abcdef")[: len(labels)], column: labels}
    if column == "ner_tags":
        rows, text = {"tokens": [["a", "b"], ["c"]], column: labels}, datasets.Sequence(text)
    features = datasets.Features({next(iter(rows)): text, column: label})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    task, data = chosen(str(tmp_path / "saved"))
    assert (task.name, data.classes) == (name, classes)
    # What was trained on is predicted, too.
    again, known = task.of(data, data.samples).samples(open_source(str(tmp_path / "saved")), Spec())
    assert known
    for samples in (data.samples, again):
        assert [labels if isinstance(labels, list) else labels.tolist() for labels in samples.labels] == expected


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), st.sampled_from("|;/"))
def test_pieces_that_are_also_alone_are_several_labels(pieces: list[str], mark: str) -> None:
    facts = facts_of([mark.join(pieces), *pieces], mark)
    joint = len(pieces) > 1
    assert facts.separator == (mark if joint else None)
    assert facts.alone == ""


def test_another_task_is_registered() -> None:
    class Mine(TASKS["regression"]):  # type: ignore[misc]
        name = "my-regression"

    try:
        register_task(Mine)
        assert TASKS["my-regression"] is Mine
        with pytest.raises(ConfigError, match=r"regression"):
            register_task(TASKS["regression"])
    finally:
        forget_registered()


WORDS = ("neg", "pos")


def task_of(name: str) -> Any:
    fields = {"regression": (0.0, 1.0), "causal-lm": ("completion",)}
    return TASKS[name](*fields.get(name, (WORDS,)))


@pytest.mark.parametrize("options", [{"label_column": "lable"}, {"text_column": "txt"}])
@pytest.mark.parametrize("name", ["classification", "multi-label", "regression", "token-classification", "causal-lm"])
def test_a_column_with_a_typo_is_not_left_out(name: str, options: dict[str, str]) -> None:
    columns: dict[str, list[Any]] = {"text": ["a"] * 4, "label": [0, 1] * 2}
    if name == "token-classification":
        columns = {"tokens": [["a"]] * 4, "tags": [["neg"], ["pos"]] * 2}
    if name == "causal-lm":
        columns = {"prompt": ["a"] * 4, "completion": ["b"] * 4, "text": ["c"] * 4}
    table, typo = Table("data", "data", columns), next(iter(options.values()))
    message = f"data has no column '{typo}'; its columns are "
    with pytest.raises(FileError, match=message):
        choose_task(table, Spec(task=name, **options))
    with pytest.raises(FileError, match=message):
        task_of(name).samples(table, Spec(**options))


# -- Numbers of classes ------------------------------------------------------------------------


def numbered(name: str, *numbers: Any) -> Table:
    """A table whose labels are numbers of classes, one each."""
    if name == "token-classification":
        tags = [[one] for one in numbers]
        return Table("data", "data", {"tokens": [["a"]] * len(tags), "tags": tags}, words={"tags": WORDS})
    labels = [[one] for one in numbers] if name == "multi-label" else list(numbers)
    return Table("data", "data", {"text": ["a"] * len(labels), "label": labels}, words={"label": WORDS})


OF_CLASSES = ("classification", "multi-label", "token-classification")


@pytest.mark.parametrize("name", OF_CLASSES)
@pytest.mark.parametrize("number", [-1, 2, 1 << 70, True])
def test_a_number_of_no_class_is_named(name: str, number: Any) -> None:
    table = numbered(name, 0, 1, number)
    message = r"row 2 of data: .* in '(label|tags)' is not the number of a class; expected 0 to 1: leave the row out"
    for read_samples in (task_of(name).samples, TASKS[name].read):
        with pytest.raises(FileError, match=message):
            read_samples(table, Spec())
    images = Data("photos", "image", ("-1", "0", "1"), Samples([], np.zeros(0, np.int64)))
    message = "photos has the label -1, which is not the number of a class; expected 0 to 1: leave such samples out"
    with pytest.raises(FileError, match=message):
        images.with_words(WORDS)


@pytest.mark.parametrize("name", [*OF_CLASSES, "regression"])
def test_labels_that_are_all_hidden_are_none(name: str) -> None:
    samples, known = task_of(name).samples(numbered(name, -1, -1), Spec())
    assert (len(samples), known) == (2, False)
    # One text may have the number -1.
    samples, known = task_of("regression").samples(numbered("regression", -1), Spec())
    assert (samples.labels.tolist(), known) == ([-1], True)


def test_a_test_part_needs_the_columns_and_labels() -> None:
    parts = {
        "test": {"text": ["a"], "label": [-1]}, "validation": {"sentence": ["a"], "label": [0]},
        "val": {"text": ["b"], "label": [1]},
    }  # fmt: skip
    table = Table("data", "data", {"text": ["c", "d"], "label": [0, 1]}, parts)
    _, held = table.parts(["text", "label"], "label")
    assert (held.path, held.columns["text"], held.tests) == ("the val part of data", ["b"], {})
    assert TASKS["classification"].read(table, Spec()).test.inputs == ["b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_spaces_around_labels_are_no_part_of_them(tmp_path: Path, suffix: str) -> None:
    labels = ["pos ", " neg", "pos", "neg"]
    lines = ["text,label", *(f"t,{label}" for label in labels)]
    if suffix == ".jsonl":
        lines = [json.dumps({"text": "t", "label": label}) for label in labels]
    path = tmp_path / f"a{suffix}"
    path.write_text("".join(f"{line}\n" for line in lines))
    data = read(str(path))
    assert data.classes == WORDS
    assert data.samples.labels.tolist() == [1, 0, 1, 0]
    task = TASKS["classification"].of(data, data.samples)
    assert task.samples(open_source(str(path)), Spec())[0].labels.tolist() == [1, 0, 1, 0]


def test_a_hundred_thousand_columns(tmp_path: Path) -> None:
    many, doubled, long = (tmp_path / f"{name}.csv" for name in ("many", "doubled", "long"))
    many.write_text("\n".join([",".join(f"c{i}" for i in range(100_000)), ",".join(["1"] * 100_000)]))
    doubled.write_text(",".join(f"c{i // 2}" for i in range(100_000)) + "\n1\n")
    long.write_text("x" * 100_000 + ",label\n1,2\n")
    start = time.process_time()
    assert len(read_table(many).columns) == 100_000
    message = (
        r"which column of .*many\.csv is the text\? It has 'c0', .*, 'c29' and 99,970 more: give --text-column NAME"
    )
    with pytest.raises(FileError, match=message):
        read(str(many))
    with pytest.raises(FileError, match=r"doubled\.csv has more than one column 'c0'$"):
        read_table(doubled)
    assert time.process_time() - start < 2
    # A name of a column is shortened in messages.
    with pytest.raises(FileError) as caught:
        read(str(long))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("source", ["x" * 100_000, "./" + "x" * 100_000, "x" * 100_000 + ".csv", "y" * 300 + "/a.csv"])
def test_a_path_that_is_too_long_has_no_data(source: str) -> None:
    with pytest.raises(TnadaptError, match=r"^no (data at|file or folder) |a path must be") as caught:
        open_source(source)
    assert len(str(caught.value)) < 5100
