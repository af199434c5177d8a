"""What the Hypothesis strategies draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import STARTS
from tests.support.depth import in_depth
from tnadapt.algebra.applying import APPLYING
from tnadapt.testing.strategies import base_weights, configs, plans


def first(wanted: Callable[[tna.UpdatePlan], bool]) -> tna.UpdatePlan:
    """The first plan of a kind, however large."""
    return find(plans(), wanted, settings=settings(phases=[Phase.generate], max_examples=2000))


EVERY = list(itertools.product(APPLYING.built_in, STARTS.built_in))


@pytest.mark.parametrize(("apply", "start"), in_depth(EVERY, EVERY[::6]))
def test_every_change_of_a_weight_is_drawn_with_every_start(apply: str, start: str) -> None:
    plan = first(lambda plan: (plan.config.apply, plan.config.start) == (apply, start))
    assert not plan.needs_base
    assert plan.init().keys() == plan.param_shapes.keys()


def test_both_axes_and_given_arrays_are_drawn() -> None:
    assert first(lambda plan: plan.config.magnitude_axis == "cols").weight_param_shapes
    assert first(lambda plan: plan.config.start == "given" and 0 < len(plan.given) < len(plan.array_shapes))


@given(st.data())
def test_starts_of_the_base_are_drawn_only_where_lora_is(data: st.DataObject) -> None:
    projections, formats, on = data.draw(
        st.sampled_from(
            [(("linear",), ("cp",), "vector"), (("identity",), ("tt",), "vector"), (("dct2",), ("cp",), "weight")]
        )
    )
    config = data.draw(configs([(4, 3)], projections, formats, on))
    assert not STARTS[config.start].needs_base
    assert config.format in formats
    assert config.projection in projections


@given(st.data())
def test_base_weights_have_the_shapes(data: st.DataObject) -> None:
    weights = data.draw(base_weights([(2, 3), (4, 1)]))
    assert [weight.shape for weight in weights] == [(2, 3), (4, 1)]
    assert tna.UpdatePlan(tna.presets.dora(1), [(2, 3), (4, 1)]).with_base(weights).init()
