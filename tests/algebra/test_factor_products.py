"""Every order of contraction gives the tensor of the reference implementation, in every library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.products import (
    cp_in_groups,
    khatri_rao,
    khatri_rao_of_rows,
    tucker_in_order,
    tucker_with_last,
)
from tnadapt.backends import Backend, load_backend

NUMPY = load_backend("numpy")
SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def plain_cp(factors: list[np.ndarray]) -> np.ndarray:
    tensor = np.zeros([len(factor) for factor in factors])
    for columns in zip(*(factor.T for factor in factors), strict=True):
        term = np.ones(())
        for column in columns:
            term = np.multiply.outer(term, column)
        tensor += term
    return tensor


@pytest.mark.law("products")
@given(SIZES, st.integers(1, 4))
def test_every_grouping_is_the_sum_of_outer_products(sizes: list[int], rank: int) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, rank)) for size in sizes]
    expected = plain_cp(factors)
    for second in range(1, len(sizes)):
        for first in range(second):
            assert relative_error(cp_in_groups(NUMPY, factors, (first, second)), expected) < 1e-12


@pytest.mark.law("products")
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=5))
def test_every_last_mode_gives_the_tensor_in_order(modes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    core = rng.normal(size=[rank for _, rank in modes])
    factors = [rng.normal(size=mode) for mode in modes]
    expected = tucker_in_order(NUMPY, core, factors)
    for last in range(len(modes)):
        assert relative_error(tucker_with_last(NUMPY, core, factors, last), expected) < 1e-12


def test_rows_are_the_transposed_columns() -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, 3)) for size in (2, 4, 5)]
    found = khatri_rao_of_rows(NUMPY, [factor.T for factor in factors])
    np.testing.assert_array_equal(found, khatri_rao(NUMPY, factors).T)


@pytest.mark.law("products")
@pytest.mark.parametrize("sizes", [(3, 40, 33), (2, 3, 40, 33), (40, 3, 2)])
def test_what_the_model_chooses_in_every_library(backend: Backend, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, 3)) for size in sizes]
    core = rng.normal(size=(3,) * len(sizes))
    there = [backend.asarray(factor, "float64") for factor in factors]
    weights = rng.normal(size=3)

    def same(found: Any, expected: np.ndarray) -> None:
        assert tuple(found.shape) == sizes
        assert relative_error(backend.to_numpy(found), expected) < 1e-12

    same(tna.cp_to_tensor((None, there)), plain_cp(factors))
    weighted = [factors[0] * weights, *factors[1:]]
    same(tna.cp_to_tensor((backend.asarray(weights, "float64"), there)), plain_cp(weighted))
    same(tna.tucker_to_tensor((backend.asarray(core, "float64"), there)), tucker_in_order(NUMPY, core, factors))


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
