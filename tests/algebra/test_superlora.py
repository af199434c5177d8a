"""The plan and its four steps, for every config: values, slices, counts, and memory."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import peak_of, relative_error
from tnadapt.backends import Backend
from tnadapt.testing import _reference as reference
from tnadapt.testing.strategies import base_weights, parameters, plans
from tnadapt.testing.verification import formula

ORACLES = json.loads((Path(__file__).parents[1] / "oracles.json").read_text())
VIT_BASE = [(768, 768)] * 24
UNET = [(64, 64)] * 6 + [(128, 128)] * 32 + [(64, 64)] * 4
LLAMA_70B = [(8192, 8192), (1024, 8192)] * 80


def start_of(plan: tna.SuperLoRA) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in plan.init().items()}


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(array).reshape(-1) for array in arrays])


@pytest.mark.law("update-formula")
@given(st.data())
def test_deltas_are_the_textbook_formula(data: st.DataObject) -> None:
    plan = data.draw(plans())
    params = data.draw(parameters(plan))
    # The plan was made with layers; the reference is told the groups themselves.
    groups = [[piece.weight for piece in group.pieces] for group in plan.groups]
    config = plan.config if isinstance(plan.config.groups, int) else plan.config.replace(groups=groups)
    expected = reference.deltas(config, plan.shapes, params, start=start_of(plan))
    found = plan.deltas(params)
    assert [delta.shape for delta in found] == list(plan.shapes)
    assert relative_error(flat(found), flat(expected)) < 1e-12


@pytest.mark.law("update-formula", "fresh-is-zero")
@given(st.data())
def test_changed_weights_are_the_textbook_formula_and_w_at_the_start(data: st.DataObject) -> None:
    plan = data.draw(plans())
    weights = data.draw(base_weights(plan.shapes))
    params = data.draw(parameters(plan))
    own = [[params[name] for name in names] for names in plan.weight_param_names]
    expected = [
        formula(plan.config, weight, delta, magnitude[0] if magnitude else None)
        for weight, delta, magnitude in zip(weights, plan.deltas(params), own, strict=True)
    ]
    assert relative_error(flat(plan.merged(params, weights)), flat(expected)) < 1e-12
    # Of other base weights than those that the plan has seen.
    plan = plan.with_base(weights)
    for found, weight in zip(plan.merged(plan.init(dtype="float64"), weights), weights, strict=True):
        assert np.array_equal(found, weight)


@pytest.mark.law("update-slice")
@given(st.data())
def test_a_slice_is_the_whole_cut(data: st.DataObject) -> None:
    plan = data.draw(plans())
    params = data.draw(parameters(plan))
    whole = flat(plan.deltas(params))
    scale = np.max(np.abs(whole)) or 1.0
    weight = data.draw(st.integers(0, len(plan.shapes) - 1))
    start = data.draw(st.integers(0, plan.size - 1))
    stop = data.draw(st.integers(start + 1, plan.size))
    fresh = pickle.loads(pickle.dumps(plan))  # has drawn nothing yet
    for other in (plan, fresh):
        first = sum(rows * cols for rows, cols in plan.shapes[:weight])
        found = other.delta(params, weight)
        assert found.shape == plan.shapes[weight]
        assert np.max(np.abs(found.reshape(-1) - whole[first : first + found.size])) < 1e-12 * scale
        assert np.max(np.abs(other.vector(params, start, stop) - whole[start:stop])) < 1e-12 * scale
        assert np.max(np.abs(other.vector(params) - whole)) < 1e-12 * scale


def _layers(plan: tna.SuperLoRA) -> list[int]:
    return [plan.layout.of_weight(weight)[0].group for weight in range(len(plan.shapes))]


@pytest.mark.law("parameter-count")
@given(plans())
def test_counts(plan: tna.SuperLoRA) -> None:
    config = plan.config
    if config.groups == "layer":
        layers = _layers(plan)
        assert plan.num_parameters == reference.count(config, plan.shapes, layers)
    else:
        assert plan.num_parameters == reference.count(config, plan.shapes)
        assert tna.parameter_count(config, plan.shapes) == plan.num_parameters
    params = plan.init()
    assert list(params) == list(plan.param_shapes)
    assert {name: array.shape for name, array in params.items()} == plan.param_shapes
    assert plan.num_parameters == sum(array.size for array in params.values())


@given(plans())
def test_names_are_the_specs(plan: tna.SuperLoRA) -> None:
    config = plan.config
    for name in plan.weight_param_shapes:
        weight, array = name.split(".")
        assert 0 <= int(weight.removeprefix("weight")) < len(plan.shapes)
        assert array == "magnitude"
    assert list(plan.param_shapes) == [*plan.array_shapes, *plan.weight_param_shapes]
    for name in plan.array_shapes:
        group, *term, split, array = name.split(".")
        assert group.removeprefix("group").isdigit()
        assert len(term) == (config.terms > 1)
        assert 0 <= int(split.removeprefix("split")) < config.splits
        assert array.rstrip("0123456789") in ("dense", "factor", "weights", "core", "gate")


@pytest.mark.law("first-gradients")
@given(plans())
def test_a_fresh_adapter_changes_nothing_and_learns_from_its_first_step(plan: tna.SuperLoRA) -> None:
    for dtype in ("float64", "float32", "float16"):
        fresh = plan.init(dtype=dtype)
        assert not flat(plan.deltas(fresh)).any()
        assert not plan.delta(fresh, len(plan.shapes) - 1).any()
        assert not plan.vector(fresh, 0, 1).any()
    begun, rng = start_of(plan), np.random.default_rng(0)
    for group in range(plan.num_groups):
        if plan.config.projection.startswith("nonlinear") and plan.groups[group].size < 16:
            # Its slope goes with the square of a product of normal numbers, nine of them at worst: of a
            # handful of elements all may be so small that differences drown. Autograd sees them: test_torch.
            continue
        # Along a random direction of the group's parameters ΔW moves to first order.
        h = 1e-6
        way = {n: rng.normal(size=a.shape) for n, a in begun.items() if n.startswith(f"group{group}.")}
        ahead, behind = (flat(plan.deltas(begun | {n: begun[n] + s * h * w for n, w in way.items()})) for s in (1, -1))
        # A dead start leaves a cubic: 1e-12 of a step of 1e-6.
        assert np.max(np.abs(ahead - behind)) / (2 * h) > 1e-11


@pytest.mark.law("equal-seeds", "update-formula", "update-slice")
def test_every_library_gives_numpys_numbers(backend: Backend, rng: np.random.Generator) -> None:
    for config in (
        tna.Config(rank=2, groups=2, fold="balanced", order=3, format="tt"),
        tna.presets.lonkr(2, splits=3, split_size=2, terms=2),
        tna.presets.lorta(2, order=4, projection="nonlinear", ratio=0.3),
        tna.presets.superlora(2, groups="layer", projection="linear_v2", ratio=0.5, shared=False),
        tna.presets.loha(2, alpha=3),
        tna.presets.superlora(2, projection="shuffle"),
    ):
        plan = tna.SuperLoRA(config, [(6, 4), (5, 4), (7, 2)], layers=["a", "b", "a"])
        host = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
        params = {name: backend.asarray(array, "float64") for name, array in host.items()}
        expected = flat(plan.deltas(host))
        found = [backend.to_numpy(delta) for delta in plan.deltas(params)]
        assert relative_error(flat(found), expected) < 1e-12
        assert relative_error(backend.to_numpy(plan.delta(params, 1)), found[1]) < 1e-12
        assert relative_error(backend.to_numpy(plan.vector(params, 3, 50)), expected[3:50]) < 1e-12
        fresh = plan.init(backend.name, "float32")
        for name, array in plan.init().items():
            assert np.array_equal(backend.to_numpy(fresh[name]), array)
        assert all(not backend.to_numpy(delta).any() for delta in plan.deltas(fresh))


# -- The oracles: counts that the paper states -----------------------------------------------------


@pytest.mark.law("parameter-count")
@pytest.mark.parametrize(
    ("model", "position", "config"),
    [
        ("vit_base_qv", 0, tna.presets.lora(4)),
        ("vit_base_qv", 1, tna.presets.lora(6, groups=1)),
        ("vit_base_qv", 2, tna.presets.superlora(22)),
        ("vit_base_qv", 3, tna.presets.superlora(26, projection="linear", ratio=0.5)),
        ("vit_base_qv", 4, tna.presets.dense()),
        ("unet_qv", 0, tna.presets.lora(1)),
        ("unet_qv", 1, tna.presets.lorta(1, order=5)),
        ("unet_qv", 2, tna.presets.lorta(1, order=3)),
        ("unet_qv", 3, tna.presets.superlora(1)),
        ("unet_qv", 4, tna.presets.lorta(1, order=5, projection="linear", ratio=0.01)),
    ],
)
def test_the_papers_counts(model: str, position: int, config: tna.Config) -> None:
    weights = {"vit_base_qv": VIT_BASE, "unet_qv": UNET}[model]
    assert tna.parameter_count(config, weights) == ORACLES[model]["counts"][position]["parameters"]


@pytest.mark.law("parameter-count")
def test_the_oracles_weights_and_all_their_counts_are_used() -> None:
    assert len(UNET) == 42
    assert sum(r * c for r, c in UNET) == 565248
    assert sum(r * c for r, c in VIT_BASE) == 14155776
    assert [len(ORACLES[model]["counts"]) for model in ("vit_base_qv", "unet_qv")] == [5, 5]


@pytest.mark.law("projection-lengths")
def test_ratio_is_the_decimal_it_is_written_as() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point.
    assert tna.parameter_count(tna.presets.fastfood(0.07), [(10, 10)]) == 7
    assert tna.parameter_count(tna.presets.fastfood(0.29), [(10, 10)]) == 29
    assert tna.parameter_count(tna.presets.fastfood(1e-9), [(10, 10)]) == 1


# -- Size: nothing is allocated to plan, nothing but the slice to slice ------------------------------


@pytest.mark.law("huge-models")
@pytest.mark.parametrize(
    "config",
    [
        tna.presets.lora(8),
        tna.presets.superlora(8),
        tna.presets.superlora(8, groups=1_000_000),
        tna.presets.lorta(4, order=5, projection="linear", ratio=0.01),
        tna.presets.lonkr(4, splits=4),
        tna.presets.fastfood(0.001),
        tna.presets.dense(),
        tna.presets.lokr(8),
    ],
)
def test_a_70_billion_parameter_model_is_counted_without_allocating(config: tna.Config) -> None:
    assert peak_of(lambda: tna.SuperLoRA(config, LLAMA_70B).num_parameters) < 2 << 20


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
    plan = tna.SuperLoRA(config, LONG)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    stop = start + (1 << 20)
    assert peak_of(lambda: plan.vector(params, start, stop)) < 24 << 20


@pytest.mark.law("projection-slice")
def test_a_slice_through_linear_f_needs_the_slice_and_the_compressed_vector() -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="linear", ratio=0.001), [(2048, 2048)] * 4)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.param_shapes.items()}
    # The group is 2**24 elements, 64 MiB, and the draws of a whole F nine bytes for each.
    assert peak_of(lambda: plan.vector(params, 1 << 20, (1 << 20) + (1 << 16))) < 48 << 20


@pytest.mark.law("beyond-2-31")
def test_a_far_slice_of_a_group_past_2_31_elements() -> None:
    # 3 * 2**30 elements: 32-bit positions would wrap.
    plan = tna.SuperLoRA(tna.presets.lorta(2, order=5), [(1 << 15, 1 << 15)] * 3)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    assert plan.size > 1 << 31
    d = tna.hypercube_shape(plan.size, 5)[0]
    found = plan.vector(params, plan.size - 5, plan.size)
    core = params["group0.split0.core"]
    for offset, value in enumerate(found):
        index = np.unravel_index(plan.size - 5 + offset, (d,) * 5)
        rows = [params[f"group0.split0.factor{m}"][i] for m, i in enumerate(index)]
        assert abs(np.einsum("abcde,a,b,c,d,e->", core, *rows) - value) < 1e-12


# -- Copies ------------------------------------------------------------------------------------------


@pytest.mark.law("copies")
def test_copies_and_pickles_are_equal_and_small(rng: np.random.Generator) -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="nonlinear", ratio=0.1), [(40, 40)] * 2)
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    expected = flat(plan.deltas(params))
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert np.array_equal(flat(other.deltas(params)), expected)
    assert len(pickle.dumps(plan)) < 10_000


@pytest.mark.law("projection-shared")
def test_groups_share_f_or_do_not(rng: np.random.Generator) -> None:
    for shared in (True, False):
        plan = tna.SuperLoRA(
            tna.presets.superlora(1, groups="weight", projection="linear", shared=shared), [(4, 4)] * 2
        )
        one = {name: rng.normal(size=shape) for name, shape in list(plan.param_shapes.items())[:2]}
        params = one | {name.replace("group0", "group1"): array for name, array in one.items()}
        first, second = plan.deltas(params)
        assert np.array_equal(first, second) == shared


# -- Bad input ---------------------------------------------------------------------------------------


def test_bad_plans() -> None:
    for config, shapes, error, message in (
        ({"rank": 4}, [(2, 2)], tna.ConfigError, "config must be a tnadapt.Config; got dict"),
        (tna.Config(groups=3), [(4, 4)], tna.ShapeError, "use fold='hypercube'"),
        (tna.Config(groups=17), [(4, 4)], tna.ConfigError, "more than the 16"),
        (tna.Config(fold=(3, 4), order=2), [(4, 4)], tna.ShapeError, "holds 12 elements and a group has 16"),
        # So many groups that their arrays are not laid out at once.
        (tna.Config(fold=(3, 4), groups=5000), [(16, 5000)], tna.ShapeError, "holds 12 elements and a group has 16"),
        (tna.Config(projection="linear", ratio=0.3), [(4, 4)], tna.ShapeError, "multiple of 4 columns"),
        (tna.Config(groups="layer"), [(4, 4)], tna.ConfigError, "needs layers"),
        (tna.Config(groups="role"), [(4, 4)], tna.ConfigError, "needs roles"),
        # Found by Hypothesis: the first group comes out even, the second of the same size does not.
        (tna.Config(groups=3), [(2, 1), (1, 3)], tna.ShapeError, "multiple of 3 columns; one has 2 elements"),
    ):
        with pytest.raises(error, match=message):
            tna.SuperLoRA(config, shapes)  # type: ignore[arg-type]


def test_a_plan_says_what_it_is() -> None:
    plan = tna.SuperLoRA(tna.Config(rank=2), [(4, 3)] * 2)
    assert repr(plan) == f"SuperLoRA({plan.config!r}, 2 weights, 2 groups, 24 elements)"


def test_bad_parameters() -> None:
    plan = tna.SuperLoRA(tna.presets.lora(2), [(4, 3)] * 2)
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
    for i in (-1, 2):
        with pytest.raises(tna.ShapeError, match="i must be from 0 to 1"):
            plan.delta(good, i)
    with pytest.raises(tna.ShapeError, match="must be an integer"):
        plan.delta(good, 0.0)  # type: ignore[arg-type]
    for start, stop in ((5, 5), (7, 3)):
        with pytest.raises(tna.ShapeError, match="start must be below stop"):
            plan.vector(good, start, stop)
    with pytest.raises(tna.ShapeError, match="stop must be from 0 to 24"):
        plan.vector(good, 0, 25)


def test_bad_init() -> None:
    plan = tna.SuperLoRA(tna.presets.lora(2), [(4, 3)])
    with pytest.raises(tna.BackendError, match="no backend named 'tensorflow'"):
        plan.init("tensorflow")
    with pytest.raises(tna.BackendError, match="no floating dtype 'int8'"):
        plan.init(dtype="int8")
    with pytest.raises(tna.BackendError, match="dtype must be a name"):
        plan.init(dtype=np.float32)  # type: ignore[arg-type]
    with pytest.raises(tna.BackendError, match="live on 'cpu'"):
        plan.init(device="cuda")
    large = tna.SuperLoRA(tna.presets.lora(512), [(4096, 4096)])
    with pytest.raises(tna.BackendError):
        assert peak_of(lambda: large.init(device="cuda")) == 0  # never reached
    assert not large.groups[0].start.kept


@pytest.mark.law("huge-models")
def test_what_is_refused_is_refused_before_anything_is_allocated() -> None:
    huge = [(1 << 20, 1 << 20)] * 4
    plan = tna.SuperLoRA(tna.presets.superlora(1), huge)
    small = {name: np.zeros((2, 2), np.float32) for name in plan.param_shapes}

    def attempts() -> None:
        with pytest.raises(tna.ShapeError):
            plan.deltas(small)
        with pytest.raises(tna.BackendError):
            tna.SuperLoRA(tna.presets.dense(), huge).init(dtype="int8")
        with pytest.raises(tna.ShapeError):
            tna.SuperLoRA(tna.Config(fold=(5, 5)), huge)

    assert peak_of(attempts) < 1 << 20


def test_neighbors_in_one_group_are_one_slice() -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2), [(5, 4)] * 6)
    assert len(plan.layout.of_slice(0, plan.size)) == 1
    assert len(plan.layout.of_slice(7, 93)) == 1
    listed = tna.SuperLoRA(tna.presets.superlora(2, groups=[[1, 0], [2]]), [(5, 4)] * 3)
    assert len(listed.layout.of_slice(0, 60)) == 3


@pytest.mark.slow
@pytest.mark.law("huge-models")
def test_construction_is_small_and_ends_for_any_values() -> None:
    for config, shapes in (
        (tna.Config(fold=(1 << 61, 2)), [(10, 10)]),
        (tna.Config(fold=(2**8 * 3**4 * 5**2 * 7 * 11 * 13, 2), splits=8), [(10, 10)]),
        (tna.Config(groups=10**9), [(10**9, 10)]),
        (tna.Config(terms=1 << 16), [(4, 4)]),
    ):
        assert peak_of(lambda c=config, s=shapes: tna.SuperLoRA(c, s).num_parameters) < 200 << 20
    for config, shapes in (
        (tna.Config(), [(10**5000, 2)]),
        (tna.Config(), [(1 << 40, 1 << 40)]),
        (tna.Config(fold=((1 << 61) - 1, 2), splits=2), [(10, 10)]),
    ):
        with pytest.raises(tna.ShapeError):
            tna.SuperLoRA(config, shapes)
    for layers in ([[0]], 5, iter([0, 1])):
        with pytest.raises(tna.ConfigError, match="layers"):
            tna.SuperLoRA(tna.Config(groups="layer"), [(2, 2)], layers=layers)  # type: ignore[arg-type]


def test_every_public_name_says_what_it_is() -> None:
    for name in tna.__all__:
        assert getattr(tna, name).__doc__, name
