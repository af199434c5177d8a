"""The tables of learning rates, and of what is left after merging, are those of the published results."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.conftest import BENCHMARKS

pytest.importorskip("torch")
if not (BENCHMARKS / "rates.py").is_file():
    pytest.skip("the benchmarks are not in this copy of the project", allow_module_level=True)


@pytest.mark.parametrize("task", ["digits", "reviews", "cifar10"])
def test_the_table_of_a_task(benchmark_scripts: Callable[[str], ModuleType], task: str) -> None:
    script = benchmark_scripts("rates")
    assert (script.RESULTS / f"{task}.rst").read_text(encoding="utf-8") == script.table(task)
    rows = script.rows_of(script.read_lines(script.RESULTS / f"{task}.jsonl"))
    assert len(rows) == len(script.CONFIGS[task]), f"a setting of {task} lacks a rate"


@pytest.mark.parametrize("name", ["power", "norm"])
def test_the_tables_of_the_rule(benchmark_scripts: Callable[[str], ModuleType], name: str) -> None:
    script = benchmark_scripts("rates")
    assert (script.RESULTS / f"{name}.rst").read_text(encoding="utf-8") == getattr(script, f"{name}_table")()


def test_what_is_left_after_merging(benchmark_scripts: Callable[[str], ModuleType]) -> None:
    script = benchmark_scripts("unmerge")
    rows = json.loads(script.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert script.TABLE.read_text(encoding="utf-8") == script.table(rows)
