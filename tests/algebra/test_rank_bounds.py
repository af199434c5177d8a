"""Ranks that updates never exceed: of any plan with any arrays, attained by the named methods."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.planning import largest_rank
from tnadapt.testing.strategies import parameters, plans

P = tna.presets


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix, rtol=1e-9)) if matrix.any() else 0


def drawn(plan: tna.SuperLoRA, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) for name, shape in plan.param_shapes.items()
    }


@pytest.mark.law("largest-rank")
@given(st.data())
def test_no_update_exceeds_its_bound(data: st.DataObject) -> None:
    plan = data.draw(plans())
    params = data.draw(parameters(plan))
    for weight, delta in enumerate(plan.deltas(params)):
        bound = plan.largest_rank(weight)
        assert 1 <= bound <= min(plan.shapes[weight])
        assert rank(delta) <= bound


FOUR: dict[str, Any] = {"weights": 4, "rows": 12, "cols": 10}
# Each with the rank that its formula has.
METHODS: dict[str, tuple[tna.Config, int]] = {
    "lora": (P.lora(3), 3),
    "lora, terms": (P.lora(2, terms=3), 6),
    "lotr": (P.lotr(3, **FOUR), 3),
    "lotr, train": (P.lotr(3, train=True, **FOUR), 3),
    "fact_tt": (P.fact_tt(3), 3),
    "fact_tk": (P.fact_tk(3), 3),
    "fact_tk, fewer columns": (P.fact_tk((2, 5, 3)), 3),
    "fact_tk, fewer rows": (P.fact_tk((2, 3, 5)), 3),
    "cara": (P.cara(3, heads=2, **FOUR), 3),
    "lorta_cp": (P.lorta_cp(3, heads=3), 3),
    "metatt": (P.metatt(3), 3),
    "metatt, heads": (P.metatt(2, heads=3), 2),
    "loha": (P.loha(2), 4),
    "lokr": (P.lokr(1), 2),
    "krona": (P.krona(), 8),
    "compacter": (P.compacter(1, terms=2), 4),
    "lotr, Kronecker": (P.lotr(1, splits=2, leading="same"), 1),
    "dense": (P.dense(), 10),
    "superlora": (P.superlora(1), 10),
    "fastfood": (P.fastfood(0.3), 10),
    "shuffled": (P.lora(1, projection="shuffle"), 10),
    "superlora of one weight": (P.superlora(2, groups="weight", fold=(12, 10)), 2),
    "six columns in an index": (tna.Config(2, groups=1, fold=(8, 60)), 10),
    "two rows in a row": (tna.Config(2, groups=1, fold=(24, 20)), 4),
    "half a row": (tna.Config(2, groups=1, fold=(96, 5)), 4),
    "miss": (P.miss(4), 4),
    "gralora": (P.gralora(2, 2), 4),
    "gralora of whole blocks": (P.gralora(12, 2), 10),
}


@pytest.mark.law("largest-rank")
@pytest.mark.parametrize("name", METHODS)
def test_the_bound_is_the_methods_rank(name: str) -> None:
    config, expected = METHODS[name]
    plan = tna.SuperLoRA(config, [(12, 10)] * 4)
    assert largest_rank(plan).value == expected
    params = drawn(plan)
    for weight in range(4):
        assert plan.largest_rank(weight) == expected
        assert rank(plan.delta(params, weight)) == expected
    assert plan.lora_rank == (expected if expected * 22 < 120 else None)
    with pytest.raises(tna.ShapeError, match="i must be from 0 to 3"):
        plan.largest_rank(4)


def test_a_weight_in_two_groups_has_the_sum_of_their_ranks() -> None:
    plan = tna.SuperLoRA(tna.Config(1, groups=2, fold="stack"), [(3, 8), (4, 8), (3, 8)])
    assert [plan.largest_rank(weight) for weight in range(3)] == [1, 2, 1]
    assert [rank(delta) for delta in plan.deltas(drawn(plan))] == [1, 2, 1]


def test_large_plans_need_no_arrays() -> None:
    llama = [(8192, 8192), (1024, 8192)] * 80
    plan = tna.SuperLoRA(P.lotr(16, groups="role"), llama, roles=["q", "v"] * 80)
    assert plan.lora_rank == 16
    assert tna.SuperLoRA(P.superlora(16), llama).lora_rank is None


def test_a_train_of_many_modes_has_the_rank_of_its_bond() -> None:
    # Too many arrays to search all cuts: those of the weights' modes belong to either side.
    config = tna.Config(2, order=14, groups=1, fold=(2,) * 14, format="tt")
    plan = tna.SuperLoRA(config, [(64, 64)] * 4)
    assert [plan.largest_rank(weight) for weight in range(4)] == [2] * 4
    assert rank(plan.delta(drawn(plan), 3)) == 2
