"""How tests run here: ``python -m pytest`` runs the fast ones in parallel, and doctests compare messages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = """
import os, pytest

def note(name):
    with open(os.path.join(os.path.dirname(__file__), name), "w") as file:
        file.write(f"{os.environ.get('PYTEST_XDIST_WORKER', 'alone')} {os.environ.get('OMP_NUM_THREADS')}")

def test_fast(): note("fast")

@pytest.mark.slow
def test_slow(): note("slow")
"""
EXAMPLE = """
>>> import tnadapt
>>> tnadapt.Config(rank=4.0)
Traceback (most recent call last):
    ...
{}: {}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The configuration of this one, and two tests that note the process that they ran in."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("pyproject.toml is not in this copy of the project")
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("tests", "tnadapt", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").touch()
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    return tmp_path


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run pytest without the options of the run that this test is part of, such as --laws."""
    unwanted = ("PYTEST_", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.mark.parametrize(
    ("options", "speeds", "parallel"),
    [
        pytest.param((), {"fast"}, True, marks=pytest.mark.slow),
        pytest.param(("-m", "slow"), {"slow"}, True, marks=pytest.mark.slow),
        (("tests/test_it.py",), {"fast"}, False),
        (("-n", "0"), {"fast"}, False),
    ],
)
def test_a_run_without_paths_is_parallel(
    project: Path, options: tuple[str, ...], speeds: set[str], parallel: bool
) -> None:
    pytest.importorskip("xdist")
    done = run(project, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    noted = {path.name: path.read_text() for path in (project / "tests").iterdir() if path.name in ("fast", "slow")}
    assert noted.keys() == speeds
    for note in noted.values():
        assert re.fullmatch(r"gw\d+ 1" if parallel else "alone None", note)


def test_a_wrong_message_of_an_example_fails(project: Path) -> None:
    message = "rank must be an integer or a tuple with one rank per mode; got 4.0"
    for exception, said, outcome in [
        ("tnadapt.errors.ConfigError", message, "1 passed"),
        ("tnadapt.errors.ConfigError", message.replace("integer", "number"), "1 failed"),
        ("ConfigError", message, "1 failed"),
    ]:
        (project / "docs" / "example.rst").write_text(EXAMPLE.format(exception, said), encoding="utf-8")
        done = run(project, "-q", "docs/example.rst")
        assert outcome in done.stdout, done.stdout + done.stderr
