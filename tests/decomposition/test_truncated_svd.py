"""Triplets from a Krylov space are those of the full decomposition, in every library and for difficult spectra."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition import _truncated_svd
from tnadapt.decomposition._truncated_svd import (
    _Bidiagonalization,
    _leading,
    _misses,
    lanczos_pays,
    lanczos_vectors,
    leading_triplets,
    truncated_pays,
)
from tnadapt.decomposition.fits import holds
from tnadapt.decomposition.linear_algebra import Algebra, no_matrix_is_closer

SIZE = 160
NUMPY = load_backend("numpy")


def _orthogonal(seed: int, size: int = SIZE) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def with_values(values: Any, columns: int = SIZE) -> np.ndarray:
    """Return a matrix of 160 rows with these singular values."""
    count = len(values)
    return (_orthogonal(1)[:, :count] * np.asarray(values)) @ _orthogonal(2, columns)[:count]


K = np.arange(SIZE)
SPECTRA = {
    "of rank three": [3.0, 2.0, 1.0],
    "slow": 1.0 / (1.0 + K),
    "fast": 0.5**K,
    "all equal": np.ones(SIZE),
    "repeated": np.r_[2.0, 2.0, 2.0, np.ones(SIZE - 3)],
    "repeated across the rank": np.r_[2.0, np.ones(9), np.full(SIZE - 10, 0.1)],
    "clustered": np.r_[1.0 + 1e-7 * K[:8], np.full(SIZE - 8, 0.5)],
    "small beside large": np.r_[1.0, 1e-3, 1e-5 * np.ones(SIZE - 2)],
    "tiny": 1e-30 / (1.0 + K),
    "with zeros": np.r_[1.0, 0.5, np.zeros(SIZE - 2)],
    "random": np.linalg.svd(np.random.default_rng(3).normal(size=(SIZE, SIZE)), compute_uv=False),
}


def agree(matrix: np.ndarray, u: Any, s: np.ndarray, v: Any, eps: float) -> None:
    """Check triplets against the full decomposition: values, residuals, orthogonality, error, and the subspace."""
    rank, true = len(s), np.linalg.svd(matrix, compute_uv=False)
    u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
    limit = 200.0 * eps * true[0]
    np.testing.assert_allclose(s, true[:rank], atol=limit, rtol=0.0)
    np.testing.assert_allclose(matrix @ v, u * s, atol=limit, rtol=0.0)
    np.testing.assert_allclose(matrix.T @ u, v * s, atol=limit, rtol=0.0)
    for vectors in (u, v):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=200.0 * eps)
    error, least = np.linalg.norm(matrix - (u * s) @ v.T), math.sqrt(np.sum(true[rank:] ** 2))
    assert error <= least + 200.0 * eps * np.linalg.norm(matrix)
    gap = true[rank - 1] - true[rank]
    if gap > 1e-2 * true[0]:
        full = np.linalg.svd(matrix)[0][:, :rank]
        assert np.linalg.norm(full.T @ u, 2) <= 1.0 + 200.0 * eps
        assert np.linalg.norm(u - full @ (full.T @ u)) <= 500.0 * eps * true[0] / gap


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_every_spectrum(name: str, dtype: str) -> None:
    matrix = with_values(SPECTRA[name]).astype(dtype)
    for rank in (1, 3, 7):
        algebra = Algebra(NUMPY, matrix)
        u, s, v, exact = algebra.svd(matrix, rank)
        agree(matrix.astype(np.float64), u, s, v, algebra.eps)
        assert holds(exact), (name, rank)


@pytest.mark.law("decompositions")
@given(st.integers(12, 40), st.integers(1, 3), st.sampled_from([256, 500]), st.booleans())
@example(16, 1, 300, False).via("the space of single vectors reaches the short side")
@example(20, 1, 300, True).via("the space of single vectors reaches the short side")
@settings(max_examples=25)
def test_every_short_side(short: int, rank: int, long: int, tall: bool) -> None:
    # Random numbers: values that decay slowly, for which one block does not converge.
    matrix = np.random.default_rng(short).normal(size=(long, short) if tall else (short, long))
    found = leading_triplets(NUMPY, matrix, rank, 0)
    if found.converged:
        true = np.linalg.svd(matrix, compute_uv=False)[:rank]
        np.testing.assert_allclose(found.s, true, rtol=1e-10)
        np.testing.assert_allclose(matrix @ found.v, found.u * found.s, atol=1e-9 * true[0])


@pytest.mark.parametrize("shape", [(160, 160), (400, 130), (130, 400), (24, 3000)])
def test_every_library(backend: Backend, shape: tuple[int, int]) -> None:
    if backend.name == "array_api_strict":
        pytest.skip("Algebra is for the libraries of TensorLy")
    rng = np.random.default_rng(0)
    host = (rng.normal(size=(shape[0], 2)) @ rng.normal(size=(2, shape[1])) + 0.1 * rng.normal(size=shape)).astype("f")
    matrix = backend.asarray(host, "float32")
    assert truncated_pays(shape, 1)
    full = Algebra(backend, matrix, "full").svd(matrix, 1)
    u, s, v, exact = Algebra(backend, matrix).svd(matrix, 1)
    agree(host.astype(np.float64), backend.to_numpy(u), s, backend.to_numpy(v), float(np.finfo("float32").eps))
    np.testing.assert_allclose(s, full[1], rtol=1e-5)
    assert holds(exact)
    assert full[3] is True
    assert backend.device(u) == backend.device(matrix)
    assert backend.dtype_name(u) == "float32"
    again = Algebra(backend, matrix).svd(matrix, 1)
    np.testing.assert_array_equal(backend.to_numpy(again[0]), backend.to_numpy(u))


@pytest.mark.parametrize("name", ["slow", "repeated", "with zeros"])
def test_a_library_whose_arrays_are_not_on_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_truncated_svd, "on_host", lambda *_: False)
    host = with_values(SPECTRA[name])
    found = leading_triplets(load_backend("torch"), torch.from_numpy(host), 3, seed=0)
    assert found.converged
    agree(host, found.u.numpy(), found.s, found.v.numpy(), float(np.finfo(float).eps))


@pytest.mark.parametrize("name", ["of rank three", "slow", "repeated", "random"])
def test_a_start_that_is_orthogonal_to_the_leading_vectors(name: str) -> None:
    matrix = with_values(SPECTRA[name])
    missed = np.ascontiguousarray(_orthogonal(2)[3:6].T)  # right vectors after the first three
    found = leading_triplets(NUMPY, matrix, 3, seed=0, start=missed)
    # Rounding brings the leading vectors in, or the result is known to be wrong.
    true = np.linalg.svd(matrix, compute_uv=False)
    right = np.allclose(found.s, true[:3], rtol=1e-8)
    assert right or not found.converged or not no_matrix_is_closer(matrix, found.u, float(np.finfo(float).eps))


def test_what_does_not_converge_is_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = with_values(SPECTRA["random"])
    monkeypatch.setattr(_truncated_svd, "lanczos_vectors", lambda *_: (None, False))
    assert not leading_triplets(NUMPY, matrix, 3, seed=0).converged
    u, s, v, exact = Algebra(NUMPY, matrix).svd(matrix, 3)
    agree(matrix, u, s, v, float(np.finfo(float).eps))
    assert exact is True


def test_copies_that_a_single_vector_misses() -> None:
    block = np.random.default_rng(0).normal(size=(32, 32))
    matrix = np.kron(np.eye(8), block)
    true = np.linalg.svd(matrix, compute_uv=False)
    # Single vectors may find the copies that rounding brings in, or nothing; never other values than the largest.
    vectors, _ = lanczos_vectors(matrix, 6, np.random.default_rng(1).normal(size=256))
    if vectors is not None:
        np.testing.assert_allclose(np.linalg.norm(matrix @ vectors[1], axis=0), true[:6], rtol=1e-8)
    np.testing.assert_allclose(Algebra(NUMPY, matrix).svd(matrix, 6)[1], true[:6], rtol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SPECTRA)
def test_right_vectors_stay_orthonormal_until_the_space_ends(name: str, dtype: str) -> None:
    matrix, eps = with_values(SPECTRA[name] / np.max(SPECTRA[name])).astype(dtype), float(np.finfo(dtype).eps)
    run = _Bidiagonalization(matrix, np.random.default_rng(5).normal(size=SIZE).astype(dtype))
    while len(run.alphas) < 100 and not (run.betas and run.betas[-1] <= 16.0 * eps * max(run.alphas)):
        run.step()
    size = len(run.alphas)
    rights, lefts = (np.asarray(rows[:size], np.float64) for rows in (run.rights, run.lefts))
    np.testing.assert_allclose(rights @ rights.T, np.eye(size), atol=100.0 * eps)
    inner = np.diag(run.alphas) + np.diag(run.betas[:-1], 1)
    np.testing.assert_allclose(matrix @ rights.T, lefts.T @ inner, atol=20.0 * eps * max(run.alphas))


@pytest.mark.parametrize("seed", range(3))
def test_close_values_of_a_large_space(seed: int) -> None:
    # Their vectors in a space of a hundred are known up to rounding over the gaps: they must still be orthonormal.
    rng = np.random.default_rng(seed)
    diagonal, above = rng.uniform(0.9, 1.1, 120), rng.uniform(0.9, 1.1, 120)
    left, s, right = _leading(list(diagonal), list(above), 4)
    inner, eps = np.diag(diagonal) + np.diag(above[:-1], 1), float(np.finfo(float).eps)
    np.testing.assert_allclose(s, np.linalg.svd(inner)[1][:4], rtol=20.0 * eps)
    for vectors in (left, right):
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(4), atol=10.0 * eps)
    np.testing.assert_allclose(inner @ right, left * s, atol=20.0 * eps)
    np.testing.assert_allclose(inner.T @ left, right * s, atol=20.0 * eps)


PAIRS = np.repeat(1.0 / (1.0 + K[: SIZE // 2]), 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("values", "found"),
    [
        (SPECTRA["repeated"], [0, 3]), (SPECTRA["repeated across the rank"], [0, 1, 10]), (PAIRS, [0, 2]),
        (PAIRS, [0, 2, 4, 6]), (SPECTRA["slow"], [0, 1, 3]), (SPECTRA["slow"], [1, 2]), (SPECTRA["fast"], [0, 2]),
    ],
)  # fmt: skip
def test_another_start_shows_missed_values(values: np.ndarray, found: list[int], dtype: str) -> None:
    right, rank = np.ascontiguousarray(_orthogonal(2)[: len(values)], dtype), len(found)
    matrix = with_values(values).astype(dtype)
    assert _misses(matrix, right[found], values[found])
    assert not _misses(matrix, right[:rank], values[:rank])


@pytest.mark.parametrize("rank", [2, 4, 7])
def test_pairs_of_values(rank: int) -> None:
    for seed in range(5):
        s = Algebra(NUMPY, with_values(PAIRS), seed=seed).svd(with_values(PAIRS), rank)[1]
        np.testing.assert_allclose(s, PAIRS[:rank], rtol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("copies", [2, 3, 5])
def test_copies_below_other_values(copies: int, dtype: str) -> None:
    # Above the smallest of the seven values that single vectors would find without them; what is left is flat.
    values = np.r_[8.0, 7.0, np.full(copies, 5.0), np.linspace(4.0, 1.0, 256 - copies - 2)]
    matrix = (_orthogonal(1, 256) * values).astype(dtype)
    for seed in range(4):
        s = Algebra(NUMPY, matrix, seed=seed).svd(matrix, 7)[1]
        np.testing.assert_allclose(s, values[:7], rtol=1e-5 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exponent", [-110, -40, 40, 100])
def test_squares_outside_the_range(exponent: int, dtype: str) -> None:
    matrix = with_values(SPECTRA["slow"]).astype(dtype)
    plain = leading_triplets(NUMPY, matrix, 3, 0)
    found = leading_triplets(NUMPY, np.ldexp(matrix, exponent), 3, 0)
    assert found.converged
    np.testing.assert_allclose(np.ldexp(found.s, -exponent), plain.s, rtol=1e-6)


def test_views_that_are_not_contiguous() -> None:
    whole = np.random.default_rng(0).normal(size=(300, 400))
    strided = whole[::2, 1::2]
    agree(strided.copy(), *leading_triplets(NUMPY, strided, 2, 0)[:3], float(np.finfo(float).eps))
    agree(strided.T.copy(), *leading_triplets(NUMPY, strided.T, 2, 0)[:3], float(np.finfo(float).eps))


def test_only_where_few_triplets_are_asked_for() -> None:
    assert truncated_pays((1024, 1024), 4)
    assert not truncated_pays((1024, 1024), 100)
    assert not truncated_pays((64, 64), 1)
    assert truncated_pays((64, 4096), 1)
    assert lanczos_pays((1024, 2048), 64)
    assert not lanczos_pays((1024, 2048), 65)


def test_numbers_that_are_not_finite_do_not_converge() -> None:
    matrix = np.ones((128, 128))
    matrix[3, 4] = np.nan
    assert not leading_triplets(NUMPY, matrix, 2, seed=0).converged
