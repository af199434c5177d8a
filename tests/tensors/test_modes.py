"""Unfoldings and mode products against TensorLy, on every library."""

from __future__ import annotations

import math
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

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)


def numbers(shape: Any, seed: int = 0, kind: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(seed)
    real = rng.normal(size=shape)
    return real + 1j * rng.normal(size=shape) if kind.startswith("complex") else real


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


def test_what_counts_as_a_tensor() -> None:
    assert tt.vec([[1, 2], [3, 4]]).dtype == np.float64
    assert tt.vec(np.arange(3)).dtype == np.float64
    assert tt.vec(np.ones(2, np.float16)).dtype == np.float32
    assert tt.vec(np.ones(2, bool)).dtype == np.float64
    for given_, error, text in (
        ([[1.0], [1.0, 2.0]], ShapeError, "differ in length"),
        (["a"], BackendError, "must hold numbers"),
        ("ab", BackendError, "got str"),
        (None, BackendError, "got NoneType"),
        (np.array(["a"]), BackendError, "dtype"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), BackendError, "mask=~array.mask"),
    ):
        with pytest.raises(error, match=text):
            tt.vec(given_)


def test_integers_of_other_libraries_become_float32() -> None:
    torch = pytest.importorskip("torch")
    assert tt.vec(torch.arange(3)).dtype is torch.float32
    assert tt.vec(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tt.unfold(np.ones((2, 3)), 2), "mode must be from 0 to 1 .*got 2"),
        (lambda: tt.unfold(np.ones((2, 3)), True), "mode must be"),
        (lambda: tt.fold(np.ones((2, 3)), 0, (2, 2)), r"has shape \(2, 2\); got \(2, 3\)"),
        (lambda: tt.vec_to_tensor(np.ones(3), (2, 2)), "is a vector of 4"),
        (lambda: tt.mode_dot(np.ones((2, 3)), np.ones((4, 2)), 1), "expected 3 columns"),
        (lambda: tt.mode_dot(np.ones((2, 3)), np.ones(2), 1), "expected 3 elements"),
        (lambda: tt.mode_dot(np.ones((2, 3)), np.ones((1, 1, 1)), 1), "a matrix or a vector"),
        (lambda: tt.multi_mode_dot(np.ones((2, 3)), [np.ones((1, 2))] * 2, [0, 0]), "occurs twice"),
        (lambda: tt.multi_mode_dot(np.ones((2, 3)), [np.ones((1, 2))] * 3), "3 matrices or vectors"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, text: str) -> None:
    with pytest.raises(ShapeError, match=text):
        call()


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(BackendError, match="two dtypes"):
        tt.mode_dot(np.ones((2, 3)), np.ones((1, 3), np.float32), 1)


def test_a_mode_product_makes_no_copy_of_its_input() -> None:
    from tests.conftest import peak_of

    tensor, matrix = np.ones((64, 64, 64)), np.ones((1, 64))
    for mode in range(3):
        assert peak_of(lambda mode=mode: tt.mode_dot(tensor, matrix, mode)) < math.prod(tensor.shape) * 8 / 4
