"""Damped Gauss-Newton: SciPy's optimum, exact zeros with a singular Jacobian, and one result for every kind of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import least_squares
from scipy.sparse import csr_array
from scipy.sparse.linalg import aslinearoperator

import tnadapt as tna
from tnadapt.decomposition._least_squares import damped_gauss_newton
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.decomposition.fits import Limits


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


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_kind_of_jacobian_gives_the_same_zero(name: str) -> None:
    elements = _elements(SMALL[name], (5, 6))
    rng = np.random.default_rng(1)
    at = rng.normal(size=elements.size)
    wanted = elements.values(at)
    kinds = {
        "dense": lambda x: elements.jacobian(x).toarray(),
        "sparse": elements.jacobian,
        "operator": lambda x: aslinearoperator(elements.jacobian(x)),
    }
    ends = {}
    for kind, jacobian in kinds.items():
        found = damped_gauss_newton(
            lambda x: elements.values(x) - wanted, jacobian, at + 0.1 * rng.normal(size=at.size),
            float(np.linalg.norm(wanted)), Limits(1e-6, 200),
        )  # fmt: skip
        ends[kind] = found.error / np.linalg.norm(wanted)
        assert found.converged
    assert max(ends.values()) < 1e-12, ends


def test_a_start_that_solves_takes_no_step() -> None:
    found = damped_gauss_newton(lambda x: x * 0.0, lambda x: np.eye(2), np.ones(2), 1.0, Limits())
    assert (found.error, found.converged, found.history) == (0.0, True, ())


def test_too_few_steps_are_not_called_converged() -> None:
    found = damped_gauss_newton(
        lambda x: x**3 - 8.0, lambda x: csr_array(np.diag(3.0 * x**2)), np.array([50.0]), 8.0, Limits(0.0, 2)
    )
    assert not found.converged
    assert len(found.history) == 2


def test_a_step_that_overflows_is_shortened() -> None:
    found = damped_gauss_newton(
        lambda x: np.exp(x) - 2.0, lambda x: np.diag(np.exp(x)), np.array([-30.0]), 2.0, Limits(1e-12, 500)
    )
    assert np.isfinite(found.error)
