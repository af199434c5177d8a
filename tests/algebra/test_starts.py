"""Starts: where training begins, and that ΔW is the difference to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.algebra.internals import STARTS, Start
from tests.conftest import NUMPY_AND_TORCH, relative_error
from tests.support.depth import in_depth
from tnadapt.algebra.factoring import factoring
from tnadapt.algebra.sources import Mixed, Scaled, Seeded, Trained
from tnadapt.backends import load_backend
from tnadapt.planning import degrees_of_freedom, known_as, largest_rank, step_cost
from tnadapt.plugins import forget_registered
from tnadapt.testing.verification import examples

P = tna.presets
FROM_BASE = ("pissa", "milora", "olora")
STARTING = (*FROM_BASE, "given", "random")
SHAPES = [(12, 8), (6, 8)]
LEFT, RIGHT = "group0.split0.factor0", "group0.split0.factor1"


def config_of(start: str, **changes: Any) -> tna.Config:
    return P.lora(3, start=start, **changes)


def base(shape: tuple[int, int] = (12, 8), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def brought(plan: tna.UpdatePlan, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in plan.array_shapes.items()}


def bound(config: tna.Config, shapes: list[tuple[int, int]] | None = None) -> tna.UpdatePlan:
    plan = tna.UpdatePlan(config, shapes or SHAPES)
    plan = plan.with_base([base(shape, i) for i, shape in enumerate(plan.shapes)])
    return plan.with_start(brought(plan)) if plan.point.brought else plan


def test_the_usual_start_is_not_written() -> None:
    assert "start" not in P.lora(2).to_dict()
    assert P.lora(2, start="pissa").to_dict()["start"] == "pissa"
    assert tna.Config.from_dict(P.lora(2, start="given").to_dict()) == P.lora(2, start="given")


# -- What is refused ---------------------------------------------------------------------------------------


def factors(start: str, weight: np.ndarray, **changes: Any) -> tuple[np.ndarray, np.ndarray, float]:
    config = config_of(start, **changes)
    params = tna.UpdatePlan(config, [weight.shape]).with_base([weight]).init()
    return params[LEFT].astype(np.float64), params[RIGHT].astype(np.float64), config.scale


class Empty(Start):
    needs_base = True


def computed(*made: Any) -> np.ndarray:
    """What LoRA's first factor is with the start of another package."""

    class Computes(Start):
        needs_base = True

        def arrays(self, place: Any, base: Any, stream: Any) -> Any:
            return made[0] if len(made) == 1 else dict(zip(("split0.factor0", "split0.factor1"), made, strict=True))

    tna.register_start("wrong", Computes)
    try:
        return bound(config_of("wrong"), [(12, 8)]).init()[LEFT]
    finally:
        forget_registered()


