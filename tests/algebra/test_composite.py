"""Several configs in one plan: every part has the numbers that it has alone, bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.composite import CompositeConfig
from tnadapt.planning import degrees_of_freedom, largest_rank
from tnadapt.testing.strategies import base_weights, parameters, plans

P = tna.presets
# What all parts have in common.
PLAIN = {"apply": "add", "magnitude_axis": "rows", "start": "zero", "before": None, "parameters": None}
PLAIN |= {"scope": "plan", "offset": True}


def renamed(name: str, groups: int, weights: int) -> str:
    """The name in the whole of an array of a part, after so many groups and weights of other parts."""
    return re.sub(
        r"^(start\.)?(group|weight)(\d+)",
        lambda found: f"{found[1] or ''}{found[2]}{int(found[3]) + (groups if found[2] == 'group' else weights)}",
        name,
    )


def numbered(parts: list[tna.UpdatePlan]) -> list[tuple[tna.UpdatePlan, int, int]]:
    found, groups, weights = [], 0, 0
    for part in parts:
        found.append((part, groups, weights))
        groups, weights = groups + part.num_groups, weights + len(part.shapes)
    return found


def whole_of(parts: list[tna.UpdatePlan]) -> tna.UpdatePlan:
    """The plan of several plans' configs and weights, with what they were given."""
    config = CompositeConfig([(part.config, len(part.shapes)) for part in parts])
    given = {
        renamed(name, groups, weights): array
        for part, groups, weights in numbered(parts)
        for name, array in part.given.items()
    }
    keys = [
        [(place, key) for place, part in enumerate(parts) for key in (part._layers or range(len(part.shapes)))]
        for _ in "lr"
    ]
    return tna.UpdatePlan(config, [shape for part in parts for shape in part.shapes], *keys, given=given)


@st.composite
def some_parts(draw: st.DrawFn) -> list[tna.UpdatePlan]:
    """Two or three plans that can be parts of one."""
    found = []
    for _ in range(draw(st.integers(2, 3))):
        drawn = draw(plans())
        try:
            config = drawn.config.replace(**PLAIN)
        except tna.ConfigError:
            assume(False)
        plan = tna.UpdatePlan(config, drawn.shapes, drawn._layers)
        found.append(plan.with_base(draw(base_weights(plan.shapes))) if plan.base_shapes else plan)
    return found


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.law("update-formula", "fresh-is-zero", "update-slice", "copies")
@settings(max_examples=25)
@given(st.data())
def test_every_part_is_what_it_is_alone(data: st.DataObject) -> None:
    parts = data.draw(some_parts())
    whole = whole_of(parts)
    params = data.draw(parameters(whole))
    started = whole.init()
    assert not any(delta.any() for delta in whole.deltas(started))
    names = data.draw(st.sets(st.sampled_from(list(whole.param_shapes)), min_size=1))
    chosen = whole.init(trained=names)
    deltas, groups = whole.deltas(params), list(whole.groups)
    assert whole.num_parameters == sum(array.size for array in params.values())
    copied = pickle.loads(pickle.dumps(whole))
    assert all(map(same, copied.deltas(params), deltas))
    start = data.draw(st.integers(0, whole.size - 1))
    stop = data.draw(st.integers(start + 1, whole.size))
    vec = whole.vector(params)
    owns = [
        {name: params[renamed(name, first, weight)] for name in part.param_shapes}
        for part, first, weight in numbered(parts)
    ]
    assert same(vec, np.concatenate([part.vector(own) for part, own in zip(parts, owns, strict=True)]))
    np.testing.assert_allclose(whole.vector(params, start, stop), vec[start:stop], rtol=1e-9, atol=1e-9)
    for own, (part, first, weight) in zip(owns, numbered(parts), strict=True):
        assert all(same(array, started[renamed(name, first, weight)]) for name, array in part.init().items())
        trained = {name for name in part.param_shapes if renamed(name, first, weight) in names}
        if trained:  # a plan that has no trained array is refused
            fresh = part.init(trained=trained)
            assert all(same(array, chosen[renamed(name, first, weight)]) for name, array in fresh.items())
        assert all(map(same, part.deltas(own), deltas[weight : weight + len(part.shapes)]))
        for index in range(len(part.shapes)):
            assert same(part.delta(own, index), whole.delta(params, weight + index))
            assert part.largest_rank(index) == whole.largest_rank(weight + index)
            assert whole.part_of(weight + index)[1] == index
        for index, group in enumerate(part.groups):
            there = groups[first + index]
            assert there.names == {name: renamed(full, first, weight) for name, full in group.names.items()}
            assert [(p.weight, p.group) for p in there.pieces] == [
                (p.weight + weight, first + index) for p in group.pieces
            ]


