"""The times of steps in the tables of methods: read strictly, and of every method that a table recommends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality.command import PUBLISHED
from benchmarks.quality.recommendation import STEPS, recommendations, step_ratio, step_ratios, studies_of
from tnadapt.errors import FileError


def test_every_recommended_method_is_measured() -> None:
    ratios, studies = step_ratios(), studies_of(PUBLISHED)
    for library in (None, "tnadapt"):
        for one in recommendations(studies, library):
            for choice in filter(None, (one.best, one.served)):
                assert step_ratio(ratios, choice.method) != "–", (library, one.budget, choice.method)


def test_the_file_says_where_it_was_measured() -> None:
    rows = [json.loads(line) for line in STEPS.read_text(encoding="utf-8").splitlines()]
    assert all(row["problem"] == "minilm" and row["layers"] == 6 for row in rows)
    assert all(row["rounds"] >= 12 and {"torch", "cores"} <= set(row) for row in rows)


def test_a_method_without_a_time_has_a_dash(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text('{"case": "superlora F 0.01", "ratio": 1.234}\n')
    ratios = step_ratios(path)
    assert [step_ratio(ratios, name) for name in ("superlora-projected", "superlora")] == ["1.23", "–"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"case": "lora"}', '{"case": "lora", "ratio": null}', "{"])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    if content:
        path.write_text(content)
    with pytest.raises(FileError, match=r"steps\.jsonl has no times of steps: "):
        step_ratios(path)
