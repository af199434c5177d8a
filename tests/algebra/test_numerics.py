"""Rounding errors are within the limits on the page about verification, and the page matches its recorded results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")


@pytest.fixture
def numerics(benchmark_scripts: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_scripts("numerics")


@pytest.mark.law("precision")
def test_every_operation_is_within_its_limit(numerics: ModuleType) -> None:
    _, *measured = numerics.measure(10)
    rows = [row for row in measured if "largest" in row]
    assert {row["bits"] for row in rows} == {6, 10}
    assert {row["dtype"] for row in rows} == set(numerics.LIMITS)
    assert len(rows) == 2 * 3 * (1 + 5 + len(numerics.FORMATS))
    for row in rows:
        assert row["largest"] <= numerics.LIMITS[row["dtype"]], row
        # What only moves numbers, or hands them on, has no error at all.
        assert (row["largest"] == 0.0) == (row["name"] in ("shuffle", "dense")), row


@pytest.mark.law("subnormal")
def test_tiny_numbers_keep_the_digits_that_there_are(numerics: ModuleType) -> None:
    rows = [*numerics.tiny(6), *numerics.tiny(10)]
    assert {row["dtype"] for row in rows} == set(numerics.TINY)
    assert len(rows) == 2 * 3 * (1 + 3 + len(numerics.FORMATS))
    for row in rows:
        assert row["distances"] <= numerics.allowed(row), row


def test_the_page_is_that_of_its_results(numerics: ModuleType, tmp_path: Path) -> None:
    rows = numerics.read(numerics.RESULTS / "numerics.jsonl")
    numerics.write(rows, tmp_path)
    shown = (numerics.RESULTS / "numerics.md").read_text(encoding="utf-8")
    assert (tmp_path / "numerics.md").read_text(encoding="utf-8") == shown
    assert (numerics.RESULTS / "numerics.png").is_file()
    text = " ".join((numerics.RESULTS.parents[1] / "docs" / "verification.rst").read_text(encoding="utf-8").split())
    worst = {
        dtype: max(row["largest"] for row in rows[1:] if row.get("largest", 0) and row["dtype"] == dtype)
        for dtype in numerics.UNITS
    }
    said = " and ".join(", ".join(f"{worst[dtype]:.2g} in {dtype}" for dtype in numerics.UNITS).rsplit(", ", 1))
    assert f"no operation has a larger error than {said}, at up to 2" in text
    for row in rows[1:]:
        assert (
            row["largest"] <= numerics.LIMITS[row["dtype"]]
            if "largest" in row
            else row["distances"] <= numerics.allowed(row)
        )
