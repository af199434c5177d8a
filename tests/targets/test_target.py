"""Targets: fields are validated, and blocks are views of the stored weight."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt import Rows, Target, TargetError


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"module": 3}, "module must be a string; got 3"),
        ({"parameter": None}, "parameter must be a string; got None"),
        ({"layer": 0}, "layer must be a string; got 0"),
        ({"parameter": ""}, "parameter must be a name, such as 'weight'; got ''"),
        ({"role": "query"}, "role must be one of q, k, v, o, linear, conv, embedding; got 'query'"),
        ({"role": None}, "role must be one of q, k, v, o, linear, conv, embedding; got None"),
        ({"transposed": 1}, "transposed must be True or False; got 1"),
        ({"stored": 6}, "stored shape must be two to eight sizes; got 6"),
        ({"stored": "64"}, "stored shape must be two to eight sizes; got '64'"),
        ({"stored": {6, 4}}, "stored shape must be two to eight sizes; got {"),
        ({"stored": ()}, r"stored shape must be two to eight sizes; got \(\)"),
        ({"stored": (6,)}, r"stored shape must be two to eight sizes; got \(6,\)"),
        ({"stored": [1] * 9}, r"stored shape must be two to eight sizes; got \[1, 1, "),
        ({"stored": (6, 0)}, "a size of a stored shape must be from 1 to 4611686018427387904; got 0"),
        ({"stored": (6, 2**62 + 1)}, "a size of a stored shape must be from 1 to 4611686018427387904; got 46"),
        ({"stored": (6, 4.0)}, "a size of a stored shape must be an integer; got 4.0"),
        ({"stored": (6, 4, 1), "transposed": True}, r"weight must be a matrix; m\.weight has shape \(6, 4, 1\)"),
        ({"rows": 3}, r"rows must be \(start, length, stride, count\); got 3"),
        ({"rows": {0, 1, 2, 6}}, r"rows must be \(start, length, stride, count\); got {"),
        ({"rows": (0, 3, 6)}, r"rows must be \(start, length, stride, count\); got \(0, 3, 6\)"),
        ({"rows": (0, 1, 6, 1, 1)}, r"rows must be \(start, length, stride, count\); got \(0, 1, 6, 1, 1\)"),
        ({"rows": (-1, 3, 6, 1)}, r"rows of m\.weight must be from 0 to 4611686018427387904; got -1"),
        ({"rows": (0, 0, 6, 1)}, r"rows of m\.weight must be from 1 to 4611686018427387904; got 0"),
        ({"rows": (0, 1, 0, 1)}, r"rows of m\.weight must be from 1 to 4611686018427387904; got 0"),
        ({"rows": (0, 1, 6, 0)}, r"rows of m\.weight must be from 1 to 4611686018427387904; got 0"),
        ({"rows": (0, 1.0, 6, 1)}, r"rows of m\.weight must be an integer; got 1\.0"),
        ({"rows": (4, 3, 6, 1)}, r"rows 4 to 6 of 1 blocks of 6 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 3, 1)}, r"rows 0 to 0 of 1 blocks of 3 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 4, 2)}, r"rows 0 to 0 of 2 blocks of 4 do not fit the 6 rows of m\.weight"),
        ({"rows": (0, 1, 6, 1), "transposed": True}, r"do not fit the 4 rows of m\.weight"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(TargetError, match=why):
        Target(**{"module": "m", "stored": (6, 4), **fields})


@pytest.mark.parametrize("stored", [(1, 1), [6, 4], (2, 1, 1, 1, 1, 1, 1, 3), (np.int64(6), 2**62)])
def test_two_to_eight_sizes_are_a_stored_shape(stored: Any) -> None:
    found = Target("m", stored).stored
    assert found == tuple(stored)
    assert all(type(size) is int for size in found)


@st.composite
def views(draw: st.DrawFn) -> tuple[Target, list[int]]:
    """A target, and the rows that it is to have by the definition."""
    count, stride = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    start = draw(st.integers(0, stride - 1))
    length = draw(st.integers(1, stride - start))
    rest = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    out, transposed = count * stride, draw(st.booleans())
    stored = (rest[0], out) if transposed else (out, *rest)
    rows = [block * stride + row for block, row in itertools.product(range(count), range(start, start + length))]
    return Target("m", stored, "q", rows=Rows(start, length, stride, count), transposed=transposed), rows


@given(views())
def test_a_block_is_the_rows_of_the_stored_weight(view: tuple[Target, list[int]]) -> None:
    target, rows = view
    stored = np.arange(np.prod(target.stored), dtype=float).reshape(target.stored)
    matrix = stored.T.copy() if target.transposed else stored.reshape(target.stored[0], -1).copy()
    block = target.block(stored)
    assert np.array_equal(block.reshape(-1, block.shape[-1]), matrix[rows])
    assert target.shape == matrix[rows].shape
    assert np.array_equal(target.like_block(matrix[rows]), block)
    # Rows that are all of them are none in particular.
    assert (target.rows is None) == (rows == list(range(len(matrix))))
    assert target.rows is None or target.rows.indices() == rows
    block[...] = -1.0
    matrix[rows] = -1.0
    assert np.array_equal(stored.T if target.transposed else stored.reshape(matrix.shape), matrix)
    assert target.renamed("other.n").name == "other.n.weight"
    assert Target("", target.stored).name == "weight"


@pytest.mark.parametrize(
    "target",
    [
        Target("a", (6, 4), "q"),
        Target("", (6, 4), parameter="qkv", rows=Rows(0, 2, 6), layer="3"),
        Target("a.b", (4, 6), "v", transposed=True),
        Target("a", (6, 2, 3, 3), "conv", groups=3),
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
        (
            ["a", [1, 1], "q", []],
            "a target's settings must be among groups, index, layer, parameter, rows, tied, transposed; got",
        ),
        (
            ["a", [1, 1], "q", {"row": 1}],
            "a target's settings must be among groups, index, layer, parameter, rows, tied, transposed; got",
        ),
    ],
)
def test_a_list_that_is_no_target_is_refused(value: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Target.from_list(value)


def test_groups_are_those_of_a_convolution() -> None:
    target = Target("a", (6, 2, 3), "conv", groups=3)
    assert target.to_list() == ["a", [6, 2, 3], "conv", {"groups": 3}]
    assert "groups=3" in repr(target)
    assert "groups" not in repr(Target("a", (6, 2, 3), "conv"))
    for stored, groups in (((6, 2), 2), ((6, 2, 3), 4)):
        with pytest.raises(TargetError, match=rf"divide them; a.weight has shape .*, and groups={groups}"):
            Target("a", stored, groups=groups)
    for groups in (0, 1.5, True, "2"):
        with pytest.raises(TargetError, match=r"the groups of a\.weight must be"):
            Target("a", (6, 2, 3), groups=groups)  # type: ignore[arg-type]
