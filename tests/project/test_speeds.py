"""``python -m pytest`` runs the fast tests in parallel, ``-m slow`` the others."""

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


def run(project: Path, *options: str) -> dict[str, str]:
    """What the tests that ran have noted."""
    unwanted = ("PYTEST_", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: path.read_text() for path in (project / "tests").iterdir() if path.name in ("fast", "slow")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "speeds"), [((), {"fast"}), (("-m", "slow"), {"slow"}), (("-m", ""), {"fast", "slow"})]
)
def test_a_run_of_everything_is_parallel(project: Path, options: tuple[str, ...], speeds: set[str]) -> None:
    found = run(project, *options)
    assert found.keys() == speeds
    if importlib.util.find_spec("xdist") is None:
        assert set(found.values()) == {"alone None"}
    else:
        assert all(note.startswith("gw") and note.endswith(" 1") for note in found.values()), found


def test_a_run_of_paths_is_not_nor_one_that_says_so(project: Path) -> None:
    assert run(project, "tests/test_it.py") == {"fast": "alone None"}
    if importlib.util.find_spec("xdist") is not None:
        assert run(project, "-n", "0") == {"fast": "alone None"}
