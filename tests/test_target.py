"""Targets by themselves: what is refused, and what their fields say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tnadapt import TargetError
from tnadapt.target import Rows, Target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"module": 1}, r"a target's module must be a string; got 1"),
        ({"layer": None}, r"a target's layer must be a string; got None"),
        ({"parameter": ""}, r"a target's parameter must be a name, such as 'weight'; got ''"),
        ({"role": "query"}, r"a target's role must be one of q, k, v, o, linear, conv; got 'query'"),
        ({"transposed": 1}, r"a target's transposed must be True or False; got 1"),
        ({"stored": (4,)}, r"a target's stored shape must be two to eight sizes; got \(4,\)"),
        ({"stored": (1,) * 9}, r"a target's stored shape must be two to eight sizes"),
        ({"stored": (4, 0)}, "a size of a stored shape must be from 1 to 4611686018427387904; got 0"),
        ({"stored": (4, 4, 3), "transposed": True}, r"weight must be a matrix; a.weight has shape \(4, 4, 3\)"),
        ({"rows": (0, 1, 2)}, r"a target's rows must be \(start, length, stride, count\); got \(0, 1, 2\)"),
        ({"rows": (0, 0, 4, 1)}, "rows of a.weight must be from 1 to"),
        ({"rows": (-1, 1, 4, 1)}, "rows of a.weight must be from 0 to"),
        ({"rows": (3, 2, 4, 1)}, r"rows 3 to 4 of 1 blocks of 4 do not fit the 4 rows of a.weight"),
        ({"rows": (0, 1, 3, 1)}, r"rows 0 to 0 of 1 blocks of 3 do not fit the 4 rows"),
        ({"stored": (4, 6), "transposed": True, "rows": (0, 1, 4, 1)}, r"do not fit the 6 rows of a.weight"),
    ],
)  # fmt: skip
def test_what_is_no_target_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target(**{"module": "a", "stored": (4, 4), **fields})


@pytest.mark.parametrize("size", [2, 8])
def test_stored_shapes_have_two_to_eight_sizes(size: int) -> None:
    assert Target("a", (2, *[1] * (size - 1))).shape == (2, 1)


def test_all_rows_are_no_selection() -> None:
    assert Target("a", (4, 2), rows=Rows(0, 4, 4)).rows is None
    assert Target("a", (4, 2), rows=Rows(0, 2, 2, 2)).rows is None
    assert Target("a", (4, 2), rows=Rows(0, 1, 2, 2)).rows == Rows(0, 1, 2, 2)
    assert Target("a", (4, 2), rows=Rows(1, 1, 2, 2)).rows == Rows(1, 1, 2, 2)
    assert Target("a", (4, 2), rows=Rows(0, 3, 4)).rows == Rows(0, 3, 4)


@pytest.mark.parametrize(
    ("target", "shape"),
    [
        (Target("a", (6, 4)), (6, 4)),
        (Target("a", (4, 6), transposed=True), (6, 4)),
        (Target("a", (6, 4, 3, 3)), (6, 36)),
        (Target("a", (6, 4), rows=Rows(1, 2, 3, 2)), (4, 4)),
        (Target("a", (4, 6), transposed=True, rows=Rows(1, 2, 3, 2)), (4, 4)),
    ],
)
def test_a_target_selects_its_rows_and_writes_into_them(target: Target, shape: tuple[int, int]) -> None:
    assert target.shape == shape
    stored = np.arange(float(np.prod(target.stored))).reshape(target.stored)
    matrix = stored.T if target.transposed else stored.reshape(len(stored), -1)
    rows = range(len(matrix)) if target.rows is None else target.rows.indices()
    np.testing.assert_array_equal(target.select(stored), matrix[rows])
    update = np.random.default_rng(0).normal(size=shape)
    expected = matrix.copy()
    expected[rows] += update
    target.block(stored)[...] += target.like_block(update)
    np.testing.assert_array_equal(matrix, expected)


@pytest.mark.parametrize(
    "target",
    [
        Target("a", (6, 4), "q"),
        Target("", (6, 4), parameter="qkv", rows=Rows(0, 2, 6), layer="3"),
        Target("a.b", (4, 6), "v", transposed=True),
    ],
)
def test_a_list_keeps_all_of_a_target(target: Target) -> None:
    assert Target.from_list(target.to_list()) == target
    assert target.renamed("c").name == f"c.{target.parameter}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("abc", r"a target must be \[module, shape, role\] and at most its settings; got 'abc'"),
        (["a", [1, 1]], "at most its settings"),
        (["a", [1, 1], "q", {}, {}], "at most its settings"),
        (["a", [1, 1], "q", []], "a target's settings must be among layer, parameter, rows, transposed; got"),
        (["a", [1, 1], "q", {"row": 1}], "a target's settings must be among layer, parameter, rows, transposed; got"),
    ],
)
def test_a_list_that_is_no_target_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target.from_list(value)
