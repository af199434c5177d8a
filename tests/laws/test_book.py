"""Every law has tests, every marker a law, cases are counted right, and the page is that of its counts."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.depth import in_depth

from . import page
from .book import laws

TESTS = Path(__file__).parents[1]


def marked() -> set[str]:
    """The ids of all markers ``law`` in the files of the tests."""
    calls = (
        node
        for path in TESTS.rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.law"
    )
    return {ast.literal_eval(argument) for call in calls for argument in call.args}


def test_every_law_has_tests_and_every_marker_a_law() -> None:
    assert marked() == set(laws())


def test_one_id_or_sentence_twice(tmp_path: Path) -> None:
    book = tmp_path / "book.toml"
    group = '[[group]]\ntitle = "{}"\n[group.laws]\n{} = "{}"\n'
    book.write_text(group.format("g", "one", "a") + group.format("h", "one", "b"))
    with pytest.raises(ValueError, match=r"book.toml has the id 'one' twice"):
        laws(book)
    book.write_text(group.format("g", "one", "a") + group.format("h", "two", "a"))
    with pytest.raises(ValueError, match="says twice: a"):
        laws(book)


CASES = """
import pytest
from hypothesis import given, strategies as st

@pytest.mark.law("known-draws")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fold", ["stack"])
@pytest.mark.parametrize("damage", ["\\udcff"])
def test_words(dtype, fold, damage): pass

@pytest.mark.law("known-draws")
@given(st.integers())
def test_digests(one): pass

@pytest.mark.law("equal-seeds", "known-draws")
@pytest.mark.parametrize("backend", ["cupy"])
def test_libraries(backend): pytest.skip("no | device")

@pytest.fixture
def broken(): yield; raise OSError

@pytest.mark.law("draws-in-pieces")
def test_pieces(broken): pass

def test_of_no_law(): assert False

@pytest.mark.slow
@pytest.mark.law("draws-in-pieces")
def test_slow(): import torch
"""


def run(folder: Path, tests: str, *options: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder with these tests, whose markers are recorded."""
    (folder / "test_draws.py").write_text(tests)
    (folder / "pytest.ini").write_text("[pytest]\njunit_family = xunit1\nmarkers =\n    law\n    slow\n")
    plugins = ["-p", "tests.laws.markers", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *options, "."]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}", "PYTEST_ADDOPTS": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(params=in_depth([(), ("-n", "1")], [("-n", "1")]), ids=lambda options: " ".join(options) or "alone")
def workers(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param:
        pytest.importorskip("xdist")
    return request.param


@pytest.mark.slow
def test_cases_are_counted(tmp_path: Path, workers: tuple[str, ...]) -> None:
    fast = run(tmp_path, CASES, *workers, "-m", "not slow", "--junitxml=fast.xml")
    assert "1 failed, 4 passed, 1 skipped" in fast.stdout, fast.stdout + fast.stderr
    run(tmp_path, CASES, *workers, "-m", "slow", "--junitxml=slow.xml")
    counted = page.count([tmp_path / "fast.xml", tmp_path / "slow.xml"])
    words, same, pieces = counted["laws"][:3]
    assert (words["passed"], words["drawn"], words["failed"]) == (3, 1, 0)
    assert (words["dtypes"], words["folds"], words["libraries"]) == (["float32", "float64"], ["stack"], ["numpy"])
    assert words["variants"] == ["\\udcff"]
    assert (same["passed"], same["skipped"]) == (0, {"no | device": 1})
    assert words["skipped"] == same["skipped"]
    assert (pieces["passed"], pieces["failed"]) == (1, 1)
    assert counted["cases"] == 6
    shown = page.page(counted)
    assert "| 3 | 1 | numpy | float32, float64 | 1: \\udcff; folds stack |" in shown
    assert "| 1 | no \\| device |" in shown
    assert f"\n1 law held in one run of the tests, with 6 cases; {len(laws()) - 1} did not.\n" in shown
    assert "| [1. Draws](#1-draws) | " in shown


@pytest.mark.slow
def test_a_marker_of_no_law_stops_the_run(tmp_path: Path, workers: tuple[str, ...]) -> None:
    done = run(tmp_path, "import pytest\n@pytest.mark.law('nonsense')\ndef test_words(): pass\n", *workers)
    # pytest-xdist reports it as a failure, pytest alone as an interruption.
    assert done.returncode in (1, 2), done.stdout
    assert "passed" not in done.stdout
    assert "test_words is marked with the law 'nonsense', which the book lacks" in done.stdout + done.stderr


def test_what_a_run_lacks_is_said() -> None:
    law = {"id": "one", "says": "a", "passed": 5, "failed": 0, "skipped": {}}
    other = {"id": "two", "says": "b", "passed": 3, "failed": 0, "skipped": {"no CUDA device": 2, "an old model": 2}}
    stated = {"laws": [law, other]}

    def lacking(one: dict[str, object], *more: dict[str, object]) -> list[str]:
        return page.shortcomings({"laws": [{**law, **one}, *(more or [other])]}, stated)

    root = "a small disk can be mounted by root alone"
    assert lacking({}) == lacking({"passed": 6}) == lacking({"passed": 1, "skipped": {root: 4}}) == []
    assert lacking({"passed": 4}) == ["'a' passed 4 cases; the page states 5"]
    assert lacking({"passed": 3, "skipped": {root: 1}}) == ["'a' passed 3 cases; the page states 5"]
    assert lacking({"failed": 2}) == ["'a' failed in 2 cases"]
    assert lacking({"passed": 0, "skipped": {root: 5}}) == ["'a' had no case that passed"]
    # What turns into a skip is gone, with a new reason or one that is known, and however many were skipped before.
    monday = ["'a' skipped 4 cases: it is Monday", "'a' passed 1 cases; the page states 5"]
    assert lacking({"passed": 1, "skipped": {"it is Monday": 4}}) == monday
    assert lacking({"passed": 6, "skipped": {"it is Monday": 4}}) == monday[:1]
    gone = ["'b' passed 2 cases; the page states 3"]
    assert lacking({}, {**other, "passed": 2}) == gone
    assert lacking({}, {**other, "passed": 2, "skipped": {"no CUDA device": 2, "an old model": 3}}) == gone
    assert lacking({}, {**other, "passed": 5, "skipped": {"an old model": 2}}) == []
    assert page.shortcomings({"laws": [law]}, stated) == ["'b' is on the page and no more in the book"]
    new = {"id": "three", "says": "c", "passed": 0, "failed": 0, "skipped": {}}
    assert lacking({}, other, new) == ["'c' had no case that passed"]


def test_the_page_is_that_of_its_counts() -> None:
    counted = json.loads(page.COUNTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(counted)
    assert {law["id"]: law["says"] for law in counted["laws"]} == {law: entry.says for law, entry in laws().items()}
    assert all(law["passed"] and not law["failed"] for law in counted["laws"])
    assert counted["cases"] >= 3000
