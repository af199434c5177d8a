"""Least squares: LSQR and CGLS solve as NumPy does, damped Gauss-Newton ends where SciPy does, for every Jacobian.

The structured Jacobian of observed elements is that of the network, column by column.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

import tnadapt as tna
from tests.decomposition.internals import Algebra, cgls, damped_gauss_newton, lsqr
from tnadapt.algebra.network import Network
from tnadapt.backends import load_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.testing.strategies import plans

NUMPY = load_backend("numpy")


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_both_give_what_numpy_gives(rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(rows, cols)), rng.normal(size=rows), np.zeros(cols)
    x, *_ = np.linalg.lstsq(a, y, rcond=None)
    for solve in (lsqr, cgls):
        found = solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, start, 1e-12, 200)
        np.testing.assert_allclose(a @ found.x, a @ x, rtol=1e-6, atol=1e-6)
        assert found.converged
        again = solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, a @ x, x, 1e-6, 10)
        assert again.iterations == 0, "a start that solves is the solution"
        np.testing.assert_array_equal(again.x, x)


@given(st.integers(0, 10_000))
def test_after_a_few_steps_both_are_at_one_place_and_have_not_converged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(20, 10)), rng.normal(size=20), rng.normal(size=10)
    for steps in (1, 3, 5):
        one, other = (
            solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, start, 1e-12, steps)
            for solve in (lsqr, cgls)
        )
        np.testing.assert_allclose(one.x, other.x, rtol=1e-6, atol=1e-8)
        assert not one.converged
        assert not other.converged


# -- Damped Gauss-Newton ------------------------------------------------------------------------------


def _elements(config: tna.Config, shape: tuple[int, int]) -> ObservedElements:
    return ObservedElements.of_network(tna.SuperLoRA(config, [shape]).groups[0].network)


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
    network = tna.SuperLoRA(config, [(2, 2)]).groups[0].network
    arrays = {name: np.full(shape, 1.5) for name, shape in network.shapes.items()}
    elements = ObservedElements.of_network(network)
    np.testing.assert_allclose(elements.values(elements.flat(arrays)), network.whole(NUMPY, arrays))
    np.testing.assert_allclose(elements.jacobian(elements.flat(arrays)).toarray(), _columns(network, arrays))
