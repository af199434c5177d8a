"""The plan: layout of weights in groups, values, slices, counts, memory, and what several plans share."""

from __future__ import annotations

import copy
import fractions
import itertools
import json
import math
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.random_parameters import drawn
from tests.conftest import NUMPY_AND_TORCH, of_any_shape, peak_of, relative_error
from tests.support.references import reference
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.group import batches
from tnadapt.algebra.layout import make_layout
from tnadapt.algebra.maps import KINDS
from tnadapt.algebra.update_plan import share_maps
from tnadapt.backends import Backend, load_backend
from tnadapt.maps import Circulant, Gather, Scatter, SignGather, Tile, Wavelet
from tnadapt.testing.strategies import configs, parameters, plans, shapes

# -- The plan and its four steps, for every config: values, slices, counts, and memory ---------------------------------


P = tna.presets


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


@st.composite
def reordered(draw: st.DrawFn) -> tna.UpdatePlan:
    """A plan of any axes: some single sizes, some several in one mode."""
    weights, row, rows, col, cols = (draw(st.integers(1, 3)) for _ in range(5))
    order = draw(st.permutations(range(5)))
    cuts = sorted(draw(st.sets(st.integers(1, 4))))
    axes = [tuple(order[lo:hi]) for lo, hi in zip([0, *cuts], [*cuts, 5], strict=True)]
    name = draw(st.sampled_from(sorted(FORMATS.built_in)))
    given: Any = draw(st.integers(1, 3))
    if name == "tucker" and draw(st.booleans()):
        given = tuple(draw(st.none() | st.integers(1, 3)) for _ in axes)
    shape = (row * rows, col * cols)
    fold: Any = (weights, row, rows, col, cols)
    if draw(st.booleans()):
        fold = ("weights", f"rows/{rows}", rows, f"cols/{cols}", cols)
    config = tna.Config(
        given, order=len(axes), groups=1, fold=fold, axes=axes, format=name,
        terms=draw(st.integers(1, 2)),
        splits=2 if draw(st.booleans()) else 1, combine="hadamard", leading="same",
        alpha=draw(st.none() | st.just(2.0)),
        projection=draw(st.sampled_from(["identity", "identity", "linear"])),
    )  # fmt: skip
    return tna.UpdatePlan(config, [shape] * weights)


# Of every map but those of the paper, which the first have.
ON_VECTORS = (
    Scatter(1),
    "gather",
    SignGather(3),
    ("shuffle", "linear"),
    (Gather(2), "nonlinear"),
    ("gather", "shuffle"),
)
ON_MATRICES = (
    "linear", "nonlinear_v2", "gather", "dct2", "dft2", "wavelet", Tile(cols=1), Tile(1), Circulant(1, average=True),
    (Scatter(1), "dct2"), ("gather", "dft2"), ("dct2", "nonlinear"), ("sign-gather", Wavelet("db2")),
)  # fmt: skip
SORTS = {
    "any": (plans(), 1e-12),
    "axes": (reordered(), 1e-12),
    "maps of vectors": (plans(ON_VECTORS), 1e-11),
    "maps of weights": (plans(ON_MATRICES, "weight"), 1e-11),
}


