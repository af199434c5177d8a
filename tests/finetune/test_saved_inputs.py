"""Values in an adapter's file that come from elsewhere: each is used as it should be, or an error names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tnadapt as tna
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Spec, open_problem, predict

from . import tiny_models as tiny

AdapterOf = Callable[[str], tuple[Path, str]]
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
        (TEXTS, {"max_length": [32]}, LENGTH + "[32]"),
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
        ("causal-lm", {"task_form": None}, FORM),
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


# -- A task that its model does not do ---------------------------------------------------------


def test_texts_for_a_model_of_timm(adapter_of: AdapterOf, tmp_path: Path) -> None:
    message = "was trained for 'classification', a task of texts, but its model is one of timm, of images"
    refused(adapter_of("classification"), tmp_path / "b.safetensors", message, library="timm", settings={})


def test_classes_of_a_language_model(adapter_of: AdapterOf, tmp_path: Path) -> None:
    file = tiny.changed(
        adapter_of("causal-lm")[0], tmp_path / "b.safetensors", labels=("no", "yes"),
        inputs={"task": "classification", "task_form": ...},
    )  # fmt: skip
    start = re.escape(f"the model of {file} returned (2, ")
    with pytest.raises(TnadaptError, match=start + r".*, 22\) logits for two samples of .*; expected \(2, 2\)"):
        predict(file, tiny.classes(tmp_path / "c.jsonl"))


def test_completions_of_a_classifier(adapter_of: AdapterOf, tmp_path: Path) -> None:
    adapter, _ = adapter_of("classification")
    file = tiny.changed(adapter, tmp_path / "b.safetensors", inputs={"task": "causal-lm", "task_form": "completion"})
    message = "the adapter's task is 'causal-lm', but its model, a BertForSequenceClassification, cannot continue texts"
    with pytest.raises(TnadaptError, match=message):
        predict(file, tiny.completions(tmp_path / "c.jsonl"))


# -- Tokenizers --------------------------------------------------------------------------------


def test_a_given_tokenizer_comes_before_the_files(adapter_of: AdapterOf, tmp_path: Path) -> None:
    adapter, data = adapter_of("classification")
    file = tiny.changed(adapter, tmp_path / "b.safetensors", inputs={"tokenizer": "//host/share"})
    own = predict(adapter, data).rows
    assert predict(file, data, tokenizer=str(adapter.parent / "model")).rows == own


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
