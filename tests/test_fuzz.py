"""Every input of the fuzzer's corpus, and in the long profile a short run of the fuzzer itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "fuzz").is_dir():
    pytest.skip("the fuzz targets are not in this copy of the project", allow_module_level=True)

from fuzz.targets import TARGETS, FaultError, measured  # noqa: E402

CORPUS = ROOT / "fuzz" / "corpus"
INPUTS = [(target, path.name) for target in TARGETS for path in sorted((CORPUS / target).iterdir())]
# Seconds a target in the tests; by hand as long as one likes.
SECONDS = 20


@pytest.mark.parametrize(("target", "name"), INPUTS)
def test_what_was_found_once_is_read_or_refused_in_little_memory(target: str, name: str) -> None:
    measured(TARGETS[target], (CORPUS / target / name).read_bytes())


def test_memory_is_measured() -> None:
    kept: list[bytes] = []
    with pytest.raises(FaultError, match=r"^3 bytes took 16,\d+,\d+ bytes of memory$"):
        measured(lambda data: kept.append(bytes(1 << 24)), b"abc")


@pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "long" or importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed, or this is not the long profile",
)
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_run(tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-m", "fuzz", target, "--seconds", str(SECONDS), "--corpus", str(tmp_path / "found")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "DONE" in done.stderr
    assert list((tmp_path / "found").iterdir()), "nothing new was reached"
    assert not list(tmp_path.glob("crash-*"))
