"""Behind a map that keeps rows and columns separate, the factors are those of the update that is formed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.maps import Map
from tnadapt.backends import load_backend
from tnadapt.backends.backend import Array, Backend
from tnadapt.maps import Scatter, Tile
from tnadapt.plugins import forget_registered

P = tna.presets
NUMPY = load_backend("numpy")


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


def check(plan: tna.SuperLoRA, seed: int = 0) -> list[int | None]:
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
    check(tna.SuperLoRA(config, [(rows, cols)] * weights + [(rows + 2, cols + 1)]), seed)


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
    assert check(plan) == [width] * len(shapes)
    assert plan.largest_ranks == [width] * len(shapes)


def test_a_kronecker_product_stays_one_between_the_maps() -> None:
    config = tna.Config(
        1, fold=(12, 8), splits=2, groups="weight", projection=Tile(cols=8), on="weight", split_size="balanced"
    )
    plan = tna.SuperLoRA(config, [(12, 20)])
    assert check(plan) == [None]
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