UNLIKE_LORA: list[dict[str, Any]] = [
    {"groups": 1}, {"groups": "weight", "fold": "hypercube"}, {"format": "tucker"}, {"splits": 2}, {"terms": 2},
    {"projection": "shuffle"}, {"sources": {"factor1": tna.sources.Seeded("normal")}}, {"format": "cp-weighted"},
    {"groups": 3},
]  # fmt: skip
HOLED = np.where(np.eye(12, 8), math.nan, 1.0)
REFUSED: list[tuple[Callable[[], object], str]] = [
    *((functools.partial(tna.Config, start=wrong),
       "start must be one of 'zero', 'given', 'random', 'pissa', 'milora', 'olora'")
      for wrong in ("svd", "", 3, None, ["pissa"])),
    (lambda: P.unilora(5, rank=2, start="given", offset=False),
     r"start='given' says where the arrays start, and offset=False starts"),
    *((functools.partial(tna.UpdatePlan, config_of(start, **changes), SHAPES),
       rf"start='{start}' makes LoRA's two factors of one base weight: it needs")
      for start in FROM_BASE for changes in UNLIKE_LORA),
    *((functools.partial(tna.UpdatePlan, config_of(start), [(6, 2)]),
       rf"start='{start}' needs rank .* \(6, 2\), which has 2; got rank=3: use") for start in FROM_BASE),
    *((functools.partial(tna.UpdatePlan, config_of("given"), SHAPES, start_from=arrays), text) for arrays, text in [
        ({"factor0": np.ones((12, 3))}, "start_from names 'factor0'; the arrays that a caller can give"),
        ({LEFT: np.full((12, 3), math.nan)}, r"start_from\['.*'\] must hold finite floating-point"),
        ({LEFT: np.ones((12, 3), int)}, r"start_from\['.*'\] must hold finite floating-point"),
        ({LEFT: "ones"}, r"start_from\['.*'\] must be an array"),
        ([1, 2], "start_from must be a mapping of names to arrays; got list"),
    ]),
    *((functools.partial(tna.UpdatePlan, config_of(start), SHAPES, start_from={LEFT: np.ones((12, 3))}),
       rf"arrays to start from need Config\(start='given'\).* start='{start}'") for start in ("zero", "pissa")),
    *((functools.partial(factors, start, HOLED),
       rf"start='{start}' of group 0 is computed from the base weight, which ho") for start in FROM_BASE),
    *((functools.partial(factors, start, np.ones((12, 8))), rf"start='{start}' of group 0 needs .*{part}")
      for start, part in zip(FROM_BASE, [*["not zero, and only 1 are above rounding"] * 2,
                                         "linearly independent, and only 1 are"], strict=True)),
    *((functools.partial(factors, "pissa", base() * size),
       "start='pissa' of group 0 has numbers that float32 cannot represent") for size in (1e-150, 1e150)),
    *((tna.UpdatePlan(config_of(start), SHAPES).init,
       r"the start of 'group0.split0.factor0' is computed from the base weights") for start in FROM_BASE),
    (lambda: Empty().arrays(tna.UpdatePlan(P.lora(1), [(2, 2)]).start_place(0), np.eye(2), None),
     r"start Empty does not define arrays\(place, base, stream\)"),
    (lambda: computed(7),
     r"start='wrong' of group 0 must compute an array for each of split0.factor0, split0.factor1; got int"),
    (lambda: computed({"split0.factor0": np.ones((12, 3))}),
     r"must compute an array for each .*; got \['split0.factor0'\]"),
    (lambda: computed(np.ones((12, 2)), np.ones((8, 3))),
     r"must compute floating-point numbers of shape \(12, 3\) for 'split0.factor0'; got float64 of"),
    (lambda: computed(np.ones((12, 3)), np.full((8, 3), 1e300)),
     r"start='wrong' of group 0 has numbers that float32 cannot represent in 'split0.factor1'"),
    (lambda: tna.decompose([base()], config_of("given")),
     "start='given' is where training starts, and a fit gives all arrays: use"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        make()


def test_an_array_to_start_from_has_the_shape_of_the_parameter_and_may_be_zero() -> None:
    assert not computed(np.zeros((12, 3)), np.ones((8, 3))).any()
    with pytest.raises(tna.ShapeError, match=r"start_from\['.*'\] has shape \(3, 12\); expected \(12, 3\)"):
        tna.UpdatePlan(config_of("given"), SHAPES, start_from={LEFT: np.ones((3, 12))})


# -- The laws ----------------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[tna.Config, list[tuple[int, int]]]]:
    own = {name: (config.replace(start="given"), shapes) for name, (config, shapes) in examples().items()}
    own["linear"] = P.superlora(2, projection="linear", ratio=0.4, groups=2, start="given"), SHAPES
    own["nonlinear"] = P.superlora(2, projection="nonlinear", start="given"), SHAPES
    own["random"] = config_of("random", alpha=5), SHAPES
    own["random, diagonals"] = P.vera(3, start="random"), SHAPES
    own["random, tied"] = P.share_lora(2, start="random"), SHAPES
    own |= {start: (config_of(start, alpha=5), SHAPES) for start in FROM_BASE}
    own |= {f"{start}, θ": (P.unilora(9, rank=2, start=start), SHAPES) for start in FROM_BASE}
    return own


@pytest.mark.law("fresh-is-zero", "first-gradients", "update-formula", "update-slice")
@pytest.mark.parametrize("name", cases())
def test_the_laws_hold(name: str) -> None:
    config, shapes = cases()[name]
    report = tna.verify(config, shapes, backends=NUMPY_AND_TORCH)
    assert report.holds, report
    assert set(STARTS.built_in) == {"zero", "given", "random", *FROM_BASE}  # all that are verified


@pytest.mark.slow
@pytest.mark.law("fresh-is-zero", "torch-jax-gradients")
@pytest.mark.parametrize("name", in_depth(["lora", "lokr", "nonlinear", "linear", "vera", *FROM_BASE], ["vera"]))
def test_the_laws_hold_on_jax(name: str) -> None:
    jax = pytest.importorskip("jax")
    config, shapes = cases()[name]
    assert tna.verify(config, shapes, backends=["jax"]).holds
    for start in ("given", "pissa"):
        plan = bound(config_of(start, alpha=5))
        assert not any(bool(delta.any()) for delta in jax.jit(plan.deltas)(plan.init("jax")))


@pytest.mark.law("fresh-is-zero")
@given(
    dtype=st.sampled_from(["float64", "float32", "float16", "bfloat16"]),
    start=st.sampled_from(STARTING),
)
def test_the_start_is_zero_in_every_dtype(dtype: str, start: str) -> None:
    pytest.importorskip("torch")
    plan = bound(config_of(start, alpha=0.7))
    params = plan.init("torch", dtype)
    assert all(bool(array.any()) for array in params.values())
    assert not any(bool(delta.any()) for delta in plan.deltas(params))
    wide = {name: array.double() for name, array in params.items()}
    # As in merging: x_0 is rounded as in training.
    assert not any(bool(delta.any()) for delta in plan.deltas(wide, dtype))


# θ itself starts at zero, and magnitudes at norms.
RANDOM = {name: found for name, found in examples().items() if found[0].before is None and found[0].apply == "add"}
RANDOM |= {
    "trained and scaled": (P.lora(2, sources={"factor0": Scaled(Trained()), "factor1": Seeded("normal")}), SHAPES),
    "trained and mixed": (P.lora(2, sources={"factor0": Mixed(Trained()), "factor1": Seeded("normal")}), SHAPES),
    "weighted vectors": (tna.Config(rank=2, order=1, format="cp-weighted"), SHAPES),
    "one gate": (tna.Config(order=2, format="circuit"), SHAPES),
}


@pytest.mark.law("fresh-is-zero", "first-gradients")
@pytest.mark.parametrize("name", RANDOM)
def test_a_random_start_has_no_zero_and_a_gradient_for_every_array(name: str) -> None:
    torch = pytest.importorskip("torch")
    config, shapes = RANDOM[name]
    plan = tna.UpdatePlan(config.replace(start="random"), shapes)
    plan = plan.with_base([base(shape, seed) for seed, shape in enumerate(shapes)])
    params = {full: array.requires_grad_() for full, array in plan.init("torch", "float64").items()}
    assert all(bool(array.any()) for array in params.values())
    update = plan.vector(params)
    assert not update.any()
    (update * torch.tensor(np.random.default_rng(0).normal(size=plan.size))).sum().backward()
    assert all(bool(array.grad.any()) for array in params.values())


# -- Arrays that are brought -------------------------------------------------------------------------------


def test_what_is_not_brought_starts_as_usual() -> None:
    usual = tna.UpdatePlan(config_of("zero"), SHAPES).init()
    array = np.full((8, 3), 0.5, np.float32)
    found = tna.UpdatePlan(config_of("given"), SHAPES, start_from={RIGHT: array}).init()
    assert np.array_equal(found[RIGHT], array)
    for name in usual.keys() - {RIGHT}:
        assert np.array_equal(found[name], usual[name])


def test_a_new_start_replaces_the_old_one_and_no_frozen_array() -> None:
    config = config_of("given", sources={"factor1": tna.sources.Given(shared=True)})
    plan = tna.UpdatePlan(config, SHAPES, given={RIGHT: np.ones((8, 3))})
    old = plan.with_start({"group1.split0.factor0": np.ones((6, 3))})
    new = old.with_start({LEFT: np.ones((12, 3))})
    assert new.given.keys() == {RIGHT, f"start.{LEFT}"}
    assert old.given.keys() == {RIGHT, "start.group1.split0.factor0"}
    assert not any(delta.any() for delta in new.deltas(new.init()))


# -- Starts of the base ------------------------------------------------------------------------------------


@pytest.mark.law("update-formula")
@pytest.mark.parametrize("alpha", [None, 0.5, 24])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8), (3, 8)])
@pytest.mark.parametrize("start", ["pissa", "milora"])
def test_singular_vectors_and_values(start: str, shape: tuple[int, int], alpha: float | None) -> None:
    weight = base(shape)
    b, a, scale = factors(start, weight, alpha=alpha)
    left, values, right = np.linalg.svd(weight, full_matrices=False)
    part = slice(0, 3) if start == "pissa" else slice(len(values) - 3, None)
    assert relative_error(scale * b @ a.T, (left[:, part] * values[part]) @ right[part]) < 1e-6
    # Each factor has the root of the values, and the largest entry of a left vector is positive.
    assert relative_error(b.T @ b * scale, np.diag(values[part])) < 1e-6
    assert relative_error(a.T @ a * scale, np.diag(values[part])) < 1e-6
    assert (b[np.abs(b).argmax(0), range(3)] > 0).all()


