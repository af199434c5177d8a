"""Thin matrix products against ``a @ b``."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import relative_error
from tnadapt.backends import _numpy as implementation
from tnadapt.backends import load_backend
from tnadapt.backends._numpy import thin_product


@pytest.fixture(autouse=True)
def _blocks_of_a_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the limits, so that small products reach every edge case."""
    for name, value in {"_LEAST": 1, "_BLOCK": 24, "_COLUMNS": 8, "_LEAST_COLUMNS": 2}.items():
        monkeypatch.setattr(implementation, name, value)


def laid_out(array: np.ndarray, how: str) -> np.ndarray:
    """Return the same numbers in another memory layout."""
    if how == "transposed":
        return np.asfortranarray(array)
    if how == "strided":
        return np.repeat(np.repeat(array, 2, axis=0), 3, axis=1)[::2, ::3]
    if how == "backwards":
        return array[::-1, ::-1].copy()[::-1, ::-1]
    if how == "unaligned":
        raw = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
        raw[...] = array
        array = raw
    array.setflags(write=False)
    return array


HOW = st.sampled_from(["plain", "transposed", "strided", "backwards", "unaligned"])


@pytest.mark.law("kernels-agree")
@given(st.integers(1, 40), st.integers(1, 16), st.integers(2, 40), HOW, HOW, st.sampled_from([np.float32, np.float64]))
@settings(max_examples=200)
def test_it_is_the_product(height: int, inner: int, width: int, one: str, other: str, dtype: type) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(height, inner)).astype(dtype), rng.normal(size=(inner, width)).astype(dtype)
    found = thin_product(laid_out(a.copy(), one), laid_out(b.copy(), other))
    assert found is not None
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    assert relative_error(found, a @ b) < 8 * np.finfo(dtype).eps


@pytest.mark.law("not-finite-shows")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinity_stay_in_their_rows_and_columns(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(3, 30))
    a[7, 1], b[2, 20], a[11, 0], b[0, 3] = np.nan, np.nan, np.inf, 0.0
    found = thin_product(a, b)
    assert found is not None
    np.testing.assert_allclose(found, a @ b, rtol=1e-12)
    assert np.isnan(found).sum() == np.isnan(a @ b).sum() > 30


def test_products_that_are_left_to_numpy() -> None:
    x = np.ones((30, 30))
    assert thin_product(x, x) is None  # thick
    assert thin_product(x[:, :0], x[:0]) is None
    assert thin_product(x[:, :2], x[:2, :1]) is None
    assert thin_product(x[:, :2], x[:3]) is None
    assert thin_product(x[:, :2].astype(np.float16), x[:2].astype(np.float16)) is None
    assert thin_product(x[:, :2].astype(np.float32), x[:2]) is None
    assert thin_product(np.ones((2, 30, 2)), x[:2]) is None


def test_the_backend_takes_it(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(3, 30))
    found = load_backend("numpy").matmul(a, b)
    assert np.array_equal(found, thin_product(a, b))
    with pytest.raises(ValueError):
        load_backend("numpy").matmul(a, b[:2])
