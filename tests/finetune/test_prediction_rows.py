"""Rows of predictions next to the columns of the data."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st

from tnadapt.finetune._prediction import prediction_rows
from tnadapt.finetune.data import Table

names = st.sampled_from(["prediction", "score", "prediction_2", "score_2", "score_3", "id"])


@given(columns=st.lists(names, unique=True))
def test_no_column_is_lost(columns: list[str]) -> None:
    table = Table("a", "a", {name: [f"{name} 0", f"{name} 1"] for name in columns})
    answers = [{"prediction": place, "score": place / 2} for place in range(2)]
    rows = prediction_rows(table, ["a", "b"], answers)
    for place, row in enumerate(rows):
        assert list(row)[:-2] == columns
        assert all(row[name] == f"{name} {place}" for name in columns)
        # Both get the same ending, so that it is clear which score is whose.
        assert list(row.values())[-2:] == [place, place / 2]
        assert len({name.removeprefix(key) for name, key in zip(list(row)[-2:], answers[0], strict=True)}) == 1


def test_values_are_those_that_json_has_and_others_are_left_out() -> None:
    columns: dict[str, Any] = {
        "day": [datetime.date(2024, 1, 2)],
        "time": [datetime.datetime(2024, 1, 2, 3, 4, 5)],
        "numbers": [[1, float("nan"), None, True]],
        "messages": [[{"role": "user", "content": "é"}]],
        "bytes": [b"\0"],
        "inside": [[{"picture": object()}]],
    }
    (row,) = prediction_rows(Table("a", "a", columns), ["a"], [{"prediction": float("inf")}])
    assert row == {
        "day": "2024-01-02",
        "time": "2024-01-02T03:04:05",
        "numbers": [1, None, None, True],
        "messages": [{"role": "user", "content": "é"}],
        "prediction": None,
    }
    json.dumps(row, allow_nan=False)


def test_columns_that_are_decoded_are_not_read() -> None:
    class Columns(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            assert name != "sound"
            return super().__getitem__(name)

    table = Table("a", "a", Columns(text=["a", "b"], sound=["", ""]), opaque=("sound",))
    # Fewer samples than rows: the first ones.
    assert prediction_rows(table, ["a"], [{"prediction": 1}]) == [{"text": "a", "prediction": 1}]


def test_images_have_their_path_or_place() -> None:
    answers = [{"prediction": "x"}] * 2
    rows = prediction_rows(None, [Path("a.png"), object()], answers)
    assert [row["image"] for row in rows] == ["a.png", 1]
