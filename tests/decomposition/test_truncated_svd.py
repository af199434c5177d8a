"""Few leading triplets are those of the full decomposition, in every library and for difficult spectra.

The proof that their subspace is the best one holds for it, and for no other.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.decomposition.internals import Algebra, leading_triplets, linear_algebra, truncated_pays
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition import fits
from tnadapt.decomposition.fits import holds, no_matrix_is_closer

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
    wide, algebra = matrix.astype(np.float64), Algebra(NUMPY, matrix)
    for rank in (1, 3, 7):
        u, s, v, exact = algebra.svd(matrix, rank)
        agree(wide, u, s, v, algebra.eps)
        assert holds(exact), (name, rank)
    if name in ("slow", "fast", "repeated", "clustered", "tiny", "random"):
        triplets = leading_triplets(NUMPY, matrix, 3, seed=0)
        assert triplets is not None, "it converges"
        agree(wide, *triplets, algebra.eps)
    # The same call has the same result, whatever was called between, also of vectors of values that are zero.
    leading_triplets(NUMPY, with_values(SPECTRA["of rank three"]), 5, seed=1)
    for one, other in zip((u, s, v), algebra.svd(matrix, 7)[:3], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.law("decompositions")
@given(st.integers(12, 40), st.integers(1, 3), st.sampled_from([256, 500]), st.booleans())
@example(16, 1, 300, False).via("the space of single vectors reaches the short side")
@example(20, 1, 300, True).via("the space of single vectors reaches the short side")
@settings(max_examples=25)
def test_every_short_side(short: int, rank: int, long: int, tall: bool) -> None:
    # Random numbers: values that decay slowly.
    matrix = np.random.default_rng(short).normal(size=(long, short) if tall else (short, long))
    triplets = leading_triplets(NUMPY, matrix, rank, 0)
    assert triplets is not None
    u, s, v = triplets
    true = np.linalg.svd(matrix, compute_uv=False)[:rank]
    np.testing.assert_allclose(s, true, rtol=1e-10)
    np.testing.assert_allclose(matrix @ v, u * s, atol=1e-9 * true[0])


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_library_whose_arrays_are_not_on_the_host(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(linear_algebra, "on_host", lambda *_: False)
    for name in ("slow", "repeated", "with zeros"):
        host = with_values(SPECTRA[name]).astype(dtype)
        triplets = leading_triplets(load_backend("torch"), torch.from_numpy(host), 2, seed=0)
        assert triplets is not None
        u, s, v = triplets
        assert u.dtype == v.dtype == torch.from_numpy(host).dtype
        agree(host.astype(np.float64), u.numpy(), s, v.numpy(), float(np.finfo(dtype).eps))


def test_vectors_of_zeros_come_from_the_full_decomposition_where_arpack_draws_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = with_values(SPECTRA["of rank three"])
    monkeypatch.setattr(linear_algebra, "_seeded", lambda: False)
    assert leading_triplets(NUMPY, matrix, 3, seed=0) is not None
    assert leading_triplets(NUMPY, matrix, 4, seed=0) is None


def test_what_does_not_converge_is_computed_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    not_finite = np.ones((128, 128))
    not_finite[3, 4] = np.nan
    for matrix in (not_finite, np.full((128, 128), np.inf), np.zeros((128, 128))):
        assert leading_triplets(NUMPY, matrix, 2, seed=0) is None
    matrix = with_values(SPECTRA["random"])
    monkeypatch.setattr(linear_algebra, "_eigenvectors", lambda *_: None)
    assert leading_triplets(NUMPY, matrix, 3, seed=0) is None
    u, s, v, exact = Algebra(NUMPY, matrix).svd(matrix, 3)
    agree(matrix, u, s, v, float(np.finfo(float).eps))
    assert exact is True


PAIRS = np.repeat(1.0 / (1.0 + K[: SIZE // 2]), 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("blocks", lambda rng: np.kron(np.eye(8), rng.normal(size=(32, 32)))),
        ("diagonal", lambda rng: np.kron(np.eye(8), np.diag(1.0 / (1.0 + K[:32])))),
        ("circulant", lambda rng: np.stack([np.roll(rng.normal(size=256), shift) for shift in range(256)])),
        ("pairs", lambda rng: with_values(PAIRS)),
    ],
)
def test_copies_that_single_vectors_miss_are_noticed(name: str, make: Any, dtype: str) -> None:
    # Without the search beside what was found, a third of the results of "blocks" lack some of the largest values.
    for seed in range(4):
        matrix = make(np.random.default_rng(seed)).astype(dtype)
        true = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        # The squares of the smallest ones vanish in float64, which says nothing about what is left.
        for size in (1.0,) if dtype == "float32" else (1.0, 1e-170):
            for rank in (2, 4, 6):
                s = Algebra(NUMPY, matrix, seed=seed).svd(size * matrix, rank)[1]
                np.testing.assert_allclose(s / size, true[:rank], rtol=1e-5 if dtype == "float32" else 1e-8)


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
    scaled = leading_triplets(NUMPY, np.ldexp(matrix, exponent), 3, 0)
    assert plain is not None
    assert scaled is not None
    np.testing.assert_allclose(np.ldexp(scaled[1], -exponent), plain[1], rtol=1e-6)


def test_views_that_are_not_contiguous() -> None:
    whole = np.random.default_rng(0).normal(size=(300, 400))
    strided = whole[::2, 1::2]
    for view in (strided, strided.T):
        triplets = leading_triplets(NUMPY, view, 2, 0)
        assert triplets is not None
        agree(view.copy(), *triplets, float(np.finfo(float).eps))


def test_only_where_few_triplets_are_asked_for() -> None:
    assert truncated_pays((1024, 1024), 4)
    assert truncated_pays((1024, 2048), 64)
    assert not truncated_pays((1024, 2048), 65)
    assert not truncated_pays((1024, 1024), 100)
    assert not truncated_pays((64, 64), 1)
    assert truncated_pays((64, 4096), 1)
    assert not truncated_pays((4096, 4096), 129)


# -- The proof ----------------------------------------------------------------------------------------


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


def test_what_is_proved_of_diagonals(monkeypatch: pytest.MonkeyPatch) -> None:
    # A large value that the subspace misses.
    matrix = np.diag(np.r_[3.0, 2.0, 1.0, np.full(61, 0.2)])
    assert proved(matrix, np.eye(64)[:, :3])
    for columns in ((0, 1, 3), (1, 2, 3), (0, 2, 5)):
        assert not proved(matrix, np.eye(64)[:, columns])
    # Ties, and matrices of smaller rank.
    assert proved(np.eye(20), np.eye(20)[:, 5:8])
    exact = np.diag([1.0, 2.0, *np.zeros(10)])
    assert proved(exact, np.eye(12)[:, :3])
    assert not proved(exact, np.eye(12)[:, :1])
    assert proved(np.zeros((4, 5)), np.eye(4)[:, :1])
    # Magnitudes whose squares would vanish or overflow.
    for size in (1e-200, 1e200):
        assert proved(size * np.diag([3.0, 1.0, 0.5]), np.eye(3)[:, :1])
        assert not proved(size * np.diag([1.0, 3.0, 0.5]), np.eye(3)[:, :1])
    # What is too large is not tried; the Frobenius norm of what is left is enough for one of these.
    flat, steep = np.eye(30), np.diag([1.0, *np.full(29, 0.1)])
    monkeypatch.setattr(fits, "_FACTORED", 20)
    assert not proved(flat, flat[:, :1])
    assert proved(steep, flat[:, :1])
    monkeypatch.setattr(fits, "_ELEMENTS", 20)
    assert not proved(steep, flat[:, :1])
