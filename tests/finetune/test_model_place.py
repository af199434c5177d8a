"""Models in GGUF files: found, fine-tuned, predicted with, and loaded again from what the adapter's file says."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("gguf")

import tnadapt as tna
from tnadapt.errors import TnadaptError
from tnadapt.finetune import Spec, open_problem, predict

from . import tiny_models as tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.gguf(tmp_path_factory.mktemp("gguf")))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 20]])).logits


@pytest.mark.parametrize("whole", [False, True], ids=["file", "folder"])
def test_a_language_model_in_a_gguf_file(
    whole: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.completions(tmp_path / "a.jsonl")
    problem = open_problem(Spec(model=str(model.parent if whole else model), data=data))
    assert (problem.task.name, type(problem.build(0)).__name__) == ("causal-lm", "LlamaForCausalLM")
    inputs = problem.parts["training"].batch(torch.arange(1), torch.device("cpu"))["input_ids"]
    assert problem.logits(problem.build(0), {"input_ids": inputs}).shape[:2] == inputs.shape
    file = tiny.untrained(tmp_path / "a.safetensors", str(model), data)
    about = tna.load(file).pretrained
    assert about is not None
    assert (about.name, about.file, about.task) == (str(model.parent), model.name, "text-generation")
    found = predict(file, data, limit=3, new_tokens=2)
    assert [set(row) for row in found.rows] == [{"prompt", "completion", "prediction", "loss", "perplexity"}] * 3
    assert torch.equal(logits(tna.torch.load_pretrained(file)), logits(problem.build(0)))
    tokenizer = tna.torch.load_processor(file)
    assert tokenizer.decode(tokenizer(" the film")["input_ids"]) == " the film"
    assert "GGUF" not in capsys.readouterr().err  # a progress bar of transformers'


def test_a_gguf_file_beside_others_is_recorded(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(model, folder / name)
    (folder / "config.json").write_text("{}")
    data = tiny.completions(tmp_path / "a.jsonl")
    file = tiny.untrained(tmp_path / "a.safetensors", str(folder / "b.gguf"), data)
    about = tna.load(file).pretrained
    assert about is not None
    assert about.file == "b.gguf"
    expected = predict(file, data, limit=2, new_tokens=2)
    # The same base elsewhere, by its file or its folder.
    for base in (model, model.parent):
        assert predict(file, data, base=str(base), limit=2, new_tokens=2) == expected
    (folder / "b.gguf").unlink()
    with pytest.raises(TnadaptError, match=r"no tokenizer in '.*b\.gguf'|cannot load its base model"):
        predict(file, data, limit=2)


def test_what_is_no_model_says_so(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.completions(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    images = tiny.shades(tmp_path / "a.npz")
    for name, samples, message in (
        (tmp_path / "none.gguf", data, r"no model at .*/none\.gguf: there is no such file"),
        (tmp_path / "empty", data, r"has no config\.json and no \.gguf file"),
        (model, images, "is a GGUF file, of which transformers makes language models"),
        (tmp_path / "broken.gguf", data, r"cannot load '.*broken\.gguf' for texts through transformers: "),
    ):
        with pytest.raises(TnadaptError, match=message):
            open_problem(Spec(model=str(name), data=samples))
    file = tiny.untrained(tmp_path / "a.safetensors", str(model), data)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    for load in (
        lambda: open_problem(Spec(model=str(model), data=data)), lambda: tna.torch.load_pretrained(file),
        lambda: tna.torch.load_processor(file), lambda: predict(file, data),
    ):  # fmt: skip
        with pytest.raises(
            TnadaptError, match=r"is a GGUF file, which needs the package gguf: pip install 'tnadapt\[g"
        ):
            load()
