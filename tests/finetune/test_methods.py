"""The methods to compare: by name, by default, and by budget."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.errors import TnadaptError

pytest.importorskip("torch")

from tnadapt.finetune import Choice, default_methods, grid, within
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
    if not short and shapes == SMALL:  # from tens to tens of thousands
        assert (min(counts.values()) < 50, max(counts.values())) == (True, 32768)
        families = {HEAD, DENSE, "LoRA", "LoKr", "LoNKr", "LoRTA", "SuperLoRA", "SuperLoRA + F"}
        assert {method.family for method in methods} >= families


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


def test_named_settings() -> None:
    chosen = methods_of(["lora", "superlora"], [1, 4], {}, SMALL, 4)
    assert [method.name for method in chosen] == ["LoRA r = 1", "LoRA r = 4", "SuperLoRA r = 1", "SuperLoRA r = 4"]
    assert chosen[3].config == tna.presets.superlora(4)
    (projected,) = methods_of([], [2], {"projection": "linear", "ratio": 0.1, "groups": 2}, SMALL, 4)
    assert projected.family == "SuperLoRA + F"
    assert projected.config == tna.presets.superlora(2, groups=2, projection="linear", ratio=0.1)
    (dense,) = methods_of(["dense"], [], {}, SMALL, 4)
    assert (dense.config, dense.label) == (tna.presets.dense(), "")
    (c3a,) = methods_of(["c3a"], [], {"block": 64}, SMALL, 4)
    assert (c3a.family, c3a.label) == ("C3A", "block = 64")
    (grouped,) = methods_of(["lotr"], [2], {"groups": "role"}, [(64, 32), (16, 32)] * 2, 2)
    assert grouped.config == tna.presets.lotr(2, groups="role"), "needs no weights of one shape"


#: What some presets need besides their names, and how many parameters they have then; 0 for any number.
NEEDED: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "c3a": ([], {"block": 64}, 8 * 64),
    "craft": ([8], {}, 2 * (4**2 + 2 * 8**2)),
    "quanta": ([], {"digits": (4, 4)}, 8 * 3 * 16**2),
    "lorta_cp": ([2], {"heads": 4}, 0),
    "cara": ([2], {"heads": 4}, 0),
}


@pytest.mark.parametrize("name", sorted(set(tna.presets.__all__) - {"nola"}))
def test_every_preset_by_its_name(name: str) -> None:
    ranks, changes, expected = NEEDED.get(name, ([], {}, 0))
    (method,) = methods_of([name], ranks, changes, SMALL, 4)
    assert method.config is not None
    count = tna.parameter_count(method.config, SMALL, roles="qv" * 4)
    assert count == expected if expected else count > 0


@pytest.mark.parametrize(
    ("name", "shapes", "message"),
    [
        ("lorta_cp", SMALL, "preset 'lorta_cp' needs the number of 'heads' or .*; give it with --set NAME=VALUE"),
        (
            "lotr", [(64, 32), (16, 32)] * 2,
            "preset 'lotr' needs weights of one shape; .* give --groups role, for one group of",
        ),
        ("c3a", SMALL, "block=768, which does not divide the 64 rows"),
    ],
)  # fmt: skip
def test_presets_that_do_not_fit(name: str, shapes: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(TnadaptError, match=message):
        tna.parameter_count(methods_of([name], [] if name == "c3a" else [2], {}, shapes, 4)[0].config, shapes)


def test_a_budget_below_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_families", lambda shapes: usual(shapes)[:2])
    message = r"a budget of 100 is less than any setting needs on these 8 weights; .* is 640"
    with pytest.raises(TnadaptError, match=message):
        within(100, SMALL)


def test_bad_choices() -> None:
    # Others are refused on the command line: see tests/cli/test_cli.py.
    with pytest.raises(TnadaptError, match="no field 'dropout'"):
        Choice(presets=("dense",), changes={"dropout": 1}).methods(SMALL, 4)
    with pytest.raises(TnadaptError, match="at least 1 parameter"):
        Choice(budgets=(10, -3)).methods(SMALL, 4)
