"""Values in an adapter's file that come from elsewhere: each is used as it should be, or an error names it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Spec, open_problem, predict
from tnadapt.finetune import _prediction as prediction
from tnadapt.finetune._saved_task import check_recordable
from tnadapt.finetune.tasks import TASKS

from . import tiny_models as tiny
from .untrained import changed, untrained

Made = tuple[Path, str]


def made(folder: Path, model: Any, write: Any, name: str = "a.jsonl") -> Made:
    data = write(folder / name)
    return untrained(folder / "a.safetensors", model(folder / "model"), data), data


@pytest.fixture(scope="module")
def of_texts(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("texts"), tiny.bert, tiny.classes)


@pytest.fixture(scope="module")
def of_numbers(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("numbers"), tiny.bert, tiny.numbers)


@pytest.fixture(scope="module")
def of_completions(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("completions"), tiny.gpt2, tiny.completions)


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return made(tmp_path_factory.mktemp("images"), tiny.vit, tiny.shades, "a.npz")


def refused(one: Made, path: Path, message: str, **about: Any) -> None:
    """Check that a file with these values is refused with its name and this message."""
    with pytest.raises(FileError) as caught:
        predict(changed(one[0], path, **about), one[1], new_tokens=2)
    assert str(caught.value).startswith(str(path)), caught.value
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_length", "long", "max_length of the inputs must be an integer from 1 to 2147483647, or None; got 'long'"),
        ("max_length", [32], "max_length of the inputs must be an integer from 1 to 2147483647, or None; got [32]"),
        ("max_length", True, "max_length of the inputs must be an integer"),
        ("max_length", 0, "max_length of the inputs must be an integer"),
        ("max_length", 33, "has the max_length 33; expected 3 to 32, for the base "),
        ("max_length", 2, "has the max_length 2; expected 3 to 32, for the base "),
        ("tokenizer", 5, "tokenizer of the inputs must be text or None; got 5"),
        ("tokenizer", "a\nb", "tokenizer of the inputs must be text or None; got 'a\\nb'"),
        ("tokenizer", "//host/share", "names as its tokenizer '//host/share', an address or network share, which is"),
        ("tokenizer", "https://host/a", "names as its tokenizer 'https://host/a', an address or network share, which"),
    ],
)
def test_settings_of_texts(of_texts: Made, tmp_path: Path, name: str, value: Any, message: str) -> None:
    refused(of_texts, tmp_path / "b.safetensors", message, inputs={name: value})


@pytest.mark.parametrize("labels", [(), ("yes",), ("yes", "yes")])
@pytest.mark.parametrize("task", ["classification", "multi-label", "token-classification"])
def test_classes_that_are_none(of_texts: Made, tmp_path: Path, task: str, labels: Any) -> None:
    message = f"classes of the task {task!r} must be two or more different names; got {labels!r}"
    refused(of_texts, tmp_path / "b.safetensors", message, labels=labels, inputs={"task": task})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task_mean", "a", "mean of the task 'regression' must be a finite number; got 'a'"),
        ("task_mean", True, "mean of the task 'regression' must be a finite number; got True"),
        ("task_deviation", 0, "deviation of the task 'regression' must be a positive number; got 0"),
        ("task_deviation", None, "deviation of the task 'regression' must be a positive number; got None"),
    ],
)
def test_numbers_of_regression(of_numbers: Made, tmp_path: Path, name: str, value: Any, message: str) -> None:
    refused(of_numbers, tmp_path / "b.safetensors", message, inputs={name: value})


@pytest.mark.parametrize("value", ["xyz", None, ["text"]])
def test_forms_of_language_modelling(of_completions: Made, tmp_path: Path, value: Any) -> None:
    message = "form of the task 'causal-lm' must be one of 'text', 'completion', 'messages'; got "
    refused(of_completions, tmp_path / "b.safetensors", message, inputs={"task_form": value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_size", "big", "image_size of the inputs must be an integer from 1 to 8192; got 'big'"),
        ("image_size", -2, "image_size of the inputs must be an integer from 1 to 8192; got -2"),
        ("image_size", 1_000_000, "image_size of the inputs must be an integer from 1 to 8192; got 1000000"),
        ("image_size", ..., "does not say how images are scaled: its inputs have no image_size"),
        ("channels", 7, "channels of the inputs must be 1 or 3; got 7"),
        ("channels", 1, "pixel_mean of the inputs must be a list of 1 numbers, one per channel; got [0.5, 0.5, 0.5]"),
        ("pixel_mean", [0, 0], "pixel_mean of the inputs must be a list of one number per channel"),
        ("pixel_mean", ["a", "b", "c"], "pixel_mean of the inputs must be a list of one number per channel"),
        ("pixel_std", "small", "pixel_std of the inputs must be a list of one number per channel, from 1e-6 to 1e6"),
        ("pixel_std", [1, 1, 0], "pixel_std of the inputs must be a list of one number per channel, from 1e-6 to 1e6"),
    ],
)
def test_settings_of_images(of_images: Made, tmp_path: Path, name: str, value: Any, message: str) -> None:
    refused(of_images, tmp_path / "b.safetensors", message, inputs={name: value})


def test_a_study_is_refused_before_it_trains_what_no_file_may_hold(of_images: Made) -> None:
    problem = open_problem(Spec(model=str(of_images[0].parent / "model"), data=of_images[1]))
    check_recordable(problem)
    problem.source["image_size"] = 10_000  # type: ignore[index]
    message = "cannot hold the task of .*: image_size of the inputs must be an integer from 1 to 8192; got 10000"
    with pytest.raises(TnadaptError, match=message):
        check_recordable(problem)


# -- A task that its model does not do ---------------------------------------------------------


def test_texts_for_a_model_of_timm(of_texts: Made, tmp_path: Path) -> None:
    message = "was trained for 'classification', a task of texts, but its model is one of timm, of images"
    refused(of_texts, tmp_path / "b.safetensors", message, library="timm", settings={})


def test_classes_of_a_language_model(of_completions: Made, tmp_path: Path) -> None:
    file = changed(
        of_completions[0], tmp_path / "b.safetensors", labels=("no", "yes"),
        inputs={"task": "classification", "task_form": ...},
    )  # fmt: skip
    start = re.escape(f"the model of {file} returned (2, ")
    with pytest.raises(TnadaptError, match=start + r".*, 22\) logits for two samples of .*; expected \(2, 2\)"):
        predict(file, tiny.classes(tmp_path / "c.jsonl"))


def test_completions_of_a_classifier(of_texts: Made, tmp_path: Path) -> None:
    file = changed(of_texts[0], tmp_path / "b.safetensors", inputs={"task": "causal-lm", "task_form": "completion"})
    message = "the adapter's task is 'causal-lm', but its model, a BertForSequenceClassification, cannot continue texts"
    with pytest.raises(TnadaptError, match=message):
        predict(file, tiny.completions(tmp_path / "c.jsonl"))


# -- Tokenizers --------------------------------------------------------------------------------


def test_a_given_tokenizer_comes_before_the_files(of_texts: Made, tmp_path: Path) -> None:
    file = changed(of_texts[0], tmp_path / "b.safetensors", inputs={"tokenizer": "//host/share"})
    own = predict(of_texts[0], of_texts[1]).rows
    assert predict(file, of_texts[1], tokenizer=str(of_texts[0].parent / "model")).rows == own


@pytest.mark.parametrize(
    ("base", "tokenizer", "named", "expected"),
    [
        (False, None, None, ("{model}", "abc123")),
        (True, None, None, ("{model}", "abc123")),
        (False, None, "words", ("words", None)),
        (False, "mine", None, ("mine", None)),
        (False, "mine", "words", ("mine", None)),
    ],
)
def test_the_bases_tokenizer_is_of_its_revision(
    of_texts: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: bool, tokenizer: str | None,
    named: str | None, expected: tuple[str, str | None],
) -> None:  # fmt: skip
    seen = []

    def tokenizer_of(name: str, library: Any, *, split_words: bool, revision: str | None) -> Any:
        seen.append((name, revision))
        return transformers.AutoTokenizer.from_pretrained(model)

    monkeypatch.setattr(prediction, "tokenizer_of", tokenizer_of)
    model = str(of_texts[0].parent / "model")
    file = changed(of_texts[0], tmp_path / "b.safetensors", revision="abc123", inputs={"tokenizer": named})
    predict(file, of_texts[1], base=model if base else None, tokenizer=tokenizer)
    assert seen == [(expected[0].format(model=model), expected[1])]


def test_descriptions_of_a_task_come_back() -> None:
    for task in (
        TASKS["regression"](1.5, 2.0), TASKS["causal-lm"]("text"), TASKS["multi-label"](("a", "b")),
    ):  # fmt: skip
        assert type(task).from_dict(task.to_dict()) == task
