"""The Pareto front, the choice of the rate, and the best adapter."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import tnadapt as tna
from tnadapt.finetune import Task, pareto_front
from tnadapt.finetune.grid import Method

from .internals import best_point, points_of, rows_of

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


@pytest.mark.parametrize(
    ("records", "seeds", "rate", "test"),
    [
        (  # whatever the test says
            [
                record(LORA, 0.1, 0, 0.9, 0.1), record(LORA, 0.1, 1, 0.8, 0.3), record(LORA, 0.2, 0, 0.84, 0.99),
                record(LORA, 0.2, 1, 0.84, 0.99),
            ],
            2, 0.1, (0.1, 0.3),
        ),
        (  # equal validation is decided by its loss
            [
                record(LORA, 0.1, 0, 0.9, 0.1), record(LORA, 0.2, 0, 0.9, 0.2, validation_loss=0.5),
                record(LORA, 0.3, 0, 0.9, 0.3, validation_loss=None),
            ],
            1, 0.2, (0.2,),
        ),
        (  # a rate that lacks a seed does not stand
            [record(LORA, 0.1, 0, 0.9, 0.9), record(LORA, 0.2, 0, 0.5, 0.4), record(LORA, 0.2, 1, 0.5, 0.6)],
            2, 0.2, (0.4, 0.6),
        ),
    ],
)  # fmt: skip
def test_the_rate_is_chosen_by_validation(
    records: list[dict[str, Any]], seeds: int, rate: float, test: tuple[float, ...]
) -> None:
    (point,) = points_of(keyed(*records), [LORA, SUPER], [0.1, 0.2, 0.3], range(seeds))
    assert (point.rate, point.test, point.score) == (rate, test, pytest.approx(sum(test) / len(test)))
    assert point.spread == pytest.approx(statistics.stdev(test) if seeds > 1 else 0)


@pytest.mark.parametrize(
    ("records", "best"),
    [
        ([record(LORA, 0.1, 0, 0.9, 0.2), record(SUPER, 0.1, 0, 0.8, 0.9), record(DENSE, 0.1, 0, 0.95, 0.95)], LORA),
        ([record(DENSE, 0.1, 0, 0.95, 0.95)], None),
        ([record(LORA, 0.1, 0, 0.9, 0.2, diverged=True), record(SUPER, 0.1, 0, 0.8, 0.9)], SUPER),
        ([record(LORA, 0.1, 0, 0.9, 0.9), record(SUPER, 0.1, 0, 0.9, 0.9)], SUPER),  # of equals, the smaller
    ],
)
def test_the_best_is_chosen_by_validation_among_adapters_that_did_not_diverge(
    records: list[dict[str, Any]], best: Method | None
) -> None:
    found = best_point(points_of(keyed(*records), [LORA, SUPER, DENSE], [0.1], [0]))
    assert (None if found is None else found.method) == best


def test_what_diverged_stands_behind_and_off_the_front() -> None:
    records = keyed(
        record(LORA, 0.1, 0, 0.9, 0.9, diverged=True), record(LORA, 0.2, 0, 0.3, 0.3),
        record(SUPER, 0.1, 0, 0.9, 0.9, diverged=True), record(SUPER, 0.2, 0, 0.95, 0.95, diverged=True),
    )  # fmt: skip
    one, other = points_of(records, [LORA, SUPER], [0.1, 0.2], [0])
    assert (one.rate, one.diverged, one.front) == (0.2, False, True)
    assert (other.diverged, other.front) == (True, False)
    assert rows_of([other])[0][5] == "diverged"


def test_the_table() -> None:
    for score, front in ((0.875, "●"), (0.5, "")):
        records = keyed(record(LORA, 0.1, 0, 0.9, score), record(SUPER, 0.1, 0, 0.8, 0.5))
        points = points_of(records, [LORA, SUPER], [0.1], [0])
        assert [point.front for point in points] == [bool(front), True]
        assert rows_of(points) == [
            ["●", "SuperLoRA", "r = 1", "5", "0.1", "80.0%", "50.0%", "2.0"],
            [front, "LoRA", "r = 1", "10", "0.1", "90.0%", f"{score:.1%}", "2.0"],
        ]
