"""Ranks that updates never exceed, and row and column factors of a weight: exact, and found wherever they exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.factoring import Factoring, factoring
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.layout import run_in_box
from tnadapt.backends import load_backend
from tnadapt.maps import Scatter, Tile
from tnadapt.planning import largest_rank
from tnadapt.testing.strategies import plans

P = tna.presets
NUMPY = load_backend("numpy")


def factors_of(plan: tna.UpdatePlan, seed: int = 0) -> list[Factoring | None]:
    """Compare the factors of all weights with the updates, and their sizes and widths with what is planned."""
    rng, factorings = np.random.default_rng(seed), list[Factoring | None]()
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    for i, shape in enumerate(plan.shapes):
        how, bound, expected = factoring(plan, i), plan.largest_rank(i), plan.delta(params, i)
        assert np.linalg.matrix_rank(expected) <= bound
        factorings.append(how)
        if how is None:
            continue
        own = {name: params[name] for name in how.names}
        product = how(NUMPY, own)
        np.testing.assert_allclose(product.dense(NUMPY), expected, rtol=1e-12, atol=1e-12)
        # In a difference of Kronecker products each term has its own widths.
        for term in product.terms if how.terms == 1 else []:
            for matrix, size in zip(term, how.sizes, strict=True):
                if matrix.right is None:
                    assert size.width is None
                    assert matrix.left.shape == (size.rows, size.cols)
                else:
                    assert matrix.left.shape == (size.rows, size.width)
                    assert matrix.right.shape == (size.cols, size.width)
        if how.stored is not None:
            computed = how.computed(NUMPY, own)
            for mine, theirs in zip(product.terms[0][0], computed.terms[0][0], strict=True):
                np.testing.assert_array_equal(mine, theirs)
        if how.width is not None:
            left, right = product.pair(NUMPY)
            assert right is not None
            assert (left.shape, right.shape) == ((shape[0], how.width), (shape[1], how.width))
            np.testing.assert_allclose(left @ right.T * product.scale, expected, rtol=1e-12, atol=1e-12)
            assert bound <= how.width
        if how.halves is not None:
            assert how.sizes == ((*shape, bound),)
    return factorings


def all_that_is_limited(plan: tna.UpdatePlan, seed: int = 0) -> list[Factoring | None]:
    """Check the factors; nothing of one group whose rank is limited lacks them."""
    factorings = factors_of(plan, seed)
    for i, (how, shape) in enumerate(zip(factorings, plan.shapes, strict=True)):
        assert how is not None or plan.largest_rank(i) == min(shape) or len(plan.layout.of_weight(i)) > 1
    return factorings


@given(plans(("identity",)), st.integers(0, 9))
def test_factors_are_the_update(plan: tna.UpdatePlan, seed: int) -> None:
    factors_of(plan, seed)


PLANS = {
    "lora": tna.UpdatePlan(P.lora(2, alpha=8), [(12, 16), (6, 16)]),
    "lora in one group": tna.UpdatePlan(P.lora(2, groups=1), [(12, 16), (6, 16)]),
    "lokr": tna.UpdatePlan(P.lokr(2), [(12, 16)]),
    "lonkr in a stack": tna.UpdatePlan(P.lonkr(2, fold="stack", split_size="balanced"), [(16, 24)] * 3),
    "digit for digit": tna.UpdatePlan(P.lorta(1, order=5, format="cp"), [(16, 16)] * 4),
    "a square by itself": tna.UpdatePlan(P.superlora(2, groups="weight"), [(16, 16)]),
}
ACROSS_WEIGHTS = tna.UpdatePlan(
    tna.Config(1, groups=1, fold=(48, 16), splits=2, leading="same"), [(10, 16), (14, 16), (24, 16)]
)
# Those whose factors are at a cut through the network, which is inside a mode or a weight.
CUT = {
    "gralora": tna.UpdatePlan(P.gralora(4, 2, alpha=3), [(24, 16)] * 3),
    "gralora of roles": tna.UpdatePlan(P.gralora(4, 2, groups="role"), [(24, 16), (16, 16)] * 2, roles="qvqv"),
    "a mode with rows and columns": tna.UpdatePlan(P.lorta(1, order=3), [(64, 64)] * 8),
    "a mode with rows and columns, CP": tna.UpdatePlan(P.lorta(2, order=3, format="cp"), [(64, 64)] * 8),
    "a cut Kronecker product": tna.UpdatePlan(P.lokr(1, split_size=5), [(13, 13)]),
    "a Kronecker product across weights": ACROSS_WEIGHTS,
    "a Kronecker product with two modes of rows": tna.UpdatePlan(
        tna.Config(1, order=3, groups=1, fold=(4, 6, 12), splits=2, leading="same"), [(24, 12)]
    ),
    "a Kronecker product whose rows are no box": tna.UpdatePlan(
        tna.Config(1, order=3, groups=1, fold=(4, 6, 24), splits=2, leading="same"), [(7, 24), (17, 24)]
    ),
}


@pytest.mark.parametrize("name", [*PLANS, *CUT])
def test_the_methods_that_factor(name: str) -> None:
    factorings = factors_of({**PLANS, **CUT}[name])
    assert None not in factorings
    assert any(how is not None and how.halves is not None for how in factorings) == (name in CUT)


def rank(matrix: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(matrix, rtol=1e-9)) if matrix.any() else 0


def drawn(plan: tna.UpdatePlan) -> dict[str, np.ndarray]:
    """Parameters of about the same size, so that ranks are clear."""
    rng = np.random.default_rng(0)
    return {
        name: rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape) for name, shape in plan.param_shapes.items()
    }


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
def test_the_bound_is_the_methods_rank_and_what_is_limited_has_factors(name: str) -> None:
    config, expected = METHODS[name]
    plan = tna.UpdatePlan(config, [(12, 10)] * 4)
    assert largest_rank(plan).value == expected
    params = drawn(plan)
    for weight in range(4):
        assert plan.largest_rank(weight) == expected
        assert rank(plan.delta(params, weight)) == expected
    # Beyond the size of the weight, only factors that the adapter has anyway count as LoRA.
    assert plan.lora_rank == (expected if expected * 22 < 120 or name == "lora, terms" else None)
    assert (None in factors_of(plan)) == (expected == 10)
    with pytest.raises(tna.ShapeError, match="i must be from 0 to 3"):
        plan.largest_rank(4)


def test_a_weight_in_two_groups_has_the_sum_of_their_ranks() -> None:
    plan = tna.UpdatePlan(tna.Config(1, groups=2, fold="stack"), [(3, 8), (4, 8), (3, 8)])
    assert [plan.largest_rank(weight) for weight in range(3)] == [1, 2, 1]
    assert [rank(delta) for delta in plan.deltas(drawn(plan))] == [1, 2, 1]


def test_large_plans_need_no_arrays() -> None:
    llama = [(8192, 8192), (1024, 8192)] * 80
    plan = tna.UpdatePlan(P.lotr(16, groups="role"), llama, roles=["q", "v"] * 80)
    assert plan.lora_rank == 16
    assert tna.UpdatePlan(P.superlora(16), llama).lora_rank is None


def test_a_train_of_many_modes_has_the_rank_of_its_bond() -> None:
    # Too many arrays to search all cuts: those of the weights' modes belong to either side.
    config = tna.Config(2, order=14, groups=1, fold=(2,) * 14, format="tt")
    plan = tna.UpdatePlan(config, [(64, 64)] * 4)
    assert [plan.largest_rank(weight) for weight in range(4)] == [2] * 4
    assert rank(plan.delta(drawn(plan), 3)) == 2


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
    how = factoring(tna.UpdatePlan(config, [(8, 8), (8, 8)]), 1)
    assert (None if how is None else how.stored) == stored


def test_an_aligned_cp_is_a_matrix_of_the_same_rank() -> None:
    how = factoring(tna.UpdatePlan(P.lorta(3, order=5, format="cp"), [(4096, 4096)] * 64), 17)
    assert how is not None
    assert how.sizes == ((4096, 4096, 3),)
    assert run_in_box((), (), (0, 1)) == slice(0, 1)  # a side without modes


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
        # Two factors of an X of full rank, or a product with X and a transform, cost more than ΔW.
        (tna.Config(projection="dct2", format="dense", on="weight"), [(12, 10)]),
        (P.miss(10), [(12, 10)]),
        # Maps that mix rows with columns.
        *(
            (tna.Config(1, fold="hypercube", projection=projection, on="weight"), [(8, 8)])
            for projection in ("shuffle", "linear", [Scatter(5), "dct2"], "wavelet", "nonlinear")
        ),
    ],
)
def test_what_does_not_factor(config: tna.Config, shapes: list[tuple[int, int]]) -> None:
    plan = tna.UpdatePlan(config, shapes)
    assert factoring(plan, 1 if len(shapes) > 1 else 0) is None
    assert plan.largest_rank(0) == 8 or shapes != [(8, 8)]


# -- Behind a map that keeps rows and columns separate -----------------------------------------------------------------


@given(
    rows=st.integers(1, 9), cols=st.integers(1, 9), tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.integers(1, 3), groups=st.sampled_from(["weight", 1]), rank=st.integers(1, 2),
    format=st.sampled_from(["dense", "cp", "cp-weighted", "tucker", "tt"]), start=st.sampled_from(["zero", "random"]),
    chain=st.sampled_from([(), ("dct2",), ("dft2",), ("dct2", "dft2")]), order=st.integers(1, 3),
    alpha=st.sampled_from([None, 3.0]), seed=st.integers(0, 3),
)  # fmt: skip
@example(
    rows=8, cols=9, tile=(8, 4), weights=2, groups="weight", rank=1, format="dense", start="zero", chain=(), order=1,
    alpha=3.0, seed=0,
)  # fmt: skip
def test_factors_are_those_of_the_formed_update(
    rows: int, cols: int, tile: tuple[int, int], weights: int, groups: str | int, rank: int, format: str, start: str,
    chain: tuple[str, ...], order: int, alpha: float | None, seed: int,
) -> None:  # fmt: skip
    few = Tile(min(tile[0], rows), min(tile[1], cols))
    config = tna.Config(
        rank, order=order, fold="balanced" if order > 1 else "hypercube", groups=groups, format=format, start=start,
        projection=[few, *chain], on="weight", alpha=alpha,
    )  # fmt: skip
    # A weight more, of another shape.
    factors_of(tna.UpdatePlan(config, [(rows, cols)] * weights + [(rows + 2, cols + 1)]), seed)


#: Of MiSS: a dense matrix before the map.
MISS = {"order": 1, "format": "dense", "fold": "hypercube"}
CASES: dict[str, tuple[dict[str, Any], list[tuple[int, int]], int]] = {
    "miss": (MISS | {"projection": Tile(cols=4)}, [(8, 16)] * 2, 4),
    "miss that is cut": (MISS | {"projection": Tile(cols=5)}, [(8, 16)], 5),
    "miss of rows": (MISS | {"projection": Tile(3, 4)}, [(8, 16), (9, 12)], 3),
    "miss of one group": (MISS | {"projection": Tile(4, 4), "groups": 1}, [(8, 16), (9, 12)], 4),
    "low rank, repeated": ({"fold": (12, 8), "projection": Tile(cols=8)}, [(12, 40)], 2),
    "low rank, cosines": ({"projection": "dct2"}, [(12, 10)], 2),
    "low rank, waves": ({"projection": "dft2"}, [(12, 10)], 4),
    "two maps": ({"fold": (6, 5), "projection": [Tile(6, 5), "dct2", "dct2"]}, [(12, 10)], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_widths_are_those_before_the_map(name: str) -> None:
    settings, shapes, width = CASES[name]
    plan = tna.UpdatePlan(tna.Config(2, on="weight", alpha=3.0, **settings), shapes)
    assert [how and how.width for how in factors_of(plan)] == [width] * len(shapes)
    assert plan.largest_ranks == [width] * len(shapes)


def test_a_kronecker_product_stays_one_between_the_maps() -> None:
    config = tna.Config(
        1, fold=(12, 8), splits=2, groups="weight", projection=Tile(cols=8), on="weight", split_size="balanced"
    )
    plan = tna.UpdatePlan(config, [(12, 20)])
    (how,) = factors_of(plan)
    assert how is not None
    assert how.width is None
    assert how.sides is not None
    assert [size[:2] for size in how.sizes] == [(3, 2), (4, 4)]


# -- The two factors at the cheapest cut: exact, and there wherever the bound on the rank is below both sides ----------


SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 8, 12]), min_size=1, max_size=4).map(tuple)


@given(
    sizes=SIZES, data=st.data(), format=st.sampled_from(sorted(FORMATS.built_in)), rank=st.integers(1, 2),
    splits=st.integers(1, 2), combine=st.sampled_from(["kronecker", "hadamard"]), terms=st.integers(1, 2),
    start=st.sampled_from(["zero", "random"]), seed=st.integers(0, 9),
)  # fmt: skip
def test_what_has_a_limited_rank_has_factors(
    sizes: tuple[int, ...], data: st.DataObject, format: str, rank: int, splits: int, combine: str, terms: int,
    start: str, seed: int,
) -> None:  # fmt: skip
    size = int(np.prod(sizes))
    assume(size <= 4000)
    # Near a square, so that a small rank is a limit.
    several = [c for c in range(1, size + 1) if size % c == 0 and size < 9 * c * c < 81 * size]
    cols = data.draw(st.sampled_from(several or [size]))
    rows, first = size // cols, data.draw(st.integers(0, size // cols - 1))
    shapes = [shape for shape in ((first, cols), (rows - first, cols)) if shape[0]]
    config = tna.Config(
        rank, order=len(sizes), fold=sizes if len(sizes) > 1 else "balanced", groups=1, format=format, splits=splits,
        combine=combine, terms=terms, leading="same", start=start,
    )  # fmt: skip
    all_that_is_limited(tna.UpdatePlan(config, shapes), seed)
    columns = data.draw(st.integers(1, size))  # that may end anywhere in a mode
    factors_of(tna.UpdatePlan(config, [(size // columns, columns)]), seed)


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=5).map(tuple), data=st.data(),
    format=st.sampled_from(["cp", "cp-batched", "cp-weighted", "tt", "tucker"]), rank=st.integers(1, 2),
    splits=st.integers(1, 2), seed=st.integers(0, 9),
)  # fmt: skip
def test_axes_with_digits_of_rows_and_columns(
    sizes: tuple[int, ...], data: st.DataObject, format: str, rank: int, splits: int, seed: int
) -> None:
    size = int(np.prod(sizes))
    order = data.draw(st.permutations(range(len(sizes))))
    ends = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1)))) if len(sizes) > 2 else [1]
    axes = tuple(tuple(order[lo:hi]) for lo, hi in zip([0, *ends], [*ends, len(sizes)], strict=True))
    cut = data.draw(st.integers(0, len(sizes) - 1))
    cols = int(np.prod(sizes[cut:]))
    if cut and data.draw(st.booleans()):
        # Columns that end within a digit.
        cols *= data.draw(st.sampled_from([d for d in range(1, sizes[cut - 1] + 1) if sizes[cut - 1] % d == 0]))
    weights = data.draw(st.sampled_from([w for w in (1, 2, 3) if (size // cols) % w == 0]))
    config = tna.Config(
        rank, order=len(axes), fold=sizes, axes=axes, groups=1, format=format, splits=splits, combine="hadamard",
        leading="same",
    )  # fmt: skip
    all_that_is_limited(tna.UpdatePlan(config, [(size // cols // weights, cols)] * weights), seed)


@pytest.mark.parametrize("splits", [2, 3])
def test_a_difference_of_kronecker_products_is_a_sum_of_them(splits: int) -> None:
    config = P.lokr(1, alpha=3, start="random", splits=splits)
    plan = tna.UpdatePlan(config, [(64, 64)])
    (how,), narrow = factors_of(plan), factoring(plan, 0, single=True)
    assert how is not None
    assert how.halves is None
    assert (len(how.sizes), how.terms) == (splits, splits)
    begun = how(NUMPY, plan.init(dtype="float64"))
    assert not begun.dense(NUMPY).any()
    # For LoRA export: one product, whose width is the bound on the rank.
    assert narrow is not None
    assert narrow.width == plan.largest_rank(0)


def test_float32_and_other_libraries_have_the_same_factors() -> None:
    torch = pytest.importorskip("torch")
    plan = ACROSS_WEIGHTS
    params: dict[str, Any] = {key: array + 0.5 for key, array in plan.init().items()}
    how = factoring(plan, 1)
    assert how is not None
    expected = plan.delta(params, 1)
    for make in (np.asarray, torch.tensor):
        own = {name: make(params[name]) for name in how.names}
        backend = tna.backends.get_backend(*own.values())
        found = how(backend, own).dense(backend)
        assert found.dtype == next(iter(own.values())).dtype
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5, atol=1e-6)
