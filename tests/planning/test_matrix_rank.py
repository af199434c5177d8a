"""Degrees of freedom and the largest rank of an update: formulas and sketches against Jacobians and singular values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.planning.internals import sketched
from tests.support.depth import in_depth
from tnadapt.algebra.group import rank_bound, rank_bounds
from tnadapt.algebra.network import Network
from tnadapt.errors import ShapeError
from tnadapt.planning import Rank, degrees_of_freedom, largest_rank
from tnadapt.testing.strategies import plans

LINEAR = ("identity", "shuffle", "linear", "linear_v2")
# A Jacobian of more parameters takes seconds.
MOST = 160


def point(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5, 1.5, shape) for name, shape in plan.param_shapes.items()
    }


def jacobian(plan: tna.UpdatePlan) -> np.ndarray:
    """Compute the Jacobian by differences, which are exact: the long vector is linear in each element of an array."""
    params = point(plan)
    columns = []
    for name, array in params.items():
        for index in np.ndindex(*array.shape):

            def moved(step: float, name: str = name, index: tuple[int, ...] = index) -> np.ndarray:
                changed = params[name].copy()
                changed[index] += step
                return plan.vector({**params, name: changed})

            columns.append((moved(1.0) - moved(-1.0)) / 2)
    return np.stack(columns, axis=1)


def rank(matrix: np.ndarray) -> int:
    values = np.linalg.svd(matrix, compute_uv=False)
    # Of the settings drawn here the smallest singular value that is none of rounding is above 1e-6 of the largest,
    # and rounding is below 1e-14 of it.
    return int(np.sum(values > 1e-9 * values[0]))


def padded(network: Network) -> bool:
    sizes = network.sizes
    if network.kronecker:
        sizes = tuple(math.prod(mode) for mode in zip(*(split.sizes for split in network.splits), strict=True))
    return math.prod(sizes) != network.size


def may_be_defective(plan: tna.UpdatePlan) -> bool:
    """Return whether CP of these sizes and rank is one of the few known defective cases."""
    if not plan.config.format.startswith("cp"):
        return False
    rank = plan.config.rank
    assert isinstance(rank, int)
    powers = {rank * plan.config.terms, rank**plan.config.splits * plan.config.terms}
    for group in plan.groups:
        for sizes in [group.network.sizes, *(split.sizes for split in group.network.splits)]:
            real = sorted(n for n in sizes if n > 1)
            if len(real) == 4 and real[:2] == [2, 2] and real[2] == real[3] and 2 * real[2] - 1 in powers:
                return True
            if len(real) == 3 and 3 in real and any(real.count(n) > 1 and (3 * n - 1) // 2 in powers for n in real):
                return True
    return False


HADAMARD = tna.Config(2, 3, 2, groups=1, fold=(4, 4, 4), format="cp", combine="hadamard", leading="same")


@given(plans(projections=LINEAR))
@example(tna.UpdatePlan(tna.Config(3, 4, groups=1, fold="hypercube"), [(4, 4)]))  # 15 expected, 14 there
@example(
    tna.UpdatePlan(tna.Config(2, 3, groups=1, fold="hypercube"), [(3, 4)])
)  # a slice of nine, and three of the next
@example(tna.UpdatePlan(tna.Config((3, 1), 3, fold=(7, 7, 6), format="tt"), [(9, 7)]))
@example(tna.UpdatePlan(tna.Config(1, 1, format="tucker", fold="hypercube"), [(5, 5)]))
@example(tna.UpdatePlan(HADAMARD.replace(format="tucker"), [(8, 8)]))
@example(tna.UpdatePlan(HADAMARD.replace(format="tt"), [(8, 8)]))
@example(tna.UpdatePlan(HADAMARD, [(8, 8)]))
def test_never_less_than_the_rank_of_the_jacobian(plan: tna.UpdatePlan) -> None:
    assume(plan.num_parameters <= MOST)
    assert rank(jacobian(plan)) <= degrees_of_freedom(plan) <= min(plan.size, plan.num_parameters)


@given(plans(projections=LINEAR))
# Two terms of a split of one number each and a matrix of rank 1: a matrix of rank 2.
@example(tna.UpdatePlan(tna.Config(1, splits=3, terms=2, fold="balanced", format="tucker"), [(5, 5)]))
@example(tna.UpdatePlan(tna.presets.compacter(2, terms=3), [(9, 6)]))
@example(tna.UpdatePlan(tna.presets.krona(), [(6, 4), (4, 6)]))
@example(tna.UpdatePlan(tna.presets.loha(2), [(7, 6)]))
@example(tna.UpdatePlan(tna.presets.lotr(2, weights=3, rows=4, cols=5), [(4, 5)] * 3))
def test_the_rank_of_the_jacobian_where_nothing_is_padded(plan: tna.UpdatePlan) -> None:
    assume(plan.num_parameters <= MOST)
    assume(not any(padded(group.network) for group in plan.groups) and not may_be_defective(plan))
    assert rank(jacobian(plan)) == degrees_of_freedom(plan)


@given(
    st.integers(1, 60), st.integers(1, 2), st.integers(1, 4), st.sampled_from(["hypercube", "balanced"]),
    st.sampled_from(["cp", "cp-weighted", "tucker", "tt"]), st.sampled_from(LINEAR), st.sampled_from([1, 1, 2]),
)  # fmt: skip
def test_the_rank_of_the_jacobian_of_padded_matrices(
    size: int, order: int, r: int, fold: str, name: str, projection: str, groups: int
) -> None:
    groups = min(groups, size)
    config = tna.Config(r, order, groups=groups, fold=fold, format=name, projection=projection)
    plan = tna.UpdatePlan(config, [(1, size)])
    assume(plan.num_parameters <= MOST)
    assert rank(jacobian(plan)) == degrees_of_freedom(plan)


@pytest.mark.parametrize("projection", ["nonlinear", "nonlinear_v2"])
@pytest.mark.parametrize(
    "config",
    in_depth(
        [tna.presets.superlora(2), tna.presets.lorta(2, order=3), tna.presets.lonkr(1, splits=2, split_size=2)],
        [tna.presets.superlora(2)],
    ),
)
def test_a_nonlinear_f_does_not_reduce_freedom(config: tna.Config, projection: str) -> None:
    jax = pytest.importorskip("jax")
    plan = tna.UpdatePlan(config.replace(projection=projection, ratio=0.5), [(6, 8), (8, 6)])
    params = {name: 3.0 * jax.numpy.asarray(array) for name, array in point(plan).items()}
    blocks = jax.jacfwd(plan.vector)(params)
    found = np.concatenate([np.asarray(block).reshape(plan.size, -1) for block in blocks.values()], axis=1)
    # tanhshrink has a slope of almost 0 in places: rows are scaled to one length.
    found = found / np.linalg.norm(found, axis=1, keepdims=True)
    assert rank(found) == degrees_of_freedom(plan)


def anywhere(plan: tna.UpdatePlan) -> tna.UpdatePlan:
    """The plan that starts at arrays in general position: the rank of a plan is that for any start that is brought."""
    if not plan.point.brought:
        return plan
    rng = np.random.default_rng(0)
    return plan.with_start({name: rng.normal(size=shape) for name, shape in plan.array_shapes.items()})


@given(plans(projections=("identity", "shuffle", "linear", "linear_v2")))
# Three groups in one weight that share an F of one element: the same two rows thrice.
@example(tna.UpdatePlan(tna.Config(1, 1, groups=3, format="dense", projection="linear", ratio=0.07), [(6, 6)]))
# One array of the start is brought and the other is zero: nothing is subtracted. Of another start a matrix would be.
@example(
    tna.UpdatePlan(
        tna.Config(1, 1, 2, format="dense", start="given"), [(2, 2)], start_from={"group0.split1.dense": np.ones(2)}
    )
)
def test_the_rank_of_random_updates(plan: tna.UpdatePlan) -> None:
    deltas = anywhere(plan).deltas(point(plan, seed=5))
    for weight, delta in enumerate(deltas):
        assert largest_rank(plan, weight) == Rank(rank(delta), True)


@given(plans(projections=("nonlinear", "nonlinear_v2")))
def test_a_nonlinear_f_has_full_rank(plan: tna.UpdatePlan) -> None:
    # Far from where tanhshrink is almost flat.
    deltas = anywhere(plan).deltas({name: 8.0 * array for name, array in point(plan, seed=5).items()})
    for weight, delta in enumerate(deltas):
        rows = np.linalg.norm(delta, axis=1, keepdims=True)
        assert largest_rank(plan, weight).value == rank(delta / rows)


@pytest.mark.parametrize(
    "config", [tna.presets.superlora(1), tna.presets.lonkr(1, splits=2), tna.Config(3, 3, groups=2, fold="balanced")]
)
def test_blocks_of_rows_change_nothing(config: tna.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tna.UpdatePlan(config, [(20, 30), (90, 80), (5, 5)])
    whole = largest_rank(plan)
    monkeypatch.setattr("tnadapt.planning._matrix_rank.BLOCK", 80 * 7)
    assert largest_rank(plan) == whole


@pytest.mark.parametrize("size", [(200, 300), (300, 200), (64, 64), (65, 300)])
@pytest.mark.parametrize("limit", [50, 128, 1024])
def test_sketches_tell_ranks_apart(size: tuple[int, int], limit: int, rng: np.random.Generator) -> None:
    for r in (1, 63, 64, 65, 127, 128, 150, 400):
        matrix = rng.standard_normal((size[0], r)) @ rng.standard_normal((r, size[1]))
        true = min(r, *size)
        expected = Rank(true, True) if true < min(limit, *size) or limit >= min(size) else Rank(limit, False)
        assert sketched(lambda: (matrix[lo : lo + 37] for lo in range(0, size[0], 37)), size, limit, rng) == expected  # noqa: B023


def test_known_ranks_and_which_weight() -> None:
    # 64 of 64 × 64 fold to a square of 512: a row of it is eight rows of a weight, one after another.
    assert largest_rank(tna.UpdatePlan(tna.presets.superlora(1), [(64, 64)] * 64)) == Rank(8, True)
    assert largest_rank(tna.UpdatePlan(tna.presets.superlora(1), [(64, 64)] * 63)) == Rank(64, True)
    plan = tna.UpdatePlan(tna.presets.lora(9), [(4, 50), (8, 6), (6, 8)])
    assert largest_rank(plan) == largest_rank(plan, 1) == Rank(6, True)
    assert largest_rank(plan, 0) == Rank(4, True)
    with pytest.raises(ShapeError, match="weight must be from 0 to 2; got 3"):
        largest_rank(plan, 3)
    # θ has fewer elements than the formulas of the arrays that are made from it, and magnitudes are no freedom.
    for apply in ("add", "magnitude"):
        theta = tna.UpdatePlan(tna.presets.unilora(9, 2, apply=apply), [(6, 4), (4, 6)])
        assert degrees_of_freedom(theta) == 9


@given(plans())
@example(tna.UpdatePlan(tna.presets.dora(2), [(4, 6), (3, 2)]))
def test_ranks_of_all_weights_equal_those_of_each(plan: tna.UpdatePlan) -> None:
    each = [rank_bound(plan.layout, plan.groups, weight) for weight in range(len(plan.shapes))]
    assert list(rank_bounds(plan.layout, plan.groups)) == plan.largest_ranks == each
    full = plan.full_rank_bound()
    assert full is None or (plan.lora_rank, full) == (None, max(each))
    assert plan.applying.additive or plan.lora_rank is None
