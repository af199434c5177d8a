"""The examples in the docstrings of the benchmark, which pytest does not collect there."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
quality = pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

MODULES = [
    one.name for one in pkgutil.walk_packages(quality.__path__, "benchmarks.quality.") if "__main__" not in one.name
]


def test_examples_hold() -> None:
    found = [doctest.testmod(importlib.import_module(name)) for name in MODULES]
    assert sum(one.failed for one in found) == 0
    assert sum(one.attempted for one in found) >= 7
