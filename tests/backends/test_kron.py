"""The Kronecker product by rows is the plain one, in every library, and each library's own is, too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.backends import Backend, get_backend, kron_by_rows, kron_plain, short_rows

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


def test_short_rows_of_long_results_only() -> None:
    def ask(a: Any, b: Any, limit: int = 8) -> bool:
        return short_rows(a, b, limit, 1 << 14)

    assert ask((100, 100), (8, 8))
    assert not ask((100, 100), (8, 9))
    assert not ask((8, 8), (8, 8))
    assert ask((16, 16), (8, 8))
    assert not ask((16, 15), (8, 8))
    assert not ask((1, 10000), (8, 8))
    assert not ask((100, 100), (1, 8))
    assert not ask((10000,), (8,))


def test_memory_that_is_not_in_c_order() -> None:
    torch = pytest.importorskip("torch")
    a = torch.arange(24.0).reshape(4, 6)
    for left, right in ((a.T, a), (a, a.T), (a[:, ::2], a[::2]), (a[None, None], a.T[None].expand(2, 3, 6, 4)[:1])):
        b = right if right.ndim == left.ndim else right[None]
        found = get_backend(left).kron(left, b)
        np.testing.assert_array_equal(found.numpy(), np.kron(left.numpy(), b.numpy()))
