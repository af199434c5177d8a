"""The table of the paper's symbols points at code that is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "conventions.rst").read_text(encoding="utf-8")
PLACES = re.findall(r"``(\w+\.py)``(?:, ``([\w.]+)``)?", TEXT)


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_where_a_symbol_is(file: str, name: str) -> None:
    found = [path for path in (ROOT / "tnadapt").rglob(file) if path.parent.name not in ("kernels", "peft", "plot")]
    assert len(found) == 1, f"conventions.rst names {file}, and there are {found}"
    place: Any = importlib.import_module(".".join(found[0].relative_to(ROOT).with_suffix("").parts))
    for part in filter(None, name.split(".")):
        assert hasattr(place, part), f"{file} has no {name}"
        place = getattr(place, part)


def test_there_are_places() -> None:
    assert len(PLACES) > 25
