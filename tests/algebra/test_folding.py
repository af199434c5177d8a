"""Folds of weights: sizes by integer arithmetic, and slices as one matrix product."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.folding import balanced_factors, balanced_shape, best_cut, boxes, kronecker_sizes
from tnadapt.algebra.formats import make_format
from tnadapt.algebra.network import Network
from tnadapt.backends import Backend

ORDERS = st.integers(1, 4)
Shape = tuple[int, ...]

# -- Sizes by integer arithmetic, and the boxes that cover a slice -----------------------------------------------------


@given(st.integers(1, 10**15) | st.builds(lambda d: d**6 + d % 2, st.integers(1, 300)), st.integers(1, 12))
@example(size=64, order=3)  # 64 ** (1 / 3) is 3.9999999999999996
@example(size=1, order=1)
@example(size=3**39, order=13)
def test_the_hypercube_is_the_smallest(size: int, order: int) -> None:
    shape = tna.hypercube_shape(size, order)
    d = shape[0]
    assert shape == (d,) * order
    assert d**order >= size
    assert d == 1 or (d - 1) ** order < size


@given(st.integers(1, 10**6), st.integers(1, 6))
def test_balanced_is_the_least_waste_of_its_kind(size: int, order: int) -> None:
    shape = balanced_shape(size, order)
    d = tna.hypercube_shape(size, order)[0]
    assert set(shape) <= {d, d - 1}
    assert list(shape) == sorted(shape, reverse=True)
    choices = [d ** (order - k) * (d - 1) ** k for k in range(order + 1)]
    assert math.prod(shape) == min(choice for choice in choices if choice >= size)


@given(st.integers(1, 5000), st.integers(1, 4))
def test_balanced_factors_are_exact_and_as_equal_as_can_be(size: int, parts: int) -> None:
    found = balanced_factors(size, parts)
    assert math.prod(found) == size
    assert list(found) == sorted(found)
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    if len(divisors) ** parts < 20_000:
        every = itertools.combinations_with_replacement(divisors, parts)
        assert sum(found) == min(sum(f) for f in every if math.prod(f) == size)


def test_the_specs_examples() -> None:
    assert balanced_factors(768, 2) == (24, 32)
    assert kronecker_sizes((768, 768), 2, 8) == [(8, 8), (96, 96)]
    assert kronecker_sizes((3763, 3763), 3, 6) == [(6, 6), (6, 6), (105, 105)]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 9))
def test_kronecker_sizes_cover(sizes: list[int], splits: int, f: int) -> None:
    for split_size in (f, "balanced", tuple(f + mode for mode in range(len(sizes)))):
        found = kronecker_sizes(sizes, splits, split_size)
        assert len(found) == splits
        for mode, d in enumerate(sizes):
            product = math.prod(split[mode] for split in found)
            assert product == d if split_size == "balanced" else product >= d


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.data())
def test_boxes_hold_the_slice_in_order_and_little_else(sizes: list[int], data: st.DataObject) -> None:
    n = math.prod(sizes)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    vec = np.arange(n).reshape(sizes)
    found = boxes(sizes, start, stop)
    assert len(found) <= 2 * len(sizes) - 1
    pieces = [vec[tuple(slice(lo, hi) for lo, hi in box.ranges)].reshape(-1) for box in found]
    for box, piece in zip(found, pieces, strict=True):
        # A box is one run of the vector.
        assert np.array_equal(piece, np.arange(box.start, box.start + len(piece)))
    joined = np.concatenate(pieces)
    assert np.array_equal(joined, np.arange(joined[0], joined[-1] + 1))
    assert joined[0] <= start
    assert joined[-1] >= stop - 1
    assert len(joined) <= 1.25 * (stop - start)


def test_boxes_of_a_large_tensor() -> None:
    found = boxes((64,) * 5, 0, 1 << 24)
    assert found == [((*((0, 1),), *((0, 64),) * 4), 0)]
    # Two elements on either side of a row's edge are two elements, not two rows.
    across = boxes((64,) * 5, (1 << 24) - 1, (1 << 24) + 1)
    assert [math.prod(hi - lo for lo, hi in box.ranges) for box in across] == [1, 1]


@given(st.integers(1, 40), st.integers(1, 4))
@example(size=5, order=2)
def test_to_hypercube_and_back(backend: Backend, size: int, order: int) -> None:
    vec = np.arange(1.0, size + 1.0)
    tensor = tna.to_hypercube(backend.asarray(vec, "float32"), order)
    host = backend.to_numpy(tensor)
    assert host.shape == tna.hypercube_shape(size, order)
    assert np.array_equal(host.reshape(-1)[:size], vec)
    assert not host.reshape(-1)[size:].any()
    assert np.array_equal(backend.to_numpy(tna.from_hypercube(tensor, size)), vec)


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4), ORDERS)
def test_several_arrays_are_one_vector_in_a_hypercube(backend: Backend, shapes: list[Shape], order: int) -> None:
    hosts = [np.random.default_rng(0).normal(size=shape) for shape in shapes]
    long = np.concatenate([host.reshape(-1) for host in hosts])
    arrays = [backend.asarray(host, "float64") for host in hosts]
    tensor = tna.to_hypercube(arrays, order)
    assert tensor.shape == tna.hypercube_shape(shapes, order) == tna.hypercube_shape(arrays, order)
    assert np.array_equal(backend.to_numpy(tensor).reshape(-1)[: len(long)], long)
    for like in (shapes, arrays):
        again = tna.from_hypercube(tensor, like)
        assert all(np.array_equal(backend.to_numpy(a), b) for a, b in zip(again, hosts, strict=True))
    # A single one is no list.
    only = tna.from_hypercube(tna.to_hypercube(arrays[0], order), shapes[0])
    assert np.array_equal(backend.to_numpy(only), hosts[0])


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("size must be at least 1", lambda: tna.hypercube_shape(0, 1)),
        ("size must be at least 1", lambda: tna.hypercube_shape([(2, 3), (0, 2)], 2)),
        ("order must be from 1", lambda: tna.hypercube_shape(1, 0)),
        ("size must be an integer; got 'weights'", lambda: tna.hypercube_shape("weights", 2)),
        ("size is an empty sequence; expected a number of elements, a shape", lambda: tna.hypercube_shape([], 2)),
        ("size must be an integer; got 2.5", lambda: tna.from_hypercube(np.zeros((3, 3)), (2, 2.5))),
        ("cannot take 10", lambda: tna.from_hypercube(np.zeros((3, 3)), 10)),
        ("cannot take 10", lambda: tna.from_hypercube(np.zeros((3, 3)), [(2, 3), (2, 2)])),
        (r"x must have one or more elements; got \[\(0, 2\)\]", lambda: tna.to_hypercube(np.zeros((0, 2)), 2)),
        (r"x must have one or more elements; got \[\]", lambda: tna.to_hypercube([], 2)),
        (
            r"order 30 for 10 elements has 2\^30 = 1,073,741,824, nearly .*: use a smaller order, such as 4",
            lambda: tna.to_hypercube(np.ones(10), 30),
        ),
        (r"3\^17 = 129,140,163, nearly .*, such as 11", lambda: tna.to_hypercube(np.ones((1 << 17) + 1, np.int8), 17)),
    ],
)
def test_bad_sizes(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(tna.ShapeError, match=message):
        call()


def test_a_hypercube_may_be_padding_up_to_a_limit() -> None:
    assert tna.to_hypercube(np.ones(2, np.int8), 24).size == 1 << 24
    assert tna.to_hypercube(np.ones(1 << 20, np.int8), 26).size == 1 << 26
    for count, order in ((2, 25), (1 << 20, 27)):
        with pytest.raises(tna.ShapeError, match="nearly all of them zeros"):
            tna.to_hypercube(np.ones(count, np.int8), order)


def test_bad_input() -> None:
    with pytest.raises(tna.BackendError, match="x must be an array of numbers or a sequence of arrays"):
        tna.to_hypercube("weights", 2)
    with pytest.raises(tna.BackendError, match="arrays of two dtypes in one call: float64 and float32"):
        tna.to_hypercube([np.zeros(2), np.zeros(2, np.float32)], 2)
    for split_size in (0, (2, 0), (2,), (2, 2, 2)):
        with pytest.raises(tna.ConfigError, match="split_size"):
            kronecker_sizes((4, 4), 2, split_size)
    # Bounds are accepted, and values beyond them are refused.
    assert tna.hypercube_shape(2**1024, 32) == (2**32,) * 32
    for size, order, expected in (
        (2**1024 + 1, 32, r"^size must be at most [\d,]+; got "),
        (5, 33, "^order must be from 1 to 32; got 33$"),
    ):
        with pytest.raises(tna.ShapeError, match=expected):
            tna.hypercube_shape(size, order)
    assert kronecker_sizes((4, 4), 2, 2**62) == [(2**62, 2**62), (1, 1)]
    with pytest.raises(tna.ConfigError, match=f"^split_size must be at most {2**62:,}; got {2**62 + 1}$"):
        kronecker_sizes((4, 4), 2, 2**62 + 1)
    assert balanced_factors(1, 32) == (1,) * 32
    with pytest.raises(tna.ShapeError, match=r"^parts must be from 1 to 32; got 33$"):
        balanced_factors(1, 33)
    assert balanced_factors(2**44, 2) == (2**22, 2**22)
    with pytest.raises(tna.ShapeError, match=r"^17592186044417 is too large to be factored evenly; give split_size "):
        balanced_factors(2**44 + 1, 2)


# -- Slices as one matrix product: the choice of the unfolding, and the values -----------------------------------------


SIZES = st.lists(st.integers(1, 6), min_size=2, max_size=5)


@pytest.mark.law("update-slice")
@given(SIZES, st.data())
def test_a_cut_holds_the_slice_and_not_much_more(sizes: list[int], data: st.DataObject) -> None:
    size = math.prod(sizes)
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    ranks = data.draw(st.lists(st.none() | st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    cut = best_cut(sizes, start, stop, lambda modes: ranks[modes])
    # How many elements each unfolding would have to form: whole rows, or a part of one row.
    formed = {}
    for modes in range(1, len(sizes)):
        if ranks[modes] is not None:
            length = math.prod(sizes[modes:])
            rows = (stop - 1) // length - start // length + 1
            formed[modes] = rows * length if rows > 1 else stop - start
    if cut is None:
        assert all(elements > 1.25 * (stop - start) for elements in formed.values())
        return
    assert 1 <= cut.modes < len(sizes)
    assert ranks[cut.modes] is not None
    whole = np.arange(size).reshape(math.prod(sizes[: cut.modes]), -1)
    part = whole[slice(*cut.rows), slice(*cut.cols)].reshape(-1)
    assert part[0] == cut.start
    assert part.tolist() == list(range(cut.start, cut.start + part.size))
    assert part[start - cut.start : stop - cut.start].tolist() == list(range(start, stop))
    assert part.size == formed[cut.modes] <= 1.25 * (stop - start)


def test_a_weight_of_a_long_group_is_one_product() -> None:
    # Of no order do its elements fill boxes; in each they are a run of rows of some unfolding, up to 7 % more.
    n = 4096 * 4096
    for order, start in itertools.product((2, 3, 4, 5), (0, 7 * n, 7 * n + 12345, 63 * n)):
        network = Network(tna.Config(rank=8, groups=1, fold="hypercube", order=order), 64 * n)
        cut = best_cut(network.sizes, start, start + n, network.splits[0].inner)
        assert cut is not None
        assert (cut.rows[1] - cut.rows[0]) * (cut.cols[1] - cut.cols[0]) <= 1.07 * n


def test_no_cut_where_none_is_near() -> None:
    # Two elements on either side of a row's end: each row is far longer.
    assert best_cut((4, 1000), 999, 1001, lambda modes: 1) is None
    assert best_cut((1000,), 0, 5, lambda modes: 1) is None
    assert best_cut((4, 10), 0, 40, lambda modes: None) is None


def test_the_core_goes_where_it_is_contracted_with_more() -> None:
    split = make_format("tucker", (4, 5, 6, 7), (3, 4, 2, 2))
    assert [split.inner(modes) for modes in (1, 2, 3)] == [3, 4, 2]
    # A mode without a factor can lie with the core only.
    split = make_format("tucker", (4, 5, 6, 7), (3, None, 2, 2))
    assert [split.inner(modes) for modes in (1, 2, 3)] == [3, 4, 2]
    split = make_format("tucker", (4, 5, 6, 7), (None, 3, None, 2))
    assert [split.inner(modes) for modes in (1, 2, 3)] == [None, None, 2]


@pytest.mark.law("precision")
def test_half_precision_keeps_its_bits_where_the_scale_is_small() -> None:
    # 1e-4 times a factor of 1e-3 is no float16 of any precision; the product of both halves is.
    config = tna.Config(rank=1, groups=1, fold="hypercube", alpha=1e-4)
    plan = tna.UpdatePlan(config, [(4, 4)])
    values = dict(zip(plan.param_shapes, (3e-3, 3e4), strict=True))
    params = {name: np.full(shape, values[name], np.float16) for name, shape in plan.param_shapes.items()}
    found = plan.deltas(params)[0].astype(np.float64)
    exact = float(np.float16(3e-3)) * float(np.float16(3e4)) * plan.config.scale
    assert np.max(np.abs(found / exact - 1)) < 2e-3
