"""The options that doctests run under: a message in an example is compared, not just the type of the exception."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

EXAMPLE = """
>>> import tnadapt
>>> tnadapt.Config(rank=4.0)
Traceback (most recent call last):
    ...
{}: {}
"""


def run(folder: Path, exception: str, message: str) -> str:
    """What pytest says about an example with that last line, under this project's options."""
    (folder / "example.rst").write_text(EXAMPLE.format(exception, message), encoding="utf-8")
    options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder)]
    # The options of the run that this test is part of, such as --laws, are not known in this folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder / "example.rst")],
        capture_output=True, text=True, check=False, cwd=folder, env=environment,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="pyproject.toml is not in this copy of the project")
def test_a_wrong_message_fails(tmp_path: Path) -> None:
    right = "tnadapt.errors.ConfigError", "rank must be an integer or a tuple with one rank per mode; got 4.0"
    said = run(tmp_path, *right)
    assert "1 passed" in said, said
    for exception, message in [(right[0], right[1].replace("integer", "number")), ("ConfigError", right[1])]:
        assert "1 failed" in run(tmp_path, exception, message)
