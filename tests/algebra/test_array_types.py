"""Type checkers know the arrays of results. mypy checks ``assert_type``, and the tests that it is true."""

from __future__ import annotations

from typing import assert_type

import numpy as np
import pytest

import tnadapt as tna

PLAN = tna.UpdatePlan(tna.presets.lora(2), [(6, 4)])


def test_arrays_have_the_types_that_type_checkers_know() -> None:
    params = PLAN.init()
    assert_type(params, dict[str, np.ndarray])
    assert_type(PLAN.deltas(params), list[np.ndarray])
    assert_type(PLAN.delta(params, 0), np.ndarray)
    assert_type(PLAN.vector(params), np.ndarray)
    assert_type(PLAN.to_arrays(params), dict[str, np.ndarray])
    assert all(isinstance(array, np.ndarray) for array in [*params.values(), *PLAN.deltas(params)])
    pytest.importorskip("torch")
    import torch

    tensors = PLAN.init("torch", dtype="float64")
    assert_type(tensors, dict[str, torch.Tensor])
    assert_type(PLAN.deltas(tensors), list[torch.Tensor])
    assert_type(PLAN.merged(tensors, [torch.zeros(6, 4, dtype=torch.float64)]), list[torch.Tensor])
    assert all(isinstance(array, torch.Tensor) for array in [*tensors.values(), *PLAN.deltas(tensors)])
