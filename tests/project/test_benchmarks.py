"""The benchmarks run, and the page that the documentation shows is made of the results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import BENCHMARKS
from tests.support.depth import in_depth, long_only

pytest.importorskip("torch")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not in this copy of the project"),
]


def smoke(script: str, *options: str) -> str:
    """Run a script on tiny sizes, and return what it prints."""
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("part", in_depth(("steps", "memory", "decoding", "strategies", "files", "gpu"), ("steps",)))
def test_a_part_runs(part: str) -> None:
    smoke("fast.py", part)


@long_only
def test_mixed_batches_agree_with_one_adapter_at_a_time() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    smoke("mixed_batch.py")


def test_a_first_run_on_a_card_goes_on_after_a_failure(
    benchmark_scripts: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    items, out = ["no such item", "same bits"], tmp_path / "found.json"
    assert not benchmark_scripts("gpu_first_run").first_run(items, out, smoke=True)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["items"]) == items
    failed, done = found["items"].values()
    assert failed["status"] == "failed"
    assert "invalid choice: 'no such item'" in failed["error"]
    assert done["status"] == "done"
    assert done["rows"] == [{"what": "a second run", "result": "the same bits"}]
    assert found["machine"]["date"]
    assert found["card"]


@long_only
def test_adapters_are_extracted_from_shards(tmp_path: Path) -> None:
    printed = smoke("extract_large.py", "--layers", "1", "--folder", str(tmp_path))
    assert [json.loads(line)["targets"] for line in printed.splitlines()] == [2, 7, 2, 2]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("results", ["extract_large.json", "mixed_batch.jsonl", "decompositions.jsonl"])
def test_a_table_is_that_of_its_results(benchmark_scripts: Callable[[str], ModuleType], results: str) -> None:
    path = BENCHMARKS / "results" / results
    content = path.read_text(encoding="utf-8")
    rows = json.loads(content) if path.suffix == ".json" else [json.loads(line) for line in content.splitlines()]
    assert benchmark_scripts(path.stem).table(rows) == path.with_suffix(".rst").read_text(encoding="utf-8")


@long_only
def test_decompositions_run_next_to_their_peers() -> None:
    pytest.importorskip("tensorly")
    smoke("decompositions.py")


def test_only_results_as_good_as_ours_are_among_the_best(benchmark_scripts: Callable[[str], ModuleType]) -> None:
    over_the_best = benchmark_scripts("decompositions").over_the_best
    ratios = {"slow": 0.5, "as good": 1.5, "fast and wrong": 9.0, "fast, of a random matrix": 8.0}
    errors = {"tnadapt": 0.1, "slow": 0.1, "as good": 0.1005, "fast and wrong": 0.2, "fast, of a random matrix": 0.2}
    assert over_the_best(ratios, errors) == 1.5
    # A rank of 4 leaves 99 % of a random matrix, whatever the triplets.
    random = {**dict.fromkeys(errors, 0.990), "fast, of a random matrix": 0.995, "fast and wrong": 0.999}
    assert over_the_best(ratios, random) == 1.5
    assert over_the_best({"wrong": 2.0}, {"tnadapt": 0.1, "wrong": 0.2}) == 0.0


def test_the_page_is_that_of_its_results(benchmark_scripts: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = benchmark_scripts("fast")
    importlib.import_module("page").write(script.read(script.RESULTS), tmp_path)
    shown = BENCHMARKS / "results"
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == (shown / "speed.md").read_text(encoding="utf-8")
    for picture in tmp_path.glob("*.png"):
        assert (shown / picture.name).is_file(), picture.name
