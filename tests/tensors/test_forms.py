"""Unfoldings and products of tensors, and every form of a tensor against the tensor that it forms; on every library."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import pickle
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

import tnadapt.tensors as tt
from tests.conftest import on_every_library, peak_of, relative_error
from tnadapt.backends import Backend
from tnadapt.errors import BackendError, ConfigError, FileError, ShapeError

# -- Unfoldings, mode products, Khatri-Rao, outer and inner products against TensorLy, and contractions ----

MODE_SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def numbers(shape: Any, seed: int = 0, kind: str = "float64") -> np.ndarray:
    rng = np.random.default_rng(seed)
    real = rng.normal(size=shape)
    return real + 1j * rng.normal(size=shape) if kind.startswith("complex") else real


def error_of(found: Any, tensor: np.ndarray) -> float:
    """The relative error of a decomposition, by NumPy alone."""
    return float(np.linalg.norm(np.asarray(found.to_tensor()) - tensor) / np.linalg.norm(tensor))


@pytest.mark.law("tensorly-conventions")
@given(MODE_SHAPES, st.data())
def test_unfold_is_tensorlys_and_fold_undoes_it(shape: tuple[int, ...], data: st.DataObject) -> None:
    mode = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = numbers(shape)
    found = tt.unfold(tensor, mode)
    assert np.array_equal(found, tensorly.base.unfold(tensor, mode))
    assert np.array_equal(tt.fold(found, mode, shape), tensor)


@pytest.mark.law("tensorly-conventions")
@given(MODE_SHAPES, st.sampled_from(["float64", "complex128"]), st.data())
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
@given(MODE_SHAPES, st.data())
def test_several_mode_products_are_tensorlys(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = numbers(shape)
    modes = data.draw(st.lists(st.sampled_from(range(len(shape))), unique=True, min_size=1))
    vectors = len(modes) < len(shape) and data.draw(st.booleans())
    factors = [numbers((shape[m],) if vectors else (m + 2, shape[m]), m) for m in sorted(modes)]
    found = tt.multi_mode_dot(tensor, factors, sorted(modes))
    expected = tensorly.tenalg.multi_mode_dot(tensor, factors, modes=sorted(modes))
    assert relative_error(found, expected) < 1e-12


def test_products_on_every_library(backend: Backend) -> None:
    host, matrix = numbers((2, 3, 4)), numbers((5, 3), 1)
    tensor, factor = backend.asarray(host, "float64"), backend.asarray(matrix, "float64")
    found = backend.to_numpy(tt.mode_dot(tensor, factor, 1))
    assert relative_error(found, np.einsum("ijk,lj->ilk", host, matrix)) < 1e-12
    assert np.array_equal(backend.to_numpy(tt.fold(tt.unfold(tensor, 2), 2, (2, 3, 4))), host)


def test_what_counts_as_a_tensor() -> None:
    assert tt.outer([[[1, 2], [3, 4]]]).dtype == np.float64
    assert tt.outer([np.arange(3)]).dtype == np.float64
    assert tt.outer([np.ones(2, np.float16)]).dtype == np.float32
    assert tt.outer([np.ones(2, bool)]).dtype == np.float64
    # Integers of other libraries become float32.
    torch = pytest.importorskip("torch")
    assert tt.outer([torch.arange(3)]).dtype is torch.float32
    assert tt.outer([torch.ones(2, dtype=torch.bfloat16)]).dtype is torch.float32


def test_a_mode_product_makes_no_copy_of_its_input() -> None:
    tensor, matrix = np.ones((64, 64, 64)), np.ones((1, 64))
    for mode in range(3):
        assert peak_of(lambda mode=mode: tt.mode_dot(tensor, matrix, mode)) < math.prod(tensor.shape) * 8 / 4


@pytest.mark.law("tensorly-conventions")
@given(SIZES, st.integers(1, 4))
def test_khatri_rao_is_tensorlys(sizes: list[int], rank: int) -> None:
    matrices = [numbers((size, rank), size) for size in sizes]
    assert relative_error(tt.khatri_rao(matrices), tensorly.tenalg.khatri_rao(matrices)) < 1e-12
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


# -- Every form against the tensor that it forms: entries, slices, arithmetic, norms ---------------


def kronecker(shape: tuple[int, ...], seed: int, **words: Any) -> tt.KroneckerTensor:
    # Each size n as 2 × n, so that every factor has something.
    cp = tt.random_cp((2, 3, *shape), 2, random_state=seed, **words)
    backend = cp.backend
    terms = []
    for term in range(2):
        column = [factor[:, term] for factor in cp.factors]
        small = tt.outer([column[0]] * len(shape))
        large = tt.outer(column[2:])
        terms.append([small, large])
    return tt.KroneckerTensor(backend.asarray(np.array([1.5, -0.5]), words.get("dtype", "float64")), terms)


def parafac2(count: int, seed: int, **words: Any) -> tt.Parafac2Tensor:
    weights, factors = tt.random_cp((count, 2, 3), 2, random_state=seed, normalized=True, **words)
    bases = [tt.random_cp((4, 2), 2, random_state=seed + k, orthogonal=True, **words).factors[0] for k in range(count)]
    return tt.Parafac2Tensor(weights, factors, bases)


MAKERS: dict[str, Any] = {
    "cp": lambda shape, seed, **words: tt.random_cp(shape, 3, random_state=seed, normalized=True, **words),
    "tucker": lambda shape, seed, **words: tt.random_tucker(shape, 2, random_state=seed, **words),
    "tt": lambda shape, seed, **words: tt.random_tt(shape, 3, random_state=seed, **words),
    "tr": lambda shape, seed, **words: tt.random_tr(shape, 2, random_state=seed, **words),
    "kronecker": kronecker,
    "hadamard": lambda shape, seed, **words: tt.HadamardTensor(
        [tt.random_cp(shape, rank, random_state=seed + rank, **words) for rank in (1, 2)]
    ),
}
EVERY: dict[str, Any] = {
    **MAKERS,
    "cp without weights": lambda shape, seed, **words: tt.CPTensor(None, tt.random_cp(shape, 2, **words).factors),
    "tt_matrix": lambda shape, seed, **words: tt.random_tt_matrix(shape, shape[::-1], 2, random_state=seed, **words),
    "kronecker without weights": lambda shape, seed, **words: tt.KroneckerTensor(
        None, kronecker(shape, seed, **words).terms
    ),
    "mixed hadamard": lambda shape, seed, **words: tt.HadamardTensor(
        [tt.random_cp(shape, 2, **words), tt.CPTensor(None, tt.random_cp(shape, 1, **words).factors)]
    ),
    "parafac2": lambda shape, seed, **words: parafac2(len(shape), seed, **words),
}
FORMS = st.sampled_from(sorted(MAKERS))
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
MATRIX = tt.random_tt_matrix((2, 3, 2), (3, 1, 2), 2, random_state=4)


@pytest.mark.law("tensor-arithmetic")
@given(FORMS, SHAPES, st.sampled_from(["float64", "complex128"]))
def test_entries_and_inner_products_are_those_of_the_tensor(form: str, shape: tuple[int, ...], dtype: str) -> None:
    one, other = (MAKERS[form](shape, seed, dtype=dtype) for seed in (1, 2))
    whole, second = one.to_tensor(), other.to_tensor()
    assert one.shape == whole.shape
    assert (one.order, one.size) == (whole.ndim, whole.size)
    every = np.indices(whole.shape).reshape(whole.ndim, -1).T
    scale = np.linalg.norm(whole)
    assert np.abs(one.entries(every) - whole.reshape(-1)).max() < 1e-12 * scale
    assert np.abs(one.entries(every - whole.shape) - whole.reshape(-1)).max() < 1e-12 * scale
    assert abs(one.entry(*[0] * whole.ndim) - whole.reshape(-1)[0]) < 1e-12 * scale
    assert abs(one.inner(other) - np.vdot(whole, second)) < 1e-12 * scale * np.linalg.norm(second)
    assert abs(one.norm() - scale) < 1e-12 * sum(float(abs(array).max()) for array in one.arrays) ** 2 + 1e-12 * scale


@pytest.mark.law("tensor-arithmetic")
@given(FORMS, SHAPES)
def test_sums_and_products_are_those_of_the_tensors(form: str, shape: tuple[int, ...]) -> None:
    one, other = (MAKERS[form](shape, seed) for seed in (1, 2))
    whole, second = one.to_tensor(), other.to_tensor()
    pairs = [
        (one * 2.5, 2.5 * whole), (np.float64(2.5) * one, 2.5 * whole), (one / 2, whole / 2), (-one, -whole),
        (3 * one, 3 * whole), (one * other, whole * second),
        (one * 2j, 2j * whole), (np.complex64(1 + 1j) * one, (1 + 1j) * whole), (one / 1j, whole / 1j),
    ]  # fmt: skip
    scale = (np.abs(whole).max() + np.abs(second).max() + 1.0) ** 2
    for found, expected in pairs:
        assert type(found) is type(one)
        assert {array.dtype for array in found.arrays} == {expected.dtype}
        assert np.abs(found.to_tensor() - expected).max() < 1e-11 * scale


@pytest.mark.law("tensor-arithmetic")
@given(FORMS, FORMS, SHAPES, st.sampled_from(["float64", "complex128"]))
def test_two_forms_meet_as_their_tensors_do(form: str, other: str, shape: tuple[int, ...], dtype: str) -> None:
    one = MAKERS[form](shape, 1, dtype=dtype)
    two = MAKERS[other](shape if other == "kronecker" else one.shape, 2, dtype=dtype)
    # Kronecker products have larger shapes than they are asked for.
    one = one if one.shape == two.shape else MAKERS[form](two.shape, 1, dtype=dtype)
    whole, second = one.to_tensor(), two.to_tensor()
    scale = (np.abs(whole).max() + np.abs(second).max() + 1.0) ** 2
    pairs = [(one + two, whole + second), (one - two, whole - second), (one * two, whole * second)]
    for result, expected in pairs:
        assert isinstance(result, tt.Decomposed)
        assert np.abs(result.to_tensor() - expected).max() < 1e-11 * scale
    # The sum has the more general form of the two, the later one in this order.
    order = [tt.CPTensor, tt.TuckerTensor, tt.TTTensor, tt.TRTensor]
    forms = {"cp": 0, "hadamard": 0, "tucker": 1, "tt": 2, "kronecker": 2, "tr": 3}
    if form == other != "hadamard":
        assert type(one + two) is type(one)
    else:
        assert type(one + two) is order[max(forms[form], forms[other])]
    for result, expected in (
        (one + second, whole + second),
        (second - one, second - whole),
        (one - second, whole - second),
    ):
        assert isinstance(result, np.ndarray)
        assert np.abs(result - expected).max() < 1e-11 * scale
    norms = sum(float(abs(array).max()) for array in one.arrays) * float(np.linalg.norm(second)) + 1.0
    assert abs(one.inner(two) - np.vdot(whole, second)) < 1e-11 * scale * whole.size * norms
    assert abs(one.inner(second) - np.vdot(whole, second)) < 1e-11 * scale * whole.size
    for network, tensor in ((one, two), (one, second), (whole, two)):
        assert abs(tt.inner(network, tensor) - np.sum(whole * second)) < 1e-11 * scale * whole.size * norms


@pytest.mark.law("tensor-arithmetic")
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.integers(1, 3),
       st.sampled_from(["float64", "complex128"]))  # fmt: skip
def test_tt_matrices_meet_kronecker_products_and_trains(sizes: list[tuple[int, int]], rank: int, dtype: str) -> None:
    rows, cols = [row for row, _ in sizes], [col for _, col in sizes]
    matrix = tt.random_tt_matrix(rows, cols, rank, random_state=1, dtype=dtype)
    whole = matrix.to_matrix()
    weights = numbers((2,), 3, dtype)
    product = tt.KroneckerTensor(
        weights, [[numbers(size, 5 * t + k, dtype) for k, size in enumerate(sizes)] for t in (0, 1)]
    )
    second = product.to_tensor()
    for result, expected in (
        (matrix + product, whole + second), (product - matrix, second - whole), (matrix * product, whole * second),
    ):  # fmt: skip
        assert type(result) is tt.TTMatrix
        assert (result.row_sizes, result.col_sizes) == (tuple(rows), tuple(cols))
        assert (
            np.abs(result.to_matrix() - expected).max() < 1e-11 * (1 + np.abs(whole).max() + np.abs(second).max()) ** 2
        )
    assert relative_error(matrix + second, whole + second) < 1e-12
    for form in ("cp", "tucker", "tt", "tr", "hadamard"):
        other = MAKERS[form](matrix.shape, 2, dtype=dtype)
        expected = np.vdot(whole, other.to_tensor())
        assert abs(matrix.inner(other) - expected) < 1e-11 * (1 + matrix.norm() * np.linalg.norm(other.to_tensor()))
        assert abs(other.inner(matrix) - expected.conj()) < 1e-11 * (
            1 + matrix.norm() * np.linalg.norm(other.to_tensor())
        )
    assert abs(matrix.inner(product) - np.vdot(whole, second)) < 1e-11 * (1 + matrix.norm() * np.linalg.norm(second))
    # Times a train, exactly, with products of ranks.
    train = tt.random_tt(cols, 2, random_state=2, dtype=dtype)
    result = matrix @ train
    assert type(result) is tt.TTTensor
    assert result.shape == tuple(rows)
    assert result.rank == tuple(a * b for a, b in zip(matrix.rank, train.rank, strict=True))
    assert relative_error(result.to_vec(), whole @ train.to_vec()) < 1e-10
    assert relative_error(result.round(max_error=1e-12).to_vec(), whole @ train.to_vec()) < 1e-9


def test_no_mixed_operation_forms_a_tensor() -> None:
    shape = (20,) * 20
    cp, train, ring = tt.random_cp(shape, 3), tt.random_tt(shape, 2), tt.random_tr(shape, 2)
    total = cp + train - ring
    assert type(total) is tt.TRTensor
    index = [3] * 20
    assert float(total.entry(*index)) == pytest.approx(
        float(cp.entry(*index) + train.entry(*index) - ring.entry(*index))
    )
    assert float(cp.inner(train)) == pytest.approx(float(train.inner(cp)), rel=1e-9)
    tucker = tt.random_tucker((30, 40, 50, 60), 3)
    other = tt.random_tt((30, 40, 50, 60), 4)
    assert peak_of(lambda: (tucker.inner(other), tucker + other, tucker + tt.random_cp((30, 40, 50, 60), 5))) < 1 << 20
    # Of more components than elements, a core has no more elements than the tensor.
    wide = tt.random_cp((2, 3, 2), 9) + tt.random_tucker((2, 3, 2), 1)
    assert wide.rank == (3, 4, 3)


@on_every_library("form", MAKERS, ["cp", "tt"])
def test_on_every_library(form: str, backend: Backend) -> None:
    with backend.double_precision():
        host = MAKERS[form]((3, 4, 2), 1)
        one = MAKERS[form]((3, 4, 2), 1, backend=backend.name, dtype="float64")
        whole = backend.to_numpy(one.to_tensor())
        assert relative_error(whole, host.to_tensor()) < 1e-12
        indices = np.array([[0] * one.order, [size - 1 for size in one.shape]])
        assert relative_error(backend.to_numpy(one.entries(indices)), host.entries(indices)) < 1e-12
        assert float(one.norm()) == pytest.approx(float(host.norm()), rel=1e-12)
        assert one.num_parameters == sum(math.prod(array.shape) for array in one.arrays)
        assert relative_error(backend.to_numpy((one + one).to_tensor()), 2 * whole) < 1e-12
        array = one.to_tensor()
        # The strict library raises an error for what it does not know, where others let the second operand try.
        first = () if backend.name == "array_api_strict" else (array + one, array - (-one))
        for dense in (one + array, *first):
            assert backend.owns(dense)
            assert relative_error(backend.to_numpy(dense), 2 * whole) < 1e-12
        ring = MAKERS["tr"](one.shape, 2, backend=backend.name, dtype="float64")
        expected = whole + backend.to_numpy(ring.to_tensor())
        assert relative_error(backend.to_numpy((one + ring).to_tensor()), expected) < 1e-12
        assert float(one.inner(ring)) == pytest.approx(float(np.vdot(whole, expected - whole)), rel=1e-9)
    # Numbers of NumPy and arrays without axes keep the dtype.
    single = MAKERS[form]((3, 4, 2), 1, dtype="float32", backend=backend.name)
    twos = [kind(2.0) for kind in (np.float64, np.float32, np.int64, np.array)]
    products = [single * two for two in (*twos, backend.asarray(np.array(2.0), "float32"))]
    products += [4 * single / two for two in twos] + [np.float32(2.0) * single, np.int64(2) * single]
    for product in products:
        assert {backend.dtype_name(array) for array in product.arrays} == {"float32"}
        assert np.allclose(backend.to_numpy(product.to_tensor()), 2.0 * whole, rtol=1e-4, atol=1e-4)
    assert abs(float((single / single.norm()).norm()) - 1.0) < 1e-4
    # A complex number makes a real tensor complex, as it does an array.
    for product in (single * 2j, 2j * single, single / -0.5j, single * backend.asarray(np.array(2j), "complex64")):
        assert {backend.dtype_name(array) for array in product.arrays} == {"complex64"}
        assert np.allclose(backend.to_numpy(product.to_tensor()), 2j * whole, rtol=1e-4, atol=1e-4)
    # Squares of these numbers leave the range of float32.
    for exponent in (-100, 100):
        moved = single * 2.0**exponent
        assert float(moved.norm()) == pytest.approx(math.ldexp(float(single.norm()), exponent), rel=1e-6)
    if hasattr(single, "mode_dot"):
        ones = backend.asarray(np.ones(4), "float32")
        contracted = backend.to_numpy(single.mode_dot(ones, 1).to_tensor())
        assert np.allclose(contracted, whole.sum(axis=1), rtol=1e-4, atol=1e-4)


@pytest.mark.law("tensor-arithmetic")
@given(FORMS, SHAPES, st.data())
def test_a_part_is_the_slice(form: str, shape: tuple[int, ...], data: st.DataObject) -> None:
    one = MAKERS[form](shape, 1)
    whole = one.to_tensor()
    index, expected = [], []
    for size in one.shape:
        if form == "kronecker":
            index.append(slice(0, size))
        elif data.draw(st.booleans()):
            index.append(data.draw(st.integers(-size, size - 1)))
        else:
            start = data.draw(st.integers(0, size - 1))
            index.append(slice(start, None, data.draw(st.integers(1, 3))))
        last = index[-1]
        expected.append(last if isinstance(last, slice) else slice(last % size, last % size + 1))
    found = one.part(*index)
    assert type(found) is type(one)
    assert np.abs(found.to_tensor() - whole[tuple(expected)]).max() < 1e-12 * (np.abs(whole).max() + 1)


@pytest.mark.law("tensor-arithmetic")
@given(
    st.sampled_from(["cp", "tucker", "tt", "tr"]), SHAPES, st.sampled_from(["float64", "complex128"]), st.booleans(),
    st.booleans(), st.data(),
)  # fmt: skip
def test_mode_products_are_those_of_the_tensor(
    form: str, shape: tuple[int, ...], dtype: str, vector: bool, keep: bool, data: st.DataObject
) -> None:
    one, mode = MAKERS[form](shape, 1, dtype=dtype), data.draw(st.integers(-len(shape), len(shape) - 1))
    factor = numbers((shape[mode],) if vector else (2, shape[mode]), 3, dtype)
    result, expected = one.mode_dot(factor, mode, keep_dim=keep), np.tensordot(factor, one.to_tensor(), (-1, mode))
    if not vector:
        expected = np.moveaxis(expected, 0, mode)
    elif keep:
        expected = np.expand_dims(expected, mode % len(shape))
    if expected.ndim:
        assert type(result) is type(one)
        result = result.to_tensor()
    assert result.shape == expected.shape
    assert np.abs(result - expected).max() < 1e-11 * (np.abs(one.to_tensor()).max() + 1.0)


# A form -> which arrays are multiplied alike, so that the tensor is multiplied by the product of one for each kind.
PLACES = {"kronecker": [0, 1, 2, 1, 2], "kronecker without weights": [0, 1, 0, 1], "parafac2": [0, 1, 2, 3]}


@pytest.mark.law("scale-invariance")
@given(st.sampled_from(sorted(EVERY)), st.sampled_from(["float64", "float32", "complex128"]),
       st.integers(0, 3), st.data())  # fmt: skip
def test_norms_are_those_of_numbers_of_any_magnitude(form: str, dtype: str, seed: int, data: st.DataObject) -> None:
    one = EVERY[form]((3, 2), seed, dtype=dtype)
    arrays, most = one.arrays, np.finfo(dtype).maxexp - 16
    places = PLACES.get(form, range(len(arrays)))
    exponents = data.draw(st.lists(st.integers(-most, most), min_size=8, max_size=8))
    # The last one leaves the norm within the dtype's range.
    last = max(places)
    rest = sum(exponents[:last])
    exponents[last] = max(-most, min(most, data.draw(st.integers(-most, most)) - rest))
    total = rest + exponents[last]
    assume(abs(total) <= most)
    scaled = [array * np.float64(2.0) ** exponents[place] for array, place in zip(arrays, places, strict=False)]
    scaled = [array.astype(dtype) for array in scaled] + arrays[len(scaled) :]
    norm = float(one.norm())
    whole = np.linalg.norm(np.asarray(one.to_tensor(), np.complex128))
    assert norm == pytest.approx(whole, rel=1e-4 if dtype == "float32" else 1e-12)
    assert float(one.with_arrays(scaled).norm()) == pytest.approx(
        math.ldexp(norm, total), rel=1e-5 if dtype == "float32" else 1e-14
    )


# -- Each form -------------------------------------------------------------------------------------


# Each decomposition, with TensorLy's class of its results, and the functions that form tensors and unfoldings of these.
TENSORLYS: dict[str, Any] = {
    "cp": (tensorly.cp_tensor.CPTensor, tensorly.cp_to_tensor, tensorly.cp_to_unfolded),
    "tucker": (tensorly.tucker_tensor.TuckerTensor, tensorly.tucker_to_tensor, tensorly.tucker_to_unfolded),
    "tensor_train": (tensorly.tt_tensor.TTTensor, tensorly.tt_to_tensor, tensorly.tt_to_unfolded),
    "tensor_ring": (tensorly.tr_tensor.TRTensor, tensorly.tr_tensor.tr_to_tensor, tensorly.tr_tensor.tr_to_unfolded),
    "tt_matrix": (
        tensorly.tt_matrix.TTMatrix, tensorly.tt_matrix.tt_matrix_to_tensor, tensorly.tt_matrix.tt_matrix_to_unfolded,
    ),
}  # fmt: skip
SEVERAL = st.lists(st.integers(2, 4), min_size=3, max_size=4)


@pytest.mark.law("tensorly-conventions")
@pytest.mark.parametrize("name", TENSORLYS)
@given(SEVERAL, st.integers(1, 2), st.integers(0, 100))
def test_results_go_into_tensorlys_functions_and_classes(name: str, shape: list[int], rank: int, seed: int) -> None:
    theirs, formed, unfolded = TENSORLYS[name]
    result = getattr(tt, name)(numbers([*shape, *shape] if name == "tt_matrix" else shape, seed), rank)
    expected = result.to_tensor()
    assert relative_error(formed(result), expected) < 1e-12
    assert relative_error(unfolded(result, 1), tensorly.unfold(expected, 1)) < 1e-12
    assert relative_error(theirs(result).to_tensor(), expected) < 1e-12
    if name in ("cp", "tucker"):
        first, factors = result
        assert relative_error(formed((first, factors)), expected) < 1e-12


@pytest.mark.law("tensorly-conventions")
@given(SEVERAL, st.integers(1, 3), st.integers(0, 100))
def test_tensorlys_objects_go_into_our_classes(shape: list[int], rank: int, seed: int) -> None:
    bonds = [1, *[rank] * (len(shape) - 1), 1]
    for theirs, ours in (
        (tensorly.random.random_cp(shape, rank, random_state=seed), lambda parts: tt.CPTensor(*parts)),
        (tensorly.random.random_tucker(shape, [rank] * len(shape), random_state=seed), lambda p: tt.TuckerTensor(*p)),
        (tensorly.random.random_tt(shape, bonds, random_state=seed), tt.TTTensor),
        (tensorly.random.random_tr(shape, [rank] * (len(shape) + 1), random_state=seed), tt.TRTensor),
        (tensorly.random.random_tt_matrix([*shape, *shape], rank, random_state=seed), tt.TTMatrix),
    ):
        assert relative_error(ours(theirs).to_tensor(), theirs.to_tensor()) < 1e-12


def test_quimb_takes_the_cores_of_a_train() -> None:
    quimb = pytest.importorskip("quimb.tensor")
    train = tt.random_tt((3, 4, 2), 3)
    theirs = quimb.MatrixProductState(list(train), shape="lpr").contract()
    assert relative_error(theirs.transpose("k0", "k1", "k2").data, train.to_tensor()) < 1e-12


def test_tensorlys_norms_signs_and_permutations_take_ours() -> None:
    one = tt.cp(numbers((3, 4, 5)), 2)
    assert float(tensorly.cp_tensor.cp_norm(one)) == pytest.approx(float(one.norm()), rel=1e-12)
    for function in (tensorly.cp_tensor.cp_normalize, tensorly.cp_tensor.cp_flip_sign):
        assert relative_error(tt.CPTensor(*function(one)).to_tensor(), one.to_tensor()) < 1e-12
    swapped = tensorly.cp_tensor.CPTensor((one.weights[::-1], [factor[:, ::-1] for factor in one.factors]))
    found, order = tensorly.cp_tensor.cp_permute_factors(tensorly.cp_tensor.CPTensor(one), swapped)
    assert np.array_equal(found.factors[0], one.factors[0])
    assert np.array_equal(order[0], [1, 0])


@pytest.mark.law("tensor-arithmetic")
def test_a_tt_matrix_multiplies_without_being_formed() -> None:
    matrix = MATRIX.to_matrix()
    x = numbers((MATRIX.shape[1], 3))
    assert relative_error(MATRIX @ x, matrix @ x) < 1e-12
    assert relative_error(MATRIX @ x[:, 0], matrix @ x[:, 0]) < 1e-12
    assert relative_error((MATRIX.T @ MATRIX).to_matrix(), matrix.T @ matrix) < 1e-12
    assert relative_error((MATRIX + MATRIX * 2).round(max_error=1e-12).to_matrix(), 3 * matrix) < 1e-10
    assert relative_error((MATRIX * MATRIX).to_matrix(), matrix * matrix) < 1e-12
    every = np.indices(MATRIX.shape).reshape(2, -1).T
    assert relative_error(MATRIX.entries(every), matrix.reshape(-1)) < 1e-12
    assert float(MATRIX.norm()) == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
    with pytest.raises(ShapeError, match="take entries"):
        MATRIX.part(0)


@pytest.mark.law("tensor-arithmetic")
@given(st.lists(st.integers(1, 5), min_size=2, max_size=5).map(tuple), st.integers(1, 3))
def test_rounding_a_sum_finds_its_ranks(shape: tuple[int, ...], rank: int) -> None:
    train = tt.random_tt(shape, rank, random_state=3)
    double = train + train
    found = double.round(max_error=1e-10)
    assert relative_error(found.to_tensor(), 2 * train.to_tensor()) < 1e-9
    assert all(a <= b for a, b in zip(found.rank, train.rank, strict=True))
    assert relative_error(double.round(rank).to_tensor(), 2 * train.to_tensor()) < 1e-9


@pytest.mark.law("tensor-arithmetic")
@given(st.integers(0, 5), st.floats(1e-3, 0.9))
def test_rounding_keeps_to_its_error(seed: int, error: float) -> None:
    train = tt.random_tt((4, 5, 4, 3), 4, random_state=seed)
    whole = train.to_tensor()
    found = train.round(max_error=error)
    assert np.linalg.norm(found.to_tensor() - whole) <= error * np.linalg.norm(whole) * (1 + 1e-9)
    # Each bond's truncation is the best one of its unfolding, so one rank less would lose too much in some bond.
    limited = train.round(found.rank[1:-1])
    assert relative_error(limited.to_tensor(), found.to_tensor()) < 1e-9


def test_truncated_normalized_and_orthogonal() -> None:
    cp = tt.CPTensor(np.array([1.0, -5.0, 3.0]), [np.eye(3), np.eye(3)])
    assert np.array_equal(np.diag(cp.truncated(2).to_tensor()), [0.0, -5.0, 3.0])
    assert np.array_equal(cp.normalized().to_tensor(), cp.to_tensor())
    tucker = tt.random_tucker((5, 4, 3), (3, 2, 3), random_state=1)
    found = tucker.orthogonal()
    assert relative_error(found.to_tensor(), tucker.to_tensor()) < 1e-12
    for factor in found.factors:
        assert relative_error(factor.T @ factor, np.eye(factor.shape[1])) < 1e-12
    # Of numbers of any magnitude.
    large = tt.CPTensor(None, [np.ldexp(cp.factors[0], 700), np.ldexp(cp.factors[1], -700)]).normalized()
    assert np.array_equal(large.weights, np.ones(3))
    assert np.array_equal(large.to_tensor(), np.eye(3))


@pytest.mark.parametrize("form", [*MAKERS, "parafac2"])
def test_copies_and_pickles_keep_the_outcome(form: str) -> None:
    one = EVERY[form]((3, 4), 1)
    one.with_outcome(tt.FitOutcome(error=0.5, bound=0.25, certified=False, history=(0.7, 0.5), method="<b>"))
    for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert type(again) is type(one)
        assert np.array_equal(again.to_tensor(), one.to_tensor())
        assert again.outcome == one.outcome
    assert (one.error, one.bound, one.certified, one.converged, one.history) == (0.5, 0.25, False, True, (0.7, 0.5))
    assert "error 0.5 (at least 0.25)" in repr(one)
    assert ">&lt;b&gt;</td>" in one._repr_html_()
    assert "converged" not in one._repr_html_()
    stopped = tt.FitOutcome(error=0.5, bound=0.25, certified=True, stopped="max_iterations", method="ALS")
    assert "no (max_iterations)" in one.with_outcome(stopped)._repr_html_()
    # Copies under TensorLy's names share no array.
    if form in ("cp", "tucker"):
        again = getattr(one, f"{form}_copy")()
        assert type(again) is type(one)
        assert np.array_equal(again.to_tensor(), one.to_tensor())
        assert not any(np.shares_memory(a, b) for a, b in zip(one.arrays, again.arrays, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", [*MAKERS, "parafac2"])
def test_a_result_passes_through_jax(form: str) -> None:
    jax = pytest.importorskip("jax")
    one, factor = EVERY[form]((3, 4), 1, backend="jax"), 1.0 if form == "hadamard" else 2.0
    passed = jax.jit(lambda x: x if form == "hadamard" else x * factor)(one)
    assert relative_error(passed.to_tensor(), factor * np.asarray(one.to_tensor())) < 1e-12
    assert type(jax.grad(lambda x: x.norm())(one)) is type(one)


@pytest.mark.parametrize("form", MAKERS)
def test_torch_differentiates_a_norm(form: str) -> None:
    torch = pytest.importorskip("torch")
    one = MAKERS[form]((3, 4), 1, backend="torch")
    leaves = [array.requires_grad_() for array in one.arrays]
    one.norm().backward()
    direct = torch.autograd.grad(torch.linalg.vector_norm(one.to_tensor()), leaves)
    for leaf, expected in zip(leaves, direct, strict=True):
        torch.testing.assert_close(leaf.grad, expected)
    # Of numbers whose squares overflow or vanish.
    for exponent in (700, -980):
        again = [torch.nn.Parameter(array.detach().clone()) for array in one.arrays]
        scaled = one.with_arrays(again) * 2.0 ** (exponent // 2) * 2.0 ** (exponent // 2)
        scaled.norm().backward()
        for leaf, expected in zip(again, direct, strict=True):
            torch.testing.assert_close(leaf.grad * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent // 2), expected)


@pytest.mark.parametrize("form", ["cp", "tucker", "tt", "tr"])
@pytest.mark.parametrize("mode", range(3))
def test_torch_differentiates_a_mode_product(form: str, mode: int) -> None:
    torch = pytest.importorskip("torch")
    one, vector = MAKERS[form]((3, 4, 2), 1, backend="torch"), torch.arange(1.0, (3, 4, 2)[mode] + 1.0).double()
    leaves = [array.requires_grad_() for array in [vector, *one.arrays]]
    result, expected = one.mode_dot(vector, mode).to_tensor(), torch.tensordot(vector, one.to_tensor(), ([0], [mode]))
    for found, direct in zip(*(torch.autograd.grad((x**2).sum(), leaves) for x in (result, expected)), strict=True):
        torch.testing.assert_close(found, direct)


ONE, WIDE = np.ones((2, 2)), np.ones((2, 3))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        *((lambda given=given: tt.unfold(given, 0), error, text) for given, error, text in (
            (["a"], BackendError, "must hold numbers"),
            (None, BackendError, "got NoneType"),
            (np.array(["a"]), BackendError, "dtype"),
            (np.ma.masked_array([1.0, 2.0], [True, False]), BackendError, "mask=~array.mask"),
        )),
        (lambda: tt.unfold(WIDE, 2), ShapeError, "mode must be from 0 to 1 .*got 2"),
        (lambda: tt.unfold(WIDE, True), ShapeError, "mode must be"),
        (lambda: tt.fold(WIDE, 0, (2, 2)), ShapeError, r"has shape \(2, 2\); got \(2, 3\)"),
        (lambda: tt.mode_dot(WIDE, np.ones((4, 2)), 1), ShapeError, "expected 3 columns"),
        (lambda: tt.mode_dot(WIDE, np.ones(2), 1), ShapeError, "expected 3 elements"),
        (lambda: tt.mode_dot(WIDE, np.ones((1, 1, 1)), 1), ShapeError, "a matrix or a vector"),
        (lambda: tt.mode_dot(WIDE, np.ones((1, 3), np.float32), 1), BackendError, "two dtypes"),
        *((lambda make=make, x=x: make((3, 4, 2), 1).mode_dot(x, 1), ShapeError,
           rf"{size} does not multiply mode 1 of a tensor of shape \(3, 4, 2\): expected 4 {of}")
          for make in (tt.random_cp, tt.random_tucker, tt.random_tt, tt.random_tr)
          for x, size, of in ((np.ones(3), r"shape \(3,\)", "elements"), (np.ones((4, 3)), r"\(4, 3\)", "columns"))),
        (lambda: tt.random_cp((3, 2), 1).mode_dot(np.ones(2), 2), ShapeError, "mode must be from 0 to 1"),
        (lambda: tt.random_cp((3, 2), 1).mode_dot(np.ones((1, 1, 2)), 1), ShapeError, "takes a matrix or a vector"),
        (lambda: tt.random_tt((3, 2), 1).mode_dot(np.ones(2, np.float32), 1), BackendError, "two dtypes"),
        (lambda: tt.multi_mode_dot(WIDE, [np.ones((1, 2))] * 2, [0, 0]), ShapeError, "occurs twice"),
        (lambda: tt.multi_mode_dot(WIDE, [np.ones((1, 2))] * 3), ShapeError, "3 matrices or vectors"),
        (lambda: tt.khatri_rao([WIDE, np.ones((2, 2))]), ShapeError, "as many columns as matrix 0"),
        (lambda: tt.khatri_rao([]), ShapeError, "at least one array"),
        (lambda: tt.khatri_rao(3), ShapeError, "a list of arrays"),
        (lambda: tt.row_khatri_rao([WIDE, np.ones((3, 3))]), ShapeError, "as many rows as matrix 0"),
        (lambda: tt.inner(np.ones(2), np.ones(3)), ShapeError, "do not contract"),
        (lambda: tt.inner(np.ones(2), WIDE), ShapeError, "do not contract"),
        (lambda: tt.outer([np.ones(2), np.ones(2, np.float32)]), BackendError, "two dtypes"),
        (lambda: tt.CPTensor(None, []), ShapeError, "at least one array"),
        (lambda: tt.CPTensor(None, [ONE, np.ones((2, 3))]), ShapeError, "CP factor 1 .*as many columns as CP factor 0"),
        (lambda: tt.CPTensor(np.ones(3), [ONE]), ShapeError, r"CP weights .*expected \(2,\)"),
        (lambda: tt.CPTensor(None, [ONE, ONE.astype(np.float32)]), BackendError, "two dtypes"),
        (lambda: tt.TuckerTensor(ONE, [ONE]), ShapeError, "needs 2 factors; got 1"),
        (lambda: tt.TuckerTensor(ONE, [ONE, np.ones((2, 3))]), ShapeError, "Tucker factor 1"),
        (lambda: tt.TTTensor([ONE]), ShapeError, r"core 0 of a tensor train has shape \(2, 2\)"),
        (lambda: tt.TTTensor([np.ones((1, 2, 2)), np.ones((3, 2, 1))]), ShapeError, r"expected \(2, size, 1\)"),
        (lambda: tt.TRTensor([np.ones((2, 2, 3)), np.ones((3, 2, 4))]), ShapeError, "ends with rank 4"),
        (lambda: tt.TTMatrix([np.ones((1, 2, 2, 2))]), ShapeError, "core 0 of a TT matrix"),
        (lambda: tt.KroneckerTensor(None, [[ONE, np.ones(2)]]), ShapeError, "same number of axes"),
        (lambda: tt.KroneckerTensor(None, [[ONE, ONE], [ONE, np.ones((1, 2))]]), ShapeError, "like term 0"),
        (lambda: tt.KroneckerTensor(np.ones(2), [[ONE, ONE]]), ShapeError, "one per term"),
        (lambda: tt.KroneckerTensor(None, [[ONE], [ONE]]).factors, ShapeError, "use terms"),
        (lambda: tt.KroneckerTensor(None, [[ONE, ONE]]).part(slice(1, 3)), ShapeError, "has no such part"),
        (lambda: tt.HadamardTensor([ONE]), ShapeError, "a list of CP tensors"),
        (lambda: tt.random_cp((2, 2), 1) + tt.random_cp((2, 3), 1), ShapeError, "expected the same shape"),
        (lambda: tt.random_cp((2, 2), 1).inner(tt.random_tt((2, 3), 1)), ShapeError, "expected the same shape"),
        (lambda: tt.random_cp((2, 2), 1).inner([[1.0, 2.0]]), ShapeError, r"a tensor or an array of shape \(2, 2\)"),
        (lambda: tt.random_cp((2, 2), 1) - tt.random_tt((2, 3), 1), ShapeError, "expected the same shape"),
        (lambda: tt.random_cp((2, 2), 1) + np.ones((2, 3)), ShapeError, r"other has shape \(2, 3\); expected \(2, 2\)"),
        (lambda: np.ones(2) - tt.random_cp((2, 2), 1), ShapeError, r"other has shape \(2,\); expected"),
        (lambda: tt.random_cp((2, 2), 1) + np.ones((2, 2), np.float32), BackendError, "two dtypes"),
        (lambda: tt.random_cp((2, 2), 1) + tt.random_tt((2, 2), 1, dtype="float32"), BackendError, "two dtypes"),
        (lambda: tt.random_cp((2, 2), 1).inner(tt.random_tt((2, 2), 1, dtype="float32")), BackendError, "two dtypes"),
        (lambda: tt.random_cp((2, 2), 1) - [[1.0, 2.0], [3.0, 4.0]], TypeError, "unsupported"),
        (lambda: tt.inner(tt.random_cp((2, 2), 1), np.ones((2, 2)), 1), ShapeError, "contracted over all 2 modes"),
        (lambda: tt.unfold(tt.random_tr((3, 3), 2), 0), BackendError, r"is a TRTensor: give its to_tensor\(\)"),
        (lambda: tt.unfold(tensorly.random.random_cp((3, 3), 2), 0), BackendError, "a CPTensor: give its to_tensor"),
        (lambda: MATRIX + tt.random_cp(MATRIX.shape, 1), ShapeError, "no common form that is smaller than the whole"),
        (lambda: tt.random_tr(MATRIX.shape, 1) * MATRIX, ShapeError, "a TRTensor and a TTMatrix have no common form"),
        (lambda: MATRIX @ tt.random_tt((3, 2, 1), 2), ShapeError,
         r"columns in modes \(3, 1, 2\) do not multiply a train of shape \(3, 2, 1\)"),
        (lambda: tt.random_cp((2, 2), 1) + 1, TypeError, "unsupported"),
        (lambda: tt.random_cp((2, 2), 1).entry(0), ShapeError, "index must be 2 integers .*; got 1"),
        (lambda: tt.random_cp((2, 2), 1).entry(0, 2), ShapeError, "index 2 is out of range for mode 1"),
        (lambda: tt.random_cp((2, 2), 1).entries([[0.0, 1.0]]), ShapeError, "must be integers"),
        (lambda: tt.random_cp((2, 2), 1).part(0, 0, 0), ShapeError, "has 2 modes; got 3"),
        (lambda: tt.random_cp((2, 2), 1).part(slice(2, 3)), ShapeError, "takes|must take"),
        (lambda: tt.random_cp((2, 2), 1).part(slice(None, None, -1)), ShapeError, "positive step"),
        (lambda: tt.random_tt((2, 2), 1).round(), ShapeError, "either rank= or max_error="),
        (lambda: tt.random_tt((2, 2), 1).round(max_error=1.0), ConfigError, "from 0 to below 1"),
        (lambda: tt.random_tt((2, 2), (1, 2)), ShapeError, "one for each of the 1 bonds"),
        (lambda: tt.random_cp((2, 3), 3, orthogonal=True), ShapeError, "at most 2"),
        (lambda: tt.random_cp((2, 0), 3), ShapeError, "at least 1"),
        (lambda: tt.random_cp((), 3), ShapeError, "shape is empty"),
        (lambda: MATRIX @ np.ones(3), ShapeError, r"expected \(6,\)"),
        (lambda: MATRIX @ MATRIX, ShapeError, "do not multiply rows"),
        (lambda: MATRIX + MATRIX.T, ShapeError, "shape|modes"),
        # NumPy would stack cores of equal shapes, and return a wrong product.
        *((lambda product=product: product(tt.random_tr((3, 3), 2)), TypeError, "unsupported op|not support ufuncs")
          for product in (lambda x: np.ones(2) * x, lambda x: x * np.ones(2), lambda x: x / np.ones(2))),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_draws_repeat() -> None:
    for make in MAKERS.values():
        assert np.array_equal(make((3, 4), 5).to_tensor(), make((3, 4), 5).to_tensor())
    for generator in (np.random.default_rng, np.random.RandomState):
        used, again = generator(5), generator(5)
        first, second, same = (tt.random_cp((3,), 1, random_state=one).factors[0] for one in (used, used, again))
        assert np.array_equal(first, same)
        assert not np.array_equal(first, second)


# -- Files, and other libraries, dtypes and devices ------------------------------------------------


@pytest.mark.law("tensor-files")
@given(
    st.sampled_from(sorted(EVERY)), st.lists(st.integers(1, 3), min_size=1, max_size=12).map(tuple),
    st.sampled_from(["float64", "float32", "complex128", "complex64"]),
)  # fmt: skip
def test_files_have_the_bits(form: str, shape: tuple[int, ...], dtype: str) -> None:
    tensor = EVERY[form](shape[:3] if "kronecker" in form else shape, 1, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensor.safetensors"
        path.write_bytes(b"replaced")
        tensor.save(path)
        content = path.read_bytes()
        again = tt.load(path)
        assert os.listdir(folder) == [path.name]
        # Any reader of safetensors gets the same numbers.
        with safe_open(path, "np") as file:
            assert json.loads(file.metadata()["tensor"]) == {
                "dtype": dtype,
                "kind": type(tensor).__name__,
                "version": 1,
            }
            sizes = [file.get_tensor(name).size for name in list(file.keys())]
        assert sum(sizes) == tensor.num_parameters * (2 if dtype.startswith("complex") else 1)
        again.save(path)
        assert path.read_bytes() == content
    assert type(again) is type(tensor)
    assert [array.dtype for array in again.arrays] == [dtype] * len(tensor.arrays)
    assert all(np.array_equal(a, b) for a, b in zip(again.arrays, tensor.arrays, strict=True))
    assert again.shape == tensor.shape
    assert again.outcome is None


def test_files_name_their_arrays(tmp_path: Path) -> None:
    path = tmp_path / "ring.safetensors"
    tt.TRTensor([np.arange(4.0).reshape(2, 1, 2)]).save(str(path))
    with safe_open(path, "np") as file:
        assert list(file.keys()) == ["cores.0"]
    tt.TuckerTensor(1j * np.ones((1, 1)), [np.ones((2, 1)) + 0j] * 2).save(path)
    with safe_open(path, "np") as file:
        assert sorted(file.keys()) == ["core", "factors.0", "factors.1"]
        assert np.array_equal(file.get_tensor("core"), [[[0.0, 1.0]]])


def tensor_file(path: Path, arrays: Any = None, recipe: Any = None, **metadata: str) -> Path:
    """Write a file of a CP tensor, or of what is given instead."""
    arrays = {"factors.0": np.ones((2, 1)), "factors.1": np.ones((3, 1))} if arrays is None else arrays
    recipe = {"dtype": "float64", "kind": "CPTensor", "version": 1} if recipe is None else recipe
    save_file(arrays, path, {"tensor": recipe if isinstance(recipe, str) else json.dumps(recipe), **metadata})
    return path


GOOD, PAIR = {"dtype": "float64", "kind": "CPTensor", "version": 1}, np.ones((2, 1))


@pytest.mark.law("tensor-files")
@pytest.mark.parametrize(
    ("arrays", "recipe", "text"),
    [
        (None, {**GOOD, "version": 2}, "has version 2 of the format of tensors; this release reads up to 1: update it"),
        (None, {**GOOD, "version": True}, "must have version 1, kind and dtype"),
        (None, {**GOOD, "more": 1}, "must have version 1, kind and dtype"),
        (None, {"version": 1}, "must have version 1, kind and dtype"),
        (None, "[]", "the entry 'tensor' must be a JSON object"),
        (None, "{", "the entry 'tensor' is not JSON"),
        (None, {**GOOD, "kind": "Decomposed"}, "has the kind 'Decomposed'; expected one of CPTensor"),
        (None, {**GOOD, "kind": ["CPTensor"]}, "has the kind"),
        (None, {**GOOD, "dtype": "int64"}, "has the dtype 'int64'; expected one of float64"),
        (None, {**GOOD, "dtype": "float32"}, "'factors.0' is F64; expected F32"),
        (None, {**GOOD, "dtype": "complex128"}, "'factors.0' has shape .*expected two numbers for each element"),
        (None, {**GOOD, "kind": "TTTensor"}, "'factors.0' is no array of a TTTensor"),
        ({}, GOOD, "has no factors of a CPTensor"),
        ({}, {**GOOD, "kind": "TRTensor"}, "has no cores of a TRTensor"),
        ({"factors.0": PAIR}, {**GOOD, "kind": "TuckerTensor"}, "has no core of a TuckerTensor"),
        ({"parts.0.weights": np.ones(1)}, {**GOOD, "kind": "HadamardTensor"}, "has no factors of a CPTensor"),
        ({"factors.1": PAIR}, GOOD, "has 1 of factors, and no 0"),
        ({"factors.0": PAIR, "factors.00": PAIR}, GOOD, "'factors.00' is no array"),
        ({"factors.0": PAIR, "factors.2": PAIR}, GOOD, "has 2 of factors, and no 1"),
        ({"terms.0.1": PAIR}, {**GOOD, "kind": "KroneckerTensor"}, "has 1 of terms.0, and no 0"),
        ({"factors.0": PAIR, "other": PAIR}, GOOD, "'other' is no array of a CPTensor"),
        ({"factors.0": np.ones(2)}, GOOD, "CP factor 0 has shape .*expected a matrix"),
        ({"cores.0": np.ones((1, 2, 3))}, {**GOOD, "kind": "TTTensor"}, r"core 0 of a tensor train has shape"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_are_refused(arrays: Any, recipe: Any, text: str, tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "file.safetensors", arrays, recipe)
    with pytest.raises(FileError, match=f"^{re.escape(str(path))}: .*{text}"):
        tt.load(path)


def test_what_is_no_file_of_a_tensor_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"factors.0": PAIR}, path)
    with pytest.raises(FileError, match=r"its metadata have no entry 'tensor'\. tnadapt\.load reads adapters"):
        tt.load(path)
    with pytest.raises(FileError, match="No such file"):
        tt.load(tmp_path / "none")
    path.write_bytes(pickle.dumps(tt.random_cp((2, 3), 1)))
    with pytest.raises(FileError, match="is a pickle"):
        tt.load(path)
    with pytest.raises(FileError, match=r"the folder .* does not exist; make it first"):
        tt.random_cp((2, 3), 1).save(tmp_path / "missing" / "file")

    class Other(tt.TTTensor):
        """A class that files do not know."""

    with pytest.raises(FileError, match="a Other has no file; expected one of CPTensor"):
        Other([np.ones((1, 2, 1))]).save(path)


@pytest.mark.law("tensor-files")
@given(st.sampled_from(sorted(EVERY)), st.data())
def test_a_damaged_file_is_a_tensor_or_a_file_error(form: str, data: st.DataObject) -> None:
    tensor = EVERY[form]((2, 2), 1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensor.safetensors"
        tensor.save(path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, min(len(content), 400) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) - 8, 100, 4]))])
        with contextlib.suppress(FileError):
            assert isinstance(tt.load(path), (tt.Decomposed, tt.Parafac2Tensor))


@pytest.mark.parametrize("form", EVERY)
def test_tensors_move_to_every_library(form: str, backend: Backend, tmp_path: Path) -> None:
    with backend.double_precision():
        host = EVERY[form]((3, 2), 1)
        host.with_outcome(tt.FitOutcome(error=0.5, bound=0.25, certified=False, method="ALS"))
        moved = host.to(backend=backend.name)
        assert all(backend.owns(array) and backend.dtype_name(array) == "float64" for array in moved.arrays)
        assert moved.outcome is host.outcome
        back = moved.to(backend="numpy")
        assert all(np.array_equal(a, b) for a, b in zip(back.arrays, host.arrays, strict=True))
        assert type(back) is type(moved) is type(host)
        for dtype in ("float32", "complex64", "complex128"):
            for cast in (moved.to(dtype=dtype), host.to(backend=backend.name, dtype=dtype)):
                assert {backend.dtype_name(array) for array in cast.arrays} == {dtype}
                assert relative_error(backend.to_numpy(cast.to_tensor()), host.to_tensor()) < 1e-5
        # A file is written from any library.
        moved.save(tmp_path / "file")
        assert np.array_equal(tt.load(tmp_path / "file").to_tensor(), host.to_tensor())


def test_what_cannot_move_is_refused() -> None:
    cp = tt.random_cp((2, 3), 1)
    assert cp.to(device="cpu").factors[0] is not cp.factors[0]
    for words, text in (
        ({"backend": "nunpy"}, "no backend named 'nunpy'"),
        ({"dtype": "float16"}, "compute in one of float64, float32, complex128, complex64; got the dtype 'float16'"),
        ({"dtype": "int64"}, "got the dtype 'int64'"),
        ({"device": "cuda"}, "numpy arrays live on 'cpu'"),
    ):
        with pytest.raises(BackendError, match=text):
            cp.to(**words)
    with pytest.raises(BackendError, match="a tensor in complex64 does not become float32: take the real"):
        cp.to(dtype="complex64").to(dtype="float32")
    torch = pytest.importorskip("torch")
    leaf = torch.ones((2, 1), dtype=torch.float64, requires_grad=True)
    tt.CPTensor(None, [leaf]).to(dtype="float32").norm().backward()
    assert torch.allclose(leaf.grad, torch.full_like(leaf, 0.5**0.5))
