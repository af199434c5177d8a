"""Statistics of the benchmark against SciPy, and its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

import tnadapt as tna
from benchmarks.quality import evidence, report, store, tasks, which
from benchmarks.quality.comparison import difference, improves, leader_of, outcomes_of
from benchmarks.quality.recommendation import lora_rank
from tests.quality.played_task import PlayedTask

TASK = PlayedTask()


class Lower(PlayedTask):
    lower = True
    percent = False


def lines(
    method: str, tests: list[float], library: str = "tnadapt", rate: float = 0.1, **more: Any
) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{method}-{rate}-{seed}", "method": method, "title": method, "library": library, "label": "r = 1",
            "budget": 0 if library == "control" else 100, "parameters": 90, "config": {"of": method}, "seed": seed,
            "rate": rate, "kept": 5, "diverged": False, "validation": 0.5, "validation_loss": 1.0, "test": test,
            "seconds": 1.0, **more,
        }
        for seed, test in enumerate(tests)
    ]  # fmt: skip


scores = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=8)


@given(pairs=scores)
def test_a_difference_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    one, two = ([float(value) for value in column] for column in zip(*pairs, strict=True))
    first, second = outcomes_of(TASK, [*lines("a", one), *lines("b", two)])
    found = difference(TASK, first, second)
    assert found is not None
    gains = np.subtract(one, two)
    assert found.seeds == len(pairs)
    assert found.mean == pytest.approx(gains.mean(), abs=1e-12)
    if gains.std() > 1e-9:
        ends = scipy.stats.ttest_rel(one, two).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((ends.low, ends.high), rel=1e-6, abs=1e-9)
        # The interval excludes 0 if and only if the test rejects at 5 %.
        p = scipy.stats.ttest_rel(one, two).pvalue
        if abs(p - 0.05) > 1e-6:
            assert found.decided == (p < 0.05)


def test_only_seeds_of_both_are_compared() -> None:
    long, short = lines("a", [0.5, 0.6, 0.9]), lines("b", [0.4, 0.4])
    first, second = outcomes_of(TASK, [*long, *short], every=True)
    found = difference(TASK, first, second)
    assert found is not None
    assert (found.seeds, found.mean) == (2, pytest.approx(0.15))
    # A setting with fewer seeds than others is not finished.
    assert [one.method for one in outcomes_of(TASK, [*long, *short])] == ["a"]


def test_where_lower_is_better_a_gain_is_a_loss() -> None:
    first, second = outcomes_of(Lower(), [*lines("a", [3.0, 4.0]), *lines("b", [1.0, 1.5])])
    found = difference(Lower(), second, first)
    assert found is not None
    assert found.mean == pytest.approx(2.25)


def test_the_leader_has_the_best_held_out_score() -> None:
    better_test = lines("a", [0.9, 0.9], validation=0.6)
    better_held_out = lines("b", [0.5, 0.6], validation=0.7)
    leader = leader_of(TASK, outcomes_of(TASK, [*better_test, *better_held_out]))
    assert leader is not None
    assert leader.method == "b"


def test_the_table_says_what_was_found() -> None:
    records = [
        *lines("base", [0.30, 0.31, 0.32], "control"),
        *lines("good", [0.80, 0.82, 0.81], validation=0.9),
        *lines("good", [0.10], rate=1.0, validation=0.1),
        *lines("good", [0.10], rate=10.0, failed="LinAlgError: no", diverged=True),
        *lines("near", [0.79, 0.83, 0.80], "PEFT", validation=0.8),
        *lines("bad", [0.40, 0.42, 0.41], rate=0.01, validation=0.4),
        *lines("lost", [0.0], failed="ValueError: no", diverged=True),
    ]
    session = {"cores": 2, "processor": "a processor", "device": "cpu", "versions": {"python": "3.12", "torch": "2"}}
    found = store.TaskResults({"samples": {"training": 3}}, {one["key"]: one for one in records}, [session])
    text = report.table(TASK, found, "played")
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert "2 trainings ended with an error; a rate with one counts as one that diverges." in text
    assert any(line.startswith("| ● | good | r = 1 | 90 | 0.1 ← | 90.0 | 81.0 ± 1.0 |") for line in shown), text
    assert any(line.startswith("| ○ | near (PEFT) |") for line in shown), text
    assert any(line.startswith("|  | bad |") for line in shown), text
    assert "Best rates: tnadapt from 0.01 to 0.1, 0.01 for 1 of 2 settings; PEFT 0.1 for all settings." in text
    assert "- lost, at most 100: failed: ValueError: no" in text
    assert "2 cores of a processor, device cpu, Python 3.12, torch 2" in text


# -- What is published ------------------------------------------------------------------------------

Publish: TypeAlias = Callable[[list[dict[str, Any]]], None]


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Return a function that makes lines the only published results, those of the played task."""
    monkeypatch.setattr(tasks, "TASKS", ["played"])
    monkeypatch.setattr(tasks, "find", lambda name: TASK)

    def publish(records: list[dict[str, Any]]) -> None:
        found = store.TaskResults({}, {one["key"]: one for one in records}, [])
        monkeypatch.setattr(
            store, "read", lambda folder, name, scale: found if (name, scale) == ("played", "small") else None
        )

    return publish


