"""Similarity and distance of updates: equations 5 to 7 of the paper."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import peak_of
from tnadapt.backends import Backend


@given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 100), st.data())
def test_an_update_is_near_itself(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    dense = np.random.default_rng(seed).normal(size=(rows, cols))
    k = data.draw(st.integers(1, min(rows, cols)))
    found = tna.geometry(dense, dense, k)
    assert np.allclose(found, (1.0, 1.0, 0.0), atol=1e-12)
    # Scale and sign leave the singular spaces as they are.
    turned = tna.geometry(dense, -2.0 * dense, k)
    assert np.allclose(turned, (1.0, 1.0, 3.0), atol=1e-12)


def test_orthogonal_spaces() -> None:
    one, two = np.zeros((6, 6)), np.zeros((6, 6))
    one[:2, :2], two[2:4, 2:4] = np.diag([2.0, 1.0]), np.diag([2.0, 1.0])
    assert np.allclose(tna.geometry(one, two, 2), (0.0, 0.0, np.sqrt(2.0)), atol=1e-12)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(number: float, rng: np.random.Generator) -> None:
    update = rng.normal(size=(3, 4))
    broken = update.copy()
    broken[1, 2] = number
    for pair in ((update, broken), (broken, update)):
        with pytest.raises(tna.ShapeError, match="geometry needs finite updates; one of them has a NaN or an infinity"):
            tna.geometry(*pair, 2)


@pytest.mark.parametrize("shape", [(2000, 6), (6, 2000)])
def test_no_more_singular_vectors_are_computed_than_there_are_values(
    shape: tuple[int, int], rng: np.random.Generator
) -> None:
    dense, variant = rng.normal(size=shape), rng.normal(size=shape)
    assert peak_of(lambda: tna.geometry(dense, variant, 2)) < 2 << 20  # all of the long side take 32 MiB


def test_they_go_to_1_and_0_as_the_variant_goes_to_the_dense_update(rng: np.random.Generator) -> None:
    dense = rng.normal(size=(30, 20))
    noise = rng.normal(size=(30, 20))
    path = [tna.geometry(dense, dense + t * noise, k=5) for t in (1.0, 0.1, 0.001, 0.0)]
    assert [p.d_euclid for p in path] == sorted((p.d_euclid for p in path), reverse=True)
    assert [p.d_left for p in path] == sorted(p.d_left for p in path)
    assert [p.d_right for p in path] == sorted(p.d_right for p in path)
    assert np.allclose(path[-1], (1.0, 1.0, 0.0))


def test_every_library(backend: Backend, rng: np.random.Generator) -> None:
    dense, variant = rng.normal(size=(7, 6)), rng.normal(size=(7, 6))
    expected = tna.geometry(dense, variant)
    found = tna.geometry(backend.asarray(dense, "float64"), backend.asarray(variant, "float64"))
    assert np.allclose(found, expected, atol=1e-12)


def test_zero_updates_and_bad_input() -> None:
    zero = np.zeros((3, 3))
    assert tna.geometry(zero, zero, 1).d_euclid == 0.0
    assert tna.geometry(zero, np.eye(3), 1).d_euclid == np.inf
    with pytest.raises(tna.ShapeError, match="the same shape"):
        tna.geometry(np.eye(3), np.eye(4))
    with pytest.raises(tna.ShapeError, match="the same shape"):
        tna.geometry(np.ones(3), np.ones(3))
    for k in (0, 4):
        with pytest.raises(tna.ShapeError, match="k must be from 1 to 3"):
            tna.geometry(np.eye(3), np.eye(3), k)
    with pytest.raises(tna.BackendError, match="complex128"):
        tna.geometry(1j * np.eye(3), np.eye(3, dtype=complex), 1)
    with pytest.raises(tna.BackendError, match="dtypes"):
        tna.geometry(np.eye(3), np.eye(3, dtype=np.float32))
