"""The files that tasks keep in their cache."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality.tasks import smollm2_sft


def test_prompts_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews, prompts = tmp_path / "reviews.csv", tmp_path / "prompts.csv"
    reviews.write_text('text,label\n"Fine, é",positive\nDull,negative\n', encoding="utf-8")

    class Interrupted:
        def __init__(self, file: Any) -> None:
            self.file = file

        def writerows(self, rows: Any) -> None:
            self.file.write("prompt,completion")
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(csv, "writer", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2_sft._prompts(reviews, prompts)
    assert list(tmp_path.iterdir()) == [reviews]
    assert smollm2_sft._prompts(reviews, prompts) == prompts
    with prompts.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["prompt", "completion"],
            ["Review: Fine, é\nSentiment:", " positive"],
            ["Review: Dull\nSentiment:", " negative"],
        ]
