"""The results file: complete lines of a single study, written by one process at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from tnadapt.errors import FileError
from tnadapt.finetune.results import FORMAT, Results

STUDY = {"epochs": 3, "batch": 32}


def training(key: str, **more: object) -> dict[str, object]:
    """Return the line of a training, in which all numbers are 1."""
    names = ["config", "seed", "rate", "parameters", "kept", "diverged", "validation", "validation_loss", "test"]
    return {"key": key, **dict.fromkeys([*names, "predictions", "seconds"], 1), **more}


def start(path: Path, *keys: str) -> None:
    with Results(path, STUDY) as results:
        results.begin_session(jobs=1)
        for key in keys:
            results.add(training(key))


def test_lines_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    start(path, "a", "b")
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a", "b"]
        results.add(training("b", test=2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (lines[0]["format"], lines[0]["study"]) == (FORMAT, STUDY)
    assert set(lines[1]["session"]) >= {"versions", "cores", "jobs"}
    with Results(path, STUDY) as results:
        assert results.records["b"]["test"] == 2
    # A first line that was not finished is written anew.
    path.write_bytes(path.read_bytes()[:20])
    with Results(path, STUDY) as results:
        assert results.records == {}
    assert json.loads(path.read_text().splitlines()[0])["study"] == STUDY


@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_that_was_not_finished_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    start(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a"]
        results.add(training("c"))
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a", "c"]


@pytest.mark.parametrize("line", [b"{half\n", b"[1]\n", b"\xff\n", b"[" * 5000 + b"\n", b'{"key": "a", "seed": 0}\n'])
def test_a_damaged_line_in_between_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    start(path, "a")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(FileError, match=r"results\.jsonl, line 3 is damaged"):
        Results(path, STUDY)


@pytest.mark.parametrize("content", [b"a diary\n", b"a diary", b'{"some": "JSON"}\n', b'{"mine": 1}\n{"mine": 2}'])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes, fresh: bool) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"is not a results file"):
        Results(path, STUDY, fresh)
    assert path.read_bytes() == content


TARGETS = [[f"bert.encoder.layer.{number}.query", 32] for number in range(4)]
OTHER = [[name, 48 if ".2." in str(name) else size] for name, size in TARGETS]


@pytest.mark.parametrize(
    ("study", "changes", "message"),
    [
        (STUDY, {"epochs": 4, "keep": []}, r"\(epochs was 3, now 4; keep was null, now \[\]\); .*--fresh"),
        (
            {**STUDY, "targets": TARGETS}, {"targets": OTHER},
            r"\(targets was \[.bert\.encoder\.layer\.2\.query., 32\], now .* 48\]\)",
        ),
        ({**STUDY, "targets": TARGETS}, {"targets": OTHER[:3]}, r"\(targets was a list of 4, now a list of 3\)"),
        # A tuple is a list after a turn as JSON.
        ({**STUDY, "targets": ("q", "v")}, {"epochs": 4}, r"\(epochs was 3, now 4\)"),
    ],
)  # fmt: skip
def test_another_study_is_refused_and_told(
    study: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path, study) as results:
        results.add(training("a"))
    before = path.read_bytes()
    with pytest.raises(FileError, match=rf"results of another study {message}"):
        Results(path, {**study, **changes})
    assert path.read_bytes() == before


@pytest.mark.law("killed-sweep")
def test_two_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "results.jsonl"
    for fresh in (False, True):
        with Results(path, STUDY) as results:
            results.add(training("a"))
            with pytest.raises(FileError, match="being written by another process"):
                Results(path, STUDY, fresh)
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a"]


def test_a_fresh_beginning_knows_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path, STUDY) as results:
        results.add(training("a", adapter="lora-a.safetensors"))
        results.add(training("b", adapter="...safetensors"))  # whose logs would be in the folder of the study itself
        results.add(training("c", adapter="../c.safetensors"))
    with Results(path, {"epochs": 7}, fresh=True) as results:
        assert (results.records, results.dropped) == ({}, ["lora-a.safetensors"])
    assert len(path.read_text().splitlines()) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "results.jsonl").mkdir()
    for folder in (tmp_path / "file", tmp_path):
        with pytest.raises(FileError, match="give another folder with --out"):
            Results(folder / "results.jsonl", STUDY)
