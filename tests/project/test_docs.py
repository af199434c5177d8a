"""What the documentation says of files: the table of the paper's symbols, and every path on a page."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnadapt"
TEXT = (ROOT / "docs" / "conventions.rst").read_text(encoding="utf-8")
PLACES = re.findall(r"``([\w/]+\.py)``(?:, ``([\w.]+)``)?", TEXT)
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.rst"), *(ROOT / "docs" / "api").glob("*.rst")]
# What is past is told by the names that it had.
PAGES.remove(ROOT / "CHANGELOG.md")
PATHS = sorted(
    (page.relative_to(ROOT).as_posix(), path)
    for page in PAGES
    for path in set(
        re.findall(
            r"`((?:tnadapt|paper|tests|benchmarks|examples|fuzz|mutation)/[\w./-]*\w)/?`",
            page.read_text(encoding="utf-8"),
        )
    )
)


@pytest.mark.parametrize(("file", "name"), sorted(set(PLACES)))
def test_where_a_symbol_is(file: str, name: str) -> None:
    assert (PACKAGE / file).is_file(), f"conventions.rst names {file}, which is not there"
    place: Any = importlib.import_module(".".join(("tnadapt", *Path(file).with_suffix("").parts)))
    for part in filter(None, name.split(".")):
        assert hasattr(place, part), f"{file} has no {name}"
        place = getattr(place, part)


def test_there_are_places() -> None:
    assert len(PLACES) > 25


@pytest.mark.parametrize(("page", "path"), PATHS)
def test_a_path_on_a_page_is_there(page: str, path: str) -> None:
    assert (ROOT / path).exists(), f"{page} names {path}, which is not there"


def test_there_are_paths() -> None:
    assert {page for page, _ in PATHS} >= {"CONTRIBUTING.md", "SECURITY.md", "docs/slices.rst"}
