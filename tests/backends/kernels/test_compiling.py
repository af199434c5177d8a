"""The first call compiles and logs it, the next process uses the cache; without a compiler, plain operations run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.depth import in_depth

CALL = """
import logging
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
import numpy as np, tnadapt as tna
x = np.random.default_rng(0).normal(size=(3, 64)).astype("float32")
tna.fwht(x), tna.fwht(x)
from tnadapt.backends._kernels import kernels
"""


def run(code: str, **environment: str) -> tuple[str, list[str]]:
    """Run the call in a new process; return what it prints and logs."""
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return found.stdout.strip(), [line for line in found.stderr.splitlines() if line.startswith("tnadapt: ")]


@pytest.mark.slow
def test_compiled_once_and_announced_once(tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")
    code = CALL + "print(kernels('walsh') is not None)"
    first = run(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert first[0] == "True"
    assert len(first[1]) == 1
    assert "compiling kernels" in first[1][0]
    assert run(code, NUMBA_CACHE_DIR=str(tmp_path)) == ("True", [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("caching.CompileResultCacheImpl._locator_classes = []", "compiled kernels are not cached"),
        ("caching.IndexDataCacheFile.save = lambda *_: open('/')", "compiled kernels could not be cached"),
    ],
    ids=["no folder", "no space"],
)
def test_without_a_writable_cache(before: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")
    code = f"from numba.core import caching; {before}{CALL}print(kernels('walsh') is not None)"
    printed, lines = run(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert printed == "True"
    assert [said in line for line in lines].count(True) == 1


@pytest.mark.parametrize(
    ("before", "environment"),
    [("import sys; sys.modules['numba'] = None", {}), ("", {"NUMBA_DISABLE_JIT": "1"})],
    ids=["no numba", "no compiling"],
)
def test_without_a_compiler_plain_operations_are_used(before: str, environment: dict[str, str]) -> None:
    code = CALL + "print(kernels('walsh'), abs(tna.fwht(tna.fwht(x)) - x).max() < 1e-5)"
    printed, said = run(before + code, **environment)
    assert printed == "None True"
    assert len(said) == 1
    assert "plain operations are used" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize("ending", in_depth([".nbc", ".nbi"], [".nbi"]))
def test_a_damaged_cache_is_recompiled(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    run(CALL, **environment)
    kept = list(tmp_path.rglob("*" + ending))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:10])
    _, lines = run(CALL, **environment)
    assert sum("cannot be read" in line for line in lines) == 1
    assert run(CALL, **environment)[1] == []


def test_functions_of_other_packages_compile_as_before() -> None:
    numba = pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")
    code = CALL + "import numba\nnames = {}\nexec('def f(x): return x + 1', names)\nprint(numba.njit(names['f'])(1))"
    assert numba is not None
    assert run(code)[0] == "2"