# -- Which method? ---------------------------------------------------------------------------------

LORA, FOURIER = tna.presets.lora(3).to_dict(), tna.presets.fourierft(4).to_dict()


def with_config(config: dict[str, Any] | None, *given: Any, **more: Any) -> list[dict[str, Any]]:
    return [{**line, "config": config} for line in lines(*given, **more)]


def test_the_rank_of_lora_that_serves_a_setting() -> None:
    facts = TASK.facts(TASK.sketch())
    cases = [
        (with_config(LORA, "lora", [0.5]), 3),
        (with_config(FOURIER, "fourierft", [0.5]), None),
        (with_config({"peft": "LoraConfig", "r": 5}, "peft-lora", [0.5], "PEFT"), 5),
        (with_config({"peft": "LoKrConfig", "r": 5}, "peft-lokr", [0.5], "PEFT"), None),
    ]
    for given_lines, rank in cases:
        (one,) = outcomes_of(TASK, given_lines)
        assert lora_rank(one, facts) == rank


@pytest.fixture
def published(publish: Publish) -> None:
    publish([
        *with_config(None, "base", [0.30, 0.31, 0.32], "control", parameters=0),
        *with_config(LORA, "dense", [0.90, 0.91, 0.92], "control"),
        *with_config(FOURIER, "fourierft", [0.75, 0.77, 0.76], validation=0.9),
        *with_config(LORA, "lora", [0.60, 0.62, 0.61], validation=0.8),
        *with_config({"r": 2}, "peft-lora", [0.76, 0.75, 0.76], "PEFT", validation=0.7),
    ])  # fmt: skip


def row_of(folder: Path) -> str:
    """Return the row of 100 parameters of "Which method?"."""
    (row,) = [line for line in which.write(folder).read_text("utf-8").splitlines() if line.startswith("| 100 |")]
    return row


@pytest.mark.usefixtures("published")
def test_an_answer_names_the_best_those_not_decided_and_the_best_as_lora(tmp_path: Path) -> None:
    text = which.write(tmp_path).read_text(encoding="utf-8")
    assert "No adapter: 31.0 ± 1.0; dense updates (128 parameters): 91.0 ± 1.0. 2 weights are adapted." in text
    row = row_of(tmp_path)
    assert row.startswith(
        "| 100 | fourierft r = 1 | 76.0 ± 1.0 | peft-lora (PEFT) | lora r = 1 (rank 3) | 61.0 ± 1.0 |"
    )
    assert row.endswith("| 15.0 [15.0, 15.0] |")


def test_a_best_method_that_is_no_better_than_no_adapter_is_marked(tmp_path: Path, publish: Publish) -> None:
    publish([
        *with_config(LORA, "base", [0.30, 0.31, 0.32], "control"),
        *with_config(LORA, "lora", [0.31, 0.30, 0.33], validation=0.8),
    ])  # fmt: skip
    assert row_of(tmp_path).startswith("| 100 | lora r = 1 (no gain) | 31.3 ± 1.5 |")


