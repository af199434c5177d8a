"""The two factors at the cheapest cut: exact, and there wherever the bound on the rank is below both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.layout import place_of, run_in_box
from tnadapt.backends import load_backend

P = tna.presets
NUMPY = load_backend("numpy")


def check(plan: tna.SuperLoRA, seed: int = 0) -> int:
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
    check(tna.SuperLoRA(config, shapes), seed)


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
    check(tna.SuperLoRA(config, [(size // cols // weights, cols)] * weights), seed)


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
    check(plan)
    how = factoring(plan, weights - 1)
    if k * k * rank < min(shapes[0]):
        assert how is not None
        assert how.sizes == ((*shapes[0], k * k * rank),)


CASES: dict[str, tuple[tna.Config, list[tuple[int, int]]]] = {
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


@pytest.mark.parametrize("name", CASES)
def test_cases_whose_cut_is_inside_a_mode(name: str) -> None:
    config, shapes = CASES[name]
    roles = ["q", "v"] * (len(shapes) // 2) if config.groups == "role" else None
    plan = tna.SuperLoRA(config, shapes, roles=roles)
    assert check(plan)


@pytest.mark.parametrize("splits", [2, 3])
def test_a_difference_of_kronecker_products_is_a_sum_of_them(splits: int) -> None:
    config = P.lokr(1, alpha=3, start="random", splits=splits)
    plan = tna.SuperLoRA(config, [(64, 64)])
    assert check(plan) == 0
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
    plan = tna.SuperLoRA(*CASES["a Kronecker product across weights"])
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
