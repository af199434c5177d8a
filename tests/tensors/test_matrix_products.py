"""Khatri-Rao, outer, inner and general contractions against TensorLy and einsum."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st

import tnadapt.tensors as tt
from tests.conftest import relative_error
from tnadapt.backends import Backend
from tnadapt.errors import BackendError, ShapeError

from .test_modes import numbers

SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@pytest.mark.law("tensorly-conventions")
@given(SIZES, st.integers(1, 4), st.booleans(), st.data())
def test_khatri_rao_is_tensorlys(sizes: list[int], rank: int, weighted: bool, data: st.DataObject) -> None:
    matrices = [numbers((size, rank), size) for size in sizes]
    weights = numbers((rank,), 9) if weighted else None
    skip = data.draw(st.integers(0, len(sizes) - 1)) if len(sizes) > 2 and data.draw(st.booleans()) else None
    expected = tensorly.tenalg.khatri_rao(matrices, weights=weights, skip_matrix=skip)
    assert relative_error(tt.khatri_rao(matrices, weights, skip), expected) < 1e-12
    rows = tt.row_khatri_rao([matrix.T for matrix in matrices])
    assert relative_error(rows, tensorly.tenalg.khatri_rao(matrices).T) < 1e-12


@pytest.mark.law("tensorly-conventions")
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=2).map(tuple), min_size=1, max_size=3))
def test_outer_is_tensorlys(shapes: list[tuple[int, ...]]) -> None:
    arrays = [numbers(shape, seed) for seed, shape in enumerate(shapes)]
    assert relative_error(tt.outer(arrays), tensorly.tenalg.outer(arrays)) < 1e-12


@pytest.mark.law("tensorly-conventions")
@given(SIZES, st.integers(1, 3), st.data())
def test_inner_is_tensorlys(sizes: list[int], extra: int, data: st.DataObject) -> None:
    one, other = numbers(sizes, kind="complex128"), numbers(sizes, 1, "complex128")
    assert relative_error(tt.inner(one, other), tensorly.tenalg.inner(one, other)) < 1e-12
    count = data.draw(st.integers(1, len(sizes)))
    wide = numbers((*sizes[len(sizes) - count :], extra), 2)
    real = np.real(one)
    expected = tensorly.tenalg.inner(real, wide, n_modes=count)
    assert relative_error(tt.inner(real, wide, n_modes=count), expected) < 1e-12


def test_a_network_is_contracted_as_einsum_does(backend: Backend) -> None:
    if backend.name == "array_api_strict":
        pytest.skip("opt_einsum knows no array_api_strict")
    arrays = [numbers(shape, seed) for seed, shape in enumerate([(2, 3), (3, 4, 5), (5, 2)])]
    placed = [backend.asarray(array, "float64") for array in arrays]
    expected = np.einsum("ab,bcd,de->ace", *arrays)
    assert relative_error(backend.to_numpy(tt.contract("ab,bcd,de->ace", *placed)), expected) < 1e-12


def test_a_long_chain_is_not_contracted_by_hand() -> None:
    # All 26 indices at once would take 2^26 steps; a path takes a few hundred.
    matrices = [numbers((2, 2), seed) for seed in range(25)]
    letters = [chr(ord("a") + k) for k in range(26)]
    equation = ",".join(a + b for a, b in itertools.pairwise(letters)) + "->az"
    expected = np.linalg.multi_dot(matrices)
    assert relative_error(tt.contract(equation, *matrices), expected) < 1e-10


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tt.khatri_rao([np.ones((2, 3)), np.ones((2, 2))]), ShapeError, "as many columns as matrix 0"),
        (lambda: tt.khatri_rao([]), ShapeError, "at least one array"),
        (lambda: tt.khatri_rao(3), ShapeError, "a list of arrays"),
        (lambda: tt.khatri_rao([np.ones((2, 3))], np.ones(2)), ShapeError, r"expected \(3,\)"),
        (lambda: tt.khatri_rao([np.ones((2, 3))] * 2, skip_matrix=2), ShapeError, "skip_matrix"),
        (lambda: tt.khatri_rao([np.ones((2, 3))], skip_matrix=0), BackendError, "at least one array"),
        (lambda: tt.row_khatri_rao([np.ones((2, 3)), np.ones((3, 3))]), ShapeError, "as many rows as matrix 0"),
        (lambda: tt.inner(np.ones(2), np.ones(3)), ShapeError, "do not contract"),
        (lambda: tt.inner(np.ones(2), np.ones((2, 3))), ShapeError, "do not contract"),
        (lambda: tt.contract("ij,jk->ik", np.ones((2, 3)), np.ones((2, 3))), ShapeError, "does not fit tensors"),
        (lambda: tt.contract("ij,jk", np.ones((2, 3))), ShapeError, "does not fit tensors"),
        (lambda: tt.outer([np.ones(2), np.ones(2, np.float32)]), BackendError, "two dtypes"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_kept_path_serves_arrays_of_every_dtype() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.complex128, np.float64):
        a, b, c = (rng.normal(size=size).astype(dtype) for size in ((2, 3), (3, 4), (4, 5)))
        found = tt.contract("ij,jk,kl->il", a, b, c)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, a @ b @ c, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="does not fit tensors"):
        tt.contract("ij,jk,kl->il", a, b, b)
