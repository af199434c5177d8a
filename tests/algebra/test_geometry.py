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


def test_orthogonal_spaces_and_zero_updates() -> None:
    one, two, zero = np.zeros((6, 6)), np.zeros((6, 6)), np.zeros((3, 3))
    one[:2, :2], two[2:4, 2:4] = np.diag([2.0, 1.0]), np.diag([2.0, 1.0])
    assert np.allclose(tna.geometry(one, two, 2), (0.0, 0.0, np.sqrt(2.0)), atol=1e-12)
    assert tna.geometry(zero, zero, 1).d_euclid == 0.0
    assert tna.geometry(zero, np.eye(3), 1).d_euclid == np.inf


EYE = np.eye(3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((EYE, np.eye(4)), tna.ShapeError, "the same shape"),
        ((np.ones(3), np.ones(3)), tna.ShapeError, "the same shape"),
        ((EYE, EYE, 0), tna.ShapeError, "k must be from 1 to 3"),
        ((EYE, EYE, 4), tna.ShapeError, "k must be from 1 to 3"),
        ((1j * EYE, EYE.astype(complex), 1), tna.BackendError, "complex128"),
        ((EYE, EYE.astype(np.float32)), tna.BackendError, "dtypes"),
        *(
            (pair, tna.ShapeError, "geometry needs finite updates; one of them has a NaN or an infinity")
            for number in (np.nan, np.inf, -np.inf)
            for pair in ((EYE, np.where(EYE, number, 1.0), 2), (np.where(EYE, number, 1.0), EYE, 2))
        ),
    ],
)
def test_bad_input(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tna.geometry(*arguments)
