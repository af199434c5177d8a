"""The results file, written by one process at a time, and the report: the front, the rates, and the best adapter."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch")

import tnadapt as tna
from tnadapt.errors import FileError
from tnadapt.finetune import Task, pareto_front
from tnadapt.finetune.grid import Method
from tnadapt.finetune.results import FORMAT, Results

from .internals import best_point, points_of, rows_of

STUDY = {"epochs": 3, "batch": 32}


def training(key: str, **more: object) -> dict[str, object]:
    """Return the line of a training, in which all numbers are 1."""
    names = ["config", "seed", "rate", "parameters", "kept", "diverged", "validation", "validation_loss", "test"]
    return {"key": key, **dict.fromkeys([*names, "predictions", "seconds"], 1), **more}


def start(path: Path, *keys: str) -> None:
    with Results(path, STUDY) as results:
        results.begin_session(jobs=1)
        for key in keys:
            results.add(training(key))


def test_lines_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "results.jsonl"
    start(path, "a", "b")
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a", "b"]
        results.add(training("b", test=2))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert (lines[0]["format"], lines[0]["study"]) == (FORMAT, STUDY)
    assert set(lines[1]["session"]) >= {"versions", "cores", "jobs"}
    with Results(path, STUDY) as results:
        assert results.records["b"]["test"] == 2
    # A first line that was not finished is written anew.
    path.write_bytes(path.read_bytes()[:20])
    with Results(path, STUDY) as results:
        assert results.records == {}
    assert json.loads(path.read_text().splitlines()[0])["study"] == STUDY


@pytest.mark.law("killed-sweep")
@pytest.mark.parametrize("cut", range(1, 22))
def test_a_line_that_was_not_finished_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "results.jsonl"
    start(path, "a", "b")
    path.write_bytes(path.read_bytes()[:-cut])
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a"]
        results.add(training("c"))
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a", "c"]


@pytest.mark.parametrize("line", [b"{half\n", b"[1]\n", b"\xff\n", b"[" * 5000 + b"\n", b'{"key": "a", "seed": 0}\n'])
def test_a_damaged_line_in_between_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "results.jsonl"
    start(path, "a")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], line, *lines[2:]]))
    with pytest.raises(FileError, match=r"results\.jsonl, line 3 is damaged"):
        Results(path, STUDY)


@pytest.mark.parametrize("content", [b"a diary\n", b"a diary", b'{"some": "JSON"}\n', b'{"mine": 1}\n{"mine": 2}'])
@pytest.mark.parametrize("fresh", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: bytes, fresh: bool) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"is not a results file"):
        Results(path, STUDY, fresh)
    assert path.read_bytes() == content


TARGETS = [[f"bert.encoder.layer.{number}.query", 32] for number in range(4)]
OTHER = [[name, 48 if ".2." in str(name) else size] for name, size in TARGETS]


@pytest.mark.parametrize(
    ("study", "changes", "message"),
    [
        (STUDY, {"epochs": 4, "keep": []}, r"\(epochs was 3, now 4; keep was null, now \[\]\); .*--fresh"),
        (
            {**STUDY, "targets": TARGETS}, {"targets": OTHER},
            r"\(targets was \[.bert\.encoder\.layer\.2\.query., 32\], now .* 48\]\)",
        ),
        ({**STUDY, "targets": TARGETS}, {"targets": OTHER[:3]}, r"\(targets was a list of 4, now a list of 3\)"),
        # A tuple is a list after a turn as JSON.
        ({**STUDY, "targets": ("q", "v")}, {"epochs": 4}, r"\(epochs was 3, now 4\)"),
    ],
)  # fmt: skip
def test_another_study_is_refused(study: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path, study) as results:
        results.add(training("a"))
    before = path.read_bytes()
    with pytest.raises(FileError, match=rf"results of another study {message}"):
        Results(path, {**study, **changes})
    assert path.read_bytes() == before


@pytest.mark.law("killed-sweep")
def test_two_at_once(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    path = tmp_path / "results.jsonl"
    for fresh in (False, True):
        with Results(path, STUDY) as results:
            results.add(training("a"))
            with pytest.raises(FileError, match="being written by another process"):
                Results(path, STUDY, fresh)
    with Results(path, STUDY) as results:
        assert list(results.records) == ["a"]


def test_a_fresh_beginning_knows_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Results(path, STUDY) as results:
        results.add(training("a", adapter="lora-a.safetensors"))
        results.add(training("b", adapter="...safetensors"))  # whose logs would be in the folder of the study itself
        results.add(training("c", adapter="../c.safetensors"))
    with Results(path, {"epochs": 7}, fresh=True) as results:
        assert (results.records, results.dropped) == ({}, ["lora-a.safetensors"])
    assert len(path.read_text().splitlines()) == 1


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "results.jsonl").mkdir()
    for folder in (tmp_path / "file", tmp_path):
        with pytest.raises(FileError, match="give another folder with --out"):
            Results(folder / "results.jsonl", STUDY)


# -- The report: the Pareto front, the choice of the rate, and the best adapter ------------------------

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
def test_the_best_adapter_is_that_of_the_best_validation(records: list[dict[str, Any]], best: Method | None) -> None:
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


def test_a_table_is_that_of_its_results(benchmark_scripts: Callable[[str], ModuleType]) -> None:
    script = benchmark_scripts("finetune")
    results = script.RESULTS / "digits.jsonl"
    table = (script.RESULTS / "digits.csv").read_text(encoding="utf-8")
    assert table == script.table(results)
    assert (script.RESULTS / "digits.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "key" in line]
    seeds, rates = ({line[field] for line in records} for field in ("seed", "rate"))
    assert len(seeds) >= 3
    # Every setting at every rate with every seed: none was left out for what it gave.
    assert len(records) == len(seeds) * len(rates) * (len(list(csv.reader(table.splitlines()))) - 1)
