"""The methods to compare: by name, by default, and by budget."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.errors import TnadaptError

pytest.importorskip("torch")

from tnadapt.finetune import Choice, default_methods, within
from tnadapt.finetune.grid import DENSE, HEAD, methods_of
from tnadapt.planning.families import usual

SMALL = [(64, 64)] * 8


@pytest.mark.parametrize("shapes", [SMALL, [(768, 768)] * 24, [(64, 64), (16, 64)] * 4, [(384, 384)] * 12])
@pytest.mark.parametrize("short", [False, True])
def test_the_default_grid_fits_any_attention(shapes: list[tuple[int, int]], short: bool) -> None:
    methods = default_methods(short)
    assert len({method.name for method in methods}) == len(methods)
    counts = {method.name: tna.parameter_count(method.config, shapes) for method in methods if method.config}
    assert methods[0].family == HEAD
    assert counts[DENSE] == max(counts.values()) == sum(rows * cols for rows, cols in shapes)


def test_the_default_grid_goes_from_tens_to_tens_of_thousands() -> None:
    counts = [tna.parameter_count(method.config, SMALL) for method in default_methods() if method.config]
    assert min(counts) < 50
    assert max(counts) == 32768
    families = {method.family for method in default_methods()}
    assert families >= {HEAD, DENSE, "LoRA", "LoKr", "LoNKr", "LoRTA", "SuperLoRA", "SuperLoRA + F"}


shapes_strategy = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@given(st.integers(1, 5000), shapes_strategy)
def test_a_budget_is_kept_and_used(budget: int, shapes: list[tuple[int, int]]) -> None:
    size = sum(rows * cols for rows, cols in shapes)
    found = {}
    for method in within(budget, shapes):
        assert method.config is not None
        count = tna.parameter_count(method.config, shapes)
        assert count <= min(budget, size)
        found[method.family] = max(count, found.get(method.family, 0))
    # The projections of one parameter or more are always there, and come within one of the budget.
    assert found["fastfood"] >= min(budget, size) - 1
    lora = tna.parameter_count(tna.presets.lora(1), shapes) if len({cols for _, cols in shapes}) == 1 else None
    if lora is not None and lora <= min(budget, size):
        least = min(min(shape) for shape in shapes)
        best = max(rank for rank in range(1, least + 1) if rank * lora <= min(budget, size))
        assert found["LoRA"] == best * lora


def test_a_budget_of_nothing() -> None:
    with pytest.raises(TnadaptError, match="a budget must be at least 1 parameter; got 0"):
        within(0, SMALL)


def test_a_budget_below_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    from tnadapt.finetune import grid as budget

    monkeypatch.setattr(budget, "_families", lambda shapes: usual(shapes)[:2])
    with pytest.raises(
        TnadaptError, match=r"a budget of 100 is less than any setting needs on these 8 weights; .* is 640"
    ):
        within(100, SMALL)


def test_named_settings() -> None:
    chosen = methods_of(["lora", "superlora"], [1, 4], {}, SMALL, 4)
    assert [method.name for method in chosen] == ["LoRA r = 1", "LoRA r = 4", "SuperLoRA r = 1", "SuperLoRA r = 4"]
    assert chosen[3].config == tna.presets.superlora(4)
    (projected,) = methods_of([], [2], {"projection": "linear", "ratio": 0.1, "groups": 2}, SMALL, 4)
    assert projected.family == "SuperLoRA + F"
    assert projected.config == tna.presets.superlora(2, groups=2, projection="linear", ratio=0.1)
    (dense,) = methods_of(["dense"], [], {}, SMALL, 4)
    assert dense.config == tna.presets.dense()
    assert dense.label == ""


@pytest.mark.parametrize(
    "name", sorted(set(tna.presets.__all__) - {"lorta_cp", "cara", "c3a", "nola", "craft", "quanta"})
)
def test_every_preset_by_its_name_alone(name: str) -> None:
    (method,) = methods_of([name], [], {}, SMALL, 4)
    assert method.config is not None
    assert tna.parameter_count(method.config, SMALL) > 0


def test_a_preset_whose_sizes_do_not_fit() -> None:
    (method,) = methods_of(["c3a"], [], {"block": 64}, SMALL, 4)
    assert (method.family, method.label) == ("C3A", "block = 64")
    assert tna.parameter_count(method.config, SMALL) == 8 * 64  # type: ignore[arg-type]
    with pytest.raises(TnadaptError, match="block=768, which does not divide the 64 rows"):
        tna.parameter_count(methods_of(["c3a"], [], {}, SMALL, 4)[0].config, SMALL)  # type: ignore[arg-type]


def test_presets_that_need_roles_or_digits() -> None:
    (craft,) = methods_of(["craft"], [8], {}, SMALL, 4)
    assert craft.config is not None
    assert tna.parameter_count(craft.config, SMALL, roles="qv" * 4) == 2 * (4**2 + 2 * 8**2)
    (quanta,) = methods_of(["quanta"], [], {"digits": (4, 4)}, SMALL, 4)
    assert quanta.family == "QuanTA"
    assert quanta.config is not None
    assert tna.parameter_count(quanta.config, SMALL) == 8 * 3 * 16**2


def test_groups_by_role_need_no_weights_of_one_shape() -> None:
    grouped = [(64, 32), (16, 32)] * 2
    (method,) = methods_of(["lotr"], [2], {"groups": "role"}, grouped, 2)
    assert method.config == tna.presets.lotr(2, groups="role")
    with pytest.raises(
        TnadaptError, match=r"'lotr' needs weights of one shape; .* give --groups role, for one group of"
    ):
        methods_of(["lotr"], [2], {}, grouped, 2)


@pytest.mark.parametrize("name", ["lorta_cp", "cara"])
def test_presets_that_want_the_number_of_heads(name: str) -> None:
    with pytest.raises(
        TnadaptError, match=f"preset '{name}' needs the number of 'heads' or .*; give it with --set NAME=VALUE"
    ):
        methods_of([name], [2], {}, SMALL, 4)
    (method,) = methods_of([name], [2], {"heads": 4}, SMALL, 4)
    assert method.config is not None
    assert tna.parameter_count(method.config, SMALL) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"presets": ("lorra",)}, r"no preset 'lorra'; did you mean 'lora'\? The presets are c3a, cara"),
        ({"ranks": (0,)}, "rank must be from 1"),
        ({"presets": ("dense",), "changes": {"dropout": 1}}, "no field 'dropout'"),
        ({"budgets": (10,), "ranks": (1,)}, "a budget or settings, not both"),
        ({"budgets": (10, -3)}, "at least 1 parameter"),
        ({"presets": ("lora",), "changes": {"seed": 5}}, "is that of the training: give --seeds N"),
    ],
)
def test_bad_choices(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        Choice(**given).methods(SMALL, 4)


def test_stacked_presets_refuse_unlike_weights() -> None:
    with pytest.raises(TnadaptError, match="preset 'lotr' needs weights of one shape"):
        methods_of(["lotr"], [1], {}, [(4, 4), (2, 4)], 1)
