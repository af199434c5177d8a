"""Hadamard products of matrices of low rank are found from the space of their rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnadapt.decomposition import _hadamard_fit as subspace
from tnadapt.decomposition._hadamard_fit import subspace_start


def product(shape: tuple[int, int], ranks: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) for rank in ranks)
    return math.prod(parts, start=np.ones(shape))


def error_of(pairs: list[tuple[np.ndarray, np.ndarray]], matrix: np.ndarray) -> float:
    made = math.prod((a @ b.T for a, b in pairs), start=np.ones(matrix.shape))
    return float(np.linalg.norm(made - matrix) / np.linalg.norm(matrix))


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((8, 12), (2, 2)), ((14, 9), (2, 2)), ((12, 24), (2, 3)), ((12, 24), (1, 2, 3)), ((9, 9), (1, 3))],
)
def test_what_is_such_a_product_is_found(shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    matrix = product(shape, ranks, 1)
    found = subspace_start(matrix, ranks, 1.0, np.random.RandomState(0))
    assert found is not None
    assert [(a.shape, b.shape) for a, b in found] == [((shape[0], r), (shape[1], r)) for r in ranks]
    assert error_of(found, matrix) < 1e-4
    assert np.linalg.matrix_rank(found[-1][1]) == ranks[-1]


def test_noise_is_left_over() -> None:
    matrix = product((10, 14), (2, 2), 3)
    noisy = matrix + 0.01 * np.linalg.norm(matrix) / math.sqrt(matrix.size) * np.random.default_rng(0).normal(
        size=(10, 14)
    )
    found = subspace_start(noisy, (2, 2), 0.5, np.random.RandomState(0))
    assert found is not None
    assert error_of(found, noisy) < 0.03


@given(st.integers(6, 12), st.integers(10, 12), st.integers(0, 100), st.floats(0.01, 1.0))
@settings(max_examples=5)
def test_a_result_is_better_than_what_was_known(rows: int, cols: int, seed: int, error: float) -> None:
    matrix = product((rows, cols), (2, 2), seed)
    found = subspace_start(matrix, (2, 2), error, np.random.RandomState(seed))
    assert found is None or error_of(found, matrix) < error


def test_a_matrix_far_from_the_rank_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_Search", None)
    noise, rng = np.random.default_rng(0).normal(size=(9, 12)), np.random.RandomState(0)
    assert subspace_start(noise, (2, 2), 0.5, rng) is None
    # The space of the rows determines no product of rank 9 or more.
    assert subspace_start(product((9, 12), (3, 3), 1), (3, 3), 0.5, rng) is None


def test_of_many_columns_some_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = product((9, 300), (2, 2), 1)
    sizes = set[int]()
    search = subspace._Search.round
    monkeypatch.setattr(subspace._Search, "round", lambda self: (sizes.add(self.size), search(self))[1])
    found = subspace_start(matrix, (2, 2), 1.0, np.random.RandomState(0))
    assert found is not None
    assert found[0][1].shape == (300, 2)
    assert error_of(found, matrix) < 1e-4
    assert sizes == {40}
