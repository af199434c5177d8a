"""The short profile runs, its table is right, and what the page on speed takes from it is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.conftest import BENCHMARKS
from tests.support.depth import long_only

Scripts = Callable[[str], ModuleType]


@pytest.fixture
def short(benchmark_scripts: Scripts) -> ModuleType:
    pytest.importorskip("torch")
    return benchmark_scripts("short")


ROWS = [
    {"case": "slower", "over": "a copy", "ratio": 3.0},
    {"case": "at the tolerance", "over": "a copy", "ratio": 2.5},
    {"case": "faster", "over": "PEFT", "ratio": 1.0},
    {"case": "not known before", "over": "PEFT", "ratio": 1.0},
    {"case": "without its peer", "over": "FFHT", "missing": "No module named 'fht_cpu'"},
]
COMMITTED = [
    {"case": row["case"], "over": row["over"], "ratio": 2.0} for row in ROWS if "known" not in str(row["case"])
]


def test_the_quotient_is_to_the_committed_ratio_and_only_what_is_worse_is_marked(short: ModuleType) -> None:
    lines = {line.case: line for line in short.compare(ROWS, COMMITTED, tolerance=1.25)}
    assert [line.quotient for line in lines.values()] == [1.5, 1.25, 0.5, None, None]
    assert [line.mark for line in lines.values()] == ["WORSE", "", "better", "new", "not installed"]
    shown = short.table(list(lines.values())).splitlines()
    assert shown[0].split() == ["case", "over", "ratio", "committed", "quotient"]
    assert shown[1].split() == ["slower", "a", "copy", "3", "2", "1.5", "WORSE"]
    assert shown[5].split() == ["without", "its", "peer", "FFHT", "–", "2", "–", "not", "installed"]


@pytest.mark.parametrize(("options", "status"), [((), 0), (("--fail-above", "1.4"), 1), (("--fail-above", "1.5"), 0)])
def test_the_exit_status_is_1_only_above_a_factor_that_is_given(
    short: ModuleType, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], status: int
) -> None:
    monkeypatch.setattr(short, "run", lambda group: ROWS)
    monkeypatch.setattr(short, "read", lambda: COMMITTED)
    assert short.main(["arrays", *options]) == status


def taking(clock: list[float], seconds: list[float]) -> Callable[[], None]:
    """Return a contestant, each of whose calls takes the next of its seconds of a clock."""
    left = iter(seconds)
    return lambda: clock.append(clock[-1] + next(left))


def test_a_ratio_is_the_median_of_those_within_a_round(short: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(short, "SECONDS", 0.0)
    monkeypatch.setattr(short, "ROUNDS", 3)
    # Two calls first. The machine is ten times as slow in the third round, of which the ratio shows nothing.
    clock = [0.0]
    ours, theirs = taking(clock, [9.0, 1.0, 2.0, 3.0, 20.0]), taking(clock, [9.0, 1.0, 1.0, 1.0, 10.0])
    ratio = short.turns(ours, theirs, lambda: clock[-1], smoke=False)
    assert ratio == {"ratio": 2.0, "low": 2.0, "high": 2.5, "seconds": 3.0, "other": 1.0, "rounds": 3}


def test_the_committed_results_have_every_case(short: ModuleType) -> None:
    rows = short.read()
    assert [row["case"] for row in rows] == list(short.CASES)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in rows)
    machine = json.loads(short.RESULTS.read_text(encoding="utf-8").partition("\n")[0])
    assert {"processor", "cores", "date", "numpy", "torch", "peft"} <= set(machine)


def test_the_first_lines_of_the_page_are_those_of_the_results(benchmark_scripts: Scripts) -> None:
    page = benchmark_scripts("page")
    rows = [
        {},
        {"problem": "vit", "case": "lora", "ratio": 0.98765},
        {"problem": "vit", "case": "dense", "ratio": 1.04},
    ]
    said = list(page.headlines({"steps": rows, "decompositions": [{}, {"kind": "CP", "ratios": {"TensorLy": 0.5}}]}))
    assert len(said) == len(page.HEADLINES) == 11
    assert said[0].endswith("PEFT's LoRA**: LoRA 0.988, dense 1.04\n")
    assert said[9].endswith("TensorLy's, the slowest case of each**: CP 0.5\n")
    sources = list(page.sources())
    assert len(sources) == len(said)
    assert sources[0].endswith(": `fast.py steps`, `fast/steps.jsonl`\n")
    assert sources[9].endswith(": `decompositions.py`, `decompositions.jsonl`\n")
    assert [line.count("not measured") for line in said] == [0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1]


@pytest.mark.slow
@long_only
def test_every_case_runs() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    command = [sys.executable, str(BENCHMARKS / "short.py"), "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 20
