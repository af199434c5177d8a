"""What a search counts for groups of a kind equals what plans count group by group."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.planning.internals import applied_cost, forward_cost, lora_export, of_map, of_network
from tnadapt.algebra.config import Config
from tnadapt.algebra.group import rank_bound, rank_bounds
from tnadapt.algebra.layout import KnownWeights
from tnadapt.algebra.superlora import parameter_count
from tnadapt.errors import ShapeError, TnadaptError
from tnadapt.planning import degrees_of_freedom, padding_waste, step_cost
from tnadapt.planning.families import Search, families

sides = st.integers(1, 12)
shapes_of = st.lists(st.tuples(sides, sides), min_size=1, max_size=6) | st.tuples(sides, sides, st.integers(1, 6)).map(
    lambda drawn: [drawn[:2]] * drawn[2]
)


@st.composite
def weighed(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[int], list[str]]:
    shapes = draw(shapes_of)
    count = len(shapes)
    layers = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    return shapes, layers, draw(st.lists(st.sampled_from("qv"), min_size=count, max_size=count))


def configs(drawn: tuple[Any, Any, Any], size: int) -> list[Config]:
    """Settings of every family at one size, and others whose groups differ or are tied."""
    found = [
        tna.presets.hira(2), tna.presets.dora(1), tna.presets.superlora(2, groups="weight", projection="linear"),
        tna.presets.superlora(1, groups=3, projection="nonlinear", ratio=0.5), tna.presets.vera(2),
        tna.presets.tinylora(parameters=2), tna.presets.lora(2, on="weight", projection="linear"),
    ]  # fmt: skip
    for family in families(*drawn):
        for ladder in family[:3]:
            try:
                found.append(ladder.config(size))
            except TnadaptError:
                continue
    return found


def made(make: Any) -> Any:
    """What a call returns, or the error that it raises."""
    try:
        return make()
    except TnadaptError as error:
        return type(error), str(error)


def plain_cost(plan: tna.SuperLoRA) -> int:
    """The multiply-adds of a step, group by group and weight by weight."""
    total = 0
    for group in plan.groups:
        start = 1 if group.start.subtracts else 0
        total += (3 + start) * forward_cost(group.network) + (2 + start) * of_map(group.projection)
    return total + sum(applied_cost(plan.applying, shape) for shape in plan.shapes)


def plain_freedom(plan: tna.SuperLoRA) -> int:
    each = [
        min(of_network(group.network), group.num_parameters, group.projection.map.freedom()) for group in plan.groups
    ]
    return min(sum(each), plan.num_parameters - sum(map(math.prod, plan.weight_param_shapes.values())))


@settings(max_examples=25)
@given(weighed(), st.integers(1, 4))
def test_counts_of_kinds_equal_those_of_all_groups(drawn: Any, size: int) -> None:
    search = Search(*drawn)
    for config in configs(drawn, size):
        plan = made(lambda: tna.SuperLoRA(config, *drawn))  # noqa: B023
        counted = made(lambda: search.adapter(config))  # noqa: B023
        if not isinstance(plan, tna.SuperLoRA):
            assert counted == plan
            continue
        every = sum(math.prod(shape) for shape in plan.param_shapes.values())
        assert counted.num_parameters == every == parameter_count(config, *drawn)
        assert sum(count for _, count in counted.alike) == plan.num_groups
        assert degrees_of_freedom(counted) == plain_freedom(plan)
        assert step_cost(counted) == plain_cost(plan)
        sizes = [group.network.size for group in plan.groups]
        assert sum(count * group.network.size for group, count in counted.alike) == sum(sizes)
        assert padding_waste(counted) == padding_waste(plan)
        assert counted.param_shapes == plan.param_shapes


@settings(max_examples=25)
@given(weighed(), st.integers(1, 4))
def test_ranks_of_all_weights_equal_those_of_each(drawn: Any, size: int) -> None:
    for config in configs(drawn, size):
        try:
            plan = tna.SuperLoRA(config, *drawn)
        except TnadaptError:
            continue
        each = [rank_bound(plan.layout, plan.groups, weight) for weight in range(len(plan.shapes))]
        assert list(rank_bounds(plan.layout, plan.groups)) == plan.largest_ranks == each
        full = plan.full_rank_bound()
        if full is not None:
            assert (plan.lora_rank, full) == (None, max(each))
        if plan.applying.additive:
            assert lora_export(plan).rank == plan.lora_rank


def test_plans_of_known_weights_share_layouts_and_others_do_not() -> None:
    weights = KnownWeights([(4, 3)] * 4, layers := [0, 0, 1, 1])
    first, second, other = (
        tna.SuperLoRA(tna.presets.superlora(rank, groups="layer"), weights, keys)
        for rank, keys in ((1, layers), (2, layers), (1, [0, 1, 0, 1]))
    )
    assert first.layout is second.layout
    assert other.layout is not first.layout
    assert [group.pieces[1].weight for group in other.groups] == [2, 3]
    assert type(pickle.loads(pickle.dumps(weights))) is tuple
    with pytest.raises(ShapeError, match=r"shapes\[1\] is \(0, 3\); expected \(rows, cols\), both at least 1"):
        KnownWeights([(1, 2), (0, 3)])


def test_a_plan_tells_how_far_it_is() -> None:
    seen: list[tuple[int, int]] = []
    found = tna.plan([(6, 4)] * 3, 60, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number + 1, len(seen)) for number in range(len(seen))]
    assert len(seen) == len(families([(6, 4)] * 3))
    assert found.to_dict() == tna.plan([(6, 4)] * 3, 60).to_dict()
