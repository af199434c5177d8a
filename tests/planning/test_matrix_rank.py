"""The largest rank of an update: formula and sketch against the singular values of the whole update."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.planning.internals import by_formula, sketched
from tnadapt.errors import ShapeError
from tnadapt.planning import Rank, largest_rank
from tnadapt.testing.strategies import plans

from .test_freedom import point, rank


def anywhere(plan: tna.SuperLoRA) -> tna.SuperLoRA:
    """The plan that starts at arrays in general position: the rank of a plan is that for any start that is brought."""
    if not plan.point.brought:
        return plan
    rng = np.random.default_rng(0)
    return plan.with_start({name: rng.normal(size=shape) for name, shape in plan.array_shapes.items()})


@given(plans(projections=("identity", "shuffle", "linear", "linear_v2")))
# Three groups in one weight that share an F of one element: the same two rows thrice.
@example(tna.SuperLoRA(tna.Config(1, 1, groups=3, format="dense", projection="linear", ratio=0.07), [(6, 6)]))
# One array of the start is brought and the other is zero: nothing is subtracted. Of another start a matrix would be.
@example(
    tna.SuperLoRA(
        tna.Config(1, 1, 2, format="dense", start="given"), [(2, 2)], start_from={"group0.split1.dense": np.ones(2)}
    )
)
def test_the_rank_of_random_updates(plan: tna.SuperLoRA) -> None:
    deltas = anywhere(plan).deltas(point(plan, seed=5))
    for weight, delta in enumerate(deltas):
        assert largest_rank(plan, weight) == Rank(rank(delta), True)


@given(plans(projections=("nonlinear", "nonlinear_v2")))
def test_a_nonlinear_f_has_full_rank(plan: tna.SuperLoRA) -> None:
    # Far from where tanhshrink is almost flat.
    deltas = anywhere(plan).deltas({name: 8.0 * array for name, array in point(plan, seed=5).items()})
    for weight, delta in enumerate(deltas):
        rows = np.linalg.norm(delta, axis=1, keepdims=True)
        assert largest_rank(plan, weight).value == rank(delta / rows)


@given(
    st.integers(1, 8), st.sampled_from(["lora", "loha", "lokr", "krona", "tucker", "tt", "compacter"]),
    st.sampled_from([(12, 18), (30, 7), (16, 16), (1, 9)]),
)  # fmt: skip
def test_formulas_of_a_weight_of_its_own(r: int, name: str, shape: tuple[int, int]) -> None:
    config = {
        "lora": tna.presets.lora(r), "loha": tna.presets.loha(r), "lokr": tna.presets.lokr(r),
        "krona": tna.presets.krona(), "tucker": tna.Config(r, format="tucker"), "tt": tna.Config(r, format="tt"),
        "compacter": tna.presets.lora(r, terms=2),
    }[name]  # fmt: skip
    plan = tna.SuperLoRA(config, [shape, (5, 5)])
    known = by_formula(plan, 0)
    assert known is not None
    assert known == rank(plan.delta(point(plan), 0))


def in_blocks(matrix: np.ndarray, limit: int, rng: np.random.Generator, rows: int = 37) -> Rank:
    def blocks() -> Iterator[np.ndarray]:
        for lo in range(0, len(matrix), rows):
            yield matrix[lo : lo + rows]

    return sketched(blocks, matrix.shape, limit, rng)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [
        tna.SuperLoRA(config, [(20, 30), (90, 80), (5, 5)])
        for config in (
            tna.presets.superlora(1),
            tna.presets.lonkr(1, splits=2),
            tna.Config(3, 3, groups=2, fold="balanced"),
        )
    ]
    whole = [largest_rank(plan) for plan in plans]
    monkeypatch.setattr("tnadapt.planning._matrix_rank.BLOCK", 80 * 7)
    assert [largest_rank(plan) for plan in plans] == whole


@pytest.mark.parametrize("size", [(200, 300), (300, 200), (64, 64), (65, 300)])
@pytest.mark.parametrize("r", [1, 63, 64, 65, 127, 128, 150, 400])
@pytest.mark.parametrize("limit", [50, 128, 1024])
def test_sketches_tell_ranks_apart(size: tuple[int, int], r: int, limit: int, rng: np.random.Generator) -> None:
    matrix = rng.standard_normal((size[0], r)) @ rng.standard_normal((r, size[1]))
    true = min(r, *size)
    found = in_blocks(matrix, limit, rng)
    assert found == (Rank(true, True) if true < min(limit, *size) or limit >= min(size) else Rank(limit, False))


def test_a_square_part_may_be_singular_where_the_whole_is_not(rng: np.random.Generator) -> None:
    # Rows come in equal pairs: of 128 random ones of 400 some are equal, and the rank is 200.
    matrix = np.repeat(rng.standard_normal((200, 300)), 2, axis=0)
    assert in_blocks(matrix, 128, rng) == Rank(128, False)
    assert in_blocks(matrix, 1024, rng) == Rank(200, True)


def test_aligned_powers_of_two_keep_the_rank_low() -> None:
    # 64 of 64 × 64 fold to a square of 512: a row of it is eight rows of a weight, one after another.
    aligned = tna.SuperLoRA(tna.presets.superlora(1), [(64, 64)] * 64)
    assert aligned.groups[0].network.sizes == (512, 512)
    assert largest_rank(aligned) == Rank(8, True)
    assert largest_rank(tna.SuperLoRA(tna.presets.superlora(1), [(64, 64)] * 63)) == Rank(64, True)


def test_which_weight() -> None:
    plan = tna.SuperLoRA(tna.presets.lora(9), [(4, 50), (8, 6), (6, 8)])
    assert largest_rank(plan) == largest_rank(plan, 1) == Rank(6, True)
    assert largest_rank(plan, 0) == Rank(4, True)
    with pytest.raises(ShapeError, match="weight must be from 0 to 2; got 3"):
        largest_rank(plan, 3)
