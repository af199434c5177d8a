"""The Pareto front, the choice of the rate, and the best adapter."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import tnadapt as tna
from tnadapt.finetune.grid import Method
from tnadapt.finetune.pareto_report import best_point, pareto_front, points_of, rows_of
from tnadapt.finetune.training import Task

LORA = Method("LoRA", "r = 1", tna.presets.lora(1))
SUPER = Method("SuperLoRA", "r = 1", tna.presets.superlora(1))
DENSE = Method("dense", "", tna.presets.dense())

places = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)


@given(places)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)

    def beats(one: tuple[int, int], other: tuple[int, int]) -> bool:
        return one != other and one[0] <= other[0] and one[1] >= other[1]

    unbeaten = {point for point in points if not any(beats(other, point) for other in points)}
    assert {points[index] for index in front} == unbeaten
    assert len(front) == len(unbeaten)
    costs = [points[index][0] for index in front]
    assert costs == sorted(costs)


def record(method: Method, rate: float, seed: int, validation: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "key": Task(method, seed, rate).key, "seed": seed, "rate": rate, "kept": 3, "seconds": 2.0, "diverged": False,
        "parameters": {"LoRA": 10}.get(method.family, 5), "validation": validation, "validation_loss": 1.0,
        "test": test, **more,
    }  # fmt: skip


def keyed(*records: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["key"]: one for one in records}


def test_the_rate_is_chosen_by_validation_whatever_the_test_says() -> None:
    records = keyed(
        record(LORA, 0.1, 0, 0.9, 0.1), record(LORA, 0.1, 1, 0.8, 0.3), record(LORA, 0.2, 0, 0.84, 0.99),
        record(LORA, 0.2, 1, 0.84, 0.99),
    )  # fmt: skip
    (point,) = points_of(records, [LORA], [0.1, 0.2], range(2))
    assert (point.rate, point.test, point.score) == (0.1, (0.1, 0.3), 0.2)
    assert point.spread == pytest.approx(0.1414213)


def test_equal_validation_is_decided_by_its_loss() -> None:
    records = keyed(
        record(LORA, 0.1, 0, 0.9, 0.1), record(LORA, 0.2, 0, 0.9, 0.2, validation_loss=0.5),
        record(LORA, 0.3, 0, 0.9, 0.3, validation_loss=None),
    )  # fmt: skip
    (point,) = points_of(records, [LORA], [0.1, 0.2, 0.3], [0])
    assert point.rate == 0.2


def test_a_rate_that_lacks_a_seed_does_not_stand() -> None:
    records = keyed(record(LORA, 0.1, 0, 0.9, 0.9), record(LORA, 0.2, 0, 0.5, 0.5), record(LORA, 0.2, 1, 0.5, 0.5))
    (point,) = points_of(records, [LORA, SUPER], [0.1, 0.2], range(2))
    assert point.rate == 0.2


def test_the_best_is_chosen_by_validation_among_adapters_that_did_not_diverge() -> None:
    records = keyed(
        record(LORA, 0.1, 0, 0.9, 0.2), record(SUPER, 0.1, 0, 0.8, 0.9), record(DENSE, 0.1, 0, 0.95, 0.95),
    )  # fmt: skip
    points = points_of(records, [LORA, SUPER, DENSE], [0.1], [0])
    best = best_point(points)
    assert best is not None
    assert best.method == LORA
    assert best_point([point for point in points if point.method == DENSE]) is None
    gone = keyed(record(LORA, 0.1, 0, 0.9, 0.2, diverged=True), record(SUPER, 0.1, 0, 0.8, 0.9))
    best = best_point(points_of(gone, [LORA, SUPER], [0.1], [0]))
    assert best is not None
    assert best.method == SUPER


def test_what_diverged_stands_behind_and_off_the_front() -> None:
    records = keyed(
        record(LORA, 0.1, 0, 0.9, 0.9, diverged=True), record(LORA, 0.2, 0, 0.3, 0.3),
        record(SUPER, 0.1, 0, 0.9, 0.9, diverged=True), record(SUPER, 0.2, 0, 0.95, 0.95, diverged=True),
    )  # fmt: skip
    one, other = points_of(records, [LORA, SUPER], [0.1, 0.2], [0])
    assert (one.rate, one.diverged, one.front) == (0.2, False, True)
    assert (other.diverged, other.front) == (True, False)
    assert rows_of([other])[0][5] == "diverged"


def test_of_equals_the_smaller_is_best() -> None:
    points = points_of(
        keyed(record(LORA, 0.1, 0, 0.9, 0.9), record(SUPER, 0.1, 0, 0.9, 0.9)), [LORA, SUPER], [0.1], [0]
    )
    best = best_point(points)
    assert best is not None
    assert best.method == SUPER
    assert [point.front for point in points] == [False, True]


def test_the_table() -> None:
    points = points_of(
        keyed(record(LORA, 0.1, 0, 0.9, 0.875), record(SUPER, 0.1, 0, 0.8, 0.5)), [LORA, SUPER], [0.1], [0]
    )
    assert rows_of(points) == [
        ["●", "SuperLoRA", "r = 1", "5", "0.1", "80.0%", "50.0%", "2.0"],
        ["●", "LoRA", "r = 1", "10", "0.1", "90.0%", "87.5%", "2.0"],
    ]
