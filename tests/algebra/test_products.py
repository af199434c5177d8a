"""CP, Tucker, TT and Kronecker products against TensorLy and NumPy, in every library; gradients; the order of sums."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.products import (
    contracted,
    cp_groups,
    cp_in_groups,
    padded_to,
    rearranged,
    train_cut,
    tucker_in_order,
    tucker_last,
    tucker_with_last,
)
from tnadapt.backends import Backend, get_backend

ONES22, ONES33 = np.ones((2, 2)), np.ones((3, 3))
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@pytest.fixture(autouse=True)
def _numpy_tensorly():
    with tensorly.backend_context("numpy", local_threadsafe=True):
        yield


@pytest.mark.law("products")
@given(SIZES, st.integers(1, 4), st.booleans())
def test_cp_matches_tensorly(sizes: list[int], rank: int, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(size=rank) if weighted else None
    factors = [rng.normal(size=(d, rank)) for d in sizes]
    # TensorLy asks for weights where there is one factor.
    expected = tensorly.cp_to_tensor((np.ones(rank) if weights is None else weights, factors)).reshape(sizes)
    assert relative_error(tna.cp_to_tensor((weights, factors)), expected) < 1e-12
    if weighted:
        # TensorLy's own object goes in as it is.
        assert relative_error(tna.cp_to_tensor(tensorly.cp_tensor.CPTensor((weights, factors))), expected) < 1e-12


@pytest.mark.law("products")
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4), st.booleans()), min_size=1, max_size=5))
def test_tucker_matches_tensorly(modes: list[tuple[int, int, bool]]) -> None:
    rng = np.random.default_rng(0)
    core = rng.normal(size=[r for _, r, _ in modes])
    factors = [rng.normal(size=(d, r)) if present else None for d, r, present in modes]
    dense = [np.eye(r) if f is None else f for f, (_, r, _) in zip(factors, modes, strict=True)]
    expected = tensorly.tucker_to_tensor((core, dense))
    assert relative_error(tna.tucker_to_tensor((core, factors)), expected) < 1e-12
    if len(modes) > 1 and all(f is not None for f in factors):
        theirs = tensorly.tucker_tensor.TuckerTensor((core, factors))
        assert relative_error(tna.tucker_to_tensor(theirs), expected) < 1e-12


@pytest.mark.law("products")
@given(SIZES, st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_tt_matches_tensorly(sizes: list[int], inner: list[int]) -> None:
    rng = np.random.default_rng(0)
    ranks = [1, *inner[: len(sizes) - 1], 1]
    cores = [rng.normal(size=(ranks[m], d, ranks[m + 1])) for m, d in enumerate(sizes)]
    expected = tensorly.tt_to_tensor(cores)
    assert relative_error(tna.tt_to_tensor(cores), expected) < 1e-12
    assert relative_error(tna.tt_to_tensor(tensorly.tt_tensor.TTTensor(cores)), expected) < 1e-12


@pytest.mark.law("products")
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_kronecker_matches_numpy(order: int, count: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    shape = st.lists(st.integers(1, 3), min_size=order, max_size=order)
    arrays = [rng.normal(size=data.draw(shape)) for _ in range(count)]
    product = tna.kronecker(*arrays)
    assert relative_error(product, functools.reduce(np.kron, arrays)) < 1e-12
    for several in (arrays, tuple(arrays), iter(arrays)):
        assert np.array_equal(tna.kronecker(several), product)


@pytest.mark.law("products")
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.sampled_from([None, 0, 3]))
def test_kron_matvec_is_the_product(sizes: list[tuple[int, int]], batch: int | None) -> None:
    rng = np.random.default_rng(0)
    matrices = [rng.normal(size=size) for size in sizes]
    x = rng.normal(size=(math.prod(cols for _, cols in sizes), *([] if batch is None else [batch])))
    assert relative_error(tna.kron_matvec(matrices, x), functools.reduce(np.kron, matrices) @ x) < 1e-12


def cases(rng: np.random.Generator) -> dict[str, tuple[Callable, list[np.ndarray]]]:
    """Name -> (function of arrays, arrays): one product of each kind."""
    return {
        "cp": (lambda w, *f: tna.cp_to_tensor((w, f)), [rng.normal(size=s) for s in ((2,), (3, 2), (4, 2), (2, 2))]),
        "tucker": (
            lambda c, a, b: tna.tucker_to_tensor((c, [a, None, b])),
            [rng.normal(size=s) for s in ((2, 3, 2), (4, 2), (3, 2))],
        ),
        # Of long modes, products are grouped in other ways, with a batch and without.
        "cp, long": (lambda *f: tna.cp_to_tensor((None, f)), [rng.normal(size=(size, 3)) for size in (2, 3, 40, 33)]),
        "cp, long first": (lambda *f: tna.cp_to_tensor((None, f)), [rng.normal(size=(size, 3)) for size in (40, 3, 2)]),
        "tucker, long": (
            lambda c, *f: tna.tucker_to_tensor((c, f)),
            [rng.normal(size=s) for s in ((3, 3, 3, 3), (2, 3), (3, 3), (40, 3), (33, 3))],
        ),
        "tt": (lambda *c: tna.tt_to_tensor(c), [rng.normal(size=s) for s in ((1, 3, 2), (2, 4, 3), (3, 2, 1))]),
        "kronecker": (lambda *a: tna.kronecker(a), [rng.normal(size=s) for s in ((2, 3), (1, 2), (3, 2))]),
        "kron_matvec": (
            lambda a, b, x: tna.kron_matvec([a, b], x),
            [rng.normal(size=s) for s in ((2, 3), (3, 2), (6, 2))],
        ),
    }


@pytest.mark.law("products", "torch-jax-gradients")
@pytest.mark.parametrize("name", cases(np.random.default_rng(0)))
def test_every_library_gives_numpys_value_and_the_exact_gradient(
    backend: Backend, name: str, rng: np.random.Generator
) -> None:
    function, host = cases(rng)[name]
    expected = function(*host)
    arrays = [backend.asarray(array, "float64") for array in host]
    assert relative_error(backend.to_numpy(function(*arrays)), expected) < 1e-12
    target = rng.normal(size=expected.shape)
    weights = backend.asarray(target.reshape(-1), "float64")
    named = {str(i): array for i, array in enumerate(arrays)}
    if "gradient" in backend.lacks(weights):
        return  # BackendContract sees to it that this is so
    found = backend.gradient(lambda a: backend.sum(backend.flatten(function(*a.values())) * weights, axis=0), named)
    for i, array in enumerate(host):
        # A product is linear in each of its arrays.
        way = rng.normal(size=array.shape)
        exact = np.sum(target * function(*host[:i], way, *host[i + 1 :]))
        got = np.sum(backend.to_numpy(found[str(i)]) * way)
        assert abs(got - exact) < 1e-11 * max(1.0, abs(exact))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("at least one factor", lambda: tna.cp_to_tensor((None, []))),
        (r"factor 1 has shape \(3, 3\); expected \(size, 2\)", lambda: tna.cp_to_tensor((None, [ONES22, ONES33]))),
        (r"weights have shape \(3,\)", lambda: tna.cp_to_tensor((np.ones(3), [np.ones((2, 2))]))),
        ("needs 2 factors; got 1", lambda: tna.tucker_to_tensor((np.ones((2, 2)), [np.ones((2, 2))]))),
        (r"expected \(size, 3\)", lambda: tna.tucker_to_tensor((np.ones((2, 3)), [None, np.ones((2, 2))]))),
        (r"core 0 has shape \(2, 3, 1\); expected \(1, size, 1\)", lambda: tna.tt_to_tensor([np.ones((2, 3, 1))])),
        (r"core 1 has shape \(3, 3\); expected \(2, size", lambda: tna.tt_to_tensor([ONES22[None], ONES33])),
        (r"core 1 has shape", lambda: tna.tt_to_tensor([np.ones((1, 2, 2)), np.ones((2, 2, 2))])),
        ("at least one core", lambda: tna.tt_to_tensor([])),
        ("a Kronecker product needs at least one array; got none", lambda: tna.kronecker([])),
        (r"same number of axes; got shapes \(2,\), \(2, 2\)", lambda: tna.kronecker([np.ones(2), np.ones((2, 2))])),
        ("at least one matrix", lambda: tna.kron_matvec([], np.ones(2))),
        (r"matrix 0 of kron_matvec has shape \(2,\)", lambda: tna.kron_matvec([np.ones(2)], np.ones(2))),
        (r"a CP tensor takes \(weights, factors\); got 3", lambda: tna.cp_to_tensor(3)),
        (r"a CP tensor takes \(weights, factors\); got 2", lambda: tna.cp_to_tensor((None, 2))),
        ("; got 1 parts", lambda: tna.cp_to_tensor(([ONES22],))),
        ("; got 3 parts", lambda: tna.tucker_to_tensor((ONES22, [None], [None]))),
        ("a tensor train takes a list of cores; got 2.0", lambda: tna.tt_to_tensor(2.0)),
        ("a Kronecker product takes arrays, or a list of arrays; got None", lambda: tna.kronecker(None)),
        ("a Kronecker product needs at least one array; got none", lambda: tna.kronecker()),
        ("arrays of at most 32 axes; got 33", lambda: tna.kronecker([np.ones([1] * 33)] * 2)),
        (r"x has shape \(3,\); expected \(4,\)", lambda: tna.kron_matvec([np.ones((2, 2))] * 2, np.ones(3))),
    ],
)  # fmt: skip
def test_bad_input(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(tna.ShapeError, match=message):
        call()


def test_mixed_dtypes_and_no_arrays() -> None:
    with pytest.raises(tna.BackendError, match="two dtypes in one call: float64 and float32"):
        tna.kronecker([np.ones(2), np.ones(2, np.float32)])
    with pytest.raises(tna.BackendError, match="got list"):
        tna.kronecker([[1.0, 2.0]])
    with pytest.raises(tna.BackendError, match=r"one of arrays must be an array of one of numpy.*; got int"):
        tna.kronecker(np.ones(2), 3)


# -- Rearrangement of Kronecker products to outer products -------------------------------------------------------------


NUMPY = get_backend(np.zeros(1))


@st.composite
def splits(draw: st.DrawFn) -> list[np.ndarray]:
    order = draw(st.integers(1, 4))
    size = st.integers(1, 3)
    sizes = draw(st.lists(st.tuples(*[size] * order), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [rng.normal(size=one) for one in sizes]


@given(splits())
def test_a_kronecker_product_rearranged_is_an_outer_product(tensors: list[np.ndarray]) -> None:
    product = functools.reduce(np.kron, tensors)
    outer = functools.reduce(np.multiply.outer, [tensor.reshape(-1) for tensor in tensors])
    np.testing.assert_allclose(rearranged(NUMPY, product, [t.shape for t in tensors]), outer, rtol=1e-12)


@given(splits(), st.data())
def test_contracting_is_the_sum_over_all_other_splits(tensors: list[np.ndarray], data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    sizes = [tensor.size for tensor in tensors]
    tensor = rng.normal(size=sizes)
    kept = data.draw(st.integers(0, len(tensors) - 1))
    given = [None if k == kept else one for k, one in enumerate(tensors)]
    letters = "abcdefgh"[: len(sizes)]
    inputs = ",".join(letters[k] for k in range(len(sizes)) if k != kept)
    vectors = [one.reshape(-1) for k, one in enumerate(tensors) if k != kept]
    expected = np.einsum(f"{letters}{',' if vectors else ''}{inputs}->{letters[kept]}", tensor, *vectors)
    found = contracted(NUMPY, tensor, given, tensors[kept].shape)
    np.testing.assert_allclose(found, expected.reshape(tensors[kept].shape), rtol=1e-10, atol=1e-10)


def test_many_modes_and_padding_at_the_end_of_each() -> None:
    np.testing.assert_array_equal(padded_to(NUMPY, np.ones((2, 1)), (3, 2)), [[1, 0], [1, 0], [0, 0]])
    # 32 modes of three splits have no more axes than NumPy allows.
    sizes = [(1,) * 30 + (2, 1), (1,) * 31 + (2,), (1,) * 30 + (1, 2)]
    assert rearranged(NUMPY, np.arange(8.0).reshape((1,) * 30 + (2, 4)), sizes).shape == (2, 2, 2)


# -- Which modes are joined last: the choice by shapes, and that it changes nothing but the time -----------------------


@pytest.mark.parametrize(
    ("choose", "sizes", "ranks", "expected"),
    [
        (cp_groups, (5, 7), 8, (0, 1)),
        (cp_groups, (2000, 40, 10), 8, (0, 1)),
        (cp_groups, (10, 40, 2000), 8, (0, 2)),
        # A long mode in the middle: a batch, and the one long operand is not expanded.
        (cp_groups, (10, 2000, 40), 8, (1, 2)),
        # Few columns are no batch.
        (cp_groups, (100, 1000, 10), 8, (0, 1)),
        (cp_groups, (16, 16, 16, 16, 16), 8, (1, 3)),
        (cp_groups, (0, 3, 2), 8, (0, 2)),
        (tucker_last, (64, 64, 64), (4, 4, 4), 2),
        (tucker_last, (10, 2000, 40), (4, 4, 4), 1),
        (tucker_last, (2000, 10, 40), (4, 4, 4), 0),
        (tucker_last, (100, 1000, 10), (4, 4, 4), 0),
        # The small rank, not only the long mode.
        (tucker_last, (30, 40), (2, 39), 0),
        (tucker_last, (0, 3), (2, 3), 1),
        (train_cut, (8, 8, 8, 8), (4, 4, 4), 2),
        (train_cut, (8, 8, 8), (4, 4), 2),
        (train_cut, (2000, 10, 10), (4, 4), 1),
        # A thin bond away from the middle saves more arithmetic than a balanced cut.
        (train_cut, (8, 8, 8, 8), (4, 50, 2), 3),
    ],
)
def test_the_modes_that_are_joined_last(choose: Callable, sizes: tuple[int, ...], ranks: Any, expected: object) -> None:
    assert choose(sizes, ranks) == expected


@pytest.mark.law("products")
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=5))
def test_every_order_gives_the_same_tensor(modes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, modes[0][1])) for size, _ in modes]
    expected = tensorly.cp_to_tensor((None, factors))
    for first, second in itertools.combinations(range(len(modes)), 2):
        assert relative_error(cp_in_groups(NUMPY, factors, (first, second)), expected) < 1e-12
    core = rng.normal(size=[rank for _, rank in modes])
    factors = [rng.normal(size=mode) for mode in modes]
    expected = tucker_in_order(NUMPY, core, factors)
    for last in range(len(modes)):
        assert relative_error(tucker_with_last(NUMPY, core, factors, last), expected) < 1e-12


def test_the_result_is_in_c_order() -> None:
    torch = pytest.importorskip("torch")
    factors = [torch.ones(size, 8, requires_grad=True) for size in (10, 200, 40)]
    for found in (tna.cp_to_tensor((None, factors)), tna.tucker_to_tensor((torch.ones(8, 8, 8), factors))):
        assert found.is_contiguous()
    assert tna.cp_to_tensor((None, [factor.detach().numpy() for factor in factors])).flags.c_contiguous


def test_modes_without_elements() -> None:
    factors = [np.ones((size, 2)) for size in (3, 0, 40)]
    assert tna.cp_to_tensor((None, factors)).shape == (3, 0, 40)
    assert tna.tucker_to_tensor((np.ones((2, 2, 2)), factors)).shape == (3, 0, 40)
    assert math.prod(tna.cp_to_tensor((None, factors[::-1])).shape) == 0
