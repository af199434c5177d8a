"""The book of laws names tests that are there, cases are counted right, and the page is that of its counts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import page
from .book import TESTS, laws, of_test
from .counting import home

LAW = '[[group]]\ntitle = "g"\n[[group.law]]\nsays = "{}"\ntests = ["{}"]\n'


def test_every_law_names_tests_that_are_there() -> None:
    found = laws()
    assert len(found) >= 60
    assert len({law.group for law in found}) == 21
    assert [law.number for law in found] == list(range(1, len(found) + 1))
    assert set(of_test(found)["test_projection.py::test_slices"]) == {
        law.number for law in found if "test_projection.py::test_slices" in law.tests
    }


def test_a_test_that_is_not_there_and_a_law_said_twice(tmp_path: Path) -> None:
    book = tmp_path / "book.toml"
    book.write_text(LAW.format("a", "test_draws.py::test_nothing_of_the_kind"))
    with pytest.raises(ValueError, match=r"names test_draws.py::test_nothing_of_the_kind for 'a', which is not there"):
        laws(book)
    once = LAW.format("a", "test_draws.py::test_words")
    book.write_text(once + once)
    with pytest.raises(ValueError, match="says twice: a"):
        laws(book)


CASES = """
import pytest
from hypothesis import given, strategies as st

@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("fold", ["stack"])
@pytest.mark.parametrize("damage", ["\\udcff"])
def test_words(dtype, fold, damage): pass

@given(st.integers())
def test_digests(one): pass

@pytest.mark.parametrize("backend", ["cupy"])
def test_the_logarithm_without_libm(backend): pytest.skip("no | device")

def test_bad_input(): assert False
"""


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
def test_cases_are_counted(tmp_path: Path, workers: list[str]) -> None:
    if workers:
        pytest.importorskip("xdist")
    (tmp_path / "test_draws.py").write_text(CASES)
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nimport tests.laws.counting as counting\ncounting.TESTS = Path(__file__).parent\n"
        "def pytest_configure(config): config.pluginmanager.register(counting.Counting(Path('counts.json')))\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *workers, "."]
    path = f"{TESTS.parent}"
    done = subprocess.run(command, cwd=tmp_path, env=_environment(path), capture_output=True, text=True, timeout=300)
    assert "1 failed" in done.stdout, done.stdout + done.stderr
    counted = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    words, same = counted["laws"][:2]
    assert (words["passed"], words["drawn"], words["failed"]) == (3, 1, 0)
    assert (words["dtypes"], words["folds"], words["libraries"]) == (["float32", "float64"], ["stack"], ["numpy"])
    assert words["variants"] == ["\\udcff"]
    assert (same["passed"], same["skipped"]) == (0, {"no | device": 1})
    assert counted["cases"] == 4
    shown = page.page(counted)
    assert "| 3 | 1 | numpy | float32, float64 | 1: \\udcff; folds stack |" in shown
    assert "| 1 | no \\| device |" in shown


def _environment(path: str) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}


def test_what_cannot_do_without_torch_is_not_counted_as_numpys() -> None:
    whole = re.compile(r"""^(?:\w+ = )?pytest\.importorskip\(["']torch["']""", re.MULTILINE)
    paths = [path for path in sorted(TESTS.rglob("test_*.py")) if whole.search(path.read_text(encoding="utf-8"))]
    assert {"test_attached.py", "test_numerics.py", "test_torch.py"} <= {path.name for path in paths}
    for path in paths:
        file = path.relative_to(TESTS).as_posix()
        assert home(file, "test_anything") == ("jax" if file == "test_jax.py" else "torch"), file
    assert home("test_start.py", "test_the_first_step_does_not_depend_on_the_method") == "torch"
    assert home("test_start.py", "test_a_nonlinear_start_is_alive_and_small") == "numpy"
    meta = "test_attaching_to_a_model_of_7_billion_on_the_meta_device_takes_no_memory"
    assert home("test_scale.py", meta) == "torch"
    assert home("test_scale.py", "test_what_a_budget_buys_is_planned_for_the_largest") == "numpy"


def test_what_a_run_lacks_is_said() -> None:
    law = {"says": "a", "passed": 5, "failed": 0, "skipped": {}}
    other = {"says": "b", "passed": 3, "failed": 0, "skipped": {"no CUDA device": 2, "an old model": 2}}
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
    new = {"says": "c", "passed": 0, "failed": 0, "skipped": {}}
    assert lacking({}, other, new) == ["'c' had no case that passed"]


@pytest.mark.skipif(not page.COUNTS.is_file(), reason="the page is not in this copy of the project")
def test_the_page_is_that_of_its_counts() -> None:
    counted = json.loads(page.COUNTS.read_text(encoding="utf-8"))
    assert page.PAGE.read_text(encoding="utf-8") == page.page(counted)
    assert [law["says"] for law in counted["laws"]] == [law.says for law in laws()]
    assert all(law["passed"] and not law["failed"] for law in counted["laws"])
    assert counted["cases"] >= 3000
