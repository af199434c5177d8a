"""Layout of weights in groups: every element occurs once, and weights that straddle groups stay in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.layout import make_layout
from tnadapt.testing import _reference as reference
from tnadapt.testing.strategies import configs, shapes


@given(st.data())
def test_pieces_are_the_reference_positions(data: st.DataObject) -> None:
    weights = data.draw(shapes())
    config = data.draw(configs(weights))
    layers = [data.draw(st.integers(0, 1)) for _ in weights]
    layout = make_layout(config.groups, weights, layers)
    expected = reference.positions(config, weights, layers)
    assert layout.num_groups == len(expected)
    starts = np.cumsum([0, *(rows * cols for rows, cols in weights)])
    for group, where in enumerate(expected):
        assert layout.group_size(group) == len(where)
        pieces = layout.of_group(group)
        found = [np.arange(p.length) + starts[p.weight] + p.weight_start for p in pieces]
        assert np.array_equal(np.concatenate(found), where)
        assert [p.group_start for p in pieces] == np.cumsum([0, *(p.length for p in pieces)])[:-1].tolist()
        columns = [weights[p.weight][1] for p in pieces]
        assert layout.columns(group) == np.gcd.reduce(columns)
    for weight, (rows, cols) in enumerate(weights):
        pieces = layout.of_weight(weight)
        assert sum(p.length for p in pieces) == rows * cols
        for p in pieces:
            assert np.array_equal(
                expected[p.group][p.group_start : p.group_start + p.length],
                starts[weight] + p.weight_start + np.arange(p.length),
            )
    start = data.draw(st.integers(0, layout.size - 1))
    stop = data.draw(st.integers(start + 1, layout.size))
    found = [expected[p.group][p.group_start : p.group_start + p.length] for p in layout.of_slice(start, stop)]
    assert np.array_equal(np.concatenate(found), np.arange(start, stop))
    assert [size for _, count, size in layout.same_size() for _ in range(count)] == [len(w) for w in expected]


def test_a_weight_may_straddle_two_groups() -> None:
    layout = make_layout(2, [(2, 3), (2, 2)])
    assert [piece.group for piece in layout.of_weight(0)] == [0, 1]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 21), (21, 21)])
def test_a_slice_that_leaves_the_vector_is_refused(start: int, stop: int) -> None:
    layout = make_layout(2, [(4, 3), (2, 4)], None)
    assert not layout.of_slice(20, 20)
    with pytest.raises(tna.ShapeError, match=f"no slice {start}:{stop} of a vector of 20 elements"):
        layout.of_slice(start, stop)


def test_groups_that_would_be_empty_are_left_out() -> None:
    # ceil(10 / 7) = 2 elements a group: five groups use up the vector.
    assert make_layout(7, [(2, 5)]).num_groups == 5


def test_layers_group_by_key_in_order_of_first_appearance() -> None:
    layout = make_layout("layer", [(1, 1), (1, 2), (1, 3), (1, 4)], layers=["b", "a", "b", "a"])
    assert [[p.weight for p in layout.of_group(g)] for g in range(2)] == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (tna.ConfigError, "more than the 6 elements", (7, [(2, 3)])),
        (tna.ConfigError, "needs layers", ("layer", [(2, 3)])),
        (tna.ConfigError, "2 keys for 1 weights", ("layer", [(2, 3)], [0, 0])),
        (tna.ConfigError, "exactly once", (((0,), (0,)), [(2, 3)])),
        (tna.ConfigError, "exactly once", (((0,),), [(2, 3), (2, 3)])),
        (tna.ConfigError, "exactly once", (((1,),), [(2, 3)])),
        (tna.ShapeError, "empty", ("weight", [])),
        (tna.ShapeError, r"shapes\[0\] is \(2, 3, 4\)", ("weight", [(2, 3, 4)])),
        (tna.ShapeError, r"shapes\[1\] is \(0, 3\)", ("weight", [(2, 3), (0, 3)])),
        (tna.ShapeError, "integers", ("weight", [(2.0, 3)])),
        (tna.ShapeError, "integers", ("weight", [3])),
    ],
)
def test_bad_input(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        make_layout(*arguments)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 11)])
def test_a_slice_out_of_the_vector_is_refused(start: int, stop: int) -> None:
    layout = make_layout(2, [(2, 3), (2, 2)])
    with pytest.raises(tna.ShapeError, match=f"no slice {start}:{stop} of a vector of 10 elements"):
        layout.of_slice(start, stop)
    assert layout.of_slice(4, 4) == []
    assert sum(piece.length for piece in layout.of_slice(0, 10)) == 10