@pytest.mark.parametrize("sharing", ["magnitude", "hadamard", "given", "random", "pissa"])
def test_what_all_parts_share(sharing: str) -> None:
    common = {"apply": sharing} if sharing in ("magnitude", "hadamard") else {"start": sharing}
    shapes = [(6, 4), (5, 4), (8, 4)]
    config = CompositeConfig([(P.lora(1, seed=1, **common), 1), (P.lora(2, seed=2, **common), 2)])
    weights = [np.random.default_rng(index).normal(size=shape) for index, shape in enumerate(shapes)]
    whole = tna.UpdatePlan(config, shapes).with_base(weights)
    parts = [tna.UpdatePlan(part.config, own).with_base(mine) for part, own, mine in
             ((config.parts[0], shapes[:1], weights[:1]), (config.parts[1], shapes[1:], weights[1:]))]  # fmt: skip
    if sharing == "given":
        whole = whole.with_start({"group1.split0.factor0": np.ones((5, 2)), "group0.split0.factor1": np.ones((4, 1))})
        parts = [
            parts[0].with_start({"group0.split0.factor1": np.ones((4, 1))}),
            parts[1].with_start({"group0.split0.factor0": np.ones((5, 2))}),
        ]
    started = whole.init(dtype="float64")
    assert all(map(same, whole.merged(started, weights), weights))
    moved = {name: array + 0.1 for name, array in started.items()}
    found = whole.merged(moved, weights)
    for part, first, weight in numbered(parts):
        own = {name: moved[renamed(name, first, weight)] for name in part.param_shapes}
        mine = {renamed(name, first, weight): array for name, array in own.items()}
        count = len(part.shapes)
        assert all(map(same, part.init(dtype="float64").values(), (started[renamed(n, first, weight)] for n in own)))
        assert all(map(same, part.merged(own, weights[weight : weight + count]), found[weight : weight + count]))
        in_units = whole.training_plan.part_of(weight)[0]
        numbers = range(in_units.num_groups)
        assert [in_units.start_place(k) for k in numbers] == [part.start_place(k) for k in numbers]
        assert [len(in_units.starts(names)) for names in (None, list(mine)[:1])] == [len(numbers)] * 2
        assert list(in_units.file_plan.units_for("adam").values()) == list(part.units_for("adam").values())
        assert in_units.arrays_plan.param_shapes.keys() <= mine.keys()
        bound = tna.UpdatePlan(config, shapes).part_of(weight)[0].with_base(weights[weight : weight + count])
        assert not bound.needs_base or sharing == "given"
        assert in_units.to_arrays(in_units.from_arrays(mine)).keys() == mine.keys() == in_units.param_shapes.keys()
        for copied in (in_units, pickle.loads(pickle.dumps(in_units))):
            assert all(map(same, copied.deltas(copied.from_arrays(mine)), part.deltas(own)))
    assert pickle.loads(pickle.dumps(whole)).needs_base is whole.needs_base is False


def test_base_weights_and_given_arrays() -> None:
    config = CompositeConfig([
        (P.lora(2), 1),
        (P.lora(2, sources={"factor1": tna.sources.Given()}), 2),
        (P.lora(2, sources={"factor0": tna.sources.FromBase("rows")}), 1),
    ])  # fmt: skip
    shapes = [(6, 4), (5, 3), (8, 3), (4, 4)]
    plan = tna.UpdatePlan(config, shapes)
    assert list(plan.given_shapes) == ["group1.split0.factor1", "group2.split0.factor1"]
    assert list(plan.base_shapes) == ["group3.split0.factor0"]
    given = {name: np.full(shape, 0.5) for name, shape in plan.given_shapes.items()}
    weights = [np.random.default_rng(index).normal(size=shape) for index, shape in enumerate(shapes)]
    told: list[tuple[int, int]] = []
    bound = tna.UpdatePlan(config, shapes, given=given).with_base(weights, lambda *counts: told.append(counts))
    assert told == [(1, 1)]
    assert bound.needs_base is False
    assert plan.needs_base is True
    alone = tna.UpdatePlan(config.parts[2].config, shapes[3:]).with_base(weights[3:])
    assert same(bound.given["group3.split0.factor0"], alone.given["group0.split0.factor0"])
    plan.fill(bound)
    assert plan.given.keys() == bound.given.keys()
    params = {name: np.ones(shape) for name, shape in plan.param_shapes.items()}
    assert all(map(same, plan.deltas(params), bound.deltas(params)))
    np.testing.assert_allclose(bound.deltas(params)[1], 1.0)  # two columns of ones and halves
    with pytest.raises(tna.ShapeError, match="with_base needs the 4 base weights; got 1"):
        plan.with_base(weights[:1])


def test_composite_configs_are_values_of_the_fields_that_are_equal() -> None:
    config = CompositeConfig([(P.lora(2), 1), (P.lokr(2, seed=3), 2)])
    other = CompositeConfig([(P.lora(2), 2), (P.lokr(2, seed=3), 1)])
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert config == CompositeConfig.from_dict(config.to_dict())
    assert hash(config) == hash(copy.copy(config))
    assert config not in (other, P.lora(2))
    assert P.lora(2) != config
    assert config.replace(rank=5).parts == ((P.lora(5), 1), (P.lokr(5, seed=3), 2))
    assert eval(repr(config), {"CompositeConfig": CompositeConfig, "Config": tna.Config}) == config
    assert (config.rank, config.format, config.apply, config.before, config.scale) == (2, "cp", "add", None, 1.0)
    # All fields, those of later releases included, are read like this.
    for field in dataclasses.fields(tna.Config):
        assert isinstance(getattr(CompositeConfig, field.name), property)


