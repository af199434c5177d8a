"""Random parameters of a plan, in float64."""

from __future__ import annotations

import numpy as np

import tnadapt as tna

__all__ = ["drawn"]


def drawn(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
