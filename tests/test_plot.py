"""Pictures are written, and nothing else happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from tnadapt.plot import STYLES, Mark, pareto

MARKS = [
    Mark("head alone", "", 0, (0.7, 0.71)),
    Mark("dense", "", 32768, (0.95, 0.96)),
    *(Mark(family, "r = 1", 100 * place, (0.8 + place / 100,), place < 3) for place, family in enumerate(STYLES, 1)),
    Mark("a method of one's own", "r = 2", 50, (0.75, 0.8, 0.7), True),
]


@pytest.mark.parametrize(
    "marks", [MARKS, MARKS[:1], MARKS[1:2], MARKS[2:3], []], ids=["all", "head alone", "dense alone", "one", "none"]
)
def test_a_picture_is_written(tmp_path: Path, marks: list[Mark]) -> None:
    pareto(marks, tmp_path / "a.png", "a title with $x_$ in it", "a note")
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5000


def test_every_family_is_in_the_legend(tmp_path: Path) -> None:
    pareto(MARKS, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    for mark in MARKS:
        assert f"<!-- {mark.family}" in text


def test_mean_and_spread() -> None:
    assert (MARKS[0].mean, round(MARKS[0].spread, 4)) == (70.5, 0.7071)
    assert Mark("LoRA", "", 1, (0.5,)).spread == 0


def test_no_window_and_no_import_before(tmp_path: Path) -> None:
    code = f"""
import sys, tnadapt.plot
assert "matplotlib" not in sys.modules
tnadapt.plot.pareto([tnadapt.plot.Mark("LoRA", "r = 1", 4, (0.5,))], {str(tmp_path / "a.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
