"""How tests run here: ``python -m pytest`` runs the fast ones in parallel, and doctests compare messages."""

from __future__ import annotations

import importlib.util
import os
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


def notes(project: Path, *options: str) -> dict[str, str]:
    """What the tests that ran have noted."""
    done = run(project, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_text() for path in (project / "tests").iterdir() if path.name in ("fast", "slow")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "speeds"), [((), {"fast"}), (("-m", "slow"), {"slow"}), (("-m", ""), {"fast", "slow"})]
)
def test_a_run_of_everything_is_parallel(project: Path, options: tuple[str, ...], speeds: set[str]) -> None:
    noted = notes(project, *options)
    assert noted.keys() == speeds
    if importlib.util.find_spec("xdist") is None:
        assert set(noted.values()) == {"alone None"}
    else:
        assert all(note.startswith("gw") and note.endswith(" 1") for note in noted.values()), noted


def test_a_run_of_paths_is_not_nor_one_that_says_so(project: Path) -> None:
    assert notes(project, "tests/test_it.py") == {"fast": "alone None"}
    if importlib.util.find_spec("xdist") is not None:
        assert notes(project, "-n", "0") == {"fast": "alone None"}


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
