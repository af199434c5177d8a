"""The proof that a subspace is the best one holds for it, and for no other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.decomposition import fits
from tnadapt.decomposition.fits import no_matrix_is_closer


def proved(matrix: np.ndarray, vectors: np.ndarray) -> bool:
    return no_matrix_is_closer(matrix, vectors, float(np.finfo(matrix.dtype).eps))


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["float32", "float64"]))
def test_of_random_subspaces_only_the_best_is_proved(seed: int, rank: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    matrix = (rng.normal(size=(12, 12)) * rng.choice([1.0, 0.1, 1e-3], size=12)).astype(dtype)
    left, values, _ = np.linalg.svd(matrix.astype(np.float64))
    assert proved(matrix, left[:, :rank].astype(dtype))
    chosen = rng.permutation(12)[:rank]
    near = left[:, :rank] + 0.03 * rng.normal(size=(12, rank))
    for other in (left[:, chosen], np.linalg.qr(near)[0], rng.normal(size=(12, rank))):
        u = np.linalg.qr(other)[0]
        wide = matrix.astype(np.float64)
        error, least = np.linalg.norm(wide - u @ (u.T @ wide)), np.linalg.norm(values[rank:])
        if error > least * (1.0 + 1e-7) + 65.0 * np.finfo(dtype).eps * np.linalg.norm(wide):
            assert not proved(matrix, u)


def test_a_large_value_that_the_subspace_misses() -> None:
    values = np.r_[3.0, 2.0, 1.0, np.full(61, 0.2)]
    matrix = np.diag(values)
    assert proved(matrix, np.eye(64)[:, :3])
    for columns in ((0, 1, 3), (1, 2, 3), (0, 2, 5)):
        assert not proved(matrix, np.eye(64)[:, columns])


def test_ties_and_matrices_of_smaller_rank() -> None:
    assert proved(np.eye(20), np.eye(20)[:, 5:8])
    exact = np.diag([1.0, 2.0, *np.zeros(10)])
    assert proved(exact, np.eye(12)[:, :3])
    assert not proved(exact, np.eye(12)[:, :1])
    assert proved(np.zeros((4, 5)), np.eye(4)[:, :1])
    # Magnitudes whose squares would vanish or overflow.
    for size in (1e-200, 1e200):
        assert proved(size * np.diag([3.0, 1.0, 0.5]), np.eye(3)[:, :1])
        assert not proved(size * np.diag([1.0, 3.0, 0.5]), np.eye(3)[:, :1])


def test_too_large_a_matrix_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = np.eye(30)
    monkeypatch.setattr(fits, "_FACTORED", 20)
    assert not proved(flat, flat[:, :1])
    # The Frobenius norm of what is left is enough here.
    assert proved(np.diag([1.0, *np.full(29, 0.1)]), flat[:, :1])
    monkeypatch.setattr(fits, "_ELEMENTS", 20)
    assert not proved(np.diag([1.0, *np.full(29, 0.1)]), flat[:, :1])
