"""Solvers against NumPy and SciPy: least squares, damped Gauss-Newton, and the few leading triplets of a matrix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator, lsqr

import tnadapt as tna
from tests.decomposition.internals import (
    Algebra,
    CPSweeps,
    SparseTensor,
    cp_als,
    damped_gauss_newton,
    leading_triplets,
    linear_algebra,
    truncated_pays,
)
from tests.decomposition.internals import (
    least_squares as linear_least_squares,
)
from tnadapt.algebra.network import Network
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition import Limits, fits
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.decomposition.fits import holds, no_matrix_is_closer
from tnadapt.testing.strategies import plans

# -- Linear least squares --------------------------------------------------------------------------

NUMPY = load_backend("numpy")


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_it_gives_what_numpy_gives(rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(rows, cols)), rng.normal(size=rows), np.zeros(cols)
    x, *_ = np.linalg.lstsq(a, y, rcond=None)
    algebra = Algebra(NUMPY, y)
    found = linear_least_squares(algebra, lambda x: a @ x, lambda z: a.T @ z, y, start, 1e-12, 200)
    np.testing.assert_allclose(a @ found[0], a @ x, rtol=1e-6, atol=1e-6)
    assert found[1]
    again = linear_least_squares(algebra, lambda x: a @ x, lambda z: a.T @ z, a @ x, x, 1e-6, 10)
    assert again[2] == 0, "a start that solves is the solution"
    np.testing.assert_array_equal(again[0], x)


@given(st.integers(0, 10_000))
def test_after_a_few_steps_it_is_where_scipys_lsqr_is_and_has_not_converged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(20, 10)), rng.normal(size=20), rng.normal(size=10)
    for steps in (1, 3, 5):
        found = linear_least_squares(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, start, 1e-12, steps)
        expected = start + lsqr(a, y - a @ start, iter_lim=steps, atol=0.0, btol=0.0)[0]
        np.testing.assert_allclose(found[0], expected, rtol=1e-6, atol=1e-8)
        assert not found[1]


# -- Damped Gauss-Newton ------------------------------------------------------------------------------


def _elements(config: tna.Config, shape: tuple[int, int]) -> ObservedElements:
    return ObservedElements.of_network(tna.UpdatePlan(config, [shape]).groups[0].network)


SMALL = {
    "cp": tna.Config(rank=2, order=3, groups=1, fold="hypercube"),
    "train": tna.Config(rank=2, order=3, groups=1, fold="balanced", format="tt"),
    "tucker": tna.Config(rank=2, order=3, groups=1, fold="hypercube", format="tucker"),
    "loha": tna.presets.loha(1),
}


@given(st.sampled_from(sorted(SMALL)), st.integers(0, 10_000))
def test_it_ends_where_scipy_does(name: str, seed: int) -> None:
    """From a start near an optimum, which both then find."""
    elements = _elements(SMALL[name], (5, 6))
    rng = np.random.default_rng(seed)
    at = rng.normal(size=elements.size)
    wanted = elements.values(at) + 0.05 * rng.normal(size=elements.count)
    start = at + 0.02 * rng.normal(size=at.size)

    def residual(x: np.ndarray) -> np.ndarray:
        return elements.values(x) - wanted

    expected = least_squares(
        residual, start, lambda x: elements.jacobian(x).toarray(), method="trf", x_scale=1.0, ftol=1e-14, xtol=1e-14,
        gtol=1e-14, max_nfev=2000,
    )  # fmt: skip
    norm = float(np.linalg.norm(wanted))
    found = damped_gauss_newton(residual, elements.jacobian, start, norm, Limits(1e-12, 2000))
    assert found.error <= np.sqrt(2.0 * expected.cost) * (1.0 + 1e-3) + 1e-9 * norm
    assert found.error == pytest.approx(float(np.linalg.norm(residual(found.x))))
    assert list(found.history) == sorted(found.history, reverse=True)


@pytest.mark.parametrize("form", ["dense", "sparse", "operator"])
@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_form_of_the_jacobian_gives_the_zero(name: str, form: str) -> None:
    elements = _elements(SMALL[name], (5, 6))
    rng = np.random.default_rng(1)
    at = rng.normal(size=elements.size)
    wanted = elements.values(at)
    convert = {"dense": lambda jacobian: jacobian.toarray(), "sparse": csr_array, "operator": aslinearoperator}[form]
    found = damped_gauss_newton(
        lambda x: elements.values(x) - wanted, lambda x: convert(elements.jacobian(x)),
        at + 0.1 * rng.normal(size=at.size), float(np.linalg.norm(wanted)), Limits(1e-6, 200),
    )  # fmt: skip
    assert found.converged
    assert found.error < 1e-12 * np.linalg.norm(wanted)


@given(
    st.lists(st.integers(1, 4), min_size=3, max_size=4), st.integers(1, 3), st.booleans(), st.booleans(),
    st.sampled_from([0.0, 0.1]), st.integers(0, 99),
)  # fmt: skip
def test_steps_of_cp_are_those_of_its_jacobian(
    shape: list[int], rank: int, complex_: bool, fixed: bool, ridge: float, seed: int
) -> None:
    rng, free = np.random.default_rng(seed), list(range(fixed, len(shape)))

    def normal(*sizes: int) -> np.ndarray:
        return rng.normal(size=sizes) + (1j * rng.normal(size=sizes) if complex_ else 0.0)

    def formed(factors: list[np.ndarray]) -> np.ndarray:
        letters = "abcd"[: len(shape)]
        return np.einsum(",".join(f"{i}r" for i in letters) + f"->{letters}", *factors)

    x, tensor, way = [normal(size, rank) for size in shape], normal(*shape), [normal(size, rank) for size in shape]
    columns = []
    for mode in free:
        for place in np.ndindex(x[mode].shape):
            unit = np.zeros_like(x[mode])
            unit[place] = 1.0
            columns.append(formed([unit if m == mode else factor for m, factor in enumerate(x)]).ravel())
    jacobian, left = np.stack(columns, axis=1), (formed(x) - tensor).ravel()
    flat = np.concatenate([x[mode].ravel() for mode in free])
    gradient = jacobian.conj().T @ left + ridge * flat
    shift = 0.1 * float(np.trace(jacobian.conj().T @ jacobian).real) / jacobian.shape[1]
    step = -np.linalg.solve(jacobian.conj().T @ jacobian + (shift + ridge) * np.eye(len(flat)), gradient)
    # Half the second derivative along a step, from differences: the tensor is a polynomial of it.
    moves = {mode: way[mode] for mode in free}
    at = [formed([f + h * moves.get(m, 0.0) for m, f in enumerate(x)]) for h in (-1e-3, 0.0, 1e-3)]
    curvature = jacobian.conj().T @ ((at[0] - 2.0 * at[1] + at[2]) / 2e-6).ravel()

    algebra = Algebra(load_backend("numpy"), tensor)
    descent = cp_als.CPDescent(algebra, tensor, rank, 1.0, [0] if fixed else [], ridge)
    descent.bases.clear()
    descent.sweeps = CPSweeps(algebra.backend, tensor, [0] if fixed else [])

    def joined(parts: dict[int, np.ndarray]) -> np.ndarray:
        return np.concatenate([parts[mode].ravel() for mode in free])

    pulled = descent._pulled(descent._measured(x)[1], x)
    np.testing.assert_allclose(joined(pulled) + ridge * flat, gradient, atol=1e-9)
    sparse = SparseTensor(np.indices(shape).reshape(len(shape), -1), tensor.ravel(), shape)
    descent = cp_als.CPDescent(algebra, sparse, rank, 1.0, [0] if fixed else [], ridge)
    square, state = descent._measured(x)
    assert square == pytest.approx(float(np.linalg.norm(left)) ** 2)
    np.testing.assert_allclose(joined(descent._pulled(state, x)) + ridge * flat, gradient, atol=1e-9)
    for most, tol in ((1 << 20, 1e-9), (0, 1e-4)):
        equations = cp_als._Equations(free, x, pulled, ridge, most)
        np.testing.assert_allclose(joined(equations.curvature(moves)), curvature, rtol=1e-3, atol=1e-3)
        equations.curvature = lambda step: {m: np.full_like(part, 1e9) for m, part in step.items()}
        found, gain = equations.step(0.1)
        assert np.linalg.norm(joined(found) - step) <= tol * np.linalg.norm(step), "too long a correction is left out"
        reduced = np.linalg.norm(left + jacobian @ step) ** 2 + ridge * np.linalg.norm(flat + step) ** 2
        expected = np.linalg.norm(left) ** 2 + ridge * np.linalg.norm(flat) ** 2 - reduced
        assert gain == pytest.approx(expected, rel=1e-3)


def test_how_it_ends() -> None:
    found = damped_gauss_newton(lambda x: x * 0.0, lambda x: np.eye(2), np.ones(2), 1.0, Limits())
    assert (found.error, found.converged, found.history) == (0.0, True, ()), "a start that solves takes no step"
    found = damped_gauss_newton(
        lambda x: x**3 - 8.0, lambda x: csr_array(np.diag(3.0 * x**2)), np.array([50.0]), 8.0, Limits(0.0, 2)
    )
    assert (found.converged, len(found.history)) == (False, 2)
    # A step that overflows is shortened.
    found = damped_gauss_newton(
        lambda x: np.exp(x) - 2.0, lambda x: np.diag(np.exp(x)), np.array([-30.0]), 2.0, Limits(1e-12, 500)
    )
    assert np.isfinite(found.error)


# -- The elements of a network, and their Jacobian -------------------------------------------------------


def _columns(network: Network, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The Jacobian, column by column: the vector is affine in each array."""
    found = []
    for name, shape in network.shapes.items():
        at_zero = network.whole(NUMPY, {**arrays, name: np.zeros(shape)})
        for unit in np.eye(int(np.prod(shape))):
            found.append(network.whole(NUMPY, {**arrays, name: unit.reshape(shape)}) - at_zero)
    return np.stack(found, axis=1)