@pytest.mark.law("update-formula", "update-slice", "parameter-count", "fresh-is-zero", "copies", "largest-rank")
@pytest.mark.parametrize("sort", SORTS)
@given(data=st.data())
def test_any_plan_is_the_textbook_formula_whole_and_in_parts(sort: str, data: st.DataObject) -> None:
    drawn_plans, tolerance = SORTS[sort]
    plan = data.draw(drawn_plans)
    # Twice as large, for those of the seed of a given start would cancel with it.
    params = {name: 2.0 * array for name, array in data.draw(parameters(plan)).items()}
    # The plan was made with layers; the reference is told the groups themselves.
    groups = [[piece.weight for piece in group.pieces] for group in plan.groups]
    config = plan.config if isinstance(plan.config.groups, int) else plan.config.replace(groups=groups)
    deltas = plan.deltas(params)
    begun = plan.init()
    expected = flat(reference.deltas(config, plan.shapes, params, start={n: a.astype("f8") for n, a in begun.items()}))
    assert [delta.shape for delta in deltas] == list(plan.shapes)
    for bound, delta in zip(plan.largest_ranks, deltas, strict=True):
        assert 1 <= bound <= min(delta.shape)
        assert np.linalg.matrix_rank(delta, rtol=1e-9) <= bound or not delta.any()
    assert relative_error(flat(deltas), expected) < tolerance
    scale = np.max(np.abs(expected)) or 1.0
    weight = data.draw(st.integers(0, len(plan.shapes) - 1))
    first = sum(rows * cols for rows, cols in plan.shapes[:weight])
    start = data.draw(st.integers(0, plan.size - 1))
    stop = data.draw(st.integers(start + 1, plan.size))
    for other in (plan, pickle.loads(pickle.dumps(plan))):  # the copy has drawn nothing yet
        delta = other.delta(params, weight)
        assert delta.shape == plan.shapes[weight]
        assert np.max(np.abs(delta.reshape(-1) - expected[first : first + delta.size])) < tolerance * scale
        assert np.max(np.abs(other.vector(params, start, stop) - expected[start:stop])) < tolerance * scale
        assert np.max(np.abs(other.vector(params) - expected)) < tolerance * scale
    assert not any(delta.any() for delta in plan.deltas(begun))
    assert {name: array.shape for name, array in begun.items()} == plan.param_shapes
    assert plan.num_parameters == sum(array.size for array in begun.values())
    layers = [plan.layout.of_weight(index)[0].group for index in range(len(plan.shapes))]
    assert plan.num_parameters == reference.count(plan.config, plan.shapes, layers)
    if plan.config.groups != "layer":
        assert plan.num_parameters == tna.parameter_count(plan.config, plan.shapes)


PAPERS = {
    "vit_base_qv": (
        [(768, 768)] * 24,
        [P.lora(4), P.lora(6, groups=1), P.superlora(22), P.superlora(26, projection="linear", ratio=0.5), P.dense()],
    ),
    "unet_qv": (
        [(64, 64)] * 6 + [(128, 128)] * 32 + [(64, 64)] * 4,
        [
            P.lora(1), P.lorta(1, order=5), P.lorta(1, order=3), P.superlora(1),
            P.lorta(1, order=5, projection="linear", ratio=0.01),
        ],
    ),
}  # fmt: skip


@pytest.mark.law("parameter-count")
@pytest.mark.parametrize("model", PAPERS)
def test_the_papers_counts(model: str) -> None:
    weights, configs = PAPERS[model]
    oracles = json.loads((Path(__file__).parents[1] / "oracles.json").read_text())
    stated = [row["parameters"] for row in oracles[model]["counts"]]
    assert [tna.parameter_count(config, weights) for config in configs] == stated


LONG = [(4096, 4096)] * 4  # 2**26 elements, 256 MiB in float32; a slice of 2**20 is 4 MiB


@pytest.mark.law("update-slice")
@pytest.mark.parametrize(
    "config",
    [
        tna.presets.superlora(2),
        tna.Config(rank=2, groups=1, fold="hypercube", order=5, format="cp-weighted"),
        tna.presets.lorta(2, order=3),
        tna.presets.lorta(2, order=5),
        tna.Config(rank=2, groups=1, fold="balanced", order=4, format="tt"),
        tna.presets.lonkr(2, splits=2),
        tna.presets.lonkr(2, splits=4, terms=2),
        tna.Config(rank=2, groups=1, fold="hypercube", splits=2, split_size="balanced", format="tucker", order=3),
        tna.Config(rank=2, groups=1, fold="hypercube", splits=2, combine="hadamard", leading="same"),
    ],
)
@pytest.mark.parametrize("start", [0, (1 << 25) - (1 << 19)])
def test_a_slice_of_a_long_group_never_forms_the_group(config: tna.Config, start: int) -> None:
    plan = tna.UpdatePlan(config, LONG)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    stop = start + (1 << 20)
    assert peak_of(lambda: plan.vector(params, start, stop)) < 24 << 20


def test_memory_behind_a_linear_f_is_less_for_one_weight_than_for_all() -> None:
    plan = tna.UpdatePlan(tna.presets.superlora(rank=4, projection="linear", ratio=0.1), [(512, 512)] * 24)
    params, length = plan.init(), plan.groups[0].projection.padded
    plan.delta(params, 0)  # compiles the kernels
    assert peak_of(lambda: plan.delta(params, 7)) < 4 * length
    assert 12 * length < peak_of(lambda: plan.deltas(params)) < 32 * length


@pytest.mark.law("projection-shared")
def test_groups_share_f_or_do_not(rng: np.random.Generator) -> None:
    for shared in (True, False):
        plan = tna.UpdatePlan(
            tna.presets.superlora(1, groups="weight", projection="linear", shared=shared), [(4, 4)] * 2
        )
        one = {name: rng.normal(size=shape) for name, shape in list(plan.param_shapes.items())[:2]}
        params = one | {name.replace("group0", "group1"): array for name, array in one.items()}
        first, second = plan.deltas(params)
        assert np.array_equal(first, second) == shared


