"""Sweeps of a few least-squares steps end where sweeps of many do."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.decomposition import _alternating


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_few_steps_reach_the_error_of_many(ratio: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="linear", ratio=ratio), [(48, 48)] * 3)
    truth = plan.deltas({name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()})
    updates = [delta + 0.5 * np.std(delta) * rng.normal(size=delta.shape) for delta in truth]
    _, few = tna.decompose(updates, plan.config, tol=1e-8)
    monkeypatch.setattr(_alternating, "_FEW", _alternating._STEPS)
    _, many = tna.decompose(updates, plan.config, tol=1e-8)
    assert few.groups[0].method == many.groups[0].method == "alternating least squares"
    assert few.error == pytest.approx(many.error, rel=1e-6)
    assert few.error < 0.5
