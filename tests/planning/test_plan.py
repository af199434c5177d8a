"""``tna.plan``: properties of every plan."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.planning.internals import CRITERIA, plan_search, rung
from tnadapt.errors import ConfigError, ShapeError
from tnadapt.planning import Plan, Row, degrees_of_freedom, families, padding_waste, step_cost

VIT = [(768, 768)] * 24
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}

weights = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=6) | st.tuples(
    st.integers(1, 24), st.integers(1, 24), st.integers(1, 8)
).map(lambda drawn: [drawn[:2]] * drawn[2])


@st.composite
def planned(draw: st.DrawFn) -> tuple[Plan, Any]:
    shapes = draw(weights)
    layers = draw(st.none() | st.lists(st.integers(0, 2), min_size=len(shapes), max_size=len(shapes)))
    by = draw(st.sampled_from([("parameters", "freedom", "cost"), tuple(CRITERIA), ("rank", "parameters"), ("waste",)]))
    dtype = draw(st.sampled_from(list(BYTES)))
    return tna.plan(shapes, draw(st.integers(1, 3000)), layers=layers, dtype=dtype, by=by), layers


@settings(max_examples=25)
@given(planned())
def test_every_row_and_the_front(drawn: tuple[Plan, Any]) -> None:
    found, layers = drawn
    assert found.rows
    for row in found.rows:
        adapter = tna.UpdatePlan(row.config, found.shapes, layers)
        assert row.parameters == tna.parameter_count(row.config, found.shapes, layers) <= found.budget
        assert row.bytes == row.parameters * BYTES[found.dtype]
        assert row.freedom == degrees_of_freedom(adapter) <= min(row.parameters, found.size)
        assert (row.cost, row.waste) == (step_cost(adapter), padding_waste(adapter))
        assert 0 <= row.waste < 1
        assert sum(count for _, count in adapter.alike) == adapter.num_groups
        sizes = sum(group.network.size for group in adapter.groups)
        assert sum(count * group.network.size for group, count in adapter.alike) == sizes
        assert row.fraction == row.freedom / found.size <= 1
    assert len({row.config for row in found.rows}) == len(found.rows)
    assert len({str(row.name) for row in found.rows}) == len(found.rows)
    # The first one may be that of the recommendation.
    order = [(row.measured is None, -(row.measured or 0.0), -row.parameters) for row in found.rows[1:]]
    assert order == sorted(order)
    # No row beats one on the front, and each other row is beaten by one on it.
    assert found.front
    for row in found.rows:
        if row in found.front:
            assert not any(beats(found, other, row) for other in found.rows)
        else:
            assert any(beats(found, best, row, ties=True) for best in found.front)


def beats(found: Plan, one: Row, other: Row, ties: bool = False) -> bool:
    """Return whether one is no worse in all that the front is of, and better or smaller; with ties, or as large."""
    value: dict[str, Callable[[Row], float]] = {
        "parameters": lambda row: rung(row.parameters, min(found.budget, found.size)),
        "freedom": lambda row: row.freedom,
        "cost": lambda row: -row.cost,
        "rank": lambda row: row.rank.value,
        "waste": lambda row: -row.waste,
    }
    pairs = [(value[name](one), value[name](other)) for name in found.by]
    better = any(a > b for a, b in pairs)
    return all(a >= b for a, b in pairs) and (better or one.parameters < other.parameters + ties)


@settings(max_examples=settings.default.max_examples // 4)
@given(weights, st.integers(1, 3000))
def test_plans_are_reproducible_and_tell_how_far_they_are(shapes: list[tuple[int, int]], budget: int) -> None:
    seen: list[tuple[int, int]] = []
    found = tna.plan(shapes, budget, progress=lambda done, total: seen.append((done, total)))
    assert found.to_dict() == tna.plan(tuple(shapes), f"{budget}").to_dict()
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    # The recommended method may be one more.
    assert {total for _, total in seen} == {len(seen)} <= {len(families.families(shapes)) + more for more in (0, 1)}


def test_each_method_is_listed_with_its_freest_setting() -> None:
    found = tna.plan(VIT, 200_000)
    methods = {row.name.family for row in found.freest}
    assert methods == {
        "LoRA", "LoHa", "LoKr", "KronA", "LoTR", "LoNKr", "LoRTA", "LoRTA + F", "SuperLoRA", "SuperLoRA + F",
        "fastfood", "LoRA-XS", "TinyLoRA", "Uni-LoRA", "VeRA",
    }  # fmt: skip
    for row in found.freest:
        assert row.freedom == max(other.freedom for other in found.rows if other.name.family == row.name.family)
    lora = next(row for row in found.freest if row.name.family == "LoRA")
    assert (lora.config, lora.parameters) == (tna.presets.lora(5), 5 * 24 * 1536)
    others = set(found.shown) - set(found.front) - set(found.freest)
    assert set(found.front) | set(found.freest) <= set(found.shown)
    assert all(row.measured is not None for row in others), "the most accurate one of a method"


def test_a_full_budget_includes_dense_and_layers_are_groups_where_they_are_known() -> None:
    found = tna.plan([(8, 8)] * 2, 10**9)
    assert any(row.config == tna.presets.dense() for row in found.rows)
    assert max(row.parameters for row in found.rows) == 128
    for layers in ([i // 2 for i in range(24)], None):
        assert any(row.config.groups == "layer" for row in tna.plan(VIT, 40_000, layers=layers).rows) is bool(layers)


def test_roles_are_among_the_groups_where_they_are_known() -> None:
    grouped, roles = [(64, 32), (16, 32)] * 3, ["q", "v"] * 3
    found = tna.plan(grouped, 2000, roles=roles)
    names = [str(row.name) for row in found.rows if row.config.groups == "role"]
    assert any(name.startswith("LoTR G = role, r = ") for name in names)
    assert any(name.startswith("SuperLoRA G = role, r = ") for name in names)
    for row in found.rows:
        assert row.parameters == tna.parameter_count(row.config, grouped, roles=roles)
        assert row.rank.value <= 32
    assert not any(row.config.groups == "role" for row in tna.plan(grouped, 2000).rows)
    with pytest.raises(ConfigError, match="roles has 1 keys for 6 weights; give one key per weight"):
        tna.plan(grouped, 2000, roles=["q"])
    assert tna.plan(VIT, "4 kB").budget == 1000
    half = tna.plan(VIT, "4KiB", dtype="bfloat16")
    assert half.budget == 2048
    assert max(row.bytes for row in half.rows) <= 4096


@pytest.mark.slow
def test_the_table() -> None:
    found = tna.plan(VIT, 1000)
    text = str(found)
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("   method"))
    assert " ".join(" ".join(lines[:first]).split()) == found.recommendation
    assert len(lines) == first + 1 + len(found.shown) + len(found.notes())
    assert sum(line.startswith("●") for line in lines) == len(found.front) + 1
    assert max(map(len, lines)) <= 120
    assert len(found.table(every=True)) == 1 + len(found.rows)
    json.dumps(found.to_dict(), allow_nan=False)
    for row, read in zip(found.shown, found.to_dict()["rows"], strict=True):
        assert tna.Config.from_dict(read["config"]) == row.config
        assert (read["parameters"], read["rank"], read["front"]) == (row.parameters, row.rank.value, row in found.front)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tna.plan([], 100), ShapeError, "shapes is empty"),
        (lambda: tna.plan([(3, 0)], 100), ShapeError, r"expected \(rows, cols\), both at least 1"),
        (lambda: tna.plan(7, 100), ShapeError, "shapes must be a list"),
        (lambda: tna.plan(100, VIT), ShapeError, "shapes must be .*; got 100; shapes and budget may be swapped"),
        (
            lambda: tna.plan("bert", 100),
            ShapeError,
            r"got 'bert'\. The command tnadapt plan and tnadapt\.planning\.model_targets take a model",
        ),
        (
            lambda: tna.plan(types.SimpleNamespace(named_modules=None), 100),
            ShapeError,
            r"integers; got a model: give \[target\.shape for target in tnadapt\.torch\.find_targets\(model\)\]",
        ),
        (lambda: tna.plan(VIT, 0), ConfigError, "budget must be at least 1"),
        (lambda: tna.plan(VIT, 1.5), ConfigError, "budget must be an integer of parameters, or bytes as text"),
        (lambda: tna.plan(VIT, "0"), ConfigError, "a budget must be at least 1 parameter; got '0'"),
        (lambda: tna.plan(VIT, "2 B"), ConfigError, "got '2 B'; one parameter is 4 bytes in float32"),
        (lambda: tna.plan(VIT, "4 parsec"), ConfigError, "such as '4 kB' or '64 KiB'; got '4 parsec'"),
        (lambda: tna.plan(VIT, "1.5"), ConfigError, "must be a whole number"),
        (lambda: tna.plan(VIT, "-5"), ConfigError, "a budget is a number of parameters"),
        (
            lambda: tna.plan(VIT, "1q"),
            ConfigError,
            "such as 1000 or '1k', or of bytes, such as '4 kB' or '64 KiB'; got",
        ),
        (lambda: tna.plan(VIT, "0.0001k"), ConfigError, "a budget of parameters must be a whole number; got '0.0001k'"),
        (lambda: tna.plan(VIT, 100, dtype="int8"), ConfigError, "dtype must be one of float64"),
        (lambda: tna.plan(VIT, 100, by=["speed"]), ConfigError, "by must name criteria among parameters"),
        (lambda: tna.plan(VIT, 100, layers=[0, 1]), ConfigError, "layers has 2 keys for 24 weights"),
    ],
)
def test_mistakes(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_budget_below_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "families", lambda shapes, layers, roles: families.usual(shapes)[:3])
    with pytest.raises(ConfigError, match=r"a budget of 20 parameters .* the least is 137: LoNKr K = 4, f = 5, r = 1"):
        tna.plan(VIT, 20)
