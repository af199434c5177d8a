"""The results that the documentation shows match the result files next to it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from types import ModuleType

import pytest

pytest.importorskip("torch")


@pytest.mark.parametrize("name", ["digits", "reviews", "cifar10"])
def test_a_table_is_that_of_its_results(benchmark_scripts: Callable[[str], ModuleType], name: str) -> None:
    script = benchmark_scripts("finetune")
    assert name in script.OPTIONS
    results = script.RESULTS / f"{name}.jsonl"
    table = (script.RESULTS / f"{name}.csv").read_text(encoding="utf-8")
    assert table == script.table(results)
    assert (script.RESULTS / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "key" in line]
    seeds, rates = ({line[field] for line in records} for field in ("seed", "rate"))
    assert len(seeds) >= 3
    # Every setting at every rate with every seed: none was left out for what it gave.
    assert len(records) == len(seeds) * len(rates) * (len(list(csv.reader(table.splitlines()))) - 1)
