"""A map before the network: arrays are a_start + P θ, in every library, scope and dtype; what is refused."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.random_parameters import drawn
from tests.conftest import NUMPY_AND_TORCH, on_every_library
from tests.support.references import reference
from tnadapt.algebra.maps import BroughtMap, make_map
from tnadapt.backends import Backend, load_backend
from tnadapt.backends.stored_floats import rounded_to

P = tna.presets
SHAPES = [(6, 4), (5, 4), (6, 4)]
NORMALIZED = tna.maps.TiedElements(normalized=True)
MAPS = ("one-hot", "signed-one-hot", "normal", "linear", ("shuffle", "one-hot"), "tied", NORMALIZED, "given")
SCOPES = ("plan", "group", "array")


def plan_of(name: Any, scope: str = "plan", **settings: Any) -> tna.UpdatePlan:
    plan = tna.UpdatePlan(P.lora(2, before=name, parameters=5, scope=scope, seed=3, **settings), SHAPES)
    assert plan.theta is not None
    given = plan.theta.stand_ins(np.random.default_rng(9))
    return tna.UpdatePlan(plan.config, SHAPES, given=given) if given else plan


ONE_HOT = plan_of("one-hot")


# -- What it computes -------------------------------------------------------------------------------


@pytest.mark.law("theta")
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("scope", SCOPES)
def test_updates_are_those_of_the_arrays_and_begin_at_their_start_and_files_hold_theta_alone(
    name: Any, scope: str, tmp_path: Path
) -> None:
    plan = plan_of(name, scope)
    report = tna.verify(plan.config, SHAPES, backends=NUMPY_AND_TORCH)
    assert report.holds, str(report)
    params, inner = drawn(plan), plan.arrays_plan
    arrays, deltas = plan.arrays(params), plan.deltas(params)
    assert list(arrays) == list(plan.array_shapes)
    assert inner.param_shapes == plan.array_shapes
    assert inner.config.before is None
    for other in (inner, pickle.loads(pickle.dumps(inner))):
        assert all(map(np.array_equal, other.deltas(arrays), deltas))
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        assert all(map(np.array_equal, other.deltas(params), deltas))
    np.testing.assert_array_equal(plan.delta(params, 1), inner.delta(arrays, 1))
    np.testing.assert_array_equal(plan.vector(params, 7, 40), inner.vector(arrays, 7, 40))
    for dtype in ("float32", "float64", "float16"):
        fresh, usual = plan.init(dtype=dtype), inner.init(dtype=dtype)
        assert not any(theta.any() for theta in fresh.values())
        assert all(array.tobytes() == usual[full].tobytes() for full, array in plan.arrays(fresh).items())
        assert not any(delta.any() for delta in plan.deltas(fresh))
    targets = [tna.Target(f"m{index}", shape) for index, shape in enumerate(SHAPES)]
    stored = {full: array.astype(np.float32) for full, array in params.items()}
    file = tna.AdapterFile(plan.config, targets, stored, given=plan.given)
    tna.save(tmp_path / "a.safetensors", file)
    found = tna.load(tmp_path / "a.safetensors")
    assert found.config == plan.config
    assert found.arrays.keys() == plan.param_shapes.keys()
    assert all(map(np.array_equal, found.deltas(), plan.deltas(stored)))
    # Another seed draws another P, which a digest tells.
    other = tna.AdapterFile(plan.config.replace(seed=4), targets, stored, given=plan.given)
    assert None is not file.draws != other.draws


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


def test_without_an_offset_arrays_begin_at_zero() -> None:
    theta = {"theta": np.arange(1.0, 6.0)}
    assert all(np.abs(array).min() > 0 for array in plan_of("one-hot", offset=False).arrays(theta).values())
    sources = {"factor1": tna.sources.Seeded("normal")}
    one = tna.UpdatePlan(P.lora(2, sources=sources, before="one-hot", parameters=5, offset=False), SHAPES)
    assert not any(delta.any() for delta in one.deltas(one.init()))
    assert any(delta.any() for delta in one.deltas(theta))


SOURCED = {
    "vera": P.vera(2),
    "tied": P.tied_lora(2),
    "scaled": tna.Config(rank=2, groups=2, fold="hypercube", projection="linear", ratio=0.5, sources={
        "factor1": tna.sources.Scaled(tna.sources.Seeded("normal")),
    }),
}  # fmt: skip


@pytest.mark.law("theta", "sources")
@on_every_library("name", [*MAPS, *SOURCED], ["one-hot", "linear"])
def test_values_and_gradients_in_every_library(name: Any, backend: Backend) -> None:
    config, shapes = (SOURCED[name], [(6, 4)] * 3) if name in SOURCED else (plan_of(name).config, SHAPES)
    report = tna.verify(config, shapes, backends=[backend.name])
    assert report.holds, str(report)


def test_arrays_of_a_cast_theta_are_those_of_training() -> None:
    torch = pytest.importorskip("torch")
    plan = plan_of("one-hot")
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16()
    trained = plan.arrays({"theta": theta})
    cast = plan.arrays({"theta": theta.float().numpy()}, "bfloat16")
    for full, array in trained.items():
        np.testing.assert_array_equal(cast[full], array.float().numpy())
        np.testing.assert_array_equal(cast[full], rounded_to(cast[full], "bfloat16"))


# -- What is refused --------------------------------------------------------------------------------


def one_hot(name: Any = "one-hot", **settings: Any) -> tna.Config:
    return tna.Config(**{"before": name, "parameters": 5, **settings})


def begun(name: str, given: dict[str, Any], parameters: int = 5, scope: str = "plan") -> dict[str, np.ndarray]:
    config = P.lora(2, before=name, parameters=parameters, scope=scope)
    assert tna.UpdatePlan(config, SHAPES).num_parameters == parameters  # counting needs no array of P
    return tna.UpdatePlan(config, SHAPES, given=given).init()


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: begun("tied", {}),
     r"'theta.index', of shape \(58,\), is an array that the caller brings: tnadapt.UpdatePlan\("),
    (lambda: begun("given", {}), r"'theta.matrix', of shape \(58, 5\), is an array that the caller brings"),
    (lambda: begun("tied", {"theta.index": np.full(58, 5)}),
     r"given\['theta.index'\] must hold integers from 0 to 4.* is 5"),
    (lambda: begun("tied", {"theta.index": np.full(58, 0.5)}), r"must hold integers from 0 to 4.*element 0 is 0.5"),
    (lambda: begun("tied", {"theta.index": np.full(58, -1)}), r"must hold integers from 0 to 4.*element 0 is -1"),
    (lambda: begun("tied", {"theta.indices": np.zeros(58)}), r"given names 'theta.indices'; the arrays that a caller"),
    (lambda: begun("one-hot", {"theta.index": np.zeros(58)}), r"given names 'theta.index'; the arrays .* are none"),
    (lambda: begun("given", {"theta.matrix": np.full((58, 5), np.nan)}), r"given\['theta.matrix'\] must hold finite"),
    (lambda: tna.Config(before="one-hot"), r"before='one-hot' needs the number of parameters: parameters=p"),
    (lambda: one_hot("shuffle"), r"before must be a linear map from vectors .*got shuffle"),
    (lambda: one_hot("nonlinear"), r"must be a linear map"),
    (lambda: one_hot(tna.maps.Scatter(5)), r"must be a linear map from vectors of any length"),
    (lambda: one_hot(["shuffle", "tied"]), r"before=shuffle → tied composes a map whose array"),
    (lambda: tna.Config(projection="tied"),
     r"projection 'tied' has an array that the caller brings, and only the map before the"),
    (lambda: one_hot("unilora"), r"projection must be one of 'identity'"),
    (lambda: one_hot(parameters=0), r"parameters must be at least 1"),
    (lambda: one_hot(parameters=2.5), r"parameters must be"),
    (lambda: one_hot(scope="layer"), r"scope must be one of 'plan', 'group', 'array'"),
    (lambda: one_hot(offset=1), r"offset must be True or False; got 1"),
    (lambda: one_hot(["shuffle"] * 8 + ["one-hot"]), r"before composes at most 8 maps; got 9"),
    (lambda: tna.Config(parameters=5),
     r"parameters=5 is about the map before the network, and there is none: set before="),
    (lambda: tna.Config(scope="group"), r"scope='group' is about the map before the network"),
    (lambda: tna.Config(offset=False), r"offset=False is about the map before the network"),
    (lambda: plan_of("one-hot", offset=False).init(),
     r"offset=False starts split0.factor0 and split0.factor1 at zero, whose"),
    (lambda: P.superlora(2, projection="nonlinear", before="one-hot", parameters=5, offset=False),
     r"offset=False starts the arrays at zero, where projection='nonlinear'"),
    (lambda: begun("one-hot", {}, 59), r"parameters=59 is more than the 58 elements that 'theta' makes"),
    (lambda: begun("normal", {}, 9, "array"), r"more than the 8 elements that 'group0.split0.factor1.theta' makes"),
    *((functools.partial(call, {"theta": np.ones(5)}, dtype=np.ones(2)), "dtype must be a string or None; got array")
      for call in (ONE_HOT.arrays, ONE_HOT.deltas, ONE_HOT.vector)),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        make()


def test_an_array_of_p_has_its_shape() -> None:
    with pytest.raises(tna.ShapeError, match=r"given\['theta.index'\] .*\(57,\).*\(58,\)"):
        begun("tied", {"theta.index": np.zeros(57)})


def test_counts_allocate_nothing_at_any_size() -> None:
    llama = [(16384, 16384)] * 1000
    assert tna.UpdatePlan(P.tinylora(13), llama).num_parameters == 13
    assert tna.UpdatePlan(P.unilora(256, 64), llama).num_parameters == 256
    # As many as there are elements are made of so many.
    assert tna.parameter_count(P.lora(2, before="one-hot", parameters=58), SHAPES) == 58


def test_a_config_with_theta_is_a_dictionary_and_one_without_is_as_before() -> None:
    config = P.lora(2, before=["shuffle", "one-hot"], parameters=5, scope="array", offset=False)
    assert tna.Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["before"] == ["shuffle", "one-hot"]
    assert P.lora(2).to_dict().keys().isdisjoint({"before", "parameters", "scope", "offset"})
    assert tna.UpdatePlan(P.lora(2), SHAPES).arrays_plan.theta is None
