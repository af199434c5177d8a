"""What a file records of its base: exact, bounded, refused if strange; names of models in GGUF."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import forge
from tnadapt import ConfigError, FileError, Pretrained
from tnadapt.checkpoints.checkpoint import gguf_files, gguf_place

from .internals import MAX_LABELS, TASKS
from .test_adapter_file import LORA, made
from .test_adapter_format import content_of, refusal

FULL = Pretrained(
    "user/base", "0123abc", "q4.gguf", "transformers", "text-classification", ["no", "yés", "👩‍🔬"], "bfloat16",
    {"problem_type": "regression", "pad_token_id": 0}, {"max_length": 128, "image_mean": [0.5, 1.0], "lower": False},
)  # fmt: skip


def written(folder: Path, about: Pretrained | None) -> bytes:
    return content_of(dataclasses.replace(made(LORA), pretrained=about), folder)


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize("about", [FULL, Pretrained(), Pretrained(labels=["a"]), Pretrained("x", library="timm")])
def test_it_comes_back_from_a_file(tmp_path: Path, about: Pretrained) -> None:
    content = written(tmp_path, about)
    found = tna.load(tmp_path / "made")
    assert found.pretrained == about
    assert tna.info(tmp_path / "made")["pretrained"] == about.to_dict()
    assert written(tmp_path, found.pretrained) == content
    assert Pretrained.from_dict(about.to_dict()) == about
    assert about.id2label == dict(enumerate(about.labels))
    assert about.label2id == {label: number for number, label in enumerate(about.labels)}


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), max_size=5),
    st.dictionaries(st.text("abc_", max_size=5), st.integers(-9, 9) | st.booleans() | st.none() | st.text("aé")),
)
def test_labels_and_inputs_survive_their_json(labels: list[str], inputs: dict[str, Any]) -> None:
    about = Pretrained("base", labels=labels, inputs=inputs)
    assert Pretrained.from_dict(json.loads(json.dumps(about.to_dict()))) == about


@pytest.mark.parametrize(
    ("names", "local", "remote"),
    [
        (["bert", "user/bert", "vit.augreg", "hf-hub:user/vit", ""], False, False),
        (["/a/b", "./b", "~/b", "a/b/c", "C:\\b", "a\\b", "local-dir:/a"], True, False),
        (["\\\\host\\share", "//host/share", "https://host/bert", "file:/a"], None, True),
    ],
)
def test_which_names_are_folders_and_which_are_elsewhere(names: list[str], local: bool | None, remote: bool) -> None:
    for name in names:
        assert Pretrained(name).remote is remote, name
        assert local is None or Pretrained(name).local is local, name


@pytest.mark.law("file-bytes")
def test_a_file_without_it_has_not_changed(tmp_path: Path) -> None:
    recipe, _ = forge.parsed(written(tmp_path, None))
    assert recipe.keys().isdisjoint({"pretrained", "labels"})
    assert "pretrained" not in tna.info(tmp_path / "made")
    about = {key: value for key, value in FULL.to_dict().items() if key != "labels"}
    assert forge.parsed(written(tmp_path, FULL))[0] == {**recipe, "labels": list(FULL.labels), "pretrained": about}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": 3}, "name must be a string; got 3"),
        ({"name": "a\nb"}, "name must be at most 1024 letters without control characters"),
        ({"name": "a" * 1025}, "name must be at most 1024 letters"),
        ({"revision": "main..x"}, "revision must be a commit, branch or tag; got 'main..x'"),
        ({"file": "../secret"}, "file must be a file in the base's folder; got '../secret'"),
        ({"file": "/etc/passwd"}, "file must be a file in the base's folder"),
        ({"library": "pickle"}, "library must be one of transformers, timm; got 'pickle'"),
        ({"task": "AutoModelForCausalLM"}, "task must be one of text-classification, "),
        ({"task": ["x"]}, "task must be a string; got ['x']"),
        ({"dtype": "complex64"}, "dtype must be one of float64, float32, float16, bfloat16"),
        ({"labels": "ab"}, "labels must be a sequence of strings; got 'ab'"),
        ({"labels": [1]}, "labels must be a sequence of strings; got [1]"),
        ({"labels": ["\ud800"]}, "a label must be a string of at most 1024 letters"),
        ({"labels": ["a"] * (MAX_LABELS + 1)}, f"labels must be at most {MAX_LABELS}; got 32769 labels"),
        ({"settings": {"auto_map": "x"}}, "settings of transformers must be among problem_type, pad_token_id; got"),
        ({"settings": {"pad_token_id": True}}, "settings have an impossible pad_token_id: True"),
        ({"settings": {"img_size": [0.5]}, "library": "timm"}, "settings have an impossible img_size: [0.5]"),
        ({"settings": 1}, "settings must be a mapping of strings; got 1"),
        ({"inputs": {"a": {}}}, "inputs['a'] must be text, a number, a boolean, None or a list of these; got {}"),
        ({"inputs": {"a": [[1]]}}, "inputs['a'] must be text, a number"),
        ({"inputs": {"a": float("nan")}}, "inputs['a'] must be text, a number"),
        ({"inputs": {str(n): n for n in range(65)}}, "inputs must be at most 64 settings; got 65"),
        ({"inputs": {str(n): "x" * 1000 for n in range(20)}}, "inputs must be small settings, of at most 16 KiB"),
        ({"inputs": []}, "inputs must be a mapping of strings; got []"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Pretrained(**settings)
    assert said in str(caught.value)


@pytest.mark.law("allocation-limit")
def test_many_labels_take_no_memory(tmp_path: Path) -> None:
    labels = ["a"] * (1 << 16)
    recipe = {"version": 1, "config": {}, "targets": [["fc", [2, 2], "q"]], "pretrained": {}, "labels": labels}
    content = forge.adapter(recipe, {f"group0.split0.factor{k}": ("F32", np.zeros((2, 4))) for k in (0, 1)})
    assert "labels" in refusal(tmp_path, content)  # imports, too
    assert peak_of(lambda: refusal(tmp_path, content)) <= 4 * len(content) + (2 << 20)


def test_the_tasks_name_classes_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    for task in TASKS.values():
        assert hasattr(transformers, task.model)
        assert hasattr(transformers, task.processor)


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"GGUF")
    return path


def test_files_folders_and_names_on_the_hub(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "a.gguf", "README.md")
    assert gguf_place(str(one)) == gguf_place(str(one / "a.gguf")) == (str(one), "a.gguf")
    other = folder(tmp_path / "other", "a.gguf", "B.GGUF", "config.json")
    assert gguf_place(str(other)) == (str(other), "")  # the config.json is of other weights
    assert gguf_place(str(other / "B.GGUF")) == (str(other), "B.GGUF")
    assert gguf_files(other) == []
    several = folder(tmp_path / "several", "b.gguf", "a.gguf")
    with pytest.raises(FileError, match=r"has 2 GGUF files and no config\.json: name one of them, .*a\.gguf'"):
        gguf_place(str(several))
    assert gguf_place("owner/name/sub/a.gguf") == ("owner/name", "sub/a.gguf")
    elsewhere = ("owner/a.gguf", "./models/x/a.gguf", "/models/x/a.gguf", "bert-base-uncased", str(other / "README.md"))
    for name in elsewhere:
        assert gguf_place(name) == (name, "")
