"""LSQR agrees with its reference implementation, and solves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnadapt.backends import Backend, get_backend
from tnadapt.decomposition._least_squares import cgls, lsqr
from tnadapt.decomposition.linear_algebra import Algebra, tensorly_on

NUMPY = get_backend(np.zeros(1))


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 10_000))
def test_both_give_what_numpy_gives(rows: int, cols: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(rows, cols)), rng.normal(size=rows), np.zeros(cols)
    expected = a @ np.linalg.lstsq(a, y, rcond=None)[0]
    for solve in (lsqr, cgls):
        found = solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, start, 1e-12, 200)
        np.testing.assert_allclose(a @ found.x, expected, rtol=1e-6, atol=1e-6)
        assert found.converged


@given(st.integers(0, 10_000))
def test_after_a_few_steps_both_are_at_one_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, y, start = rng.normal(size=(20, 10)), rng.normal(size=20), rng.normal(size=10)
    for steps in (1, 3, 5):
        one, other = (
            solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, start, 0.0, steps).x
            for solve in (lsqr, cgls)
        )
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_a_start_that_solves_is_the_solution() -> None:
    a, x = np.eye(3), np.array([1.0, 2.0, 3.0])
    for solve in (lsqr, cgls):
        found = solve(Algebra(NUMPY, x), lambda x: a @ x, lambda z: a.T @ z, x, x, 1e-6, 10)
        assert found.iterations == 0
        np.testing.assert_array_equal(found.x, x)


def test_steps_that_do_not_suffice_are_not_called_converged() -> None:
    rng = np.random.default_rng(0)
    a, y = rng.normal(size=(30, 20)), rng.normal(size=30)
    for solve in (lsqr, cgls):
        assert not solve(Algebra(NUMPY, y), lambda x: a @ x, lambda z: a.T @ z, y, np.zeros(20), 1e-12, 3).converged


def test_norms_of_any_length(backend: Backend) -> None:
    if backend.name == "array_api_strict":
        pytest.skip("computed for on the host")
    rng = np.random.default_rng(0)
    for size in (1, 5, 1 << 16, (1 << 17) + 3):
        x = rng.normal(size=size)
        algebra = Algebra(backend, backend.asarray(x, "float64"))
        assert algebra.norm(algebra.like) == pytest.approx(np.linalg.norm(x), rel=1e-12)


def test_the_guard_sets_tensorly_back_after_an_error() -> None:
    import tensorly

    before = tensorly.get_backend()
    with pytest.raises(ZeroDivisionError), tensorly_on(NUMPY):
        raise ZeroDivisionError
    assert tensorly.get_backend() == before