@pytest.mark.law("update-formula")
@pytest.mark.parametrize("alpha", [None, 0.5, 24])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (3, 8)])
def test_the_qr_decomposition(shape: tuple[int, int], alpha: float | None) -> None:
    weight = base(shape)
    b, a, scale = factors("olora", weight, alpha=alpha)
    q, r = np.linalg.qr(weight)
    assert relative_error(scale * b @ a.T, q[:, :3] @ r[:3]) < 1e-6
    assert relative_error(scale * b.T @ b, np.eye(3)) < 1e-6
    assert (np.diagonal(a[:3]) > 0).all()
    assert relative_error(np.tril(a[:3].T, -1), np.zeros((3, 3))) < 1e-6


def test_the_iteration_converges_for_weights_of_any_size() -> None:
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(size, 60)))[0] for size in (200, 150))
    weight = (left * 0.9 ** np.arange(60)) @ right.T
    for size in (1.0, 1e-37, 1e37):
        b, a, _ = factors("pissa", size * weight)
        assert relative_error(b @ a.T, size * (left[:, :3] * 0.9 ** np.arange(3)) @ right[:, :3].T) < 1e-6


@pytest.mark.parametrize(
    ("start", "values"), [("pissa", [9, 8, 7, 7, 5, 4, 3, 2]), ("milora", [9, 8, 7, 6, 5, 5, 3, 2])]
)
def test_a_warning_where_the_part_is_not_determined(start: str, values: list[float]) -> None:
    left, right = (np.linalg.qr(base((size, 8)))[0] for size in (12, 8))
    with pytest.warns(UserWarning, match=rf"start='{start}' of group 0 takes .* nearer than 0.0001 to the next one"):
        factors(start, (left * values) @ right.T)
    values[3 if start == "pissa" else 5] -= 0.5
    factors(start, (left * values) @ right.T)  # warnings are errors


