"""Kronecker products by rows against plain ones, in every library, and thin matrix products against ``a @ b``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import relative_error
from tnadapt.backends import Backend, get_backend, kron_by_rows, kron_plain, load_backend

from .internals import numpy_backend
from .layouts import LAYOUTS, laid_out

# -- Kronecker products ----------------------------------------------------------------------------------

SIZES = st.integers(1, 6)


@given(st.data(), st.integers(1, 4))
def test_by_rows_is_the_plain_product(data: Any, order: int) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=data.draw(st.tuples(*[SIZES] * order))).astype(np.float32) for _ in range(2))
    backend = get_backend(a)
    found = kron_by_rows(backend, a, b)
    np.testing.assert_array_equal(found, kron_plain(backend, a, b))
    np.testing.assert_array_equal(found, np.kron(a, b))


@pytest.mark.parametrize("sizes", [((70, 30), (20, 4)), ((3, 5, 40), (4, 2, 3)), ((100, 2), (100, 64))])
def test_every_library_agrees_with_the_plain_product(backend: Backend, sizes: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (backend.asarray(rng.normal(size=size), "float32") for size in sizes)
    found = backend.to_numpy(backend.kron(a, b))
    np.testing.assert_array_equal(found, backend.to_numpy(kron_plain(backend, a, b)))
    # Zeros keep their sign, and what is not finite stays so.
    odd = backend.asarray(np.array([[-0.0, 2.0], [np.nan, 1.0]]), "float32")
    found = backend.to_numpy(kron_by_rows(backend, odd, odd))
    np.testing.assert_array_equal(found, backend.to_numpy(kron_plain(backend, odd, odd)))
    np.testing.assert_array_equal(np.signbit(found[0, :1]), [False])


def test_memory_that_is_not_in_c_order() -> None:
    torch = pytest.importorskip("torch")
    a = torch.arange(24.0).reshape(4, 6)
    for left, right in ((a.T, a), (a, a.T), (a[:, ::2], a[::2]), (a[None, None], a.T[None].expand(2, 3, 6, 4)[:1])):
        b = right if right.ndim == left.ndim else right[None]
        found = get_backend(left).kron(left, b)
        np.testing.assert_array_equal(found.numpy(), np.kron(left.numpy(), b.numpy()))


# -- Thin matrix products --------------------------------------------------------------------------------

thin_product = numpy_backend.thin_product


@pytest.fixture
def blocks_of_a_few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink the limits, so that small products reach every edge case."""
    for name, value in {"_LEAST": 1, "_BLOCK": 24, "_COLUMNS": 8, "_LEAST_COLUMNS": 2}.items():
        monkeypatch.setattr(numpy_backend, name, value)


HOW = st.sampled_from([how for how in LAYOUTS if how != "repeated"])


@pytest.mark.usefixtures("blocks_of_a_few_elements")
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


@pytest.mark.usefixtures("blocks_of_a_few_elements")
@pytest.mark.law("not-finite-shows")
@pytest.mark.filterwarnings("ignore:invalid value")
def test_nan_and_infinity_stay_in_their_rows_and_columns(rng: np.random.Generator) -> None:
    a, b = rng.normal(size=(30, 3)), rng.normal(size=(3, 30))
    a[7, 1], b[2, 20], a[11, 0], b[0, 3] = np.nan, np.nan, np.inf, 0.0
    found = thin_product(a, b)
    assert found is not None
    np.testing.assert_allclose(found, a @ b, rtol=1e-12)
    assert np.isnan(found).sum() == np.isnan(a @ b).sum() > 30


@pytest.mark.usefixtures("blocks_of_a_few_elements")
def test_the_backend_takes_it_or_leaves_the_product_to_numpy(rng: np.random.Generator) -> None:
    x, backend = rng.normal(size=(30, 30)), load_backend("numpy")
    assert thin_product(x[:, :3], x[:3]) is not None
    for a, b in (
        (x, x),  # thick
        (x[:, :0], x[:0]),
        (x[:, :2], x[:2, :1]),
        (x[:, :2].astype(np.float16), x[:2].astype(np.float16)),
        (x[:, :2].astype(np.float32), x[:2]),
        (np.ones((2, 30, 2)), x[:2]),
    ):
        assert thin_product(a, b) is None
        assert np.array_equal(backend.matmul(a, b), a @ b)
    assert np.array_equal(backend.matmul(x[:, :3], x[:3]), thin_product(x[:, :3], x[:3]))
    assert thin_product(x[:, :2], x[:3]) is None
    with pytest.raises(ValueError):
        backend.matmul(x[:, :2], x[:3])
