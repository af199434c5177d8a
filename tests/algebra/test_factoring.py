"""Row and column factors of a weight: exact, and found wherever they exist."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.factoring import Factoring, factoring
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.layout import place_of, run_in_box
from tnadapt.algebra.maps import Map
from tnadapt.algebra.products import cp_in_groups, khatri_rao, khatri_rao_of_rows, tucker_in_order, tucker_with_last
from tnadapt.algebra.starting_points import STARTS
from tnadapt.backends import Array, Backend, load_backend
from tnadapt.maps import Scatter, Tile
from tnadapt.plugins import forget_registered
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


# -- Behind a map that keeps rows and columns separate, the factors are those of the update that is formed -------------


class Ordered(Map):
    """A vector in another order, each element times a number: one side of :class:`Exchanged`."""

    def make(self, key: object) -> np.ndarray:
        rng = np.random.default_rng(self.n_out)
        return rng.permutation(self.n_out) if key == "order" else rng.normal(size=self.n_out).astype(np.float32)

    def forward(self, backend: Backend, x: Array) -> Array:
        kind = backend.dtype_name(x)
        return backend.take(x, self.on(backend, "order", x)) * self.on(backend, "scales", x, kind)


class Exchanged(Map):
    """Rows and columns in another order, and scaled."""

    square = two_sided = True
    shape: tuple[int, int]

    def sides(self) -> Sequence[tuple[Map, Map]]:
        return [(Ordered(self.shape[0], self.shape[0]), Ordered(self.shape[1], self.shape[1]))]

    def forward(self, backend: Backend, x: Array) -> Array:
        ((rows, cols),) = self.sides()
        matrix = cols.forward(backend, backend.reshape(x, (*x.shape[:-1], *self.shape)))
        moved = rows.forward(backend, backend.matrix_transpose(matrix))
        return backend.reshape(backend.matrix_transpose(moved), x.shape)


@pytest.fixture(scope="module", autouse=True)
def exchanged() -> Iterator[None]:
    tna.register_map("exchanged", Exchanged)
    yield
    forget_registered()


def separation_check(plan: tna.SuperLoRA, seed: int = 0) -> list[int | None]:
    """Compare factors and updates of all weights; return the widths of the two factors, None where there are none."""
    rng, widths = np.random.default_rng(seed), list[int | None]()
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    for i, shape in enumerate(plan.shapes):
        how, expected = factoring(plan, i), plan.delta(params, i)
        assert np.linalg.matrix_rank(expected) <= plan.largest_rank(i)
        widths.append(None if how is None else how.width)
        if how is None:
            continue
        found = how(NUMPY, {name: params[name] for name in how.names})
        np.testing.assert_allclose(found.dense(NUMPY), expected, rtol=1e-12, atol=1e-12)
        if how.width is not None:
            left, right = found.pair(NUMPY)
            assert right is not None
            assert (left.shape, right.shape) == ((shape[0], how.width), (shape[1], how.width))
            np.testing.assert_allclose(left @ right.T * found.scale, expected, rtol=1e-12, atol=1e-12)
            assert plan.largest_rank(i) <= how.width
    return widths


@given(
    rows=st.integers(1, 9), cols=st.integers(1, 9), tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.integers(1, 3), groups=st.sampled_from(["weight", 1]), rank=st.integers(1, 2),
    format=st.sampled_from(["dense", "cp", "cp-weighted", "tucker", "tt"]), start=st.sampled_from(["zero", "random"]),
    chain=st.sampled_from([(), ("dct2",), ("dft2",), ("exchanged",), ("exchanged", "dct2")]), order=st.integers(1, 3),
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
    separation_check(tna.SuperLoRA(config, [(rows, cols)] * weights + [(rows + 2, cols + 1)]), seed)


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
    "low rank, exchanged": ({"projection": "exchanged"}, [(12, 10)], 2),
    "two maps": ({"fold": (6, 5), "projection": [Tile(6, 5), "exchanged", "dct2"]}, [(12, 10)], 2),
}


@pytest.mark.parametrize("name", CASES)
def test_widths_are_those_before_the_map(name: str) -> None:
    settings, shapes, width = CASES[name]
    plan = tna.SuperLoRA(tna.Config(2, on="weight", alpha=3.0, **settings), shapes)
    assert separation_check(plan) == [width] * len(shapes)
    assert plan.largest_ranks == [width] * len(shapes)


def test_a_kronecker_product_stays_one_between_the_maps() -> None:
    config = tna.Config(
        1, fold=(12, 8), splits=2, groups="weight", projection=Tile(cols=8), on="weight", split_size="balanced"
    )
    plan = tna.SuperLoRA(config, [(12, 20)])
    assert separation_check(plan) == [None]
    how = factoring(plan, 0)
    assert how is not None
    assert how.sides is not None
    assert [size[:2] for size in how.sizes] == [(3, 2), (4, 4)]


@pytest.mark.parametrize("projection", ["shuffle", "linear", [Scatter(5), "dct2"], "wavelet", "nonlinear"])
def test_maps_that_mix_rows_with_columns_have_no_factors(projection: object) -> None:
    fold = "hypercube" if projection != "nonlinear" else "balanced"
    plan = tna.SuperLoRA(tna.Config(1, fold=fold, projection=projection, on="weight"), [(8, 8)])
    assert factoring(plan, 0) is None
    assert plan.largest_rank(0) == 8


def test_what_a_map_does_not_make_smaller_has_no_factors() -> None:
    # Two factors of an X of full rank, or a product with X and a transform, cost more than ΔW.
    for config in (tna.Config(projection="dct2", format="dense", on="weight"), P.miss(10)):
        assert factoring(tna.SuperLoRA(config, [(12, 10)]), 0) is None


def test_miss_exports_as_lora() -> None:
    plan = tna.SuperLoRA(P.miss(4), [(16, 16)] * 2)
    assert plan.lora_rank == 4


# -- The two factors at the cheapest cut: exact, and there wherever the bound on the rank is below both sides ----------


def network_halves_check(plan: tna.SuperLoRA, seed: int = 0) -> int:
    """Compare the factors of all weights with the updates; return how many are at a cut."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    cuts = 0
    for i, shape in enumerate(plan.shapes):
        how, bound = factoring(plan, i), plan.largest_rank(i)
        if how is None:
            # Nothing of one group whose rank is limited lacks factors.
            assert bound == min(shape) or len(plan.layout.of_weight(i)) > 1
            continue
        found = how(NUMPY, {name: params[name] for name in how.names})
        np.testing.assert_allclose(found.dense(NUMPY), plan.delta(params, i), rtol=1e-12, atol=1e-12)
        if how.halves is not None:
            cuts += 1
            (((left, right),),) = found.terms
            assert right is not None
            assert (left.shape, right.shape) == ((shape[0], bound), (shape[1], bound))
    return cuts


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
    network_halves_check(tna.SuperLoRA(config, shapes), seed)


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
    network_halves_check(tna.SuperLoRA(config, [(size // cols // weights, cols)] * weights), seed)


@given(
    k=st.sampled_from([1, 2, 3]),
    rank=st.integers(1, 3),
    rows=st.integers(1, 4),
    cols=st.integers(1, 4),
    weights=st.integers(1, 2),
)
@example(k=2, rank=2, rows=8, cols=6, weights=2)
def test_blocks_of_gralora(k: int, rank: int, rows: int, cols: int, weights: int) -> None:
    shapes = [(4 * k * rows, 4 * k * cols)] * weights
    plan = tna.SuperLoRA(P.gralora(k * rank, k, alpha=3), shapes)
    network_halves_check(plan)
    how = factoring(plan, weights - 1)
    if k * k * rank < min(shapes[0]):
        assert how is not None
        assert how.sizes == ((*shapes[0], k * k * rank),)


NETWORK_HALVES_CASES: dict[str, tuple[tna.Config, list[tuple[int, int]]]] = {
    "gralora": (P.gralora(4, 2), [(24, 16)] * 3),
    "gralora of roles": (P.gralora(4, 2, groups="role"), [(24, 16), (16, 16)] * 2),
    "two rows in a row": (tna.Config(2, groups=1, fold=(24, 20)), [(12, 10)] * 4),
    "half a row": (tna.Config(2, groups=1, fold=(96, 5)), [(12, 10)] * 4),
    "a mode with rows and columns": (P.lorta(1, order=3), [(64, 64)] * 8),
    "a mode with rows and columns, CP": (P.lorta(2, order=3, format="cp"), [(64, 64)] * 8),
    "a cut Kronecker product": (P.lokr(1, split_size=5), [(13, 13)]),
    "a Kronecker product across weights": (
        tna.Config(1, groups=1, fold=(48, 16), splits=2, leading="same"), [(10, 16), (14, 16), (24, 16)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORK_HALVES_CASES)
def test_cases_whose_cut_is_inside_a_mode(name: str) -> None:
    config, shapes = NETWORK_HALVES_CASES[name]
    roles = ["q", "v"] * (len(shapes) // 2) if config.groups == "role" else None
    plan = tna.SuperLoRA(config, shapes, roles=roles)
    assert network_halves_check(plan)


@pytest.mark.parametrize("splits", [2, 3])
def test_a_difference_of_kronecker_products_is_a_sum_of_them(splits: int) -> None:
    config = P.lokr(1, alpha=3, start="random", splits=splits)
    plan = tna.SuperLoRA(config, [(64, 64)])
    assert network_halves_check(plan) == 0
    how, narrow = factoring(plan, 0), factoring(plan, 0, single=True)
    assert how is not None
    assert (len(how.sizes), how.terms) == (splits, splits)
    begun = how(NUMPY, plan.init(dtype="float64"))
    assert not begun.dense(NUMPY).any()
    # For LoRA export: one product, whose width is the bound on the rank.
    assert narrow is not None
    assert narrow.width == plan.largest_rank(0)


def test_float32_and_other_libraries_have_the_same_factors() -> None:
    torch = pytest.importorskip("torch")
    plan = tna.SuperLoRA(*NETWORK_HALVES_CASES["a Kronecker product across weights"])
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


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), data=st.data())
def test_places_hold_their_rows(sizes: tuple[int, ...], data: st.DataObject) -> None:
    size = int(np.prod(sizes))
    cols = data.draw(st.sampled_from([c for c in range(1, size + 1) if size % c == 0]))
    first = data.draw(st.integers(0, size // cols - 1))
    rows = data.draw(st.integers(1, size // cols - first))
    place = place_of(sizes, first * cols, rows * cols, cols)
    if place is None:
        return
    vec = np.arange(size).reshape(sizes)[tuple(slice(*bounds) for bounds in place.ranges)]
    split = [length for leg in place.legs() for length in leg]
    by_side = vec.reshape(split).transpose([*range(0, len(split), 2), *range(1, len(split), 2)])
    matrix = by_side.reshape(int(np.prod(split[::2])), -1)
    found = matrix[run_in_box(place.row_sizes, place.row_ranges, place.rows)]
    np.testing.assert_array_equal(found, np.arange(first * cols, (first + rows) * cols).reshape(rows, cols))


# -- Every order of contraction gives the tensor of the reference implementation, in every library ---------------------


FACTOR_PRODUCTS_SIZES = st.lists(st.integers(1, 5), min_size=2, max_size=5)


def plain_cp(factors: list[np.ndarray]) -> np.ndarray:
    tensor = np.zeros([len(factor) for factor in factors])
    for columns in zip(*(factor.T for factor in factors), strict=True):
        term = np.ones(())
        for column in columns:
            term = np.multiply.outer(term, column)
        tensor += term
    return tensor


@pytest.mark.law("products")
@given(FACTOR_PRODUCTS_SIZES, st.integers(1, 4))
def test_every_grouping_is_the_sum_of_outer_products(sizes: list[int], rank: int) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, rank)) for size in sizes]
    expected = plain_cp(factors)
    for second in range(1, len(sizes)):
        for first in range(second):
            assert relative_error(cp_in_groups(NUMPY, factors, (first, second)), expected) < 1e-12


@pytest.mark.law("products")
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=2, max_size=5))
def test_every_last_mode_gives_the_tensor_in_order(modes: list[tuple[int, int]]) -> None:
    rng = np.random.default_rng(0)
    core = rng.normal(size=[rank for _, rank in modes])
    factors = [rng.normal(size=mode) for mode in modes]
    expected = tucker_in_order(NUMPY, core, factors)
    for last in range(len(modes)):
        assert relative_error(tucker_with_last(NUMPY, core, factors, last), expected) < 1e-12


def test_rows_are_the_transposed_columns() -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, 3)) for size in (2, 4, 5)]
    found = khatri_rao_of_rows(NUMPY, [factor.T for factor in factors])
    np.testing.assert_array_equal(found, khatri_rao(NUMPY, factors).T)


@pytest.mark.law("products")
@pytest.mark.parametrize("sizes", [(3, 40, 33), (2, 3, 40, 33), (40, 3, 2)])
def test_what_the_model_chooses_in_every_library(backend: Backend, sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(size, 3)) for size in sizes]
    core = rng.normal(size=(3,) * len(sizes))
    there = [backend.asarray(factor, "float64") for factor in factors]
    weights = rng.normal(size=3)

    def same(found: Any, expected: np.ndarray) -> None:
        assert tuple(found.shape) == sizes
        assert relative_error(backend.to_numpy(found), expected) < 1e-12

    same(tna.cp_to_tensor((None, there)), plain_cp(factors))
    weighted = [factors[0] * weights, *factors[1:]]
    same(tna.cp_to_tensor((backend.asarray(weights, "float64"), there)), plain_cp(weighted))
    same(tna.tucker_to_tensor((backend.asarray(core, "float64"), there)), tucker_in_order(NUMPY, core, factors))


def test_the_result_is_in_c_order() -> None:
    torch = pytest.importorskip("torch")
    factors = [torch.ones(size, 8, requires_grad=True) for size in (10, 200, 40)]
    for found in (tna.cp_to_tensor((None, factors)), tna.tucker_to_tensor((torch.ones(8, 8, 8), factors))):
        assert found.is_contiguous()
    assert tna.cp_to_tensor((None, [factor.detach().numpy() for factor in factors])).flags.c_contiguous


def test_modes_without_elements() -> None:
    factors = [np.ones((size, 2)) for size in (3, 0, 40)]
    assert tna.cp_to_tensor((None, factors)).shape == (3, 0, 40)
    assert tna.tucker_to_tensor((np.ones((2, 2, 2)), factors)).shape == (3, 0, 40)
    assert math.prod(tna.cp_to_tensor((None, factors[::-1])).shape) == 0
