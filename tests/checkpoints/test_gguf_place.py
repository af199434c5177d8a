"""Names of models in GGUF: a file, a folder with one, a file in a repository."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tnadapt.checkpoints.checkpoint import (
    gguf_files,
    gguf_place,
    hidden_bar,
    need_gguf,
)
from tnadapt.errors import FileError, TnadaptError


def folder(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"GGUF")
    return path


def test_files_and_folders(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", "a.gguf", "README.md")
    assert gguf_place(str(one)) == gguf_place(str(one / "a.gguf")) == (str(one), "a.gguf")
    other = folder(tmp_path / "other", "a.gguf", "B.GGUF", "config.json")
    assert gguf_place(str(other)) == (str(other), "")  # the config.json is of other weights
    assert gguf_place(str(other / "B.GGUF")) == (str(other), "B.GGUF")
    assert gguf_place(str(other / "README.md")) == (str(other / "README.md"), "")
    assert gguf_files(other) == []


def test_one_of_several_files_has_to_be_named(tmp_path: Path) -> None:
    several = folder(tmp_path / "several", "b.gguf", "a.gguf")
    with pytest.raises(FileError, match=r"has 2 GGUF files and no config\.json: name one of them, .*a\.gguf'"):
        gguf_place(str(several))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("owner/name/sub/a.gguf", ("owner/name", "sub/a.gguf")),
        ("owner/a.gguf", ("owner/a.gguf", "")),
        ("./models/x/a.gguf", ("./models/x/a.gguf", "")),
        ("/models/x/a.gguf", ("/models/x/a.gguf", "")),
        ("bert-base-uncased", ("bert-base-uncased", "")),
    ],
)
def test_names_on_the_hub(name: str, place: tuple[str, str]) -> None:
    assert gguf_place(name) == place


def test_the_package_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        assert name == "gguf"

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(TnadaptError, match=r"'a\.gguf' is a GGUF file, which needs .* pip install 'tnadapt\[gguf\]'"):
        need_gguf("a.gguf")


def test_the_bar_is_back_after_an_error() -> None:
    module = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    before = module.tqdm
    with hidden_bar(""):
        assert module.tqdm is before
    with hidden_bar("a.gguf"):
        assert list(module.tqdm([1, 2], desc="x")) == [1, 2]
        assert module.tqdm is not before
    assert module.tqdm is before

    def fail() -> None:
        with hidden_bar("a.gguf"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert module.tqdm is before
