"""Tables of samples: columns that were asked for, numbers of classes, parts, and spaces around labels."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Spec
from tnadapt.finetune._pretrained import choose_task
from tnadapt.finetune.data import (
    Data,
    Samples,
    Table,
    find_column,
    needed_column,
    open_source,
    read_table,
)
from tnadapt.finetune.tasks import TASKS

from .small import read

WORDS = ("neg", "pos")


def task_of(name: str) -> Any:
    fields = {"regression": (0.0, 1.0), "causal-lm": ("completion",)}
    return TASKS[name](*fields.get(name, (WORDS,)))


# -- Columns -----------------------------------------------------------------------------------


def test_a_column_that_was_asked_for_is_there() -> None:
    message = r"a.csv has no column 'lable'; its columns are 'text', 'label'"
    for find in (find_column, lambda *given: needed_column(given[0], "label", *given[1:])):
        with pytest.raises(FileError, match=message):
            find("a.csv", "lable", ["label"], ["text", "label"])
    assert find_column("a.csv", None, ["label"], ["text"]) is None


@pytest.mark.parametrize("options", [{"label_column": "lable"}, {"text_column": "txt"}])
@pytest.mark.parametrize("name", ["classification", "multi-label", "regression", "token-classification", "causal-lm"])
def test_a_column_with_a_typo_is_not_left_out(name: str, options: dict[str, str]) -> None:
    columns: dict[str, list[Any]] = {"text": ["a"] * 4, "label": [0, 1] * 2}
    if name == "token-classification":
        columns = {"tokens": [["a"]] * 4, "tags": [["neg"], ["pos"]] * 2}
    if name == "causal-lm":
        columns = {"prompt": ["a"] * 4, "completion": ["b"] * 4, "text": ["c"] * 4}
    table, typo = Table("data", "data", columns), next(iter(options.values()))
    with pytest.raises(FileError, match=f"data has no column '{typo}'; its columns are "):
        choose_task(table, Spec(task=name, **options))
    with pytest.raises(FileError, match=f"data has no column '{typo}'; its columns are "):
        task_of(name).samples(table, Spec(**options))


# -- Numbers of classes ------------------------------------------------------------------------


def numbered(name: str, *numbers: Any) -> Table:
    """A table whose labels are numbers of classes, one each."""
    if name == "token-classification":
        tags = [[one] for one in numbers]
        return Table("data", "data", {"tokens": [["a"]] * len(tags), "tags": tags}, words={"tags": WORDS})
    labels = [[one] for one in numbers] if name == "multi-label" else list(numbers)
    return Table("data", "data", {"text": ["a"] * len(labels), "label": labels}, words={"label": WORDS})


TASK_NAMES = ("classification", "multi-label", "token-classification")


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name in TASK_NAMES for number in (-1, 2, 1 << 70, True)]
)
def test_a_number_of_no_class_is_named(name: str, number: Any) -> None:
    table = numbered(name, 0, 1, number)
    message = r"row 2 of data: .* in '(label|tags)' is not the number of a class; expected 0 to 1: leave the row out"
    with pytest.raises(FileError, match=message):
        task_of(name).samples(table, Spec())
    with pytest.raises(FileError, match=message):
        TASKS[name].read(table, Spec())


@pytest.mark.parametrize("name", TASK_NAMES)
def test_numbers_are_those_of_the_names(name: str) -> None:
    samples, known = task_of(name).samples(numbered(name, 1, 0), Spec())
    assert known
    expected = {"multi-label": [[0, 1], [1, 0]], "token-classification": [[1], [0]]}.get(name, [1, 0])
    assert [one if isinstance(one, list) else one.tolist() for one in samples.labels] == expected


@pytest.mark.parametrize("name", [*TASK_NAMES, "regression"])
def test_labels_that_are_all_hidden_are_none(name: str) -> None:
    samples, known = task_of(name).samples(numbered(name, -1, -1), Spec())
    assert len(samples) == 2
    assert not known


def test_one_text_may_have_the_number_minus_one() -> None:
    samples, known = task_of("regression").samples(numbered("regression", -1), Spec())
    assert known
    assert samples.labels.tolist() == [-1]


def test_classes_that_do_not_all_occur_have_names() -> None:
    table = Table("data", "data", {"text": list("abcd"), "label": [2, 0, 2, 0]}, words={"label": ("a", "b", "c")})
    data = TASKS["classification"].read(table, Spec())
    assert data.classes == ("a", "c")
    assert data.samples.labels.tolist() == [1, 0, 1, 0]
    # What was trained on is predicted, too.
    assert TASKS["classification"](data.classes).samples(table, Spec())[0].labels.tolist() == [1, 0, 1, 0]


def test_images_with_a_number_of_no_class() -> None:
    data = Data("photos", "image", ("-1", "0", "1"), Samples([], np.zeros(0, np.int64)))
    message = "photos has the label -1, which is not the number of a class; expected 0 to 1: leave such samples out"
    with pytest.raises(FileError, match=message):
        data.with_words(WORDS)


# -- Parts -------------------------------------------------------------------------------------


def test_a_test_part_needs_the_columns_and_labels() -> None:
    parts = {
        "test": {"text": ["a"], "label": [-1]}, "validation": {"sentence": ["a"], "label": [0]},
        "val": {"text": ["b"], "label": [1]},
    }  # fmt: skip
    table = Table("data", "data", {"text": ["c", "d"], "label": [0, 1]}, parts)
    held = table.test(["text", "label"], "label")
    assert held is not None
    assert (held.path, held.columns["text"], held.tests) == ("the val part of data", ["b"], {})
    assert TASKS["classification"].read(table, Spec()).test.inputs == ["b"]


# -- Spaces ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_spaces_around_labels_are_no_part_of_them(tmp_path: Path, suffix: str) -> None:
    labels = ["pos ", " neg", "pos", "neg"]
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        path.write_text("".join(f"{line}\n" for line in ("text,label", *(f"t,{label}" for label in labels))))
    else:
        path.write_text("".join(json.dumps({"text": "t", "label": label}) + "\n" for label in labels))
    data = read(str(path))
    assert data.classes == WORDS
    assert data.samples.labels.tolist() == [1, 0, 1, 0]
    task = TASKS["classification"].of(data, data.samples)
    assert task.samples(open_source(str(path)), Spec())[0].labels.tolist() == [1, 0, 1, 0]


# -- Hostile tables ----------------------------------------------------------------------------


def test_a_hundred_thousand_columns(tmp_path: Path) -> None:
    many, doubled = tmp_path / "many.csv", tmp_path / "doubled.csv"
    many.write_text("\n".join([",".join(f"c{i}" for i in range(100_000)), ",".join(["1"] * 100_000)]))
    doubled.write_text(",".join(f"c{i // 2}" for i in range(100_000)) + "\n1\n")
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


def test_a_name_of_a_column_is_shortened_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "long.csv"
    path.write_text("x" * 100_000 + ",label\n1,2\n")
    with pytest.raises(FileError) as caught:
        read(str(path))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("source", ["x" * 100_000, "./" + "x" * 100_000, "x" * 100_000 + ".csv", "y" * 300 + "/a.csv"])
def test_a_path_that_is_too_long_has_no_data(source: str) -> None:
    with pytest.raises(TnadaptError, match=r"^no (data at|file or folder) |a path must be") as caught:
        open_source(source)
    assert len(str(caught.value)) < 5100
