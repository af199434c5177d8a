"""Errors of few bits are within what the page states, and the page is that of its results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not in this copy of the project")


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("numerics")
    for name in ("numerics", "machine"):
        sys.modules.pop(name, None)


def test_every_operation_is_within_its_limit(numerics: ModuleType) -> None:
    _, *rows = numerics.measure(10)
    assert {row["bits"] for row in rows} == {6, 10}
    assert {row["dtype"] for row in rows} == set(numerics.LIMITS)
    assert len(rows) == 2 * 3 * (1 + 5 + len(numerics.FORMATS))
    for row in rows:
        assert row["largest"] <= numerics.LIMITS[row["dtype"]], row
        # What only moves numbers, or hands them on, has no error at all.
        assert (row["largest"] == 0.0) == (row["name"] in ("shuffle", "dense")), row


def test_the_page_is_that_of_its_results(numerics: ModuleType, tmp_path: Path) -> None:
    rows = numerics.read(numerics.RESULTS / "numerics.jsonl")
    numerics.write(rows, tmp_path)
    shown = (numerics.RESULTS / "numerics.md").read_text(encoding="utf-8")
    assert (tmp_path / "numerics.md").read_text(encoding="utf-8") == shown
    assert (numerics.RESULTS / "numerics.png").is_file()
    assert all(row["largest"] <= numerics.LIMITS[row["dtype"]] for row in rows[1:])