def test_a_gain_is_an_interval_above_no_adapter() -> None:
    records = [
        *lines("base", [0.30, 0.31, 0.32], "control"),
        *lines("good", [0.40, 0.42, 0.41]),
        *lines("near", [0.31, 0.30, 0.33]),
        *lines("bad", [0.10, 0.12, 0.11]),
    ]
    found = {one.method: one for one in outcomes_of(TASK, records)}
    assert [improves(TASK, found[name], found["base"]) for name in ("good", "near", "bad")] == [True, False, False]
    assert improves(TASK, found["near"], None)


def test_what_plans_rank_by_is_the_share_of_the_gain_of_dense_updates_on_held_out_samples(
    tmp_path: Path, publish: Publish
) -> None:
    publish([
        *with_config(None, "base", [0.30, 0.31, 0.32], "control", parameters=0, validation=0.4),
        *with_config(LORA, "dense", [0.90, 0.91, 0.92], "control", validation=0.8),
        *with_config(FOURIER, "fourierft", [0.75, 0.77, 0.76], validation=0.6),
        *with_config(LORA, "lora", [0.60, 0.62, 0.61], validation=0.7),  # worse on test samples
        *with_config({"r": 2}, "peft-lora", [0.76, 0.75, 0.76], "PEFT", validation=0.7),
    ])  # fmt: skip
    (task,) = json.loads(evidence.evidence(tmp_path))["tasks"]
    assert (task["title"], task["elements"], task["no_gain"]) == (TASK.title, 128, [])
    assert [(one["config"], one["parameters"], one["held_out_share"]) for one in task["settings"]] == [
        (FOURIER, 90, 0.5), (LORA, 90, 0.75),
    ]  # fmt: skip


@pytest.mark.parametrize(("second", "no_gain"), [([0.45, 0.44, 0.47], []), ([0.31, 0.33, 0.30], [100])])
@pytest.mark.parametrize("larger", [False, True])
def test_plans_do_not_rank_by_a_budget_at_which_nothing_is_gained(
    tmp_path: Path, publish: Publish, second: list[float], no_gain: list[int], larger: bool
) -> None:
    records = [
        *with_config(None, "base", [0.30, 0.31, 0.32], "control", parameters=0, validation=0.4),
        *with_config(LORA, "dense", [0.90, 0.91, 0.92], "control", validation=0.9),
        *with_config(LORA, "lora", [0.31, 0.30, 0.33], validation=0.8),
        *with_config({"r": 2}, "peft-lora", second, "PEFT", validation=0.7),
    ]
    if larger:
        records += with_config(FOURIER, "fourierft", [0.75, 0.77, 0.76], validation=0.9, budget=1000)
    publish(records)
    (task,) = json.loads(evidence.evidence(tmp_path))["tasks"]
    # A method of PEFT may be the one that gains: the budget decides something, and ours count with it.
    assert [one["config"] for one in task["settings"]] == [*([] if no_gain else [LORA]), *([FOURIER] if larger else [])]
    # A task counts also if nothing is gained at any of its budgets: plans name it.
    assert task["no_gain"] == no_gain


def test_a_method_that_is_better_on_test_than_the_best_is_named(tmp_path: Path, publish: Publish) -> None:
    publish([
        *with_config(LORA, "base", [0.30, 0.31, 0.32], "control"),
        *with_config(LORA, "lora", [0.41, 0.40, 0.43], validation=0.8),
        *with_config(FOURIER, "fourierft", [0.61, 0.60, 0.63], validation=0.7),
        *with_config({"r": 2}, "peft-lora", [0.42, 0.39, 0.43], "PEFT", validation=0.7),
        *with_config({"r": 1}, "peft-fourierft", [0.31, 0.30, 0.32], "PEFT", validation=0.7),
    ])  # fmt: skip
    expected = "| 100 | lora r = 1 | 41.3 ± 1.5 | fourierft (better on test), peft-lora (PEFT) | lora"
    assert row_of(tmp_path).startswith(expected)
