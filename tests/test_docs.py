"""The table of the paper's symbols points at code that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "conventions.rst").read_text(encoding="utf-8")
PLACES = re.findall(r"``(\w+\.py)``(?:, ``([\w.]+)``)?", TEXT)


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_where_a_symbol_is(file: str, name: str) -> None:
    found = list((ROOT / "tnadapt").rglob(file))
    assert found, f"conventions.rst names {file}, which is not there"
    for part in filter(None, name.split(".")):
        source = found[0].read_text(encoding="utf-8")
        assert re.search(rf"\b(?:def|class) {part}\b|\b{part}\b *[:=]|self\.{part}\b", source), f"{file} has no {part}"


def test_there_are_places() -> None:
    assert len(PLACES) > 25