# -- Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        ({"rank": 4}, [[(2, 2)]], tna.ConfigError, "config must be a tnadapt.Config; got dict"),
        ([(2, 2)], [tna.Config()], tna.ConfigError, "got list; config and shapes may be swapped"),
        (tna.Config(groups=3), [[(4, 4)]], tna.ShapeError, "use fold='hypercube'"),
        (tna.Config(groups=17), [[(4, 4)]], tna.ConfigError, "more than the 16 elements"),
        (tna.Config(fold=(3, 4), order=2), [[(4, 4)]], tna.ShapeError, "holds 12 elements and a group has 16"),
        # So many groups that their arrays are not laid out at once.
        (tna.Config(fold=(3, 4), groups=5000), [[(16, 5000)]], tna.ShapeError, "holds 12 elements and a group has 16"),
        (tna.Config(projection="linear", ratio=0.3), [[(4, 4)]], tna.ShapeError, "multiple of 4 columns"),
        (tna.Config(groups="layer"), [[(4, 4)]], tna.ConfigError, "needs layers"),
        (tna.Config(groups="role"), [[(4, 4)]], tna.ConfigError, "needs roles"),
        # Found by Hypothesis: the first group comes out even, the second of the same size does not.
        (tna.Config(groups=3), [[(2, 1), (1, 3)]], tna.ShapeError, "multiple of 3 columns; one has 2 elements"),
        (tna.Config(groups="layer"), [[(2, 3)], [0, 0]], tna.ConfigError, "2 keys for 1 weights"),
        (tna.Config(groups=((0,), (0,))), [[(2, 3)]], tna.ConfigError, "exactly once"),
        (tna.Config(groups=((0,),)), [[(2, 3), (2, 3)]], tna.ConfigError, "the weights 0 to 1 exactly once; got"),
        (tna.Config(groups=((1,),)), [[(2, 3)]], tna.ConfigError, "exactly once"),
        (tna.Config(), [[]], tna.ShapeError, "empty"),
        (tna.Config(), [[(2, 3, 4)]], tna.ShapeError, r"shapes\[0\] is \(2, 3, 4\)"),
        (tna.Config(), [[(2, 3), (0, 3)]], tna.ShapeError, r"shapes\[1\] is \(0, 3\)"),
        (tna.Config(), [[(2.0, 3)]], tna.ShapeError, "integers"),
        (tna.Config(), [[3]], tna.ShapeError, "integers"),
        (
            tna.Config(2, order=3, groups=1, fold=(4, 6, 5), axes=(1, 0, 2), format="tt"),
            [[(6, 5)] * 3],
            tna.ShapeError,
            r"all 120 elements of fold=\(4, 6, 5\), and a group has 90",
        ),
    ],
)
def test_bad_plans(config: Any, arguments: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tna.UpdatePlan(config, *arguments)


def test_a_plan_says_what_it_is_and_pickles_without_its_draws() -> None:
    plan = tna.UpdatePlan(tna.Config(rank=2), [(4, 3)] * 2)
    assert repr(plan) == f"UpdatePlan({plan.config!r}, 2 weights, 2 groups, 24 elements)"
    plan = tna.UpdatePlan(tna.presets.superlora(2, projection="nonlinear", ratio=0.1), [(40, 40)] * 2)
    plan.deltas(plan.init())
    assert len(pickle.dumps(plan)) < 10_000


def test_bad_parameters() -> None:
    plan = tna.UpdatePlan(tna.presets.lora(2), [(4, 3)] * 2)
    good = plan.init()
    first = next(iter(good))
    cases = [
        ([1, 2], tna.ShapeError, "must be a mapping"),
        ({}, tna.ShapeError, r"missing: 'group0.split0.factor0', \S+, \S+, \S+; unknown: none"),
        (
            good | dict.fromkeys("abcde", good[first]),
            tna.ShapeError,
            "missing: none; unknown: 'a', 'b', 'c', 'd' and 1 more$",
        ),
        (good | {"extra": good[first]}, tna.ShapeError, "unknown: 'extra'"),
        (good | {first: good[first].T}, tna.ShapeError, r"has shape \(2, 4\); expected \(4, 2\)"),
        (good | {first: good[first].astype(np.float64)}, tna.BackendError, "two dtypes"),
        (good | {first: good[first].tolist()}, tna.BackendError, "got list"),
        ({n: a.astype(np.int32) for n, a in good.items()}, tna.BackendError, "cast it"),
        ({n: a.astype(complex) for n, a in good.items()}, tna.BackendError, "complex128"),
    ]
    for params, error, message in cases:
        for call in (plan.deltas, lambda p: plan.delta(p, 0), plan.vector):
            with pytest.raises(error, match=message):
                call(params)  # type: ignore[operator]
    for call, arguments, message in (
        (plan.delta, (-1,), "i must be from 0 to 1"),
        (plan.delta, (2,), "i must be from 0 to 1"),
        (lambda _, i: plan.part_of(i), (-1,), "i must be from 0 to 1"),
        (lambda _, i: plan.part_of(i), (2,), "i must be from 0 to 1"),
        (plan.delta, (0.0,), "must be an integer"),
        (plan.vector, (5, 5), "start must be below stop"),
        (plan.vector, (7, 3), "start must be below stop"),
        (plan.vector, (0, 25), "stop must be from 0 to 24"),
    ):
        with pytest.raises(tna.ShapeError, match=message):
            call(good, *arguments)  # type: ignore[operator]


def test_bad_init() -> None:
    plan = tna.UpdatePlan(tna.presets.lora(512), [(4096, 4096)])
    for arguments, message in (
        ({"backend": "tensorflow"}, "no backend named 'tensorflow'"),
        ({"dtype": "int8"}, "no floating dtype 'int8'"),
        ({"dtype": np.float32}, "dtype must be a name"),
        ({"device": "cuda"}, "live on 'cpu'"),
    ):
        with pytest.raises(tna.BackendError, match=message):
            plan.init(**arguments)  # type: ignore[arg-type]
    assert not plan.groups[0].start.kept  # nothing is drawn


@pytest.mark.law("huge-models")
def test_what_is_refused_is_refused_before_anything_is_allocated() -> None:
    huge = [(1 << 20, 1 << 20)] * 4
    plan = tna.UpdatePlan(tna.presets.superlora(1), huge)
    small = {name: np.zeros((2, 2), np.float32) for name in plan.param_shapes}

    def attempts() -> None:
        with pytest.raises(tna.ShapeError):
            plan.deltas(small)
        with pytest.raises(tna.BackendError):
            tna.UpdatePlan(tna.presets.dense(), huge).init(dtype="int8")
        with pytest.raises(tna.ShapeError):
            tna.UpdatePlan(tna.Config(fold=(5, 5)), huge)

    assert peak_of(attempts) < 1 << 20


@pytest.mark.slow
@pytest.mark.law("huge-models")
def test_construction_is_small_and_ends_for_any_values() -> None:
    for config, sizes in (
        (tna.Config(fold=(1 << 61, 2)), [(10, 10)]),
        (tna.Config(fold=(2**8 * 3**4 * 5**2 * 7 * 11 * 13, 2), splits=8), [(10, 10)]),
        (tna.Config(groups=10**9), [(10**9, 10)]),
        (tna.Config(terms=1 << 16), [(4, 4)]),
    ):
        assert peak_of(lambda c=config, s=sizes: tna.UpdatePlan(c, s).num_parameters) < 200 << 20
    for config, sizes in (
        (tna.Config(), [(10**5000, 2)]),
        (tna.Config(), [(1 << 40, 1 << 40)]),
        (tna.Config(fold=((1 << 61) - 1, 2), splits=2), [(10, 10)]),
    ):
        with pytest.raises(tna.ShapeError):
            tna.UpdatePlan(config, sizes)
    for layers in ([[0]], 5, iter([0, 1])):
        with pytest.raises(tna.ConfigError, match="layers"):
            tna.UpdatePlan(tna.Config(groups="layer"), [(2, 2)], layers=layers)  # type: ignore[arg-type]


# -- Layout of weights in groups: every element occurs once, and weights that straddle groups stay in order ------------


@given(st.data())
def test_pieces_are_the_reference_positions(data: st.DataObject) -> None:
    weights = data.draw(shapes())
    config = data.draw(configs(weights))
    layers = [data.draw(st.integers(0, 1)) for _ in weights]
    layout = make_layout(config.groups, weights, layers)
    expected = reference.positions(config, weights, layers)
    starts = np.cumsum([0, *(rows * cols for rows, cols in weights)])
    assert layout.num_groups == len(expected)
    assert [size for _, count, size in layout.same_size() for _ in range(count)] == [len(w) for w in expected]
    for group, where in enumerate(expected):
        pieces = layout.of_group(group)
        found = [np.arange(p.length) + starts[p.weight] + p.weight_start for p in pieces]
        assert np.array_equal(np.concatenate(found), where)
        assert [p.group_start for p in pieces] == np.cumsum([0, *(p.length for p in pieces)])[:-1].tolist()
        assert layout.columns(group) == np.gcd.reduce([weights[p.weight][1] for p in pieces])
    start = data.draw(st.integers(0, layout.size - 1))
    stop = data.draw(st.integers(start + 1, layout.size))
    runs = layout.of_slice(start, stop)
    # Neighbors in one group are one run.
    assert all((a.group, a.group_start + a.length) != (b.group, b.group_start) for a, b in itertools.pairwise(runs))
    found = [expected[p.group][p.group_start : p.group_start + p.length] for p in runs]
    assert np.array_equal(np.concatenate(found), np.arange(start, stop))
    assert not layout.of_slice(layout.size, layout.size)
    for start, stop in ((-1, 2), (3, 2), (0, layout.size + 1), (layout.size + 1, layout.size + 1)):
        with pytest.raises(tna.ShapeError, match=f"no slice {start}:{stop} of a vector of {layout.size} elements"):
            layout.of_slice(start, stop)


@given(st.data())
def test_split_groups_cuts_the_long_vector_and_join_groups_inverts_it(backend: Backend, data: st.DataObject) -> None:
    weights = data.draw(shapes())
    config = data.draw(configs(weights))
    layers = [data.draw(st.integers(0, 1)) for _ in weights]
    hosts = [np.random.default_rng(number).normal(size=shape) for number, shape in enumerate(weights)]
    arrays = [backend.asarray(host, "float64") for host in hosts]
    vectors = tna.split_groups(arrays, config.groups, layers=layers, roles=layers)
    expected = [flat(hosts)[where] for where in reference.positions(config, weights, layers, layers)]
    assert all(np.array_equal(backend.to_numpy(v), e) for v, e in zip(vectors, expected, strict=True))
    joined = tna.join_groups(vectors, weights, config.groups, layers=layers, roles=layers)
    assert all(np.array_equal(backend.to_numpy(j), host) for j, host in zip(joined, hosts, strict=True))


A, B = np.ones((2, 3)), np.ones((4, 2))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (tna.ShapeError, "matrices is empty", lambda: tna.split_groups([], 1)),
        (tna.ShapeError, r"matrices\[1\] is \(3,\); expected \(rows, cols\)", lambda: tna.split_groups([A, A[0]], 1)),
        (tna.BackendError, "matrices must be a sequence of arrays of numbers; got 3", lambda: tna.split_groups(3, 1)),
        (tna.BackendError, "two dtypes", lambda: tna.split_groups([A, np.ones((2, 3), np.float32)], 1)),
        (tna.ConfigError, "groups=15 is more than the 14 elements", lambda: tna.split_groups([A, B], 15)),
        (tna.ConfigError, "groups must be at least 1", lambda: tna.split_groups([A, B], 0)),
        (tna.ConfigError, '"role", an integer of at least 1', lambda: tna.split_groups([A, B], "roles")),
        (tna.ConfigError, "needs layers=", lambda: tna.split_groups([A, B], "layer")),
        (tna.ConfigError, "0 to 1 exactly once", lambda: tna.split_groups([A, B], [[0, 2]])),
        (tna.ShapeError, "vectors must be one per group; got 1 for 2 groups",
         lambda: tna.join_groups([np.ones(14)], [(2, 3), (4, 2)], 2)),
        (tna.ShapeError, r"vectors\[1\] has shape \(8,\); expected \(7,\), as the shapes and groups say",
         lambda: tna.join_groups([np.ones(7), np.ones(8)], [(2, 3), (4, 2)], 2)),
        (tna.ShapeError, "shapes must be a sequence of pairs of integers; got",
         lambda: tna.join_groups([np.ones(2)], [(2,)], 1)),
    ],
)  # fmt: skip
def test_bad_groups(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


# -- The equation by hand, operator by operator ------------------------------------------------------------------------


def by_hand(plan: tna.UpdatePlan, params: Any) -> list[Any]:
    """Return the updates of all weights by the public operators: equation (2) of the paper."""
    config, vectors = plan.config, []
    for g, group in enumerate(plan.groups):
        splits = []
        for split in (f"group{g}.split{k}." for k in range(config.splits)):
            factors = [params[f"{split}factor{m}"] for m in range(config.order)]
            cp = config.format != "tucker"
            make = tna.cp_to_tensor if cp else tna.tucker_to_tensor
            splits.append(make((params.get(f"{split}weights") if cp else params[f"{split}core"], factors)))
        n_in = max(1, math.ceil(fractions.Fraction(str(config.ratio)) * group.size))
        tensor = tna.kronecker(splits)[tuple(map(slice, tna.hypercube_shape(n_in, config.order)))]
        x = tna.from_hypercube(tensor, n_in) * config.scale
        vectors.append(tna.fastfood(x, group.size, seed=config.seed, kind=config.projection))
    return tna.join_groups(vectors, plan.shapes, config.groups)


@st.composite
def composed(draw: st.DrawFn) -> tna.UpdatePlan:
    weights = draw(shapes())
    most = min(4, sum(rows * cols for rows, cols in weights))
    splits, rank = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return tna.UpdatePlan(
        tna.Config(
            rank, draw(st.integers(1, 3)), splits=splits, groups=draw(st.just("weight") | st.integers(1, most)),
            fold="hypercube", leading="same", split_size=draw(st.integers(1, 3)) if splits > 1 else "balanced",
            format=draw(st.sampled_from(["cp", "cp-weighted", "tucker"])), projection=draw(st.sampled_from(KINDS[2:4])),
            ratio=draw(st.sampled_from([0.07, 0.3, 0.5, 1.0])), alpha=draw(st.sampled_from([None, rank / 4, 2 * rank])),
            seed=draw(st.integers(0, 2**32)),
        ),
        weights,
    )  # fmt: skip


@pytest.mark.law("update-formula")
@of_any_shape
@given(composed())
def test_the_operators_by_hand_are_the_plan(backend: Backend, plan: tna.UpdatePlan) -> None:
    # Sums of whole numbers are exact in any order, so what is left is the same call of F: equal to the bit.
    rng = np.random.default_rng(0)
    whole = {name: rng.integers(-3, 4, size=shape).astype(float) for name, shape in plan.param_shapes.items()}
    for host in (whole, drawn(plan)):
        params = {name: backend.asarray(array, "float64") for name, array in host.items()}
        expected = flat([backend.to_numpy(delta) for delta in plan.deltas(params)])
        operators = flat([backend.to_numpy(delta) for delta in by_hand(plan, params)])
        assert relative_error(operators, expected) < 1e-12
        assert host is not whole or np.array_equal(operators, expected)


@pytest.mark.law("update-formula")
@pytest.mark.parametrize("library", [*NUMPY_AND_TORCH[1:], pytest.param("jax", marks=pytest.mark.slow)])
def test_the_operators_are_differentiable_and_map_over_batches(library: str) -> None:
    config = tna.Config(2, 3, splits=2, groups=2, fold="hypercube", leading="same", split_size=2, format="tucker",
                        projection="linear", ratio=0.3)  # fmt: skip
    pytest.importorskip(library)
    plan, backend = tna.UpdatePlan(config, [(6, 4), (5, 3)]), load_backend(library)
    params = {name: backend.asarray(array, "float64") for name, array in drawn(plan).items()}

    def loss(compute: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda arrays: sum(backend.sum(backend.flatten(delta**3), axis=0) for delta in compute(arrays))

    gradients = [
        backend.gradient(loss(compute), params) for compute in (plan.deltas, lambda arrays: by_hand(plan, arrays))
    ]
    assert gradients[0] is not None
    for name, gradient in gradients[0].items():
        assert relative_error(backend.to_numpy(gradients[1][name]), backend.to_numpy(gradient)) < 1e-12
    several = {name: backend.asarray(np.stack([array, 2 * array]), "float64") for name, array in drawn(plan).items()}
    if library == "jax":
        import jax

        batched = jax.jit(jax.vmap(lambda arrays: by_hand(plan, arrays)))(several)
    else:
        import torch

        batched = torch.func.vmap(lambda arrays: by_hand(plan, arrays))(several)
    for member in range(2):
        alone = by_hand(plan, {name: array[member] for name, array in several.items()})
        for together, delta in zip(batched, alone, strict=True):
            assert relative_error(backend.to_numpy(together[member]), backend.to_numpy(delta)) < 1e-12


# -- Networks whose modes index the fold in another order, or several of its sizes in one mode -------------------------


@given(plan=st.one_of(plans(), reordered()))
def test_the_adjoint_of_a_network_is_that_of_each_of_its_linear_maps(plan: tna.UpdatePlan) -> None:
    group, numpy = plan.groups[0], load_backend("numpy")
    arrays = {name: drawn(plan)[full] for name, full in group.names.items()}
    rng = np.random.default_rng(1)
    vec = rng.normal(size=group.network.size)
    gradients = group.network.adjoint(numpy, arrays, vec)
    assert {name: array.shape for name, array in gradients.items()} == group.network.shapes
    for name, gradient in gradients.items():
        other = rng.normal(size=gradient.shape)
        # Of several terms, the others are a constant.
        without, moved = (group.network.whole(numpy, {**arrays, name: array}) for array in (0.0 * other, other))
        np.testing.assert_allclose((other * gradient).sum(), ((moved - without) * vec).sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.law("special-cases")
@given(sizes=st.tuples(*[st.integers(1, 4)] * 3), name=st.sampled_from(sorted(FORMATS.built_in)), r=st.integers(1, 3))
def test_the_folds_own_order_is_no_change(sizes: tuple[int, int, int], name: str, r: int) -> None:
    plain = tna.Config(r, order=3, groups=1, fold=sizes, format=name)
    one, other = (tna.UpdatePlan(c, [sizes[1:]] * sizes[0]) for c in (plain, plain.replace(axes=(0, 1, 2))))
    assert one.param_shapes == other.param_shapes
    params = drawn(one)
    for mine, theirs in zip(one.deltas(params), other.deltas(params), strict=True):
        assert relative_error(theirs, mine) < 1e-12
    for mine, theirs in zip(one.init().values(), other.init().values(), strict=True):
        assert np.array_equal(mine, theirs)


def test_updates_in_another_order_are_fitted() -> None:
    config = tna.Config(2, order=3, groups=1, fold=("weights", "rows", "cols"), axes=(1, 0, 2), format="tt")
    plan = tna.UpdatePlan(config, [(6, 5)] * 3)
    deltas = plan.deltas(drawn(plan))
    params, report = tna.decompose(deltas, config)
    assert report.error < 1e-6
    assert report.bound <= report.error
    for found, delta in zip(plan.deltas(params), deltas, strict=True):
        assert relative_error(found, delta) < 1e-6


def test_axes_are_part_of_a_config_and_left_out_where_there_are_none() -> None:
    config = tna.Config(2, order=2, groups=1, fold=(4, 6, 5), axes=((1, 0), 2))
    assert config.axes == ((1, 0), (2,))
    assert config.to_dict()["axes"] == [[1, 0], [2]]
    assert tna.Config.from_dict(config.to_dict()) == config
    assert "axes" not in tna.Config(2).to_dict()


def test_blocks_are_fitted_each_by_itself_to_the_optimum() -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(8, 6)), np.zeros((8, 6))]
    deltas[1][:4, :3] = 1.0  # the other blocks are zero
    _, report = tna.decompose(deltas, P.gralora(2, blocks=2))
    left = 0.0
    for delta in deltas:
        for block in (delta[:4, :3], delta[:4, 3:], delta[4:, :3], delta[4:, 3:]):
            left += float(np.sum(np.linalg.svd(block, compute_uv=False)[1:] ** 2))
    whole = sum(float(np.sum(delta**2)) for delta in deltas)
    assert report.error == pytest.approx(np.sqrt(left / whole))
    assert report.certified


# -- Groups in one call of F: the same bits as one by one, and as few calls as the backend's limit allows --------------


MAPS = (*(kind for kind in KINDS if kind != "identity"), tna.maps.Gather(size=3), "normal")


@contextmanager
def at_once(backend: Backend, limit: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "at_once", lambda x: limit)
        yield


def superlora(count: int, side: int = 4, **settings: Any) -> tna.UpdatePlan:
    settings = {"projection": "linear", "ratio": 0.3, **settings}
    return tna.UpdatePlan(tna.presets.superlora(2, groups="weight", **settings), [(side, side)] * count)


#: For the compiled kernels, with many repeats of a short period.
LONG_ENOUGH = [superlora(3, 130, projection=name, ratio=0.01) for name in ("linear", "nonlinear_v2")]
LONG_ENOUGH.append(superlora(3, 130, projection="shuffle", ratio=1.0))


@pytest.mark.parametrize("backend", ["numpy", "array_api_strict", "torch"], indirect=True)
@given(data=st.data())
def test_batches_change_no_bit(backend: Backend, data: st.DataObject) -> None:
    plan = data.draw(plans(projections=MAPS) | st.sampled_from(LONG_ENOUGH))
    kind = data.draw(st.sampled_from(["float32", "float64"]))
    params = {name: backend.asarray(a, kind) for name, a in data.draw(parameters(plan)).items()}
    start = data.draw(st.integers(0, plan.size - 1))
    stop = data.draw(st.integers(start + 1, plan.size))

    def computed(limit: int) -> list[np.ndarray]:
        with at_once(backend, limit):
            found = [*plan.deltas(params), plan.vector(params), plan.vector(params, start, stop)]
        return [backend.to_numpy(array) for array in found]

    for ours, plain in zip(computed(1 << 20), computed(0), strict=True):
        assert np.array_equal(ours, plain)


@pytest.mark.parametrize("projection", ["linear", "nonlinear"])
def test_groups_of_weights_apart_are_computed_once(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tna.UpdatePlan(P.superlora(2, groups=[[0, 2], [3, 1]], projection=projection, ratio=0.3), [(4, 3)] * 4)
    params = {name: array + 0.5 for name, array in plan.init(dtype="float64").items()}
    expected = flat(plan.deltas(params))
    monkeypatch.setattr(type(plan.groups[0].projection.map), "slice", None)  # not called
    assert np.array_equal(plan.vector(params), expected)


def together(plan: tna.UpdatePlan, first: int = 0) -> list[list[int]]:
    """Which groups are computed in one call, of the elements from the first one on."""
    runs = [(group, 0 if number else first, group.size) for number, group in enumerate(plan.groups)]
    return batches(load_backend("numpy"), np.zeros(1), runs)


def test_what_is_alike_is_together_as_far_as_the_limit_allows() -> None:
    for limit, most in ((0, 1), (16, 1), (63, 3), (1 << 20, 24)):
        with at_once(load_backend("numpy"), limit):
            assert together(superlora(24)) == [list(range(first, first + most)) for first in range(0, 24, most)]
    two = tna.UpdatePlan(tna.presets.superlora(2, groups="weight", projection="linear"), [(4, 4), (4, 5), (4, 4)])
    assert together(two) == [[0, 2], [1]]
    assert together(superlora(2, shared=False)) == [[0], [1]]
    assert together(superlora(3), first=1) == [[0], [1, 2]]  # the first is not whole
    assert together(superlora(2, projection="identity", ratio=1.0)) == [[0], [1]]
    # A product with a matrix sums one row in another order than several.
    assert together(superlora(2, projection="normal")) == [[0], [1]]
    assert together(superlora(2, projection=["shuffle", "linear"], ratio=0.3)) == [[0, 1]]


def test_processors_put_short_vectors_together_devices_longer_ones_and_jax_none() -> None:
    torch = pytest.importorskip("torch")
    backend = load_backend("torch")
    assert backend.at_once(torch.zeros(1)) == load_backend("numpy").at_once(np.zeros(1)) == 1 << 16
    assert backend.at_once(types.SimpleNamespace(device=torch.device("cuda"))) == 1 << 24
    assert backend.at_once(torch.zeros(1, device="meta")) == 0
    jax = pytest.importorskip("jax")
    # XLA may round rows of a batch differently, and merges the launches of a program itself.
    assert load_backend("jax").at_once(jax.numpy.zeros(1)) == 0


@given(st.data())
@settings(max_examples=20)
def test_a_plan_computes_the_same_with_shared_maps(data: st.DataObject) -> None:
    plan, other = data.draw(plans()), data.draw(plans())
    params = data.draw(parameters(plan))
    expected = plan.vector(params)
    shared = copy.deepcopy(plan)
    share_maps(shared, [other, plan], digests=True)
    np.testing.assert_array_equal(shared.vector(params), expected)
    assert [group.projection.digest for group in shared.groups] == [group.projection.digest for group in plan.groups]


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (P.superlora(3, projection="linear", ratio=0.1), True),  # of another rank in front of it
        (P.superlora(2, projection="linear", ratio=0.1, seed=1), False),
        (P.superlora(2, projection="linear", ratio=0.2), False),
        (P.superlora(2, projection="linear_v2", ratio=0.1), False),
        (P.superlora(2, projection="linear", ratio=0.1, groups=2), False),
    ],
)
def test_which_maps_are_equal(config: tna.Config, same: bool) -> None:
    shapes = [(16, 16)] * 4
    one = tna.UpdatePlan(P.superlora(2, projection="linear", ratio=0.1), shapes)
    other = tna.UpdatePlan(config, shapes)
    share_maps(other, [one])
    assert (other.groups[0].projection.map is one.groups[0].projection.map) is same
