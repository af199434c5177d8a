"""Second runs: what agrees, what is decided again, what is reversed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("benchmarks.quality", reason="the benchmarks are not in this copy of the project")

from benchmarks.quality import page, replication, store, tasks, which
from benchmarks.quality.comparison import outcomes_of
from tests.quality.played_task import PlayedTask

from .test_comparison import lines

TASK = PlayedTask()
FIRST = [
    *lines("base", [0.30, 0.31, 0.32], "control"),
    *lines("a", [0.80, 0.82, 0.81]),
    *lines("b", [0.70, 0.73, 0.71]),
    *lines("c", [0.60, 0.62, 0.61]),
    *lines("d", [0.59, 0.63, 0.62]),
]


def run(**scores: list[float]) -> list[dict[str, Any]]:
    return [line for name, tests in scores.items() for line in lines(name, tests)]


def test_two_equal_runs_agree_in_all_that_is_decided() -> None:
    first = outcomes_of(TASK, FIRST)
    # Every pair but that of c and d.
    assert replication.agreement(TASK, first, first) == replication.Agreement(5, 5, 5, 0)


def test_signs_and_decisions_are_counted() -> None:
    # b is above a for sure, c below a without being decided, and d is missing.
    second = outcomes_of(TASK, run(a=[0.70, 0.72, 0.71], b=[0.80, 0.83, 0.81], c=[0.90, 0.10, 0.50]))
    found = replication.agreement(TASK, outcomes_of(TASK, FIRST), second)
    assert found == replication.Agreement(decided=3, same=2, confirmed=0, reversed=1)


def test_two_settings_are_too_few() -> None:
    second = outcomes_of(TASK, run(a=[0.7, 0.8, 0.9], b=[0.1, 0.2, 0.3]))
    assert replication.agreement(TASK, outcomes_of(TASK, FIRST), second) == replication.Agreement()


def test_pages_have_the_second_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = store.TaskResults({"samples": {"training": 3}}, {one["key"]: one for one in FIRST}, [])

    def read(folder: Path, name: str, scale: str) -> store.TaskResults | None:
        there = folder == tmp_path or (folder.name == replication.FOLDER and folder.parent.name == "twice")
        return found if scale == "small" and (there or folder.name == "twice") else None

    monkeypatch.setattr(store, "read", read)
    monkeypatch.setattr(tasks, "TASKS", ["played"])
    monkeypatch.setattr(tasks, "find", lambda name: TASK)
    monkeypatch.setattr(page, "_studies", lambda folder: [(TASK, "small")])
    monkeypatch.setattr(which, "_section", lambda *_: iter(["## Played"]))
    said = "Repeated on another machine: of 5 differences between two methods that are decided here, 5 have"
    twice = tmp_path / "twice"
    assert said in which.page(twice).replace("\n", " ")
    assert said in page.page(twice).replace("\n", " ")
    assert "Repeated" not in which.page(tmp_path)
    assert "Repeated" not in page.page(tmp_path)
