"""dft2 by an FFT: equal to the products with cosines and sines, for any sides, batch, dtype and slice."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import NUMPY_AND_TORCH, relative_error
from tnadapt.algebra.maps import Dft2
from tnadapt.backends import Backend, load_backend
from tnadapt.backends.backend import FFT_DTYPES

#: Even, odd and prime sides, the shortest ones, and a pair of which one has many factors.
SHAPES = [(1, 1), (1, 6), (7, 1), (2, 2), (9, 5), (16, 16), (31, 37), (66, 128), (131, 96)]
ROUNDING = {"float64": 1e-12, "float32": 2.0**-20}


def with_fft() -> Any:
    """Return a context in which sides do not matter."""
    return mock.patch("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", 0)


def fourier(rows: int, cols: int) -> Dft2:
    return Dft2(rows * cols, rows * cols, shape=(rows, cols))


@pytest.mark.law("projection-adjoint", "projection-slice")
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    batch=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from(FFT_DTYPES),
    library=st.sampled_from(NUMPY_AND_TORCH),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_the_fft_is_the_product_with_cosines_and_sines(
    rows: int, cols: int, batch: list[int], dtype: str, library: str, seed: int, data: st.DataObject
) -> None:
    b, f = load_backend(library), fourier(rows, cols)
    x = b.asarray(np.random.default_rng(seed).normal(size=(*batch, f.n_in)), dtype)
    start = data.draw(st.integers(0, f.n_out - 1))
    stop = data.draw(st.integers(start + 1, f.n_out))
    with with_fft():
        found, back, part = f.forward(b, x), f.adjoint(b, x), f.slice(b, x, start, stop)
    assert b.dtype_name(found) == dtype
    assert relative_error(b.to_numpy(found), b.to_numpy(f.forward_plain(b, x))) < ROUNDING[dtype]
    assert np.array_equal(b.to_numpy(back), b.to_numpy(found))  # its matrix is symmetric
    assert np.array_equal(b.to_numpy(part), b.to_numpy(found)[..., start:stop])


@pytest.mark.law("projection-adjoint", "projection-slice")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [0, 8, 10**9], ids=["FFT", "chosen", "products"])
def test_every_library_computes_numpys_transform(
    backend: Backend, shape: tuple[int, int], rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", rate)
    x = np.random.default_rng(0).normal(size=(2, math.prod(shape)))
    f = tna.Projection.on_weights("dft2", [shape])
    expected = np.fft.ifft2(x.reshape(2, *shape)).real.reshape(2, -1)
    theirs = backend.asarray(x, "float64")
    assert relative_error(backend.to_numpy(f(theirs)), expected) < 1e-12
    assert relative_error(backend.to_numpy(f.adjoint(theirs)), expected) < 1e-12
    start, stop = f.n_out // 3, f.n_out // 3 + 1
    assert relative_error(backend.to_numpy(f.slice(theirs, start, stop)), expected[:, start:stop]) < 1e-12


# The half-precision dtypes of each library; array_api_strict has none.
HALVES = {
    "numpy": ["float16"],
    "cupy": ["float16"],
    "torch": ["float16", "bfloat16"],
    "jax": ["float16", "bfloat16"],
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_single_and_rounded_once(backend: Backend, dtype: str) -> None:
    numbers = np.random.default_rng(0).normal(size=96)
    if dtype not in HALVES.get(backend.name, ()):
        with pytest.raises(tna.BackendError, match=dtype):
            backend.asarray(numbers, dtype)
        return
    x = backend.asarray(numbers, dtype)
    f = tna.Projection.on_weights("dft2", [(8, 12)])
    expected = backend.astype(f(backend.astype(x, "float32")), dtype)
    assert np.array_equal(backend.to_numpy(f(x)), backend.to_numpy(expected))


@pytest.mark.parametrize("library", NUMPY_AND_TORCH)
@pytest.mark.parametrize("chunk", [1, 12 * 7, 2 * 12 * 7 + 1, 4 * 12 * 7])
def test_a_batch_in_chunks(library: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    b, f = load_backend(library), fourier(12, 7)
    x = b.asarray(np.random.default_rng(0).normal(size=(5, f.n_in)), "float64")
    expected = b.to_numpy(f.forward_plain(b, x))
    monkeypatch.setattr("tnadapt.backends.backend._CHUNK", chunk)
    with with_fft():
        assert relative_error(b.to_numpy(f.forward(b, x)), expected) < 1e-12


def test_strided_read_only_and_empty_input() -> None:
    b, f = load_backend("numpy"), fourier(4, 6)
    x = np.random.default_rng(0).normal(size=(f.n_in, 6))[:, ::2].T
    x.flags.writeable = False
    kept = x.copy()
    with with_fft():
        assert relative_error(f.forward(b, x), f.forward_plain(b, kept)) < 1e-12
        assert f.forward(b, x[:0]).shape == (0, f.n_out)
    assert np.array_equal(x, kept)


def test_an_array_class_of_its_own_keeps_its_class() -> None:
    class Own(np.ndarray):
        pass

    b, f = load_backend("numpy"), fourier(4, 6)
    x = np.random.default_rng(0).normal(size=f.n_in)
    with with_fft():
        found = f.forward(b, x.view(Own))
    assert type(found) is Own
    assert relative_error(np.asarray(found), f.forward(b, x)) < 1e-12


@pytest.mark.parametrize(
    ("shape", "cost"),
    [
        ((1, 1), 0),
        ((64, 32), 64 * 32 * 11),  # log2 of the number of elements
        ((1, 1024 * 9), 1024 * 9 * (10 * 2 + 2 * 3) / 2),
        ((12, 350), 12 * 350 * (2 + 2 + 3 + 2 + 5 + 5 + 7) / 2),
        ((1, 769), 6 * 11 * 2048 / 2),  # a prime: three transforms of 2048
        ((61, 67), 2 * 61 * 67 * (61 + 67)),  # the products are faster
    ],
)
def test_the_cost_is_that_of_the_faster_way(shape: tuple[int, int], cost: float) -> None:
    assert fourier(*shape).cost() == math.ceil(cost)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nothing_costs_more_than_the_products(rows: int, cols: int) -> None:
    assert fourier(rows, cols).cost() <= 2 * rows * cols * (rows + cols)
