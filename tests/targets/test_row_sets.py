"""Rows given as a list, and one matrix of a stack: their fields, their places in the stored array, and their JSON."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt import RowIndices, Rows, Target, TargetError


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ((), r"a list of at least one integer; got \(\)"),
        (5, "a list of at least one integer; got 5"),
        ({5, 9}, "a list of at least one integer; got {"),
        ((5, 5), "must increase; 5 follows 5"),
        ((9, 5), "must increase; 5 follows 9"),
        ((-1,), "an index of a row must be from 0"),
        ((1.0,), "an index of a row must be an integer; got 1.0"),
        ((True,), "an index of a row must be an integer; got True"),
    ],
)
def test_wrong_lists_of_rows_are_refused(numbers: Any, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        RowIndices(numbers)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"rows": RowIndices((2, 6))}, r"row 6 is not among the 6 rows of m\.weight"),
        ({"rows": RowIndices((4,)), "transposed": True}, r"row 4 is not among the 4 rows of m\.weight"),
        ({"index": 0}, r"one of the matrices of a 3-D weight; m\.weight has \(6, 4\)"),
        ({"stored": (3, 6, 4), "index": 3}, r"the index of m\.weight must be from 0 to 2; got 3"),
        ({"stored": (3, 6, 4), "index": True}, r"the index of m\.weight must be an integer; got True"),
        ({"stored": (3, 6, 4), "index": 0, "rows": (0, 1, 3, 1)}, "do not fit the 6 rows"),
        ({"tied": "head.weight"}, "tied names must be a list of dotted paths; got 'head.weight'"),
        ({"tied": ("",)}, r"tied names must be a list of dotted paths; got \(''"),
        ({"tied": ("m.weight",)}, "tied names must be different ones"),
        ({"tied": ("a.weight", "a.weight")}, "tied names must be different ones"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetError, match=why):
        Target(**{"module": "m", "stored": (6, 4), **fields})


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ({}, "must be four integers, or indices; got {}"),
        ({"numbers": [1]}, "must be four integers, or indices; got {'numbers'"),
        ({"indices": [1], "more": 2}, "must be four integers, or indices"),
        ({"indices": "12"}, "must be four integers, or indices"),
        ({"indices": []}, "at least one integer"),
        ({"indices": [3, 1]}, "must increase"),
        ({"indices": [6]}, "row 6 is not among the 6 rows"),
    ],
)
def test_wrong_rows_of_a_file_are_refused(rows: Any, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        Target.from_list(["m", [6, 4], "q", {"rows": rows}])


def test_all_rows_in_a_list_are_the_whole_weight() -> None:
    assert Target("m", (3, 2), rows=RowIndices(range(3))) == Target("m", (3, 2))  # type: ignore[arg-type]


@st.composite
def targets(draw: st.DrawFn) -> Target:
    out, cols, count = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    transposed, stacked = draw(st.booleans()), draw(st.booleans())
    stored = (cols, out) if transposed else (out, cols)
    rows = draw(
        st.one_of(
            st.none(),
            st.sets(st.integers(0, out - 1), min_size=1).map(lambda found: RowIndices(tuple(sorted(found)))),
            st.integers(0, out - 1).map(lambda start: Rows(start, out - start, out)),
        )
    )
    index = draw(st.integers(0, count - 1)) if stacked else None
    tied = draw(st.sampled_from([(), ("head.weight",), ("a.b", "c.d")]))
    return Target(
        "m", (count, *stored) if stacked else stored, rows=rows, transposed=transposed, index=index, tied=tied
    )


@given(targets())
def test_what_is_written_is_selected_and_nothing_else_changes(target: Target) -> None:
    stored = np.zeros(target.stored)
    matrix = 1.0 + np.arange(np.prod(target.shape)).reshape(target.shape)
    target.write(stored, matrix)
    np.testing.assert_array_equal(target.select(stored), matrix)
    assert np.count_nonzero(stored) == matrix.size
    own = stored if target.index is None else stored[target.index]
    whole = own.T if target.transposed else own
    rows = list(range(target.out)) if target.rows is None else target.rows.indices()
    np.testing.assert_array_equal(whole[rows], matrix)
    assert target.shape == (len(rows), whole.shape[1])


@given(targets())
def test_a_target_survives_json(target: Target) -> None:
    assert Target.from_list(json.loads(json.dumps(target.to_list()))) == target
    assert [one.name for one in target.tied_targets()] == list(target.tied)


def test_a_list_of_rows_has_no_view() -> None:
    with pytest.raises(TargetError, match=r"no view of a list of rows, as of m\.weight: use select\(\) and write\(\)"):
        Target("m", (6, 4), rows=RowIndices((1, 3))).block(np.zeros((6, 4)))


def test_labels_tell_targets_apart() -> None:
    stack = (3, 6, 4)
    found = [
        Target("m", (6, 4)), Target("m", (6, 4), rows=Rows(2, 2, 6)), Target("m", (6, 4), rows=RowIndices((4,))),
        Target("m", (6, 4), rows=RowIndices((1, 5))), Target("m", stack, index=2),
        Target("m", stack, rows=Rows(0, 1, 2, 3), index=1),
    ]  # fmt: skip
    assert [target.label.removeprefix("m.weight") for target in found] == [
        "", "[2:4]", "[4]", "[1, …]", "[2]", "[1][0:1]",
    ]  # fmt: skip