LORA = (P.lora(2), 1)
TWO = CompositeConfig([LORA, (P.lokr(2, seed=3), 2)])
GIVEN = CompositeConfig([LORA, (P.lora(2, sources={"factor1": tna.sources.Given()}), 2)])
NO_PAIRS = "parts must be a list of two or more pairs of a config and a number of weights; got"
REFUSED: list[tuple[Callable[[], object], str]] = [
    *((functools.partial(CompositeConfig, parts), NO_PAIRS) for parts in ([], [LORA], {"a": 1}, [LORA, P.lora(2)])),
    (lambda: CompositeConfig([LORA, ("lora", 1)]), "part 1 must be a tnadapt.Config; got str"),
    (lambda: CompositeConfig([LORA, (P.lora(2), 0)]), "the weights of part 1 must be at least 1"),
    (lambda: CompositeConfig([LORA, (P.lora(2), True)]), "the weights of part 1 must be an integer; got True"),
    (lambda: CompositeConfig([LORA, (P.unilora(2), 1)]),
     "part 1 makes its arrays from θ by before='one-hot', which one config of several cannot"),
    (lambda: CompositeConfig([LORA, (P.dora(2), 1)]),
     "all configs of one adapter must have the same apply; part 0 has 'add', part"),
    (lambda: CompositeConfig([LORA, (P.lora(2, start="given"), 1)]),
     "must have the same start; part 0 has 'zero', part 1 'given'"),
    (lambda: CompositeConfig([(CompositeConfig([LORA] * 2), 2), LORA]),
     "part 0 must be a tnadapt.Config; got Composite"),
    *((functools.partial(getattr, TWO, name), f"{name} differs between the 2 configs of one adapter: ")
      for name in ("splits", "seed")),
    *((functools.partial(CompositeConfig.from_dict, wrong), "expected a mapping with the key 'parts'")
      for wrong in ({}, {"rank": 3}, 3)),
    *((functools.partial(CompositeConfig.from_dict, wrong), "parts must be a list of pairs")
      for wrong in ({"parts": 3}, {"parts": [3]})),
    (lambda: tna.UpdatePlan(TWO, [(2, 2)] * 3, layers="a"), "one key per weight; got 1 for 3 weights"),
    (lambda: tna.UpdatePlan(GIVEN, [(4, 4)] * 3, given={"group0.split0.factor1": np.ones((4, 2))}),
     "given names 'group0.split0.factor1'; the arrays that a caller can give"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=re.escape(message)):
        make()


@pytest.mark.parametrize("call", [tna.UpdatePlan, functools.partial(tna.verify, backends=["numpy"])])
def test_weights_are_as_many_as_the_configs_say(call: Callable[..., object]) -> None:
    with pytest.raises(tna.ShapeError, match="items must be one for each of the 3 weights of the configs; got 2"):
        call(TWO, [(4, 4)] * 2)


def test_layers_and_roles_are_those_of_each_part() -> None:
    config = CompositeConfig([(P.superlora(1, groups="layer"), 3), (P.superlora(1, groups="role"), 2)])
    plan = tna.UpdatePlan(config, [(2, 2)] * 5, layers=["a", "a", "b", "a", "a"], roles="qqqqv")
    assert [len(group.pieces) for group in plan.groups] == [2, 1, 1, 1]


def test_every_part_is_measured_verified_and_drawn(tmp_path: Path) -> None:
    config = CompositeConfig([(P.lora(2), 1), (P.superlora(3, projection="linear", ratio=0.5), 2), (P.dense(), 1)])
    shapes = [(12, 8), (8, 8), (16, 8), (3, 8)]
    plan, slices = tna.UpdatePlan(config, shapes), tna.UpdatePlan(config.parts[1].config, shapes[1:3])
    of_slices = [largest_rank(slices, weight).value for weight in (0, 1)]
    assert [largest_rank(plan, weight).value for weight in range(4)] == [2, *of_slices, 3]
    assert degrees_of_freedom(plan) == sum(degrees_of_freedom(of_config) for of_config, _ in plan.config_plans)
    report = tna.verify(config, shapes, backends=["numpy"])
    assert report.holds
    assert {law.subject for law in report.laws} == {"part 0", "part 1", "part 2"}
    rng = np.random.default_rng(0)
    params, fit = tna.decompose([rng.normal(size=shape) for shape in shapes], config)
    assert params.keys() == plan.param_shapes.keys()
    assert fit.groups[-1].error < 1e-6
    pytest.importorskip("matplotlib")
    from tnadapt import plot

    for group in range(3):
        plot.network(config, shapes, tmp_path / f"{group}.svg", group=group)
    assert "ρ = 0.5" in (tmp_path / "1.svg").read_text(encoding="utf-8")
