"""Type checkers know the arrays of results. mypy checks ``assert_type``, and the tests that it is true."""

from __future__ import annotations

from typing import assert_type

import numpy as np
import pytest

import tnadapt as tna

PLAN = tna.SuperLoRA(tna.presets.lora(2), [(6, 4)])


def test_numpy() -> None:
    params = PLAN.init()
    assert_type(params, dict[str, np.ndarray])
    assert_type(PLAN.deltas(params), list[np.ndarray])
    assert_type(PLAN.delta(params, 0), np.ndarray)
    assert_type(PLAN.vector(params), np.ndarray)
    assert_type(PLAN.to_arrays(params), dict[str, np.ndarray])
    assert all(isinstance(array, np.ndarray) for array in [*params.values(), *PLAN.deltas(params)])


def test_torch() -> None:
    torch = pytest.importorskip("torch")
    import torch as known

    params = PLAN.init("torch", dtype="float64")
    assert_type(params, dict[str, known.Tensor])
    assert_type(PLAN.deltas(params), list[known.Tensor])
    assert_type(PLAN.merged(params, [known.zeros(6, 4, dtype=known.float64)]), list[known.Tensor])
    assert all(isinstance(array, torch.Tensor) for array in [*params.values(), *PLAN.deltas(params)])
