"""A map before the network: arrays are a_start + P θ, in every library, scope and dtype; what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.random_parameters import drawn
from tests.conftest import NUMPY_AND_TORCH
from tests.support.references import reference
from tnadapt.algebra.maps import BroughtMap, make_map
from tnadapt.algebra.norms import rounded_to
from tnadapt.backends import Backend, load_backend

P = tna.presets
SHAPES = [(6, 4), (5, 4), (6, 4)]
NORMALIZED = tna.maps.TiedElements(normalized=True)
MAPS = ("one-hot", "signed-one-hot", "normal", "linear", ("shuffle", "one-hot"), "tied", NORMALIZED, "given")
SCOPES = ("plan", "group", "array")
before = pytest.mark.parametrize("name", MAPS)
scoped = pytest.mark.parametrize("scope", SCOPES)


def plan_of(name: Any, scope: str = "plan", **settings: Any) -> tna.SuperLoRA:
    plan = tna.SuperLoRA(P.lora(2, before=name, parameters=5, scope=scope, seed=3, **settings), SHAPES)
    assert plan.theta is not None
    given = plan.theta.stand_ins(np.random.default_rng(9))
    return tna.SuperLoRA(plan.config, SHAPES, given=given) if given else plan


# -- What it computes -------------------------------------------------------------------------------


@pytest.mark.law("theta")
@before
@scoped
def test_updates_are_those_of_the_arrays_and_begin_at_their_start(name: Any, scope: str) -> None:
    plan = plan_of(name, scope)
    params, inner = drawn(plan), plan.arrays_plan
    arrays = plan.arrays(params)
    assert list(arrays) == list(plan.array_shapes)
    assert inner.param_shapes == plan.array_shapes
    assert inner.config.before is None
    for ours, theirs in zip(plan.deltas(params), inner.deltas(arrays), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(plan.delta(params, 1), inner.delta(arrays, 1))
    np.testing.assert_array_equal(plan.vector(params, 7, 40), inner.vector(arrays, 7, 40))
    assert tna.SuperLoRA(P.lora(2), SHAPES).arrays_plan.theta is None
    for dtype in ("float32", "float64", "float16"):
        fresh, usual = plan.init(dtype=dtype), inner.init(dtype=dtype)
        assert not any(theta.any() for theta in fresh.values())
        assert all(array.tobytes() == usual[full].tobytes() for full, array in plan.arrays(fresh).items())
        assert not any(delta.any() for delta in plan.deltas(fresh))


@pytest.mark.law("theta")
@given(
    st.sampled_from(["one-hot", "signed-one-hot"]), st.integers(1, 40), st.integers(0, 60), st.integers(0, 2**64 - 1)
)
def test_one_hot_maps_are_isometries(name: str, n_in: int, more: int, seed: int) -> None:
    found = make_map(name, n_in, n_in + more, seed)
    dense = reference.matrix_of(found)
    np.testing.assert_allclose(dense.T @ dense, np.eye(n_in), atol=1e-12)
    assert ((dense != 0).sum(axis=1) == 1).all()
    counts = (dense != 0).sum(axis=0)
    assert counts.max() - counts.min() <= 1
    assert (dense >= 0).all() or name != "one-hot"
    assert found.gain() * math.sqrt(n_in * (n_in + more)) == pytest.approx(np.linalg.norm(dense) ** 2)


def test_a_large_normal_map_is_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_map("normal", 7, 50, seed=1)
    x, y = np.random.default_rng(0).normal(size=(2, 7)), np.random.default_rng(1).normal(size=(2, 50))
    f, g = tna.Projection("normal", 7, 50, seed=1), tna.Projection("normal", 7, 50, seed=1)
    whole, back = f(x), f.adjoint(y)
    monkeypatch.setattr("tnadapt.algebra.maps._matrices._KEPT", 0)
    monkeypatch.setattr("tnadapt.algebra.maps._matrices._BLOCK", 7 * 8)
    np.testing.assert_allclose(g(x), whole, rtol=1e-12)
    np.testing.assert_allclose(g.adjoint(y), back, rtol=1e-12)
    np.testing.assert_allclose(g.slice(x, 5, 43), whole[:, 5:43], rtol=1e-12)
    assert not g.map.kept
    assert small.digest() == g.digest


# -- Arrays of P that the caller brings -------------------------------------------------------------


@pytest.mark.law("theta")
@given(st.integers(1, 12), st.lists(st.integers(0, 11), min_size=1, max_size=80), st.booleans())
def test_the_adjoint_of_tied_elements_sums_those_of_one_index(n_in: int, index: list[int], normalized: bool) -> None:
    index = [number % n_in for number in index]
    found = make_map(tna.maps.TiedElements(normalized), n_in, len(index))
    assert isinstance(found, BroughtMap)
    found.bring(np.array(index, np.float32))
    y = np.random.default_rng(0).normal(size=(2, len(index)))
    expected = np.zeros((2, n_in))
    for place, number in enumerate(index):
        expected[:, number] += y[:, place] / (math.sqrt(index.count(number)) if normalized else 1.0)
    np.testing.assert_allclose(found.adjoint(load_backend("numpy"), y), expected, rtol=1e-12, atol=1e-13)
    if normalized:
        dense = found.matrix()
        used = sorted(set(index))
        np.testing.assert_allclose((dense.T @ dense)[np.ix_(used, used)], np.eye(len(used)), atol=1e-12)


def test_a_sum_over_very_unequal_indices_takes_little_memory() -> None:
    found = make_map("tied", 1000, 100_000)
    assert isinstance(found, BroughtMap)
    index = np.zeros(100_000, np.float32)
    index[:999] = np.arange(1, 1000)
    found.bring(index)
    y = np.ones(100_000)
    total = found.adjoint(load_backend("numpy"), y)
    assert total.tolist() == [99_001.0] + [1.0] * 999
    assert sum(array.size for key, array in found.kept.items() if isinstance(key, tuple)) <= 3 * 100_000


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("tied", {"theta.index": np.zeros(57)}, r"given\['theta.index'\] .*\(57,\).*\(58,\)"),
        ("tied", {}, r"'theta.index', of shape \(58,\), is an array that the caller brings: tnadapt.SuperLoRA\("),
        ("given", {}, r"'theta.matrix', of shape \(58, 5\), is an array that the caller brings"),
        (
            "tied",
            {"theta.index": np.full(58, 5)},
            r"given\['theta.index'\] must hold integers from 0 to 4.* is 5",
        ),
        ("tied", {"theta.index": np.full(58, 0.5)}, r"must hold integers from 0 to 4.*element 0 is 0.5"),
        ("tied", {"theta.index": np.full(58, -1)}, r"must hold integers from 0 to 4.*element 0 is -1"),
        (
            "tied",
            {"theta.indices": np.zeros(58)},
            r"given names 'theta.indices'; the arrays that a caller",
        ),
        ("one-hot", {"theta.index": np.zeros(58)}, r"given names 'theta.index'; the arrays .* are none"),
        (
            "given",
            {"theta.matrix": np.full((58, 5), np.nan)},
            r"given\['theta.matrix'\] must hold finite",
        ),
    ],
)
def test_arrays_of_p_that_do_not_fit(name: str, given: dict[str, Any], message: str) -> None:
    config = P.lora(2, before=name, parameters=5)
    with pytest.raises((tna.ConfigError, tna.ShapeError), match=message):
        tna.SuperLoRA(config, SHAPES, given=given).init()
    # Counting needs none of them.
    assert tna.SuperLoRA(config, SHAPES).num_parameters == 5


# -- The start --------------------------------------------------------------------------------------


def test_without_an_offset_one_array_per_term_must_be_made() -> None:
    plan = plan_of("one-hot", offset=False)
    with pytest.raises(tna.ConfigError, match=r"offset=False starts split0.factor0 and split0.factor1 at zero, whose"):
        plan.init()
    theta = {"theta": np.arange(1.0, 6.0)}
    assert all(np.abs(array).min() > 0 for array in plan.arrays(theta).values())
    sources = {"factor1": tna.sources.Seeded("normal")}
    one = tna.SuperLoRA(P.lora(2, sources=sources, before="one-hot", parameters=5, offset=False), SHAPES)
    assert not any(delta.any() for delta in one.deltas(one.init()))
    assert any(delta.any() for delta in one.deltas(theta))
    with pytest.raises(tna.ConfigError, match=r"offset=False starts the arrays at zero, where projection='nonlinear'"):
        P.superlora(2, projection="nonlinear", before="one-hot", parameters=5, offset=False)


@pytest.mark.law("theta")
@before
@scoped
def test_the_laws_hold(name: Any, scope: str) -> None:
    report = tna.verify(plan_of(name, scope).config, SHAPES, backends=NUMPY_AND_TORCH)
    assert report.holds, str(report)


SOURCED = {
    "vera": P.vera(2),
    "tied": P.tied_lora(2),
    "scaled": tna.Config(rank=2, groups=2, fold="hypercube", projection="linear", ratio=0.5, sources={
        "factor1": tna.sources.Scaled(tna.sources.Seeded("normal")),
    }),
}  # fmt: skip


@pytest.mark.law("theta", "sources")
@pytest.mark.parametrize("name", [*MAPS, *SOURCED])
def test_values_and_gradients_in_every_library(name: Any, backend: Backend) -> None:
    plan = tna.SuperLoRA(SOURCED[name], [(6, 4)] * 3) if name in SOURCED else plan_of(name)
    host = drawn(plan)
    rng = np.random.default_rng(2)
    target = rng.normal(size=plan.size)
    with backend.double_precision():
        params = {full: backend.asarray(array, "float64") for full, array in host.items()}
        weights = backend.asarray(target, "float64")
        np.testing.assert_allclose(backend.to_numpy(plan.vector(params)), plan.vector(host), rtol=1e-10, atol=1e-12)
        if "gradient" in backend.lacks(weights):
            return
        found = backend.gradient(lambda own: backend.sum(plan.vector(own) * weights, axis=0), params)
        assert found is not None
        way = {full: rng.normal(size=array.shape) for full, array in host.items()}
        ahead, behind = (
            plan.vector({full: array + step * 1e-6 * way[full] for full, array in host.items()}) for step in (1, -1)
        )
        slope = float(target @ (ahead - behind)) / 2e-6
        along = sum(float(np.sum(np.asarray(backend.to_numpy(found[full])) * way[full])) for full in host)
        assert abs(along - slope) <= 1e-6 * max(1.0, abs(slope))


# -- Casts ------------------------------------------------------------------------------------------


def test_arrays_of_a_cast_theta_are_those_of_training() -> None:
    torch = pytest.importorskip("torch")
    plan = plan_of("one-hot")
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    trained = plan.arrays({"theta": theta})
    cast = plan.arrays({"theta": theta.float().numpy()}, "bfloat16")
    for full, array in trained.items():
        np.testing.assert_array_equal(cast[full], array.float().numpy())
        np.testing.assert_array_equal(cast[full], rounded_to(cast[full], "bfloat16"))


def test_copies_and_pickles() -> None:
    plan = plan_of("normal", "group")
    params = drawn(plan)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), pickle.loads(pickle.dumps(plan.arrays_plan))):
        own = params if other.theta is not None else plan.arrays(params)
        for ours, theirs in zip(other.deltas(own), plan.deltas(params), strict=True):
            np.testing.assert_array_equal(ours, theirs)


# -- Files ------------------------------------------------------------------------------------------


@before
@scoped
def test_a_file_holds_theta_alone(name: Any, scope: str, tmp_path: Any) -> None:
    plan = plan_of(name, scope)
    targets = [tna.Target(f"m{index}", shape) for index, shape in enumerate(SHAPES)]
    params = {full: array.astype(np.float32) for full, array in drawn(plan).items()}
    file = tna.AdapterFile(plan.config, targets, params, given=plan.given)
    tna.save(tmp_path / "a.safetensors", file)
    found = tna.load(tmp_path / "a.safetensors")
    assert found.config == plan.config
    assert found.arrays.keys() == plan.param_shapes.keys()
    for ours, theirs in zip(found.deltas(), plan.deltas(params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # Another seed draws another P, which a digest tells.
    other = tna.AdapterFile(plan.config.replace(seed=4), targets, params, given=plan.given)
    assert None is not file.draws != other.draws


# -- What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"before": "one-hot"}, r"before='one-hot' needs the number of parameters: parameters=p"),
        (
            {"before": "shuffle", "parameters": 5},
            r"before must be a linear map from vectors .*got shuffle",
        ),
        ({"before": "nonlinear", "parameters": 5}, r"must be a linear map"),
        ({"before": tna.maps.Scatter(5), "parameters": 5}, r"must be a linear map from vectors of any length"),
        (
            {"before": ["shuffle", "tied"], "parameters": 5},
            r"before=shuffle → tied composes a map whose array",
        ),
        ({"projection": "tied"}, r"projection 'tied' has an array that the caller brings, and only the map before the"),
        ({"before": "unilora", "parameters": 5}, r"projection must be one of 'identity'"),
        ({"before": "one-hot", "parameters": 0}, r"parameters must be from 1"),
        ({"before": "one-hot", "parameters": 2.5}, r"parameters must be"),
        ({"before": "one-hot", "parameters": 5, "scope": "layer"}, r"scope must be one of 'plan', 'group', 'array'"),
        ({"before": "one-hot", "parameters": 5, "offset": 1}, r"offset must be True or False; got 1"),
        ({"before": ["shuffle"] * 8 + ["one-hot"], "parameters": 5}, r"before composes at most 8 maps; got 9"),
        ({"parameters": 5}, r"parameters=5 is about the map before the network, and there is none: set before="),
        ({"scope": "group"}, r"scope='group' is about the map before the network"),
        ({"offset": False}, r"offset=False is about the map before the network"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.Config(**settings)


def test_a_dtype_is_a_name() -> None:
    plan = tna.SuperLoRA(P.lora(2, before="one-hot", parameters=5), SHAPES)
    for call in (plan.arrays, plan.deltas, plan.vector):
        with pytest.raises(tna.ConfigError, match="dtype must be a string or None; got array"):
            call(plan.init(), dtype=np.ones(2))  # type: ignore[operator]


def test_more_parameters_than_what_they_make() -> None:
    with pytest.raises(tna.ConfigError, match=r"parameters=59 is more than the 58 elements that 'theta' makes"):
        tna.SuperLoRA(P.lora(2, before="one-hot", parameters=59), SHAPES)
    assert tna.parameter_count(P.lora(2, before="one-hot", parameters=58), SHAPES) == 58
    with pytest.raises(tna.ConfigError, match=r"more than the 8 elements that 'group0.split0.factor1.theta' makes"):
        tna.SuperLoRA(P.lora(2, before="normal", parameters=9, scope="array"), SHAPES)


def test_counts_allocate_nothing_at_any_size() -> None:
    llama = [(16384, 16384)] * 1000
    plan = tna.SuperLoRA(P.tinylora(13), llama)
    assert plan.num_parameters == 13
    assert tna.SuperLoRA(P.unilora(256, 64), llama).num_parameters == 256


def test_a_config_with_theta_is_a_dictionary_and_one_without_is_as_before() -> None:
    config = P.lora(2, before=["shuffle", "one-hot"], parameters=5, scope="array", offset=False)
    assert tna.Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["before"] == ["shuffle", "one-hot"]
    assert P.lora(2).to_dict().keys().isdisjoint({"before", "parameters", "scope", "offset"})
