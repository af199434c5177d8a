"""Sources: which arrays are trained, which are frozen, and where the frozen ones come from."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.random_parameters import drawn
from tests.algebra.test_init import first_step
from tests.conftest import NUMPY_AND_TORCH, peak_of, relative_error
from tnadapt.algebra import rng as draws
from tnadapt.algebra.init import STEP
from tnadapt.algebra.sources import (
    SOURCES,
    BaseCore,
    FromBase,
    Given,
    Mixed,
    Scaled,
    Seeded,
    Source,
    SourceMap,
    Stream,
    Tied,
    Trained,
    source_from_dict,
    source_to_dict,
)
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.plugins import forget_registered
from tnadapt.testing import SourceContract

SHAPES = [(6, 4), (8, 4), (6, 4)]
DISTRIBUTIONS = ("normal", "uniform", "signs", "orthonormal", "one-hot", "eye")


@dataclasses.dataclass(frozen=True)
class Normal(Source):
    """Seeded normal numbers, as a plug-in would write them."""

    std: float = 1.0
    shared: bool = False

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        group = 0 if self.shared else stream.group
        drawn = draws.normals(stream.seed, group, stream.purpose, 0, math.prod(shape))
        return np.float32(self.std) * drawn.reshape(shape)


@pytest.fixture
def normal() -> Iterator[type[Source]]:
    tna.register_source("normal", Normal)
    yield Normal
    forget_registered()


@dataclasses.dataclass(frozen=True)
class Wrong(Source):
    what: str = "shape"

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        if self.what == "raises":
            raise KeyError("no such table")
        made = {
            "shape": np.ones((1, 1)), "int": np.ones(shape, int), "nan": np.full(shape, np.nan),
            "large": np.full(shape, 1e300), "half": np.full(shape, 1e5), "zeros": np.zeros(shape),
        }  # fmt: skip
        return made[self.what]


@dataclasses.dataclass(frozen=True)
class Nothing(Source):
    trained: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Needs(Source):
    seed: int


@dataclasses.dataclass(frozen=True)
class Named(Source):
    source: str = "x"


@dataclasses.dataclass(frozen=True)
class Computed(Source):
    std: float = dataclasses.field(init=False, default=1.0)


class Plain(Source):
    def __init__(self, std: float) -> None:
        object.__setattr__(self, "std", std)


# -- The contract ---------------------------------------------------------------------------------


CONTRACTS: dict[str, tuple[Source, ...]] = {
    "trained": (Trained(),),
    "seeded": (
        *(Seeded(name, shared) for name in DISTRIBUTIONS for shared in (True, False)),
        *(Seeded(name, scale=0.25) for name in DISTRIBUTIONS),
    ),
    "from-base": (FromBase("rows"), FromBase("cols", vectors=True), FromBase("mode")),
    "base-core": (BaseCore(),),
    "given": (Given(), Given(shared=True)),
    "tied": (Tied("split0.factor0"), Tied("group3.term1.split0.core")),
    "scaled": (Scaled(Seeded("normal")), Scaled(Tied("group0.split0.factor0"), size=False, rank=True, start=0.1)),
    "mixed": (Mixed(Seeded("normal")), Mixed(Tied("group0.split0.factor0"))),
}
globals().update(
    {f"Test_{name}": type(f"Test_{name}", (SourceContract,), {"sources": CONTRACTS[name]}) for name in CONTRACTS}
)


@pytest.mark.usefixtures("normal")
class TestNormal(SourceContract):
    sources = (Normal(), Normal(0.5, shared=True))


def test_every_built_in_source_has_its_contract() -> None:
    tested = {type(source) for sources in CONTRACTS.values() for source in sources}
    assert tested >= {SOURCES[name] for name in SOURCES.built_in}


def test_the_longest_key_counts() -> None:
    one, two, three = Normal(1.0), Normal(2.0), Normal(3.0)
    found = SourceMap({"factor0": one, "split1.factor0": two, "term2.split1.factor0": three})
    assert [found.of(name) for name in ("split0.factor0", "split1.factor0", "term1.split1.factor0")] == [one, two, two]
    assert found.of("term2.split1.factor0") is three
    assert found.of("split0.factor1") is None


# -- What is refused ------------------------------------------------------------------------------


def computed(source: Source, dtype: str = "float32") -> list[np.ndarray]:
    plan = tna.UpdatePlan(tna.Config(format="cp-weighted", sources={"factor1": source}), SHAPES)
    return plan.deltas(plan.init(dtype=dtype))


def frozen(*keys: str, **settings: Any) -> tna.UpdatePlan:
    return tna.UpdatePlan(tna.Config(sources=dict.fromkeys(keys, Normal()), **settings), SHAPES)


def seeded(**settings: Any) -> tna.Config:
    return tna.Config.from_dict({"sources": {"factor1": {"source": "seeded", **settings}}})


SOURCES_REFUSED = [
    ([("factor0", Trained())], r"sources must be a mapping of array names to sources, .*got \[\("),
    ({"": Trained()}, r"a key of sources is the name of an array, such as 'factor0'.*got ''"),
    ({"term0.factor0": Trained()}, r"or 'term0.split0.factor0'; got 'term0.factor0'"),
    ({3: Trained()}, r"a key of sources is the name of an array.*got 3"),
    ({"factor0": "trained"}, r"sources\['factor0'\] must be a source, such as .*Trained\(\); got 'trained'"),
    ({"factor0": Trained}, r"sources\['factor0'\] must be a source"),
    (None, r"sources must be a mapping of array names to sources, .*got None"),
    ({f"factor{number}": Trained() for number in range(4097)}, "sources has 4097 entries; at most 4096"),
    ({"factor0": {"source": "vera"}},
     r"sources\['factor0'\]: source must be one of 'trained', 'seeded'.*; got 'vera'.*install the plug-in"),
    ({"factor0": {"std": 1.0}}, r"a source must be a mapping with its name as 'source'; got \{'std': 1.0\}"),
    ({"factor0": {"source": "trained", "std": 1}}, r"source 'trained' has no setting 'std'; it has none"),
    ({"factor1": Plain(1.0)}, "Plain must be a frozen dataclass: decorate"),
    *(({"factor1": Normal(value)}, r"sources\['factor1'\]: std must be None, a boolean, an integer, a finite")
      for value in ([], {}, math.inf, math.nan, 1 << 64, ((((((),),),),),), np.float32(0.5), object())),
]  # fmt: skip
REFUSED: list[tuple[Callable[[], object], str]] = [
    *((functools.partial(tna.Config, sources=sources), message) for sources, message in SOURCES_REFUSED),
    (lambda: SourceMap([("factor0", Trained())]), r"sources must be a mapping of names to sources; got \[\('factor0'"),
    *((functools.partial(frozen, key), rf"sources names '{key}'.*the arrays are 'factor0', 'factor1'")
      for key in ("facotr0", "split1.factor0", "term0.split0.factor0", "core")),
    (lambda: tna.Config(sources={"factor1": Normal()}).to_dict(),
     r"Normal\(.*its class is not registered; call tnadapt.register_source"),
    (lambda: tna.register_source("int", int), r"must be a class that inherits from .*Source; got <class 'int'>"),
    (lambda: tna.register_source("trained", Normal), "source 'trained' is built in and cannot be replaced"),
    # Classes whose settings would be lost.
    (lambda: tna.register_source("wrong", Plain), "must be a frozen dataclass"),
    (lambda: tna.register_source("wrong", Named), "'source' is reserved"),
    (lambda: tna.register_source("wrong", Computed), "'std'"),
    (lambda: frozen("factor0", "factor1"), "freezes all of split0.factor0, split0.factor1, and nothing is left"),
    (lambda: frozen("split0.factor0", "factor1"), "freezes all of split0.factor0, split0.factor1, and nothing is left"),
    (lambda: frozen("term1.split0.factor0", "term1.split0.factor1", terms=2),
     "freezes all of term1.split0.factor0, term1.split0.factor1"),
    (lambda: computed(Wrong("shape")), r"Wrong\(what=.* must compute floating-point numbers of shape \(4, 4\) for "
                                       r"'group0.split0.factor1'; it returned float64"),
    (lambda: computed(Wrong("int")),
     r"Wrong\(what=.* must compute floating-point numbers of shape \(4, 4\) .*; it returned int64"),
    (lambda: computed(Wrong("nan")),
     r"Wrong\(what=.* computes NaN, infinity, or numbers beyond float32 for 'group0.split0.factor1'"),
    (lambda: computed(Wrong("large")), r"Wrong\(what=.* computes NaN, infinity, or numbers beyond float32"),
    (lambda: computed(Wrong("zeros")),
     r"Wrong\(what=.* computes only zeros for 'group0.split0.factor1', so that nothing could be trained"),
    (lambda: computed(Wrong("raises")),
     r"Wrong\(what=.* failed to compute 'group0.split0.factor1': KeyError: 'no such table'"),
    (lambda: computed(Wrong("half"), "float16"), r"for 'split0.factor1' that float16 cannot represent; use float32"),
    (lambda: computed(Nothing()), r"source Nothing does not define array\(shape, stream\)"),
    (lambda: seeded(distribution="gauss"), r"distribution must be one of 'normal', .*'eye'; got 'gauss'"),
    (lambda: seeded(distribution=["normal"]), r"distribution must be one of"),
    (lambda: seeded(distribution="normal", shared=1), r"shared must be True or False; got 1"),
    (lambda: seeded(distribution="normal", scale=0.0), r"scale must be a number from 1e-30 to 1e30, or None; got 0.0"),
    (lambda: seeded(distribution="normal", scale=math.nan), r"scale must be a number"),
    (lambda: seeded(distribution="normal", scale=True), r"scale must be a number .*; got True"),
    (lambda: seeded(distribution="normal", scale=10**400), r"scale must be a number"),
    (seeded, r"missing 1 required positional argument: 'distribution'"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        make()


@pytest.mark.usefixtures("normal")
def test_missing_and_unknown_fields_are_refused() -> None:
    tna.register_source("needs", Needs)
    with pytest.raises(tna.ConfigError, match=r"source 'needs': .*missing 1 required .*'seed'"):
        source_from_dict({"source": "needs"})
    with pytest.raises(tna.ConfigError, match="source 'normal' has no setting 'scale'; its settings are std, shared"):
        source_from_dict({"source": "normal", "scale": 1})
    assert source_from_dict(source_to_dict(Needs(3))) == Needs(3)


# -- What they do ---------------------------------------------------------------------------------

CONFIGS: dict[str, tna.Config] = {
    "lora": tna.Config(rank=2, sources={"factor1": Normal()}),
    "core alone": tna.Config(
        rank=2, format="tucker", groups=1, fold="hypercube", sources={"factor0": Normal(), "factor1": Normal(0.5)}
    ),
    "nonlinear": tna.Config(rank=2, groups=1, fold="hypercube", projection="nonlinear", sources={"factor0": Normal()}),
}


@pytest.mark.law("sources")
@pytest.mark.usefixtures("normal")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_laws_hold_and_what_is_frozen_is_neither_counted_nor_made_nor_stored(name: str, tmp_path: Path) -> None:
    report = tna.verify(CONFIGS[name], SHAPES, backends=NUMPY_AND_TORCH)
    assert report.holds, str(report)
    plan = tna.UpdatePlan(CONFIGS[name], SHAPES)
    every = tna.UpdatePlan(plan.config.replace(sources={}), SHAPES)
    assert plan.frozen_shapes
    assert not plan.frozen_shapes.keys() & plan.param_shapes.keys()
    assert {**plan.param_shapes, **plan.frozen_shapes} == every.param_shapes
    assert {key: array.shape for key, array in plan.init().items()} == plan.param_shapes
    with pytest.raises(tna.ShapeError, match="unknown: 'group0"):
        plan.deltas({**plan.init(), **{key: np.zeros(shape) for key, shape in plan.frozen_shapes.items()}})
    params = {key: array.astype(np.float32) for key, array in drawn(plan).items()}
    targets = [tna.Target(f"m{index}", shape) for index, shape in enumerate(SHAPES)]
    path = tmp_path / "adapter.safetensors"
    tna.save(path, tna.AdapterFile(plan.config, targets, params))
    found = tna.load(path)
    assert found.arrays.keys() == plan.param_shapes.keys()
    assert found.config == plan.config
    for ours, theirs in zip(found.deltas(), plan.deltas(params), strict=True):
        assert np.array_equal(ours, theirs)
    forget_registered()
    with pytest.raises(
        tna.FileError, match=r"source must be one of 'trained', 'seeded', .*; got 'normal'.*install the plug-in"
    ):
        tna.load(path)


def test_whatever_of_terms_with_different_sources_is_trained_the_start_changes_nothing() -> None:
    sources = {"term0.split0.factor1": Normal(), "term1.split0.factor0": Normal()}
    plan = tna.UpdatePlan(tna.Config(rank=2, terms=2, sources=sources), SHAPES)
    for chosen in plan.param_shapes:
        for arrays in ([chosen], [full for full in plan.param_shapes if full.endswith(chosen.rpartition(".")[2])]):
            assert not any(delta.any() for delta in plan.deltas(plan.init(trained=arrays)))


@pytest.mark.usefixtures("normal")
@pytest.mark.parametrize("value", ["x", None, {}, [1, 2, 3], 10**400, {"a": 1}, [[[[[[1]]]]]], "9" * 100_000])
def test_hostile_settings_are_an_error_of_ours(value: Any) -> None:
    nested: list[Any] = []
    for _ in range(5000):
        nested = [nested]

    def use(source: Any) -> None:
        plan = tna.UpdatePlan(tna.Config.from_dict({"sources": {"factor1": source}}), SHAPES)
        plan.deltas(plan.init())

    for std in (value, nested):
        for source in ({"source": "normal", "std": std}, {"source": "trained", "std": std}, std):
            with pytest.raises(tna.TnadaptError):
                use(source)


@pytest.mark.parametrize("array", ["factor0", "factor1"])
@pytest.mark.parametrize("multiplied", [lambda source: source, Scaled, Mixed])
def test_the_first_step_takes_the_size_of_frozen_arrays_into_account(
    array: str, multiplied: Callable[[Source], Source]
) -> None:
    for std in (1e-3, 1.0, 1e3):
        sources = {array: multiplied(Normal(std))}
        config = tna.Config(rank=4, format="tucker", groups="weight", sources=sources)
        assert STEP / 5 < first_step(tna.UpdatePlan(config, [(24, 16)])) < STEP * 5


def test_planning_accounts_for_frozen_arrays() -> None:
    from tnadapt.planning import degrees_of_freedom, known_as, largest_rank

    lora = tna.presets.lora(4)
    half, full = lora.replace(sources={"factor1": Normal()}), lora.replace(sources={"factor1": Wrong("half")})
    plan, all_ones, usual = (tna.UpdatePlan(config, [(48, 48)]) for config in (half, full, lora))
    assert degrees_of_freedom(plan) <= plan.num_parameters < degrees_of_freedom(usual)
    assert (largest_rank(plan).value, largest_rank(all_ones).value) == (4, 1)
    assert np.isfinite(all_ones.deltas(all_ones.init())[0]).all()
    assert "factor1" in str(known_as(half)) != str(known_as(lora))


# -- Seeded arrays -------------------------------------------------------------------------------

sizes = st.integers(1, 40)


@given(st.sampled_from(DISTRIBUTIONS), sizes, sizes, st.integers(0, 2**64 - 1), st.booleans())
def test_seeded_arrays_are_what_their_name_says(name: str, rows: int, cols: int, seed: int, shared: bool) -> None:
    stream = Stream(seed, 3, (1 << 16) + 5)
    array = Seeded(name, shared).array((rows, cols), stream).astype(np.float64)
    if name == "normal":
        words = draws.normals(seed, 0 if shared else 3, (1 << 16) + 5, 0, rows * cols).astype(np.float64)
        assert np.array_equal(array, (words.reshape(rows, cols) / np.sqrt(rows)).astype(np.float32))
    elif name == "signs":
        assert np.allclose(np.abs(array), rows**-0.5, rtol=1e-6)
    elif name == "uniform":
        assert np.abs(array).max() <= (3 / rows) ** 0.5 * (1 + 1e-6)
    elif name == "orthonormal":
        thin = array if rows >= cols else array.T
        assert np.allclose(thin.T @ thin, np.eye(min(rows, cols)), atol=1e-5)
        # The Q of normal numbers whose R has a positive diagonal.
        normals = Seeded("normal", shared, scale=1.0).array((rows, cols), stream)
        assert np.diagonal(thin.T @ (normals if rows >= cols else normals.T)).min() > -1e-4
    elif name == "one-hot":
        assert np.array_equal(array.sum(axis=0), np.ones(cols))
        assert set(np.unique(array)) <= {0.0, 1.0}
        assert array.sum(axis=1).max() - array.sum(axis=1).min() <= 1
    elif name == "eye":
        assert np.array_equal(array, np.eye(rows, cols))


@pytest.mark.parametrize("name", ["normal", "uniform", "signs"])
def test_independent_numbers_have_the_variance_that_the_docstring_states(name: str) -> None:
    wide = Seeded(name).array((50, 4000), Stream(1, 0, 1 << 16)).astype(np.float64)
    assert abs(wide.mean()) < 4 * (50 * wide.size) ** -0.5
    assert abs(50 * wide.var() - 1) < 0.02
    assert np.allclose(Seeded(name, scale=3.0).array((50, 4000), Stream(1, 0, 1 << 16)), wide * 3 * 50**0.5, rtol=1e-6)


@given(st.sampled_from(DISTRIBUTIONS), sizes, sizes, sizes, sizes)
def test_a_shared_array_is_cut_from_that_of_the_largest_sizes(name: str, rows: int, cols: int, r: int, c: int) -> None:
    largest = max(rows, r), max(cols, c)
    whole = Seeded(name).array(largest, Stream(5, 9, 1 << 16))
    part = Seeded(name).array((rows, cols), Stream(5, 1, 1 << 16, largest))
    assert np.array_equal(part, whole[:rows, :cols])


@pytest.mark.parametrize(("square", "rounded"), [(1.0, 1.0), (1.7, 218 / 128), (0.3, 154 / 512)])
def test_mean_squares_have_eight_bits(square: float, rounded: float) -> None:
    plan = tna.UpdatePlan(tna.Config(rank=3, sources={"factor1": Seeded("signs", scale=square**0.5)}), [(6, 4)])
    assert plan.groups[0].frozen.mean_square("split0.factor1") == rounded


@pytest.mark.parametrize("shared", [True, False])
def test_groups_share_arrays_or_not(shared: bool) -> None:
    plan = tna.UpdatePlan(tna.Config(rank=3, sources={"factor1": Seeded("normal", shared)}), [(6, 4), (5, 4), (6, 7)])
    first, second, third = (group.frozen.host("split0.factor1") for group in plan.groups)
    assert np.array_equal(first, second) is shared
    assert np.array_equal(first, third[:4]) is shared
    assert copy.deepcopy(plan.groups[0]) is plan.groups[0]
    alike = tna.UpdatePlan(plan.config, [(6, 4)] * 100).groups
    assert (len({id(group.frozen) for group in alike}) == 1) is shared
    other = tna.UpdatePlan(plan.config.replace(seed=1), plan.shapes)
    assert not np.array_equal(other.groups[0].frozen.host("split0.factor1"), first)


def test_arrays_of_one_group_and_terms_differ() -> None:
    sources = {"factor0": Seeded("normal"), "term0.split0.factor0": Trained()}
    plan = tna.UpdatePlan(tna.Config(rank=2, terms=3, groups=1, fold="hypercube", sources=sources), [(6, 6)])
    frozen = [plan.groups[0].frozen.host(name) for name in plan.groups[0].frozen_names]
    assert len(frozen) == 2
    assert not np.array_equal(*frozen)


# -- Files, casts and activations -----------------------------------------------------------------


@pytest.mark.usefixtures("normal")
def test_a_file_is_refused_where_its_source_computes_other_arrays(tmp_path: Path) -> None:
    config, path = tna.Config(rank=2, sources={"factor1": Normal()}), tmp_path / "adapter.safetensors"
    tna.save(path, tna.AdapterFile(config, [tna.Target("m", (6, 4))], tna.UpdatePlan(config, [(6, 4)]).init()))

    @dataclasses.dataclass(frozen=True)
    class Doubled(Normal):
        def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
            return super().array(shape, stream) * np.float32(2.0)

    tna.register_source("normal", Doubled)
    with pytest.raises(tna.FileError, match="draws"):
        tna.load(path)


@pytest.mark.usefixtures("normal")
def test_files_of_many_and_of_large_frozen_arrays(tmp_path: Path) -> None:
    config, path = tna.Config(rank=1, sources={"factor1": Normal()}), tmp_path / "adapter.safetensors"
    targets = [tna.Target(f"m{index}", (3, 2)) for index in range(1100)]
    file = tna.AdapterFile(config, targets, tna.UpdatePlan(config, [(3, 2)] * 1100).init())
    tna.save(path, file)  # more than it may leave out
    assert tna.load(path).num_parameters == 3300
    with pytest.raises(tna.ShapeError, match=r"must be those of config and targets; missing: 'group0\.term0"):
        tna.AdapterFile(tna.Config(rank=1, terms=4, sources=config.sources), targets, file.arrays)
    # A small file does not make its reader draw much.
    arrays = {"group0.split0.factor0": np.ones((1, 1), np.float32)}
    tna.save(path, tna.AdapterFile(config, [tna.Target("m", (1, 1 << 28))], arrays))
    assert peak_of(lambda: tna.load(path)) < 1 << 24
    assert peak_of(lambda: tna.info(path)) < 1 << 24


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_frozen_arrays_of_a_cast_are_those_of_training(dtype: str) -> None:
    plan = tna.UpdatePlan(CONFIGS["lora"], SHAPES)
    params = drawn(plan)
    frozen = rounded_to(plan.groups[1].frozen.host("split0.factor1"), dtype).astype(np.float64)
    assert relative_error(plan.deltas(params, dtype)[1], params["group1.split0.factor0"] @ frozen.T) < 1e-12


def test_relu_needs_the_array_behind_it_to_start_at_zero() -> None:
    torch = pytest.importorskip("torch")
    import tnadapt.torch

    model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    wrong, right = (tna.Config(rank=2, sources={name: Normal()}) for name in ("factor0", "factor1"))
    with pytest.raises(tna.ConfigError, match=r"activation='relu' .* freezes 'factor0'.*nothing would learn"):
        tnadapt.torch.attach(model, wrong, targets=["0"], activation="relu")
    adapter = tnadapt.torch.attach(model, right, targets=["0"], activation="relu")
    model(torch.randn(5, 4)).sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in adapter.parameters())