@pytest.mark.parametrize("start", [*FROM_BASE, "given"])
def test_arrays_are_counted_named_and_contiguous_as_parameters_must_be_whichever_are_trained(start: str) -> None:
    plan = tna.UpdatePlan(config_of(start), SHAPES)
    assert plan.num_parameters == tna.UpdatePlan(config_of("zero"), SHAPES).num_parameters
    if start == "given":
        plan = plan.with_start({name: np.asfortranarray(array) for name, array in brought(plan).items()})
    else:
        assert list(plan.base_shapes) == [f"start.{name}" for name in plan.param_shapes]
        plan = bound(plan.config)
    assert all(array.flags.c_contiguous for array in plan.init().values())
    assert all(map(np.array_equal, plan.init(trained=[LEFT]).values(), plan.init().values()))


def test_progress_and_equal_bits() -> None:
    told: list[tuple[int, int]] = []
    plan = tna.UpdatePlan(config_of("pissa"), SHAPES)
    weights = [base(shape) for shape in SHAPES]
    found = plan.with_base(weights, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = plan.with_base(lambda index: weights[index])
    assert all(np.array_equal(array, again.given[name]) for name, array in found.given.items())


# -- Which arrays are trained, ranks and factors ------------------------------------------------------------


@pytest.mark.law("largest-rank")
@pytest.mark.parametrize("config", [P.lora(2), P.lotr(2, weights=2, rows=12, cols=8), P.loha(2), P.lokr(1)], ids=str)
def test_the_rank_is_twice_as_large(config: tna.Config) -> None:
    shapes = [(12, 8)] * 2
    one, two = (tna.UpdatePlan(config.replace(start=start), shapes) for start in ("zero", "given"))
    assert two.largest_rank(0) == min(8, 2 * one.largest_rank(0))
    found = largest_rank(two, 0)
    rng = np.random.default_rng(0)
    plan = two.with_start({name: rng.normal(size=shape) for name, shape in two.array_shapes.items()})
    params = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
    assert np.linalg.matrix_rank(plan.deltas(params)[0]) == found.value <= two.largest_rank(0)


@pytest.mark.law("special-cases")
@pytest.mark.parametrize("config", [P.lora(2, alpha=5), P.lotr(2, weights=2, rows=12, cols=8), P.loha(2)], ids=str)
def test_the_factors_are_exact(config: tna.Config) -> None:
    plan, numpy = bound(config.replace(start="given"), [(12, 8)] * 2), load_backend("numpy")
    factorings = (plan, *(tna.UpdatePlan(config.replace(start=start), [(12, 8)] * 2) for start in ("given", "zero")))
    how, unbound, usual = (factoring(each, 1) for each in factorings)
    assert how is not None
    assert unbound is not None
    assert usual is not None
    assert unbound.sizes[0].width == 2 * (usual.sizes[0].width or 0)
    params = {name: array.astype(np.float64) for name, array in brought(plan, 1).items()}
    assert relative_error(how(numpy, params).dense(numpy), plan.delta(params, 1)) < 1e-13
    for dtype in (np.float32, np.float64):
        fresh = {name: array.astype(dtype) for name, array in plan.init().items()}
        assert not how(numpy, fresh).dense(numpy).any()


def test_the_start_costs_a_forward_pass_and_no_freedom() -> None:
    usual, given, of_base = (tna.UpdatePlan(config_of(start), SHAPES) for start in ("zero", "given", "pissa"))
    assert 3 * step_cost(given) == 4 * step_cost(usual)
    assert degrees_of_freedom(usual) == degrees_of_freedom(given) == degrees_of_freedom(of_base)
    assert str(known_as(config_of("olora"))) == "LoRA r = 3, olora"
