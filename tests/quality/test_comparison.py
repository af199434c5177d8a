"""Statistics of the benchmark against SciPy, and its table."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality import report, store
from benchmarks.quality.comparison import difference, leader_of, outcomes_of
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
        *lines("near", [0.79, 0.83, 0.80], "PEFT", validation=0.8),
        *lines("bad", [0.40, 0.42, 0.41], validation=0.4),
        *lines("lost", [0.0], failed="ValueError: no", diverged=True),
    ]
    session = {"cores": 2, "processor": "a processor", "device": "cpu", "versions": {"python": "3.12", "torch": "2"}}
    found = store.TaskResults({"samples": {"training": 3}}, {one["key"]: one for one in records}, [session])
    text = report.table(TASK, found, "played")
    shown = [line for line in text.splitlines() if line.startswith("|")]
    assert any(line.startswith("| ● | good | r = 1 | 90 | 0.1 ← | 90.0 | 81.0 ± 1.0 |") for line in shown), text
    assert any(line.startswith("| ○ | near (PEFT) |") for line in shown), text
    assert any(line.startswith("|  | bad |") for line in shown), text
    assert "- lost, at most 100: failed: ValueError: no" in text
    assert "2 cores of a processor, device cpu, Python 3.12, torch 2" in text