@given(st.data())
def test_the_jacobian_is_that_of_single_columns(data: st.DataObject) -> None:
    network = data.draw(plans()).groups[0].network
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    count = data.draw(st.integers(1, network.size))
    some = np.sort(rng.choice(network.size, count, replace=False))
    elements = ObservedElements.of_network(network, some)
    assert elements.shapes == network.shapes
    at = elements.flat(arrays)
    expected = network.whole(NUMPY, arrays)[some]
    np.testing.assert_allclose(elements.values(at), expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
    columns = _columns(network, arrays)[some]
    np.testing.assert_allclose(elements.jacobian(at).toarray(), columns, rtol=1e-9, atol=1e-9 * np.abs(columns).max())
    back = elements.arrays(at)
    assert all(np.array_equal(back[name], arrays[name]) for name in arrays)


def test_the_jacobian_of_a_long_train() -> None:
    """More indices than an einsum has letters."""
    config = tna.Config(rank=1, order=32, groups=1, fold=(2, 2, *[1] * 30), format="tt")
    network = tna.UpdatePlan(config, [(2, 2)]).groups[0].network
    arrays = {name: np.full(shape, 1.5) for name, shape in network.shapes.items()}
    elements = ObservedElements.of_network(network)
    np.testing.assert_allclose(elements.values(elements.flat(arrays)), network.whole(NUMPY, arrays))
    np.testing.assert_allclose(elements.jacobian(elements.flat(arrays)).toarray(), _columns(network, arrays))


# -- Leading triplets are those of the full decomposition, in every library and for difficult spectra ----

SIZE = 160


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
    "with noise": np.r_[np.linspace(2.0, 1.0, 7), np.full(SIZE - 7, 1e-4)],
    "with one beyond": np.r_[3.0, 2.0, 1.0, 1e-6, np.zeros(SIZE - 4)],
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
    monkeypatch.setattr(linear_algebra, "_subspace", lambda *_: (matrix.sum(axis=0), 3.0, None))
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
