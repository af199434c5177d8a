"""The results that the documentation shows match the result files next to it."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not in this copy of the project")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_finetune", BENCHMARKS / "finetune.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.mark.parametrize("name", ["digits", "reviews", "cifar10"])
def test_a_table_is_that_of_its_results(script: ModuleType, name: str) -> None:
    assert name in script.OPTIONS
    results = script.RESULTS / f"{name}.jsonl"
    table = (script.RESULTS / f"{name}.csv").read_text(encoding="utf-8")
    assert table == script.table(results)
    assert (script.RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "key" in line]
    assert len({line["seed"] for line in records}) >= 3
    # Every setting at every rate with every seed: none was left out for what it gave.
    count = 1
    for field in ("seed", "rate"):
        count *= len({line[field] for line in records})
    assert len(records) == count * (len(list(csv.reader(table.splitlines()))) - 1)
