"""The tables of learning rates, and of what is left after merging, are those of the published results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
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


def test_what_the_tables_say_together(benchmark_scripts: Callable[[str], ModuleType]) -> None:
    script = benchmark_scripts("rates")
    text = script.summary()
    assert (script.RESULTS / "summary.rst").read_text(encoding="utf-8") == text
    rows = [row for task in script.TASKS for row in script.rows_of(script.read_lines(script.RESULTS / f"{task}.jsonl"))]
    within = [max(row.best, script.DEFAULT) <= 2 * min(row.best, script.DEFAULT) for row in rows]
    lost = [100 * (statistics.fmean(row.test_best) - statistics.fmean(row.test_default)) for row in rows]
    assert text.startswith(f"On all tasks, {sum(within)} of {len(rows)} settings have their best rate within a factor")
    assert f"loses more than half a point in {sum(one > 0.5 for one in lost)} settings" in text
    assert text.endswith(f"at most {max(lost):.2f}.\n")


@pytest.mark.parametrize("name", ["power", "norm"])
def test_the_tables_of_the_rule(benchmark_scripts: Callable[[str], ModuleType], name: str) -> None:
    script = benchmark_scripts("rates")
    assert (script.RESULTS / f"{name}.rst").read_text(encoding="utf-8") == getattr(script, f"{name}_table")()


def lines_of(rates: Sequence[float], losses: Sequence[float | None], seed: int = 0) -> str:
    """Return lines of one setting at several rates."""
    setting = {"task": "reviews", "family": "LoRA", "label": "r = 1", "parameters": 10, "elements": 100, "weights": 8}
    return "".join(
        json.dumps({**setting, "key": f"{rate}-{seed}", "seed": seed, "rate": rate, "validation_loss": loss}) + "\n"
        for rate, loss in zip(rates, losses, strict=True)
    )


def test_a_loss_of_zero_is_the_best_and_a_repeated_training_counts_once(
    benchmark_scripts: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = benchmark_scripts("rates")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    (tmp_path / "digits.jsonl").touch()

    def tables(text: str) -> tuple[str, str]:
        for name in ("power", "norm"):
            (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
        return script.power_table(), script.norm_table()

    best_is_zero = tables(lines_of(script.RATES, [0.5, 0.4, 0.3, 0.0, None]))
    assert best_is_zero == tables(lines_of(script.RATES, [0.5, 0.4, 0.3, 0.1, None]))
    assert f"     - {script.RATES[3]:g}\n" in best_is_zero[0]
    last = [0.5, 0.4, 0.3, 0.2, 0.25]
    once = lines_of(script.RATES, last) + lines_of(script.RATES, last, seed=1)
    assert tables(lines_of(script.RATES, [0.1, 0.2, 0.3, 5.0, 0.5]) + once) == tables(once)


def test_what_is_left_after_merging(benchmark_scripts: Callable[[str], ModuleType]) -> None:
    script = benchmark_scripts("unmerge")
    rows = json.loads(script.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert script.TABLE.read_text(encoding="utf-8") == script.table(rows)
