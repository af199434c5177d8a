"""The task that data are evidence of, and the refusals of data that fit another, several, or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.errors import ConfigError, FileError, TnadaptError
from tnadapt.plugins import forget_registered

pytest.importorskip("torch")

from tnadapt.cli._options import TASK_NAMES
from tnadapt.finetune import Spec
from tnadapt.finetune._pretrained import choose_task
from tnadapt.finetune.data import facts_of, open_source
from tnadapt.finetune.tasks import TASKS, register_task

from . import tiny_models as tiny


def chosen(path: str, **options: Any) -> Any:
    spec = Spec(model="any", data=str(path), **options)
    source = open_source(str(path), spec.text_column, spec.label_column)
    task = choose_task(source, spec)
    return task, task.read(source, spec)


def table(folder: Path, labels: list[Any], **more: list[Any]) -> str:
    """Write texts with these labels as a .csv of plain cells."""
    lines = [",".join(["text", "label", *more])]
    lines += [",".join(map(str, [f"text {i}", *row])) for i, row in enumerate(zip(labels, *more.values(), strict=True))]
    (folder / "data.csv").write_text("\n".join(lines))
    return str(folder / "data.csv")


def test_the_command_lists_all_tasks() -> None:
    assert tuple(TASKS.built_in) == TASK_NAMES


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (tiny.classes, "classification"),
        (tiny.several, "multi-label"),
        (tiny.numbers, "regression"),
        (tiny.tags, "token-classification"),
        (tiny.completions, "causal-lm"),
    ],
)
def test_the_task_is_evident(tmp_path: Path, make: Any, name: str) -> None:
    path = make(tmp_path / "data.jsonl")
    task, data = chosen(path)
    assert task.name == name
    assert len(data.samples) == 40
    assert chosen(path, task=name)[0] is task


def test_images_are_classified(tmp_path: Path) -> None:
    assert chosen(tiny.shades(tmp_path / "data.npz"))[0].name == "image-classification"


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
    ],
)  # fmt: skip
def test_labels_of_a_csv(
    tmp_path: Path, labels: list[Any], options: dict[str, Any], name: str, classes: tuple[str, ...]
) -> None:
    task, data = chosen(table(tmp_path, labels), **options)
    assert (task.name, data.classes) == (name, classes)


@pytest.mark.parametrize(
    ("column", "labels", "name"),
    [
        ("stars", ["good", "bad"], "classification"),
        ("answer", ["yes", "no"], ""),
        ("stars", [0.5, 1.25, 2.5, 3.75], "regression"),
    ],
)
def test_named_columns_are_texts_and_labels_unless_they_are_called_completions(
    tmp_path: Path, column: str, labels: list[Any], name: str
) -> None:
    path = tmp_path / "data.csv"
    path.write_text("\n".join([f"review,{column}", *(f"text {i},{labels[i % len(labels)]}" for i in range(8))]))
    if not name:  # completions are few words, too
        with pytest.raises(TnadaptError, match=r"'review' and 'answer' are prompts and completions \(--task causal-lm"):
            chosen(path, text_column="review", label_column=column)
        return
    assert chosen(path, text_column="review", label_column=column)[0].name == name


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
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
        ([f"answer {i}" for i in range(8)], {}, "'label' has 8 different labels in 8 rows (--task classification)"),
    ],
)  # fmt: skip
def test_data_that_do_not_fit(tmp_path: Path, labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(TnadaptError) as caught:
        chosen(table(tmp_path, labels), **options)
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


def test_images_fit_no_other_task(tmp_path: Path) -> None:
    path = tiny.shades(tmp_path / "data.npz")
    for name in TASK_NAMES[:-1]:
        with pytest.raises(TnadaptError, match=f"--task {name} does not fit: data.npz has images; these"):
            chosen(path, task=name)


def test_a_missing_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"data\.csv, line 3: nothing in column 'label'"):
        chosen(table(tmp_path, [1.5, "", 2.5]), task="regression")


def test_classes_that_datasets_names_are_evident(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["no", "maybe", "yes"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    rows = {"text": list("abcdef"), "label": [0, 1, 2] * 2}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "one")
    task, data = chosen(str(tmp_path / "one"))
    assert (task.name, data.classes) == ("classification", ("no", "maybe", "yes"))
    listed = datasets.Features({"text": datasets.Value("string"), "labels": datasets.Sequence(names)})
    rows = {"text": list("abc"), "labels": [[0], [0, 2], []]}
    datasets.Dataset.from_dict(rows, features=listed).save_to_disk(tmp_path / "several")
    task, data = chosen(str(tmp_path / "several"))
    assert (task.name, data.classes) == ("multi-label", ("no", "yes"))
    np.testing.assert_array_equal(data.samples.labels, [[1, 0], [1, 1], [0, 0]])
    tagged = datasets.Features(
        {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(names)}
    )
    rows = {"tokens": [["a", "b"], ["c"]], "ner_tags": [[0, 2], [1]]}
    datasets.Dataset.from_dict(rows, features=tagged).save_to_disk(tmp_path / "tags")
    task, data = chosen(str(tmp_path / "tags"))
    assert (task.name, data.classes) == ("token-classification", ("maybe", "no", "yes"))
    assert list(data.samples.labels) == [[1, 2], [0]]


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


# -- JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"', "line 1 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 is \\[1\\]; expected an object with one value for each column"),
        ("a.jsonl", '{"text": "x"}\n\n{"label": "y"}\n', "line 3: column 'label' is not in every row"),
        ("a.jsonl", "\n", "has no rows"),
        ("a.json", '{"text": "x"}', "is not a list of objects"),
        ("a.json", '[{"text": "x"}, 3]', "entry 2 is 3; expected an object"),
        ("a.json", "[" * 100_000, "the file is not JSON"),
    ],
)
def test_bad_json(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(FileError, match=message):
        open_source(str(tmp_path / name))


def test_a_list_and_lines_of_json_are_the_same(tmp_path: Path) -> None:
    lines = Path(tiny.classes(tmp_path / "a.jsonl")).read_text().splitlines()
    (tmp_path / "a.json").write_text(f"[{','.join(lines)}]")
    one, other = (open_source(str(tmp_path / name)) for name in ("a.jsonl", "a.json"))
    assert dict(one.columns) == dict(other.columns)  # type: ignore[union-attr]
