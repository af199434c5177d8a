"""Every input of the fuzzer's corpus, and a short run of the fuzzer itself where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if not (ROOT / "fuzz").is_dir():
    pytest.skip("the fuzz targets are not in this copy of the project", allow_module_level=True)

from fuzz.mutants import check_mutants
from fuzz.targets import TARGETS, FaultError, measured
from tests.support.depth import LONG, in_depth

CORPUS = ROOT / "fuzz" / "corpus"
INPUTS = [(target, path.name) for target in TARGETS for path in sorted((CORPUS / target).iterdir())]
# Packages that targets import.
NEEDED = {"gguf": ["gguf"], "tokenizer": ["torch", "transformers", "tokenizers"], "table": ["torch"]}
MUTANTS = 5000 if LONG else 50
# In the long profile every target for a minute; else what is read of files, for seconds.
SECONDS = 60 if LONG else 2


@pytest.mark.law("fuzz")
@pytest.mark.parametrize(("target", "stored"), INPUTS)
def test_what_was_found_once_is_read_or_refused_in_little_memory(target: str, stored: str) -> None:
    for package in NEEDED.get(target, []):
        pytest.importorskip(package)
    measured(TARGETS[target], (CORPUS / target / stored).read_bytes())


@pytest.mark.law("fuzz")
@pytest.mark.parametrize("target", TARGETS)
def test_mutants_are_read_or_refused_in_little_time_and_memory(target: str) -> None:
    for package in NEEDED.get(target, []):
        pytest.importorskip(package)
    check_mutants(target, MUTANTS)


def test_memory_is_measured() -> None:
    kept: list[bytes] = []
    with pytest.raises(FaultError, match=r"^3 bytes took 16,\d+,\d+ bytes of memory$"):
        measured(lambda data: kept.append(bytes(1 << 24)), b"abc")


@pytest.mark.law("fuzz")
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("target", in_depth(TARGETS, ["adapter"]))
def test_a_short_run(tmp_path: Path, target: str) -> None:
    command = [sys.executable, "-m", "fuzz", target, "--seconds", str(SECONDS), "--corpus", str(tmp_path / "found")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # However much memory this process has had: as much as the fuzzer's limit, at least.
    assert len(b"x" * (1600 << 20))
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "INITED" in done.stderr, "the corpus was not tried"
    assert "DONE" in done.stderr
    assert not list(tmp_path.glob("crash-*"))
