"""Unfoldings, mode products, Khatri-Rao, outer and inner products against TensorLy, and contractions against einsum."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st

import tnadapt.tensors as tt
from tests.conftest import peak_of, relative_error
from tnadapt.backends import Backend
from tnadapt.errors import BackendError, ShapeError

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def numbers(shape: Any, seed: int = 0, kind: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(seed)
    real = rng.normal(size=shape)
    return real + 1j * rng.normal(size=shape) if kind.startswith("complex") else real


def error_of(found: Any, tensor: np.ndarray) -> float:
    """The relative error of a decomposition, by NumPy alone."""
    return float(np.linalg.norm(np.asarray(found.to_tensor()) - tensor) / np.linalg.norm(tensor))


@pytest.mark.law("tensorly-conventions")
@given(SHAPES, st.data())
def test_unfold_is_tensorlys_and_fold_undoes_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    mode = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = numbers(shape)
    found = tt.unfold(tensor, mode)
    assert np.array_equal(found, tensorly.base.unfold(tensor, mode))
    assert np.array_equal(tt.fold(found, mode, shape), tensor)
    assert np.array_equal(tt.vec(tensor), tensorly.tensor_to_vec(tensor))
    assert np.array_equal(tt.vec_to_tensor(tt.tensor_to_vec(tensor), shape), tensor)


@pytest.mark.law("tensorly-conventions")
@given(SHAPES, st.sampled_from(["float64", "complex128"]), st.data())
def test_mode_products_are_tensorlys(shape: tuple[int, ...], kind: str, data: st.DataObject) -> None:
    tensor = numbers(shape, kind=kind)
    mode = data.draw(st.integers(0, len(shape) - 1))
    rows, transpose = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    matrix = numbers((shape[mode], rows) if transpose else (rows, shape[mode]), 1, kind)
    expected = tensorly.tenalg.mode_dot(tensor, matrix, mode, transpose=transpose)
    assert relative_error(tt.mode_dot(tensor, matrix, mode, transpose=transpose), expected) < 1e-12
    vector = numbers((shape[mode],), 2, kind)
    expected = np.reshape(tensorly.tenalg.mode_dot(tensor, vector, mode), shape[:mode] + shape[mode + 1 :])
    assert relative_error(tt.mode_dot(tensor, vector, mode - len(shape)), expected) < 1e-12


@pytest.mark.law("tensorly-conventions")
@given(SHAPES, st.data())
def test_several_mode_products_are_tensorlys(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = numbers(shape)
    modes = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1))
    vectors = len(modes) < len(shape) and data.draw(st.booleans())
    factors = [numbers((shape[m],) if vectors else (m + 2, shape[m]), m) for m in sorted(modes)]
    skip = data.draw(st.one_of(st.none(), st.integers(0, len(modes) - 1)))
    found = tt.multi_mode_dot(tensor, factors, sorted(modes), skip=skip)
    expected = tensorly.tenalg.multi_mode_dot(tensor, factors, modes=sorted(modes), skip=skip)
    assert relative_error(found, expected) < 1e-12


def test_on_every_library(backend: Backend) -> None:
    host, matrix = numbers((2, 3, 4)), numbers((5, 3), 1)
    tensor, factor = backend.asarray(host, "float64"), backend.asarray(matrix, "float64")
    found = backend.to_numpy(tt.mode_dot(tensor, factor, 1))
    assert relative_error(found, np.einsum("ijk,lj->ilk", host, matrix)) < 1e-12
    assert np.array_equal(backend.to_numpy(tt.fold(tt.unfold(tensor, 2), 2, (2, 3, 4))), host)
    if backend.name == "array_api_strict":
        pytest.skip("opt_einsum knows no array_api_strict")
    arrays = [numbers(shape, seed) for seed, shape in enumerate([(2, 3), (3, 4, 5), (5, 2)])]
    found = tt.contract("ab,bcd,de->ace", *(backend.asarray(array, "float64") for array in arrays))
    assert relative_error(backend.to_numpy(found), np.einsum("ab,bcd,de->ace", *arrays)) < 1e-12


def test_what_counts_as_a_tensor() -> None:
    assert tt.vec([[1, 2], [3, 4]]).dtype == np.float64
    assert tt.vec(np.arange(3)).dtype == np.float64
    assert tt.vec(np.ones(2, np.float16)).dtype == np.float32
    assert tt.vec(np.ones(2, bool)).dtype == np.float64


def test_integers_of_other_libraries_become_float32() -> None:
    torch = pytest.importorskip("torch")
    assert tt.vec(torch.arange(3)).dtype is torch.float32
    assert tt.vec(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.float32


ONE = np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        *((lambda given=given: tt.vec(given), error, text) for given, error, text in (
            ([[1.0], [1.0, 2.0]], ShapeError, "differ in length"),
            (["a"], BackendError, "must hold numbers"),
            ("ab", BackendError, "got str"),
            (None, BackendError, "got NoneType"),
            (np.array(["a"]), BackendError, "dtype"),
            (np.ma.masked_array([1.0, 2.0], [True, False]), BackendError, "mask=~array.mask"),
        )),
        (lambda: tt.unfold(ONE, 2), ShapeError, "mode must be from 0 to 1 .*got 2"),
        (lambda: tt.unfold(ONE, True), ShapeError, "mode must be"),
        (lambda: tt.fold(ONE, 0, (2, 2)), ShapeError, r"has shape \(2, 2\); got \(2, 3\)"),
        (lambda: tt.vec_to_tensor(np.ones(3), (2, 2)), ShapeError, "is a vector of 4"),
        (lambda: tt.mode_dot(ONE, np.ones((4, 2)), 1), ShapeError, "expected 3 columns"),
        (lambda: tt.mode_dot(ONE, np.ones(2), 1), ShapeError, "expected 3 elements"),
        (lambda: tt.mode_dot(ONE, np.ones((1, 1, 1)), 1), ShapeError, "a matrix or a vector"),
        (lambda: tt.mode_dot(ONE, np.ones((1, 3), np.float32), 1), BackendError, "two dtypes"),
        (lambda: tt.multi_mode_dot(ONE, [np.ones((1, 2))] * 2, [0, 0]), ShapeError, "occurs twice"),
        (lambda: tt.multi_mode_dot(ONE, [np.ones((1, 2))] * 3), ShapeError, "3 matrices or vectors"),
        (lambda: tt.khatri_rao([ONE, np.ones((2, 2))]), ShapeError, "as many columns as matrix 0"),
        (lambda: tt.khatri_rao([]), ShapeError, "at least one array"),
        (lambda: tt.khatri_rao(3), ShapeError, "a list of arrays"),
        (lambda: tt.khatri_rao([ONE], np.ones(2)), ShapeError, r"expected \(3,\)"),
        (lambda: tt.khatri_rao([ONE] * 2, skip_matrix=2), ShapeError, "skip_matrix"),
        (lambda: tt.khatri_rao([ONE], skip_matrix=0), BackendError, "at least one array"),
        (lambda: tt.row_khatri_rao([ONE, np.ones((3, 3))]), ShapeError, "as many rows as matrix 0"),
        (lambda: tt.inner(np.ones(2), np.ones(3)), ShapeError, "do not contract"),
        (lambda: tt.inner(np.ones(2), ONE), ShapeError, "do not contract"),
        (lambda: tt.contract("ij,jk->ik", ONE, ONE), ShapeError, "does not fit tensors"),
        (lambda: tt.contract("ij,jk", ONE), ShapeError, "does not fit tensors"),
        (lambda: tt.outer([np.ones(2), np.ones(2, np.float32)]), BackendError, "two dtypes"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_mode_product_makes_no_copy_of_its_input() -> None:
    tensor, matrix = np.ones((64, 64, 64)), np.ones((1, 64))
    for mode in range(3):
        assert peak_of(lambda mode=mode: tt.mode_dot(tensor, matrix, mode)) < math.prod(tensor.shape) * 8 / 4


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


def test_a_long_chain_is_not_contracted_by_hand() -> None:
    # All 26 indices at once would take 2^26 steps; a path takes a few hundred.
    matrices = [numbers((2, 2), seed) for seed in range(25)]
    letters = [chr(ord("a") + k) for k in range(26)]
    equation = ",".join(a + b for a, b in itertools.pairwise(letters)) + "->az"
    expected = np.linalg.multi_dot(matrices)
    assert relative_error(tt.contract(equation, *matrices), expected) < 1e-10


def test_a_kept_path_serves_arrays_of_every_dtype() -> None:
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.complex128, np.float64):
        a, b, c = (rng.normal(size=size).astype(dtype) for size in ((2, 3), (3, 4), (4, 5)))
        found = tt.contract("ij,jk,kl->il", a, b, c)
        assert found.dtype == dtype
        np.testing.assert_allclose(found, a @ b @ c, rtol=1e-5, atol=1e-5)
    with pytest.raises(ShapeError, match="does not fit tensors"):
        tt.contract("ij,jk,kl->il", a, b, b)
