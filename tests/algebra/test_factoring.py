"""Row and column factors of a weight: exact, and found wherever they exist."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.factoring import Factoring, factoring
from tnadapt.algebra.starting_points import STARTS
from tnadapt.backends import load_backend
from tnadapt.testing.strategies import configs, parameters, plans

P = tna.presets
NUMPY = load_backend("numpy")


def check(plan: tna.SuperLoRA, params: dict[str, np.ndarray], i: int, how: Factoring) -> None:
    found = how(NUMPY, {name: params[name] for name in how.names})
    expected = plan.delta(params, i)
    np.testing.assert_allclose(found.dense(NUMPY), expected, rtol=1e-12, atol=1e-12)
    if how.stored is not None:
        computed = how.computed(NUMPY, {name: params[name] for name in how.names})
        for mine, theirs in zip(found.terms[0][0], computed.terms[0][0], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for term in found.terms:
        for matrix, size in zip(term, how.sizes, strict=True):
            if matrix.right is None:
                assert size.width is None
                assert matrix.left.shape == (size.rows, size.cols)
            else:
                assert matrix.left.shape == (size.rows, size.width)
                assert matrix.right.shape == (size.cols, size.width)


@given(st.data())
def test_factors_are_the_update(data: st.DataObject) -> None:
    plan = data.draw(plans(("identity",)))
    found = [factoring(plan, i) for i in range(len(plan.shapes))]
    params = data.draw(parameters(plan))
    for i, how in enumerate(found):
        if how is not None:
            check(plan, params, i, how)


@st.composite
def aligned(draw: st.DrawFn) -> tna.SuperLoRA:
    """Plans with a fold whose last modes are the columns."""
    rows = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=2))
    cols = draw(st.lists(st.sampled_from([2, 3, 4, 8, 9]), min_size=1, max_size=2))
    weights = draw(st.integers(1, 4))
    shape = int(np.prod(rows)), int(np.prod(cols))
    fold = draw(st.sampled_from([(weights, *rows, *cols), (weights * rows[0], *rows[1:], *cols)]))
    config = draw(configs([shape] * weights, ("identity",)))
    config = config.replace(
        # Starts that are computed from the base are LoRA's alone, which has no other fold.
        start="zero" if STARTS[config.start].needs_base else config.start,
        fold=fold,
        order=len(fold),
        groups=1,
        rank=2 if isinstance(config.rank, tuple) else config.rank,
        split_size="balanced",
    )
    return tna.SuperLoRA(config, [shape] * weights)


@given(st.data())
def test_factors_of_folds_that_line_up(data: st.DataObject) -> None:
    plan = data.draw(aligned())
    params = data.draw(parameters(plan))
    found = [factoring(plan, i) for i in range(len(plan.shapes))]
    assume(any(found))
    for i, how in enumerate(found):
        if how is not None:
            check(plan, params, i, how)


PLANS = {
    "lora": tna.SuperLoRA(P.lora(2, alpha=8), [(12, 16), (6, 16)]),
    "lora in one group": tna.SuperLoRA(P.lora(2, groups=1), [(12, 16), (6, 16)]),
    "lora of two terms": tna.SuperLoRA(P.lora(2, terms=2), [(12, 16), (6, 16)]),
    "lokr": tna.SuperLoRA(P.lokr(2), [(12, 16)]),
    "krona": tna.SuperLoRA(P.krona(), [(12, 16)]),
    "compacter": tna.SuperLoRA(P.compacter(terms=2), [(12, 16)]),
    "loha": tna.SuperLoRA(P.loha(2), [(12, 16)]),
    "lonkr in a stack": tna.SuperLoRA(P.lonkr(2, fold="stack", split_size="balanced"), [(16, 24)] * 3),
    "lotr": tna.SuperLoRA(P.lotr(2, weights=3, rows=12, cols=16), [(12, 16)] * 3),
    "lotr as a train": tna.SuperLoRA(P.lotr(2, train=True, weights=3, rows=12, cols=16), [(12, 16)] * 3),
    "fact_tk": tna.SuperLoRA(P.fact_tk(2, weights=3, rows=12, cols=16), [(12, 16)] * 3),
    "cara": tna.SuperLoRA(P.cara(2, weights=3, rows=12, cols=16, heads=3), [(12, 16)] * 3),
    "lorta_cp": tna.SuperLoRA(P.lorta_cp(2, layers=2, rows=12, cols=16, heads=3), [(12, 16)] * 4),
    "digit for digit": tna.SuperLoRA(P.lorta(1, order=5, format="cp"), [(16, 16)] * 4),
    "a square by itself": tna.SuperLoRA(P.superlora(2, groups="weight"), [(16, 16)]),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_methods_that_factor(name: str) -> None:
    plan = PLANS[name]
    rng = np.random.default_rng(0)
    params = {key: rng.normal(size=shape) for key, shape in plan.param_shapes.items()}
    for i in range(len(plan.shapes)):
        how = factoring(plan, i)
        assert how is not None
        check(plan, params, i, how)


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        (P.lora(4), ("group1.split0.factor0", "group1.split0.factor1")),
        (P.lora(4, groups=1), None),  # a run of rows of a larger matrix
        (P.lora(4, terms=2), None),  # two pairs
        (P.lora_fa(4), None),  # one factor is frozen
        (P.lokr(4), None),
        (P.superlora(4, order=3), None),
    ],
)
def test_factors_that_are_stored_are_not_computed(config: tna.Config, stored: tuple[str, str] | None) -> None:
    how = factoring(tna.SuperLoRA(config, [(8, 8), (8, 8)]), 1)
    assert (None if how is None else how.stored) == stored


def test_an_aligned_cp_is_a_matrix_of_the_same_rank() -> None:
    how = factoring(tna.SuperLoRA(P.lorta(3, order=5, format="cp"), [(4096, 4096)] * 64), 17)
    assert how is not None
    assert how.sizes == ((4096, 4096, 3),)


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (P.dense(), [(4, 4)]),
        (P.superlora(2), [(4, 4)] * 3),  # rows of 7 go through rows of 4
        (P.superlora(2, groups="weight"), [(4, 9)]),
        (P.superlora(2, groups=2), [(4, 4)] * 3),  # the second weight is in both groups
        (P.superlora(2, projection="shuffle"), [(4, 4)]),
        (P.fastfood(0.5), [(4, 4)]),
        (P.lokr(3, split_size=5), [(13, 13)]),  # a product of 15 by 15 is cut, and its rank is full
    ],
)
def test_what_does_not_factor(config: tna.Config, shapes: list[tuple[int, int]]) -> None:
    assert factoring(tna.SuperLoRA(config, shapes), 1 if len(shapes) > 1 else 0) is None
