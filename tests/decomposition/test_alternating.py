"""Alternating least squares through F: short sweeps end where long ones do, and large groups start from the adjoint."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna
from tests.decomposition.internals import Algebra, group_fits
from tnadapt.backends import load_backend

ALGEBRA = Algebra(load_backend("numpy"), np.zeros(1))


def updates_of(plan: tna.SuperLoRA, seed: int, noise: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = plan.deltas({name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()})
    return [delta + (noise * np.std(delta) * rng.normal(size=delta.shape)).astype("f4") for delta in truth]


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_few_steps_reach_the_error_of_many(ratio: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="linear", ratio=ratio), [(48, 48)] * 3)
    updates = [delta.astype(np.float64) for delta in updates_of(plan, seed, 0.5)]
    _, few = tna.decompose(updates, plan.config, tol=1e-8)
    monkeypatch.setattr(group_fits, "_FEW", group_fits._MANY)
    _, many = tna.decompose(updates, plan.config, tol=1e-8)
    assert few.groups[0].method == many.groups[0].method == "alternating least squares"
    assert few.error == pytest.approx(many.error, rel=1e-6)
    assert few.error < 0.5


# Through which F, and what the updates are: of the network, with noise as large, and noise alone.
LARGE = [(ratio, noise) for ratio in (0.05, 0.3, 1.0) for noise in (0.0, 1.0, 1e6)]


@pytest.mark.parametrize(("ratio", "noise"), LARGE)
def test_a_large_group_is_fitted_at_least_as_well_from_the_adjoint(
    ratio: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="linear", ratio=ratio), [(128, 128)] * 17)
    updates = updates_of(plan, 3, noise)
    _, found = tna.decompose(updates, plan.config)
    monkeypatch.setattr(group_fits, "_LARGE", 1 << 30)
    _, before = tna.decompose(updates, plan.config)
    # Noise has many local optima that are nearly as good as the best.
    assert 1.0 - found.error**2 >= (0.99 if noise > 1.0 else 1.0) * (1.0 - before.error**2) - 1e-6
    if not noise:
        assert found.error < 1e-6


@pytest.mark.parametrize("format", ["cp", "cp-weighted", "tucker"])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_curvature_is_that_of_the_network(format: str, splits: int) -> None:
    config = tna.Config(rank=2, order=2, fold=(12, 24), groups=1, format=format, splits=splits)
    network = tna.SuperLoRA(config, [(12, 24)]).groups[0].network
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    known = 0
    for name, shape in network.shapes.items():
        curvature = group_fits._curvature(network, arrays, ALGEBRA, name)
        if curvature is None:
            continue
        known += 1
        direction = rng.normal(size=shape)
        image = network.whole(ALGEBRA.backend, {**arrays, name: direction})
        back = network.adjoint(ALGEBRA.backend, arrays, image, only=name)[name]
        expected = direction * curvature[0, 0] if len(curvature) == 1 else direction @ curvature
        factor = np.vdot(expected, back) / np.vdot(expected, expected)
        assert factor > 0.0
        assert np.allclose(back, factor * expected)
    assert known == {"cp": 2, "cp-weighted": 2, "tucker": 0}[format] + splits - 1


def test_arrays_without_curvature_are_not_weighted() -> None:
    single = Algebra(ALGEBRA.backend, np.zeros(1, np.float32))
    assert group_fits._inverse(single, None) is None
    assert group_fits._inverse(single, np.zeros((2, 2))) is None
    # A component without weight has no gradient; its rounding is not blown up.
    for factor in (0.0, 1e-30):
        inverse = group_fits._inverse(single, np.diag([1.0, factor]))
        assert inverse is not None
        assert np.isfinite(inverse).all()
        assert inverse.max() < 1e4
