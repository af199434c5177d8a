"""Equal maps F of several plans exist once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.superlora import share_maps
from tnadapt.testing.strategies import parameters, plans

P = tna.presets


@given(st.data())
@settings(max_examples=20)
def test_a_plan_computes_the_same_with_shared_maps(data: st.DataObject) -> None:
    plan, other = data.draw(plans()), data.draw(plans())
    params = data.draw(parameters(plan))
    expected = plan.vector(params)
    shared = copy.deepcopy(plan)
    share_maps(shared, [other, plan], digests=True)
    np.testing.assert_array_equal(shared.vector(params), expected)
    assert [group.projection.digest for group in shared.groups] == [group.projection.digest for group in plan.groups]


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (P.superlora(3, projection="linear", ratio=0.1), True),  # of another rank in front of it
        (P.superlora(2, projection="linear", ratio=0.1, seed=1), False),
        (P.superlora(2, projection="linear", ratio=0.2), False),
        (P.superlora(2, projection="linear_v2", ratio=0.1), False),
        (P.superlora(2, projection="linear", ratio=0.1, groups=2), False),
    ],
)
def test_which_maps_are_equal(config: tna.Config, same: bool) -> None:
    shapes = [(16, 16)] * 4
    one = tna.SuperLoRA(P.superlora(2, projection="linear", ratio=0.1), shapes)
    other = tna.SuperLoRA(config, shapes)
    share_maps(other, [one])
    assert (other.groups[0].projection.map is one.groups[0].projection.map) is same
