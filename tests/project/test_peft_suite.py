"""The script that runs PEFT's own tests over the plug-in: how it reads LoRA's settings, and what it calls wrong."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import BENCHMARKS

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not in this copy of the project")


@pytest.fixture
def suite(benchmark_scripts: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_scripts("peft_suite")


def row(method: str, outcome: str, test: str = "test_a", why: str = "") -> dict[str, Any]:
    return {"file": "f.py", "test": test, "method": method, "row": "MLP", "outcome": outcome, "why": why}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, {}),
        ({"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none"}, {}),
        ({"target_modules": None, "task_type": "CAUSAL_LM"}, {"target_modules": "qv", "task_type": "CAUSAL_LM"}),
        (
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "init_lora_weights": False},
            {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "init_weights": False},
        ),
        ({"target_modules": ["lin0"], "use_dora": True}, None),
        ({"bias": "lora_only"}, None),
        ({"init_lora_weights": "pissa"}, None),
    ],
)
def test_settings_of_plain_lora(
    given: dict[str, Any], found: dict[str, Any] | None, benchmark_scripts: Callable[[str], ModuleType]
) -> None:
    assert benchmark_scripts("peft_suite_plugin").plain(given) == found


def test_a_difference_needs_one_reason_and_a_reason_a_difference(suite: ModuleType) -> None:
    rows = [
        row("LoRA", "passed"),
        row("lora", "failed", why="no bias"),
        row("superlora", "passed"),
        # What LoRA does not pass itself is no difference.
        row("LoRA", "failed", "test_b"),
        row("lora", "failed", "test_b"),
    ]
    found = suite.differences(rows)
    assert found == [rows[1]]
    fits = {"test": "test_a", "why": "bias", "reason": "…"}
    assert suite.explained(found, [fits]) == ([[rows[1]]], [])
    assert suite.explained(found, [])[1] == ["no reason for f.py test_a lora MLP: no bias"]
    assert suite.explained(found, [fits, fits])[1][0].startswith("several reasons for f.py test_a")
    assert suite.explained([], [fits])[1] == ["no difference for the reason of test_a"]
    assert suite.explained(found, [{**fits, "why": "dtype"}])[1][0].startswith("no reason")


def test_results_survive_their_file(suite: ModuleType) -> None:
    rows = [{"left_out": {}}, row("LoRA", "passed"), row("LoRA", "passed"), row("lora", "failed", why="x")]
    lines = suite.packed(rows)
    assert len(lines) == 3
    assert suite.unpacked(lines) == rows


def test_the_page_is_that_of_its_results_and_explains_every_difference(suite: ModuleType) -> None:
    found = suite.unpacked([json.loads(line) for line in suite.RESULTS.read_text(encoding="utf-8").splitlines()])
    reasons = tomllib.loads(suite.REASONS.read_text(encoding="utf-8"))["difference"]
    assert suite.page(found, reasons) == suite.PAGE.read_text(encoding="utf-8")
    rows = [one for one in found if "test" in one]
    assert suite.explained(suite.differences(rows), reasons)[1] == []
