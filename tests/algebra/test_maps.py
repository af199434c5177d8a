"""Every map inherits the contract; maps with settings, chains of maps, and maps of each weight."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import DAUBECHIES, Repeat
from tests.algebra.random_parameters import drawn
from tests.conftest import NUMPY_AND_TORCH, on_every_library, relative_error
from tests.support.references import reference
from tnadapt import ConfigError
from tnadapt.algebra import rng as draws
from tnadapt.algebra.maps import KINDS, MAPS, BroughtMap, Chain, Dft2, Map, PerWeight, make_map, make_map_on_weights
from tnadapt.backends import FFT_DTYPES, Backend, load_backend
from tnadapt.maps import (
    CenteredWavelet,
    Circulant,
    Gather,
    MapSettings,
    Scatter,
    SignGather,
    TiedElements,
    Tile,
    TorchScatter,
    Wavelet,
)
from tnadapt.plugins import forget_registered
from tnadapt.testing import MapContract


class BroughtMapContract(MapContract):
    """Of maps with an array that the caller brings."""

    def _each(self, seed: int = 3) -> Iterator[Map]:
        for brought in super()._each(seed):
            assert isinstance(brought, BroughtMap)
            brought.bring(brought.stand_in(np.random.default_rng(seed)))
            yield brought


SHORT: dict[str, Any] = {"lengths": ((0, 5), (0, 6), (0, 64), (0, 509))}
# What the contract is held to, beyond its own lengths and shapes and the settings that a map has by itself.
CONTRACTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in MAPS.built_in},
    "tied": {"settings": (TiedElements(), TiedElements(normalized=True))},
    "scatter": {**SHORT, "settings": (Scatter(5), Scatter(positions=(4, 0, 2)))},
    "torch-scatter": {**SHORT, "settings": (TorchScatter(5), TorchScatter(3, seed=-1))},
    "gather": {"settings": (Gather(), Gather(4))},
    "sign-gather": {"settings": (SignGather(), SignGather(4))},
    "centered-wavelet": {"settings": (CenteredWavelet(), CenteredWavelet("db2"), CenteredWavelet("db5"))},
    "tile": {
        "shapes": ((2, 3), (4, 6), (9, 5), (16, 16), (12, 35)),
        "settings": (Tile(), Tile(cols=3), Tile(rows=2), Tile(2, 2)),
    },
    "circulant": {
        "shapes": ((3, 3), (3, 6), (12, 9), (18, 3)),
        "settings": (Circulant(1), Circulant(3), Circulant(3, average=True)),
    },
    "wavelet": {"settings": (Wavelet(), Wavelet("db2"), Wavelet("db5"))},
}


def contract(name: str) -> type:
    base = BroughtMapContract if issubclass(MAPS[name], BroughtMap) else MapContract
    return type(f"Test_{name}", (base,), {"kind": MAPS[name], **CONTRACTS[name]})


globals().update({f"Test_{name}": contract(name) for name in CONTRACTS})


class TestRepeat(MapContract):
    kind = Repeat
    # More than are concatenated, too.
    lengths = ((1, 1), (3, 3), (3, 7), (4, 8), (5, 64), (2, 509))


class TestPeriodicWavelet(MapContract):
    kind = MAPS["wavelet"]
    shapes = ((2, 2), (4, 6), (16, 16), (12, 34))
    settings = tuple(Wavelet(family, periodic=True) for family in ("haar", "db2", "db7"))


def test_the_papers_maps_are_built_in_first_and_each_has_its_name() -> None:
    assert MAPS.built_in[: len(KINDS)] == KINDS
    assert [MAPS[name].kind for name in MAPS.built_in] == list(MAPS.built_in)


# -- Maps with settings, chains of maps, and maps of each weight: what a config says, and that all of it follows -------


NUMPY = load_backend("numpy")
SHAPES = [(6, 4), (4, 4), (6, 4)]
SIDES = st.integers(1, 9)

# Every way to shorten, and what may follow on vectors and on matrices.
SHORTER = [Scatter(3), Scatter(positions=(2, 0)), TorchScatter(3, 777), Gather(3), SignGather(2)]
NOT_SHORTER = [Tile(cols=3), Circulant(2), Wavelet("db3"), CenteredWavelet("db3"), TiedElements()]
VECTORS: list[Any] = [
    *SHORTER,
    "gather",
    [Scatter(3), "shuffle"],
    [Scatter(3), "linear"],
    ["shuffle", "shuffle"],
    ["shuffle", "gather", "linear_v2"],
    [Gather(3), "nonlinear"],
    ["linear", "shuffle", "nonlinear_v2"],
]
MATRICES: list[Any] = [
    "linear",
    "dct2",
    "dft2",
    "wavelet",
    Wavelet("db2", periodic=True),
    Tile(cols=3),
    Circulant(2),
    [Scatter(3), "dct2"],
    [Scatter(3), "dft2"],
    [TorchScatter(3), "dft2"],
    [Scatter(3), Wavelet("db3")],
    [Scatter(3), CenteredWavelet("db3")],
    [Scatter(3), Circulant(2, average=True)],
    ["dct2", Tile(2, 2)],
    [SignGather(3), "dct2", "nonlinear"],
]


def dense_config(projection: Any, **settings: Any) -> tna.Config:
    return tna.Config(order=1, format="dense", projection=projection, **settings)


@pytest.mark.parametrize("projection", [*VECTORS, *MATRICES], ids=str)
def test_dictionaries_copies_and_pickles_give_the_config_back(projection: Any) -> None:
    config = dense_config(projection, on="weight")
    stored = json.loads(json.dumps(config.to_dict()))
    for other in (tna.Config.from_dict(stored), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert hash(other) == hash(config)
    assert config.replace(rank=8).projection == config.projection


def test_one_way_to_say_and_to_store_each() -> None:
    def projection(value: Any) -> Any:
        return tna.Config(projection=value, on="weight").projection

    assert projection(["linear"]) == projection(["identity", "linear"]) == "linear"
    assert projection(["identity"]) == projection(["identity", "identity"]) == "identity"
    assert projection(Gather()) == projection({"map": "gather"}) == "gather"
    assert projection(Wavelet("haar")) == "wavelet"
    assert projection(Scatter(positions=[4, 1])) == Scatter(2, (4, 1))
    assert projection([Scatter(np.int64(3)), "dct2"]) == (Scatter(3), "dct2")
    stored = dense_config([Scatter(2, (3, 1)), "dft2"], on="weight").to_dict()
    assert stored["projection"] == [{"map": "scatter", "size": 2, "positions": [3, 1]}, "dft2"]
    assert stored["on"] == "weight"
    assert "on" not in tna.Config().to_dict()
    assert tna.Config().to_dict()["projection"] == "identity"


@dataclasses.dataclass(frozen=True)
class Unregistered(MapSettings):
    pass


@dataclasses.dataclass(frozen=True)
class Power(MapSettings):
    by: float = 2.0


class Scaled(Map):
    """``y = by * x``, as a plug-in would write it."""

    settings_class = Power
    square = True
    matrices: ClassVar[int] = 0

    def forward(self, backend: Backend, x: Any) -> Any:
        return x * self.settings.by

    def matrix(self) -> np.ndarray:
        return self.settings.by * np.eye(self.n_out)


class Loose(MapSettings):
    pass


@dataclasses.dataclass(frozen=True)
class Reserved(MapSettings):
    map: int = 3


def subclass(settings: MapSettings) -> MapSettings:
    """Settings of a subclass, which are checked like its own."""
    own = dataclasses.make_dataclass("Own", [("more", Any, None)], bases=(type(settings),), frozen=True)
    return own(**dataclasses.asdict(settings), more=[])


def registered(settings: type) -> None:
    tna.register_map("other", type("Other", (Map,), {"settings_class": settings}))


STORABLE = "must be None, a boolean, an integer, a finite .*; got"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"projection": "dct3"}, r"projection must be one of 'identity', .* such as tnadapt.maps.Scatter\(size=1000\), or a"
                             r" list of these; got 'dct3'"),
    ({"projection": 3}, "projection must be one of .*got 3"),
    ({"projection": []}, "composes 1 to 16 maps; got 0"),
    ({"projection": ["shuffle"] * 17}, "composes 1 to 16 maps; got 17"),
    ({"projection": [["shuffle"]]}, r"projection must be one of .*got \['shuffle'\]"),
    ({"projection": "scatter"}, r"map 'scatter' needs settings: .*tnadapt.maps.Scatter\(size=…, positions=…\)"),
    ({"projection": "circulant"}, r"map 'circulant' needs settings: projection=tnadapt.maps.Circulant\(block=…\)"),
    ({"projection": {"size": 3}}, r"a mapping with its name as 'map'; got \{'size': 3\}"),
    ({"projection": {"map": "linear"}}, "map 'linear' has no settings; give its name, projection='linear'"),
    ({"projection": {"map": "scatter", "sise": 3}}, "map 'scatter' has no setting 'sise'; its settings are size, pos"),
    ({"projection": {"map": "circulant"}}, "map 'circulant': TypeError: .*block"),
    ({"projection": {"map": "scatters"}}, "projection must be one of .*got 'scatters'"),
    ({"projection": Unregistered()}, r"Unregistered\(\) are the settings of no registered map; call tnadapt.regis"),
    ({"projection": ["nonlinear", "shuffle"]}, "'nonlinear' is not linear, and only the last map of a chain may be"),
    ({"projection": "dct2"}, "'dct2' works on the rows and columns of a weight, and on='vector'.*set on='weight'"),
    ({"projection": [Scatter(3), "dft2"]}, "'dft2' works on the rows and columns of a weight.*set on='weight'"),
    ({"on": "matrix"}, "on must be one of 'vector', 'weight'; got 'matrix'"),
    ({"projection": Scatter(3), "ratio": 0.5},
     r"ratio=0.5 sets the length before F, and the projection scatter\(size=3\) determines it by its own settings"),
    ({"projection": [Scatter(3), "linear"], "ratio": 0.5}, "ratio=0.5 sets the length before F, and the projection"),
    ({"projection": ["dct2", "linear"], "on": "weight", "ratio": 0.5}, "the projection dct2 → linear determines it by"),
    ({"projection": ["shuffle", "shuffle"], "ratio": 0.5}, "ratio=0.5 needs a projection that changes the length"),
]  # fmt: skip


def on_square(projection: Any, rows: int = 4) -> tna.UpdatePlan:
    return tna.UpdatePlan(dense_config(projection, on="weight"), [(rows, 4)])


@pytest.mark.parametrize(("make", "message"), [
    *((functools.partial(tna.Config, **settings), message) for settings, message in REFUSED),
    (lambda: MAPS.find("svd"), r"projection must be one of 'identity', .*got 'svd'.*install the plug-in"),
    (Scatter, r"Scatter needs the number of values, Scatter\(size=1000\), or their positions"),
    (lambda: Scatter(0), "Scatter's size must be at least 1; got 0"),
    (lambda: Scatter(2.0), "Scatter's size must be an integer"),
    (lambda: Scatter(positions=()), r"positions must be a tuple of integers, or None; got \(\)"),
    (lambda: Scatter(positions=5), "positions must be a tuple of integers, or None; got 5"),
    (lambda: Scatter(positions=(1, -1)), "one of Scatter's positions must be at least 0"),
    (lambda: Scatter(positions=(1, 4, 1)), "positions must be distinct; 1 is given twice or more"),
    (lambda: Scatter(3, (1, 4)), "Scatter has size=3 and 2 positions: leave size out"),
    (lambda: Scatter(positions=tuple(range(20_000))), r"20000 positions have more digits .*Scatter\(size=20000"),
    (lambda: Gather(0), "Gather's size must be at least 1"),
    (lambda: SignGather(0), "SignGather's size must be at least 1"),
    (lambda: Tile(cols=0), "Tile's cols must be at least 1"),
    (lambda: Circulant(0), "Circulant's block must be at least 1"),
    (lambda: Circulant(3, average=1), "Circulant's average must be True or False; got 1"),
    (lambda: Wavelet("db11"), "Wavelet's family must be one of 'haar', 'db1', .*; got 'db11'"),
    (lambda: Wavelet("haar", periodic=1), "Wavelet's periodic must be True or False; got 1"),
    (lambda: on_square(Wavelet("db2", periodic=True), rows=5),
     "needs even sizes, and a weight has 5 rows and 4 columns: leave periodic"),
    (lambda: on_square(TorchScatter(17)),
     "TorchScatter has size=17, more positions than places: its output has 16 elements; give a"),
    (lambda: on_square(Scatter(17)),
     "Scatter has size=17, more positions than places: its output has 16 elements; give a size of at"),
    (lambda: on_square(Scatter(positions=(3, 16))),
     "position 16 is beyond its output of 16 elements, whose positions are 0 to 15"),
    (lambda: tna.maps.TorchScatter(None), "TorchScatter's size must be an integer; got None"),
    (lambda: Circulant(None), "Circulant's block must be an integer; got None"),
    (lambda: on_square(Tile(cols=5)), "Tile has cols=5, and a weight of 4×4 has 4: give at most 4"),
    (lambda: on_square(Circulant(3)), "Circulant has block=3, which does not divide the 4 rows and 4 columns"),
    (lambda: on_square(["dct2", Scatter(9)]),
     "'dct2' works on the rows and columns of a weight, and its output is a vector of 9"),
    (lambda: on_square(["dct2", Circulant(2)]),
     "'dct2' works on .* its output is a vector of 8 elements: set on='weight', and let"),
    (lambda: tna.UpdatePlan(dense_config("dct2", on="weight", groups=2), SHAPES),
     "group 0 has 8 of the 16 elements of a weight of 4×4: use groups='weight', 'layer', 'role', 1, or"),
    (lambda: tna.Projection(Scatter(3), 4, 9), r"scatter\(size=3\) takes n_in=3; got n_in=4: leave n_in out"),
    (lambda: tna.Projection("shuffle", 4), "n_out must be an integer"),
    (lambda: make_map(("shuffle", "shuffle"), 16, 16, group=1 << 28),
     "can be drawn for 268435456 groups, and 268435456 is beyond: use shared"),
    *((functools.partial(Power, value), f"Power: by {STORABLE}")
      for value in ([], math.inf, math.nan, 1 << 64, (((((),),),),), np.float64(0.5), np.ones(2))),
    *((functools.partial(subclass, settings), f"Own: more {STORABLE}") for settings in (*SHORTER, *NOT_SHORTER)),
    (lambda: registered(int), "settings_class must inherit from tnadapt.maps.MapSettings; got <class 'int'>"),
    (lambda: registered(Loose), "the settings class Loose must be a frozen dataclass"),
    (lambda: registered(Reserved), "the settings class Reserved has the field 'map': the name 'map' is reserved"),
])  # fmt: skip
def test_settings_configs_and_plans_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_map_of_each_weight_needs_whole_weights() -> None:
    config = dense_config("dct2", on="weight", groups=2)
    assert tna.UpdatePlan(config, [(2, 3), (3, 2)]).num_groups == 2  # the cut is between the weights
    assert tna.UpdatePlan(config.replace(groups=1), SHAPES).num_parameters == 64
    # Weights of one size and other shapes differ in their coefficients: 6 × 6 and 4 × 10.
    assert tna.UpdatePlan(dense_config("wavelet", on="weight", groups="weight"), [(5, 6), (3, 10)]).num_parameters == 76


@pytest.mark.law("projection-lengths")
@pytest.mark.parametrize(
    ("projection", "ratio", "expected"),
    [
        # Ratios are the decimals that they are written as: 0.07 * 100 is 7.000000000000001 in floating point.
        ("linear", 0.07, 7),
        ("linear", 0.29, 29),
        ("linear", 1e-9, 1),
        ("gather", 0.07, 7),
        ("sign-gather", 1.0, 100),
        (["shuffle", "linear"], 0.3, 30),
        (["gather", "linear"], 0.3, 30),  # the first one that can
        (["linear", "linear"], 0.3, 30),
        ([Scatter(5), "linear"], 1.0, 5),
        ("shuffle", 1.0, 100),
        ("linear", 1.0, 100),
        (["linear", Gather(20)], 0.3, 30),  # ρ is of the whole chain
    ],
)
def test_the_length_before_a_chain(projection: Any, ratio: float, expected: int) -> None:
    plan = tna.UpdatePlan(dense_config(projection, ratio=ratio), [(10, 10)])
    assert plan.groups[0].projection.n_in == plan.num_parameters == expected
    if ratio == 1.0:  # unless given
        assert tna.Projection(projection, n_out=100).n_in == expected


# -- What is computed -----------------------------------------------------------------------------


def maps_of(projection: Any) -> list[Map]:
    """The map on a vector, or on one weight and several, equal or not."""
    if projection in VECTORS:
        return [tna.Projection(projection, n_out=n, seed=5, group=2).map for n in (5, 64)]
    shapes: list[list[tuple[int, int]]] = [[(6, 4)], [(4, 4)] * 3, [(6, 4), (4, 8), (6, 4)]]
    return [tna.Projection.on_weights(projection, given, seed=5).map for given in shapes]


@pytest.mark.law("projection-adjoint", "projection-slice")
@pytest.mark.parametrize("projection", [*VECTORS, *MATRICES], ids=str)
def test_a_chain_is_the_product_of_its_matrices_and_has_its_sum_of_squares(
    projection: Any, rng: np.random.Generator
) -> None:
    for f in maps_of(projection):
        matrix, part = reference.matrix_of(f), f.linear_part
        x, y = rng.normal(size=(2, 3, f.n_in)), rng.normal(size=(2, 3, f.n_out))
        expected = x @ matrix.T
        assert relative_error(part.forward(NUMPY, x), expected) < 1e-12
        assert relative_error(part.adjoint(NUMPY, y), y @ matrix) < 1e-12
        slope = np.ones_like(expected)
        if not f.linear:
            slope, expected = np.tanh(expected) ** 2, reference.tanhshrink(expected)
        assert relative_error(f.forward(NUMPY, x), expected) < 1e-12
        assert relative_error(f.adjoint_at(NUMPY, y, x), (y * slope) @ matrix) < 1e-12
        for start, stop in ((0, 1), (f.n_out - 1, f.n_out), (1, f.n_out - 1), (0, f.n_out)):
            for each in (f, copy.deepcopy(f)):
                cut = each.slice(NUMPY, x, start, stop)
                assert np.max(np.abs(cut - expected[..., start:stop])) < 1e-12 * np.max(np.abs(expected))
        assert np.linalg.matrix_rank(matrix) <= f.freedom()
        if f.isometry:
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(f.n_out), atol=1e-12)
            assert f.squared_norm() == f.n_out  # bit for bit
        blocks = f.parts if isinstance(f, PerWeight) else (f,)
        chains = [block.parts if isinstance(block, Chain) else (block,) for block in blocks]
        exact = float(np.sum(matrix**2))
        # Fastfood's is that of its expectation, and that of several maps is estimated.
        if all(sum(not each.isometry for each in chain) < 2 for chain in chains) and "linear" not in f.kind:
            assert math.isclose(f.squared_norm(), exact, rel_tol=1e-12)
        else:
            assert f.n_out < 16 or 0.2 * exact <= f.squared_norm() <= 5.0 * exact


@given(st.integers(2, 6), st.integers(2, 6), st.data())
def test_seeded_positions_have_their_share_of_the_sum_of_squares(rows: int, cols: int, data: st.DataObject) -> None:
    """Exactly, as a mean over all positions, which have the same probability."""
    size = data.draw(st.integers(1, rows * cols))
    squares = np.sum(make_map_on_weights("dft2", [(rows, cols)]).matrix() ** 2, axis=0)
    assert squares.max() <= 2.0 * squares.min() * (1.0 + 1e-12)  # even_columns
    chain = make_map_on_weights((Scatter(size), "dft2"), [(rows, cols)])
    assert math.isclose(chain.squared_norm(), size * squares.mean(), rel_tol=1e-12)


@pytest.mark.law("equal-seeds", "update-formula", "update-slice")
@on_every_library("projection", [*VECTORS, *MATRICES], [*VECTORS, *MATRICES][::3])
def test_every_library_gives_numpys_numbers(projection: Any, backend: Backend, rng: np.random.Generator) -> None:
    f = maps_of(projection)[-1]
    x, y = rng.normal(size=(2, f.n_in)), rng.normal(size=(2, f.n_out))
    theirs, at = backend.asarray(x, "float64"), backend.asarray(x, "float64")
    found = backend.to_numpy(copy.deepcopy(f).forward(backend, theirs))
    assert relative_error(found, f.forward(NUMPY, x)) < 1e-12
    back = backend.to_numpy(copy.deepcopy(f).adjoint_at(backend, backend.asarray(y, "float64"), at))
    assert relative_error(back, f.adjoint_at(NUMPY, y, x)) < 1e-12
    cut = backend.to_numpy(copy.deepcopy(f).slice(backend, theirs, 3, f.n_out - 2))
    assert relative_error(cut, f.forward(NUMPY, x)[:, 3:-2]) < 1e-12


def test_equal_maps_in_a_chain_draw_differently() -> None:
    found = make_map(("shuffle", "shuffle"), 16, 16, seed=1)
    assert isinstance(found, Chain)
    assert found.parts[0].digest() == make_map("shuffle", 16, 16, seed=1).digest()
    assert found.parts[1].digest() == make_map("shuffle", 16, 16, seed=1, group=1 << 28).digest()
    assert make_map(("shuffle", "linear"), 16, 16).full_rank
    assert not make_map(("linear", "shuffle"), 16, 16).full_rank


def test_digests_differ_where_maps_do() -> None:
    of_vectors = [
        Scatter(3), Scatter(positions=(0, 1, 2)), Scatter(positions=(0, 2, 1)), Gather(3), SignGather(3),
        [Scatter(3), "shuffle"], [Scatter(3), "linear"],
    ]  # fmt: skip
    of_weights = [
        "dct2", "dft2", Wavelet("db2"), Wavelet("db2", periodic=True), Tile(cols=2), Tile(cols=4), Circulant(2),
        Circulant(2, average=True),
    ]  # fmt: skip
    maps = [
        *(tna.Projection(recipe, n_out=32) for recipe in of_vectors),
        tna.Projection(Scatter(3), n_out=32, seed=1),
        tna.Projection(Scatter(3), n_out=32, group=1),
        *(tna.Projection.on_weights(recipe, [(4, 8)]) for recipe in of_weights),
        tna.Projection.on_weights("dct2", [(8, 4)]),
        tna.Projection.on_weights("dct2", [(4, 4)] * 2),
    ]
    assert len({f.digest for f in maps}) == len(maps)
    assert maps[0].digest == tna.Projection(Scatter(3), n_out=32).digest


@pytest.mark.law("known-draws")
def test_the_draws_are_pinned() -> None:
    """What files of released versions hold: a change here is a break of the format."""
    assert tna.Projection(Scatter(5), n_out=100, seed=7).map.host("positions").tolist() == SCATTERED
    gather = make_map("gather", 4, 12, seed=7)
    assert gather.host("index").tolist() == GATHERED
    assert make_map("sign-gather", 4, 12, seed=7).host("signs").tolist() == SIGNED
    assert tna.Projection([SignGather(7), "linear"], n_out=509, seed=7).digest == CHAINED
    assert tna.Projection.on_weights([Scatter(7), "dft2"], [(6, 4), (8, 8)], seed=7).digest == ON_WEIGHTS


SCATTERED = [42, 93, 31, 74, 67]
GATHERED = [1, 1, 1, 0, 0, 2, 3, 2, 0, 3, 2, 3]
SIGNED = [-1, 1, -1, 1, 1, 1, -1, -1, -1, -1, -1, 1]
CHAINED = "203135d8588d31a4ce9fb2393d7c508bbea96fc9ca409e495a44bd7c299f5017"
ON_WEIGHTS = "3468816c821583566f77733845e0206184a4fef9222f419bfc27dc4c036617ab"


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from([0, 2**63]))
def test_a_gather_uses_every_element_alike(n_in: int, n_out: int, seed: int) -> None:
    counts = np.bincount(make_map("gather", n_in, n_out, seed).host("index"), minlength=n_in)
    assert counts.max() - counts.min() <= 1
    assert len(counts) == n_in


@given(st.integers(1, 60), st.data())
def test_seeded_positions_are_the_first_of_the_permutation(places: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, places))
    start = data.draw(st.integers(0, places - 1))
    stop = data.draw(st.integers(start + 1, places))
    positions = draws.permutation(places, 4, 3, 0, size)
    x, y = np.arange(1.0, size + 1), np.arange(10.0, places + 10)
    expected = np.zeros(places)
    expected[positions] = x
    for settings in (Scatter(size), Scatter(positions=tuple(positions.tolist()))):
        f = tna.Projection(settings, n_out=places, seed=4, group=3)
        for _ in range(2):  # without draws in memory, and with
            assert np.array_equal(f.slice(x, start, stop), expected[start:stop])
            assert np.array_equal(f(x), expected)
        assert np.array_equal(f.adjoint(y), y[positions])


@pytest.mark.parametrize(("length", "dtype"), [((1 << 31) - 1, np.int32), (1 << 31, np.int64)])
def test_drawn_positions_are_of_the_shorter_integers_that_fit(length: int, dtype: type) -> None:
    for positions in (
        tna.Projection(Scatter(length), n_out=length).map.make(("sources", 0, 100)),
        make_map("gather", length, length).make(("index", 0, 100)),
    ):
        assert positions.dtype == dtype
        assert 0 <= positions.min() < positions.max() <= length


# -- Transforms against other libraries -----------------------------------------------------------


@given(SIDES, SIDES)
def test_the_cosine_transform_is_that_of_scipy(rows: int, cols: int) -> None:
    from scipy.fft import idctn

    x = np.random.default_rng(0).normal(size=rows * cols)
    transformed = tna.Projection.on_weights("dct2", [(rows, cols)])(x).reshape(rows, cols)
    assert relative_error(transformed, idctn(x.reshape(rows, cols), norm="ortho")) < 1e-12


def test_half_of_the_frequencies_are_redundant() -> None:
    """FourierFT takes the real part, so that a frequency and its negative have one effect."""
    f = tna.Projection.on_weights("dft2", [(6, 4)])
    assert np.linalg.matrix_rank(f(np.eye(24))) == f.map.freedom() == 14


@pytest.mark.parametrize("family", ["haar", *DAUBECHIES])
@given(SIDES, SIDES, st.booleans())
def test_wavelets_are_those_of_pywavelets(family: str, rows: int, cols: int, periodic: bool) -> None:
    pywt = pytest.importorskip("pywt")
    wavelet = pywt.Wavelet(family)
    assert family == "haar" or DAUBECHIES[family] == tuple(wavelet.rec_lo)
    size = (2 * rows, 2 * cols) if periodic else (rows, cols)
    f = tna.Projection.on_weights(Wavelet(family, periodic=periodic), [size])
    shape = size if periodic else tuple(2 * math.ceil((side + wavelet.rec_len - 2) / 2) for side in size)
    assert f.n_in == math.prod(shape)
    x = np.random.default_rng(0).normal(size=shape)
    expected = pywt.waverec2(in_quarters(x), family, "periodization" if periodic else "zero")[: size[0], : size[1]]
    assert relative_error(f(x.reshape(-1)).reshape(size), expected) < 1e-12


def in_quarters(x: np.ndarray) -> list[Any]:
    """The coefficients as PyWavelets has them: its first detail is high-pass along rows (``da``)."""
    rows, cols = x.shape[0] // 2, x.shape[1] // 2
    return [x[:rows, :cols], (x[rows:, :cols], x[:rows, cols:], x[rows:, cols:])]


# -- All that follows from a config ---------------------------------------------------------------

CONFIGS = {
    "scatter": dense_config(Scatter(7)),
    "gather, low rank": tna.presets.superlora(2, projection=["sign-gather", "shuffle"], ratio=0.3),
    "chain of fastfood": tna.Config(2, 3, groups=2, fold="balanced", projection=["linear", "linear"], ratio=0.3),
    "nonlinear chain": tna.Config(
        rank=2, groups=1, fold="hypercube", projection=["gather", "nonlinear"], ratio=0.5, seed=2
    ),
    "per weight": dense_config([Scatter(5), "dft2"], on="weight", groups=1, shared=False),
    "per weight, low rank": tna.presets.superlora(2, [[0, 2], [1]], projection="linear", on="weight"),
    "per weight, nonlinear": tna.Config(
        rank=2, groups=1, fold="hypercube", projection=["dct2", "nonlinear"], on="weight"
    ),
    "tile": tna.Config(rank=2, fold="hypercube", projection=Tile(cols=2), on="weight"),
    "circulant": dense_config(Circulant(2, average=True), on="weight", groups=1),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_laws_plots_files_and_fits_follow_from_a_config(name: str, tmp_path: Any) -> None:
    from tnadapt.planning import degrees_of_freedom, known_as, largest_rank, step_cost

    config, plan = CONFIGS[name], tna.UpdatePlan(CONFIGS[name], SHAPES)
    report = tna.verify(config, SHAPES, backends=["numpy"])
    assert report.holds, str(report)
    assert str(known_as(config))
    assert step_cost(plan) >= 0
    assert 1 <= degrees_of_freedom(plan) <= plan.num_parameters
    # Files tell draws of other seeds where a map draws.
    arrays = {key: array.astype(np.float32) for key, array in drawn(plan).items()}
    targets = [tna.Target(f"layer.{number}.q", shape, "q") for number, shape in enumerate(SHAPES)]
    one, other = (tna.AdapterFile(config.replace(seed=seed), targets, arrays).draws for seed in (0, 9))
    assert one is not None
    assert (one != other) == ("tile" not in name and "circulant" not in name)
    if "nonlinear" not in name:
        deltas = plan.deltas(drawn(plan))
        assert largest_rank(plan, 0).value == np.linalg.matrix_rank(deltas[0])
        params, fit = tna.decompose(deltas, config, max_iterations=300)
        assert fit.error < (1e-7 if config.order == 1 else 0.1)
        assert params.keys() == plan.param_shapes.keys()
    pytest.importorskip("matplotlib")
    from tnadapt import plot

    plot.network(config, SHAPES, tmp_path / "network.png")
    plot.layout(plan, tmp_path / "groups.png")


def test_the_cosine_transform_of_lora_is_fitted_exactly() -> None:
    """It preserves distances, so that a truncated SVD of the transformed update is the optimum."""
    config = tna.presets.lora(2, projection="dct2", on="weight")
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(6, 4))
    _, report = tna.decompose([delta], config)
    from scipy.fft import dctn

    values = np.linalg.svd(dctn(delta, norm="ortho"), compute_uv=False)
    assert math.isclose(report.error, math.sqrt(np.sum(values[2:] ** 2) / np.sum(values**2)), rel_tol=1e-9)


# -- Plug-ins -------------------------------------------------------------------------------------


class Sum(Map):
    """Each element of y is the sum of x."""

    square = True

    def forward(self, backend: Backend, x: Any) -> Any:
        return x.sum() * np.ones(self.n_out)

    def matrix(self) -> np.ndarray:
        return np.ones((self.n_out, self.n_in))


def test_a_squared_norm_that_a_map_does_not_define_is_the_mean_of_many_probes() -> None:
    estimates = [Sum(16, 16, group=group).squared_norm() / 256 for group in range(30)]
    assert abs(np.mean(estimates) - 1.0) < 0.2
    assert np.std(estimates) < 0.5  # of a single probe it is 1.4


@pytest.fixture
def scaled() -> Iterator[None]:
    tna.register_map("scaled", Scaled)
    yield
    forget_registered()


@pytest.mark.usefixtures("scaled")
def test_a_registered_map_with_settings_that_a_file_can_hold() -> None:
    config = tna.Config(rank=2, groups=1, fold="hypercube", projection=["gather", Power(3.0)], ratio=0.5)
    assert config.to_dict()["projection"] == ["gather", {"map": "scaled", "by": 3.0}]
    assert tna.Config.from_dict(config.to_dict()) == config
    assert tna.verify(config, SHAPES, backends=["numpy"]).holds
    assert tna.Config(projection=Power()).projection == "scaled"
    assert tna.Projection("scaled", n_out=4).map.kind == "scaled"
    for value in (None, True, -((1 << 64) - 1), 0.1, "x", (), ((((1, "x"), 2.5),),)):
        config = tna.Config(projection=Power(value))
        assert tna.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_weights_of_equal_shape_share_one_map_and_identities_are_one() -> None:
    on_weights = make_map_on_weights((Scatter(3), "dct2"), [(6, 4), (4, 4), (6, 4)])
    assert isinstance(on_weights, PerWeight)
    assert on_weights.parts[0] is on_weights.parts[2]
    assert on_weights.n_in == 9
    assert [make_map_on_weights(name, SHAPES).identity for name in ("identity", "shuffle")] == [True, False]


def test_many_given_positions_fit_into_a_file_and_not_into_a_message(tmp_path: Any) -> None:
    positions = tuple(np.random.default_rng(0).permutation(100_000)[:8000].tolist())
    config = tna.presets.shira(8000, positions)
    targets = [tna.Target("layer.0.q", (400, 400), "q")]
    plan = tna.UpdatePlan(config, [(400, 400)])
    tna.save(tmp_path / "adapter.safetensors", tna.AdapterFile(config, targets, drawn(plan)))
    assert tna.load(tmp_path / "adapter.safetensors").config == config
    assert repr(plan.groups[0].projection) == (
        "Projection('scatter(size=8000, positions=(8000 given))', n_in=8000, n_out=160000, seed=0, group=0)"
    )


# -- dft2 by an FFT: equal to the products with cosines and sines, for any sides, batch, dtype and slice ---------------


#: Even, odd and prime sides, the shortest ones, and a pair of which one has many factors.
FOURIER_SHAPES = [(1, 1), (1, 6), (7, 1), (2, 2), (9, 5), (16, 16), (31, 37), (66, 128), (131, 96)]
ROUNDING = {"float64": 1e-12, "float32": 2.0**-20}


def with_fft() -> Any:
    """Return a context in which sides do not matter."""
    return mock.patch("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", 0)


def fourier(rows: int, cols: int) -> Dft2:
    return Dft2(rows * cols, rows * cols, shape=(rows, cols))


@pytest.mark.law("projection-adjoint", "projection-slice")
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 70),
    batch=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from(FFT_DTYPES),
    library=st.sampled_from(NUMPY_AND_TORCH),
    chunk=st.just(1 << 20) | st.integers(1, 20_000),
    data=st.data(),
)
def test_the_fft_is_the_product_with_cosines_and_sines(
    rows: int, cols: int, batch: list[int], dtype: str, library: str, chunk: int, data: st.DataObject
) -> None:
    b, f = load_backend(library), fourier(rows, cols)
    x = b.asarray(np.random.default_rng(0).normal(size=(*batch, f.n_in)), dtype)
    start = data.draw(st.integers(0, f.n_out - 1))
    stop = data.draw(st.integers(start + 1, f.n_out))
    with with_fft(), mock.patch("tnadapt.backends._CHUNK", chunk):
        found, back, part = f.forward(b, x), f.adjoint(b, x), f.slice(b, x, start, stop)
    assert b.dtype_name(found) == dtype
    assert relative_error(b.to_numpy(found), b.to_numpy(f.forward_plain(b, x))) < ROUNDING[dtype]
    assert np.array_equal(b.to_numpy(back), b.to_numpy(found))  # its matrix is symmetric
    assert np.array_equal(b.to_numpy(part), b.to_numpy(found)[..., start:stop])


@pytest.mark.law("projection-adjoint", "projection-slice")
@pytest.mark.parametrize("shape", FOURIER_SHAPES)
@pytest.mark.parametrize("rate", [0, 8, 10**9], ids=["FFT", "chosen", "products"])
def test_every_library_computes_numpys_transform(
    backend: Backend, shape: tuple[int, int], rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnadapt.algebra.maps._transforms._PRODUCTS_PER_STEP", rate)
    x = np.random.default_rng(0).normal(size=(2, math.prod(shape)))
    f = tna.Projection.on_weights("dft2", [shape])
    expected = np.fft.ifft2(x.reshape(2, *shape)).real.reshape(2, -1)
    theirs = backend.asarray(x, "float64")
    assert relative_error(backend.to_numpy(f(theirs)), expected) < 1e-12
    assert relative_error(backend.to_numpy(f.adjoint(theirs)), expected) < 1e-12
    start, stop = f.n_out // 3, f.n_out // 3 + 1
    assert relative_error(backend.to_numpy(f.slice(theirs, start, stop)), expected[:, start:stop]) < 1e-12


def test_half_precision_is_computed_in_single_and_rounded_once(backend: Backend) -> None:
    numbers, f = np.random.default_rng(0).normal(size=96), tna.Projection.on_weights("dft2", [(8, 12)])
    for dtype in ("float16", "bfloat16"):
        try:
            x = backend.asarray(numbers, dtype)
        except tna.BackendError:
            continue
        expected = backend.astype(f(backend.astype(x, "float32")), dtype)
        assert np.array_equal(backend.to_numpy(f(x)), backend.to_numpy(expected))


class OwnClass(np.ndarray):
    pass


def test_strided_read_only_and_empty_input_and_arrays_of_their_own_class() -> None:
    b, f = load_backend("numpy"), fourier(4, 6)
    x = np.random.default_rng(0).normal(size=(f.n_in, 6))[:, ::2].T
    x.flags.writeable = False
    kept = x.copy()
    with with_fft():
        assert relative_error(f.forward(b, x), f.forward_plain(b, kept)) < 1e-12
        assert f.forward(b, x[:0]).shape == (0, f.n_out)
        of_class = f.forward(b, x.view(OwnClass))
    assert type(of_class) is OwnClass
    assert relative_error(np.asarray(of_class), f.forward_plain(b, kept)) < 1e-12
    assert np.array_equal(x, kept)


@pytest.mark.parametrize(
    ("shape", "cost"),
    [
        ((1, 1), 0),
        ((64, 32), 64 * 32 * 11),  # log2 of the number of elements
        ((1, 1024 * 9), 1024 * 9 * (10 * 2 + 2 * 3) / 2),
        ((12, 350), 12 * 350 * (2 + 2 + 3 + 2 + 5 + 5 + 7) / 2),
        ((1, 769), 6 * 11 * 2048 / 2),  # a prime: three transforms of 2048
        ((61, 67), 2 * 61 * 67 * (61 + 67)),  # the products are faster
    ],
)
def test_the_cost_is_that_of_the_faster_way(shape: tuple[int, int], cost: float) -> None:
    assert fourier(*shape).cost() == math.ceil(cost)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_nothing_costs_more_than_the_products(rows: int, cols: int) -> None:
    assert fourier(rows, cols).cost() <= 2 * rows * cols * (rows + cols)
