"""decompose: properties of every config, and the optimum where theory gives it."""

from __future__ import annotations

import itertools
import math
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest
import tensorly
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import on_every_library
from tnadapt import presets
from tnadapt.backends import Backend
from tnadapt.decomposition import Step
from tnadapt.errors import BackendError, ConfigError, ShapeError
from tnadapt.testing.strategies import parameters, plans


def _error(plan: tna.UpdatePlan, params: dict[str, Any], given: list[np.ndarray]) -> float:
    """Relative Frobenius error, by NumPy alone."""
    wrong = sum(float(((a - b) ** 2).sum()) for a, b in zip(plan.deltas(params), given, strict=True))
    total = sum(float((b**2).sum()) for b in given)
    return math.sqrt(wrong / total)


def _normal(rng: np.random.Generator, plan: tna.UpdatePlan) -> list[np.ndarray]:
    return [rng.normal(size=shape) for shape in plan.shapes]


# -- Of every config ---------------------------------------------------------------------------


def _added(plan: tna.UpdatePlan) -> tna.UpdatePlan:
    """Return a plan that can be fitted: of added updates, from a start that needs no arrays and no base."""
    if plan.config.start in ("zero", "random") and plan.config.apply == "add":
        return plan
    # A start that is given cannot be fitted, and one that is computed needs the base weights.
    with pytest.raises(ConfigError, match=r"use start='zero'|use apply='add'|computed from the base weights: bind"):
        tna.decompose([np.ones(shape) for shape in plan.shapes], plan.config, layers=plan._layers)
    config = plan.config.replace(start="zero", apply="add", magnitude_axis="rows")
    return tna.UpdatePlan(config, plan.shapes, plan._layers)


@given(st.data())
def test_any_config_is_fitted_as_its_report_says(data: st.DataObject) -> None:
    plan = _added(data.draw(plans()))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    given = _normal(rng, plan)
    layers = plan._layers
    params, report = tna.decompose(given, plan.config, layers=layers, max_iterations=10)
    assert {name: array.shape for name, array in params.items()} == plan.param_shapes
    assert list(params) == list(plan.param_shapes)
    assert all(array.dtype == np.float64 and np.isfinite(array).all() for array in params.values())
    assert report.error == pytest.approx(_error(plan, params, given), rel=1e-6, abs=1e-12)
    # Never worse than nothing, and never better than what is possible.
    assert 0.0 <= report.bound <= report.error <= 1.0 + 1e-12
    again, same = tna.decompose(given, plan.config, layers=layers, max_iterations=10)
    assert all(np.array_equal(params[name], again[name]) for name in params)
    assert same.to_dict() == report.to_dict()


@pytest.mark.slow
@given(st.data())
def test_nothing_near_an_optimum_is_better(data: st.DataObject) -> None:
    plan = _added(data.draw(plans()))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    given = _normal(rng, plan)
    params, report = tna.decompose(given, plan.config, layers=plan._layers, max_iterations=20)
    certified = [g for g, found in zip(plan.groups, report.groups, strict=True) if found.certified]
    for group in certified:
        for size in (1e-1, 1e-3):
            near = dict(params)
            for full in group.names.values():
                near[full] = params[full] + size * rng.normal(size=params[full].shape)
            # Least squares through F end at a tolerance, and so does this.
            assert _error(plan, near, given) >= report.error - 1e-5


@given(st.data())
def test_an_update_of_zeros_is_the_start_of_training(data: st.DataObject) -> None:
    plan = _added(data.draw(plans()))
    zeros = [np.zeros(shape) for shape in plan.shapes]
    params, report = tna.decompose(zeros, plan.config, layers=plan._layers)
    started = plan.init(dtype="float64")
    assert all(np.array_equal(params[name], started[name]) for name in started)
    assert report.error == 0.0
    assert report.certified
    assert "the updates are zero" in str(report)


def test_a_bound_allows_for_the_rounding_of_a_start_that_is_subtracted() -> None:
    config = presets.lora_fa(2).replace(start="random")
    plan = tna.UpdatePlan(config, [(8, 6)])
    rng = np.random.default_rng(0)
    moved = {name: array + 1e-5 * rng.normal(size=array.shape) for name, array in plan.init(dtype="float64").items()}
    (delta,) = plan.deltas(moved)
    _, report = tna.decompose([delta.astype(np.float32)], config)
    assert report.error > 1e-6
    assert report.bound < 1e-6  # an update in float64 has almost that of no error


RECOVERED = {
    "dense": presets.dense(),
    "lora": presets.lora(3),
    "lora of two terms": presets.lora(2, terms=2),
    "lora by alpha": presets.lora(3, alpha=12),
    "lokr": presets.lokr(3),
    "lokr, all factored": presets.lokr(2, leading="same"),
    "krona": presets.krona(),
    "krona of two terms": presets.krona(terms=2),
    "lonkr": presets.lonkr(3, split_size=2),
    "lotr": presets.lotr(3, weights=4, rows=12, cols=24),
    "lotr as a train": presets.lotr(3, weights=4, rows=12, cols=24, train=True),
    "fact_tk": presets.fact_tk(3, weights=4, rows=12, cols=24),
    "lorta": presets.lorta(3, order=3),
    "lorta of order 5": presets.lorta(2, order=5),
    "superlora": presets.superlora(3),
    "superlora of order 3": presets.superlora(3, order=3),
    "superlora in three groups": presets.superlora(3, groups=3),
    "shuffle": presets.superlora(3, projection="shuffle"),
    "fastfood": presets.fastfood(0.3),
    "linear F": presets.superlora(3, projection="linear", ratio=0.3),
    "linear_v2 F": presets.superlora(3, projection="linear_v2", ratio=0.3),
    "nonlinear F": presets.superlora(2, projection="nonlinear", ratio=0.5),
    "nonlinear_v2 F": presets.superlora(2, projection="nonlinear_v2", ratio=0.5),
    "balanced": tna.Config(rank=2, order=4, groups=1, fold="balanced"),
}
#: Of which the optimum is known.
EXACT = ("dense", "lora", "lora of two terms", "krona", "lotr", "lotr as a train")


@pytest.mark.parametrize("name", RECOVERED)
def test_updates_of_a_config_are_recovered(name: str) -> None:
    plan = tna.UpdatePlan(RECOVERED[name], [(12, 24)] * 4)
    rng, size = np.random.default_rng(0), 0.5 if "nonlinear" in name else 1.0
    made = plan.deltas({full: size * rng.normal(size=shape) for full, shape in plan.param_shapes.items()})
    _, report = tna.decompose(made, plan.config, max_iterations=500)
    # An alternation ends where a step gains less than 1e-6; the slowest of them makes a hundred such steps.
    assert report.error < (1e-13 if name in EXACT else 1e-4)
    assert report.certified or name not in EXACT


# -- The optimum, by formulas of their own -----------------------------------------------------


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_krona_is_the_nearest_kronecker_product(rows: int, cols: int, seed: int) -> None:
    delta = np.random.default_rng(seed).normal(size=(3 * rows, 3 * cols))
    _, report = tna.decompose([delta], presets.krona(split_size=3))
    # Which is held to Van Loan's rearrangement.
    assert report.error == pytest.approx(tna.kronecker_decomposition(delta, [(3, 3), (rows, cols)]).error, abs=1e-12)
    assert report.certified


@given(st.lists(st.integers(2, 4), min_size=3, max_size=4), st.integers(1, 3), st.integers(0, 1000))
def test_a_train_is_within_its_bound(sizes: list[int], rank: int, seed: int) -> None:
    tensor = np.random.default_rng(seed).normal(size=sizes)
    config = tna.Config(rank=rank, order=len(sizes), fold=tuple(sizes), format="tt")
    _, report = tna.decompose(tensor, config)
    # Oseledets: √(d - 1) times the optimum, which is no less than the bound.
    assert report.error <= math.sqrt(len(sizes) - 1) * report.bound + 1e-6


def test_a_kronecker_product_of_factored_splits_gains_in_every_sweep() -> None:
    rng = np.random.default_rng(0)
    errors: list[float] = []
    _, report = tna.decompose(
        [rng.normal(size=(24, 36))],
        presets.lokr(2, leading="same", terms=2),
        tol=0.0,
        max_iterations=60,  # of one start; another one begins where a sweep gains nothing
        progress=lambda step: None if step.error is None else errors.append(step.error),
    )
    assert len(errors) > 3
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(report.error, rel=1e-9)


# -- Libraries, dtypes, devices ----------------------------------------------------------------

EACH = {
    "lora": presets.lora(2),
    "lokr": presets.lokr(2),
    "krona": presets.krona(),
    "loha": presets.loha(2),
    "lorta": presets.lorta(2),
    "cp": tna.Config(rank=2, order=3, groups=1, fold="hypercube"),
    "weighted": tna.Config(rank=2, order=3, groups=1, fold="balanced", format="cp-weighted"),
    "train": tna.Config(rank=2, order=3, groups=1, fold="hypercube", format="tt"),
    "fastfood": presets.fastfood(0.5),
    "linear": presets.superlora(2, projection="linear", ratio=0.5),
    "nonlinear": presets.superlora(2, projection="nonlinear", ratio=0.5),
}


@on_every_library("name", EACH, ["lorta", "weighted", "linear"])
def test_every_library_fits_as_numpy_does_and_keeps_its_arrays(name: str, backend: Backend) -> None:
    config = EACH[name]
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(6, 8)), rng.normal(size=(6, 8))]
    _, expected = tna.decompose(given, config, max_iterations=30)
    before = tensorly.get_backend()
    own = [backend.asarray(delta, "float64") for delta in given]
    params, report = tna.decompose(own, config, max_iterations=30)
    assert tensorly.get_backend() == before
    for array in params.values():
        assert backend.owns(array)
        assert backend.dtype_name(array) == "float64"
        assert backend.device(array) == backend.device(own[0])
    # Iterations amplify the last bits; the error they end at is the same.
    assert report.error == pytest.approx(expected.error, rel=1e-3)
    plan = report.plan
    assert _error(plan, {n: backend.to_numpy(a) for n, a in params.items()}, given) == pytest.approx(report.error)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_single_and_half_precision_are_fitted_in_single(kind: str) -> None:
    torch = pytest.importorskip("torch")
    delta = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).to(getattr(torch, kind)).requires_grad_()
    params, report = tna.decompose([delta], presets.lora(2))
    assert all(array.dtype == torch.float32 and not array.requires_grad for array in params.values())
    left = torch.linalg.svdvals(delta.detach().double())[2:].norm() / delta.detach().double().norm()
    assert report.error == pytest.approx(float(left), rel=1e-5)


@pytest.mark.law("no-global-random-state")
def test_numpys_random_state_is_neither_read_nor_moved() -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=(5, 6, 7))
    config = tna.Config(rank=6, order=3, fold=(5, 6, 7))  # more than a mode's size: filled up at random
    np.random.seed(1)
    random.seed(1)
    before = np.random.get_state()[1].tolist(), random.getstate()
    first = tna.decompose(given, config)[1]
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before
    np.random.seed(2)
    assert tna.decompose(given, config)[1].error == first.error


# -- What else is promised ---------------------------------------------------------------------


def test_random_projections_find_what_stands_out_and_certify_nothing() -> None:
    rng = np.random.default_rng(0)
    u, v = np.linalg.qr(rng.normal(size=(80, 5)))[0], np.linalg.qr(rng.normal(size=(60, 5)))[0]
    delta = (u * [5.0, 4.0, 3.0, 2.0, 1.0]) @ v.T + 1e-3 * rng.normal(size=(80, 60))
    full = tna.decompose([delta], presets.lora(5), svd="full")[1]
    found = tna.decompose([delta], presets.lora(5), svd="randomized")[1]
    assert full.certified
    assert found.groups[0].method == "randomized SVD"
    # The randomized error is no smaller but for rounding: each is the root of a float64 sum of 4,800 squares, and these
    # two may differ in the last bits alone.
    assert full.error * (1.0 - 1e-12) <= found.error <= full.error * 1.001


def test_progress_tells_of_every_group_and_iteration_and_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(6, 6)) for _ in range(3)]
    for config in (tna.Config(rank=1, splits=2, groups="weight"), presets.lora(2)):
        steps: list[Step] = []
        watched, _ = tna.decompose(deltas, config, progress=steps.append)
        assert [step.group for step in steps if step.iteration == 0] == [0, 1, 2]
        assert {step.groups for step in steps} == {3}
        assert all(0 < step.error < 1 for step in steps if step.error is not None)
        assert steps[-1].error is not None
        silent, _ = tna.decompose(deltas, config)
        assert all(np.array_equal(watched[name], array) for name, array in silent.items())


def test_one_tensor_of_any_order() -> None:
    rng = np.random.default_rng(0)
    params, report = tna.decompose(rng.normal(size=7), tna.Config(order=1, format="dense"))
    assert report.plan.shapes == ((1, 7),)
    assert report.certified
    tensor = rng.normal(size=(3, 4, 5))
    params, report = tna.decompose(tensor, tna.Config(rank=3, order=3, fold=(3, 4, 5), format="tucker"))
    made = tna.tucker_to_tensor(
        (params["group0.split0.core"], [params[f"group0.split0.factor{mode}"] for mode in range(3)])
    )
    assert np.linalg.norm(made - tensor) / np.linalg.norm(tensor) == pytest.approx(report.error)


@pytest.mark.law("fold-shape")
def test_a_tensor_of_more_than_two_modes_needs_them_named() -> None:
    tensor = np.random.default_rng(0).normal(size=(6, 7, 8))
    for config in (tna.Config(rank=3), presets.dense(), presets.superlora(2), presets.lorta(2, order=3)):
        with pytest.raises(ShapeError, match=r"shape \(6, 7, 8\) has 3 modes.*fold=\(6, 7, 8\).*a list of matrices"):
            tna.decompose(tensor, config)
        with pytest.raises(ShapeError, match="has 3 modes"):
            tna.search_rank(tensor, config)
    for fold in ((8, 7, 6), (6, 8, 7), (6, 7, 9), (12, 28), (4, 14, 6)):
        with pytest.raises(ShapeError, match=r"cuts across the modes of a tensor of shape \(6, 7, 8\)"):
            tna.decompose(tensor, tna.Config(rank=2, order=len(fold), fold=fold))
    with pytest.raises(ShapeError, match="groups=2 would cut"):
        tna.decompose(tensor, tna.Config(rank=2, order=3, fold=(6, 7, 8), groups=2))
    # Modes merged, and divided.
    for fold in ((6, 7, 8), (42, 8), (6, 56), (336,), (2, 3, 7, 8), (2, 3, 7, 2, 2, 2)):
        _, report = tna.decompose(tensor, tna.Config(rank=2, order=len(fold), fold=fold))
        assert report.plan.groups[0].network.sizes == fold


def test_a_stack_of_weights_as_one_tensor_is_the_same_stack_as_a_list() -> None:
    tensor = np.random.default_rng(0).normal(size=(3, 6, 8))
    for config in (presets.lotr(2, weights=3, rows=6, cols=8), presets.cara(2, weights=3, rows=6, cols=8, heads=2)):
        (one, first), (several, second) = (tna.decompose(given, config) for given in (tensor, list(tensor)))
        assert first.error == second.error
        assert all(np.array_equal(one[name], several[name]) for name in one)


def test_groups_by_layer() -> None:
    rng = np.random.default_rng(0)
    given = [rng.normal(size=(4, 4)) for _ in range(4)]
    _, report = tna.decompose(given, tna.Config(rank=1, groups="layer"), layers=["a", "a", "b", "b"])
    assert len(report.groups) == 2
    with pytest.raises(ConfigError, match="needs layers"):
        tna.decompose(given, tna.Config(rank=1, groups="layer"))
    _, by_role = tna.decompose(given, tna.Config(rank=1, groups="role"), roles=["a", "a", "b", "b"])
    assert by_role.error == report.error


GOOD = np.ones((2, 3))


@pytest.mark.parametrize(
    ("deltas", "settings", "error", "match"),
    [
        *(([GOOD, np.where(np.eye(2, 3) > 0, bad, 1.0)], {}, ShapeError, "NaN, infinity") for bad in (np.nan, np.inf)),
        ([], {}, ShapeError, "is empty"),
        ("x", {}, BackendError, "must be a list of arrays"),
        ([np.ones((2, 3, 4))], {}, ShapeError, "by itself, not in a list"),
        (np.ones(()), {}, ShapeError, "must have elements"),
        (np.ones((0, 3)), {}, ShapeError, "must have elements"),
        ([np.ones((2, 3), int)], {}, BackendError, "real floating"),
        ([GOOD, GOOD.astype("float32")], {}, BackendError, "two dtypes"),
        ([GOOD], {"tol": -1.0}, ConfigError, "tol"),
        ([GOOD], {"tol": "x"}, ConfigError, "tol"),
        ([GOOD], {"max_iterations": 0}, ConfigError, "max_iterations"),
        ([GOOD], {"svd": "best"}, ConfigError, "svd must be one of"),
        ([GOOD], {"seed": -1}, ConfigError, "seed"),
        ([GOOD], {"cfg": {"rank": 1}}, ConfigError, "cfg must be a Config"),
    ],
)
def test_what_cannot_be_decomposed_is_refused(deltas: Any, settings: dict[str, Any], error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        tna.decompose(deltas, **{"cfg": tna.Config(rank=1), **settings})


def test_a_tensor_on_the_meta_device_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="has no values"):
        tna.decompose([torch.empty(3, 4, device="meta")], presets.lora(1))


# -- search_rank -------------------------------------------------------------------------------


@given(st.integers(2, 9), st.integers(2, 9), st.floats(0.01, 0.9), st.integers(0, 1000))
def test_the_rank_found_is_the_smallest(rows: int, cols: int, error: float, seed: int) -> None:
    delta = np.random.default_rng(seed).normal(size=(rows, cols))
    found = tna.search_rank([delta], presets.lora(), max_error=error)
    values = np.linalg.svd(delta, compute_uv=False) ** 2
    tails = [math.sqrt(values[rank:].sum() / values.sum()) for rank in range(len(values) + 1)]
    assert found.rank == max(1, next(rank for rank, tail in enumerate(tails) if tail <= error))
    assert found.config.rank == found.rank
    assert found.report.error <= error


@pytest.mark.parametrize("name", ["cp", "weighted", "train", "lorta", "lotr"])
def test_a_rank_is_found_for_other_formats(name: str) -> None:
    lotr = name == "lotr"  # whose first mode has all of its size
    config = presets.lotr(2, weights=2, rows=6, cols=8) if lotr else EACH[name]
    plan = tna.UpdatePlan(config, [(6, 8)] * 2)
    rng = np.random.default_rng(0)
    made = plan.deltas({full: rng.normal(size=shape) for full, shape in plan.param_shapes.items()})
    found = tna.search_rank(made, config.replace(rank=(None, 5, 5) if lotr else 7), max_error=1e-3)
    assert found.rank == 2 if lotr else found.rank <= 2
    assert found.config.rank == ((None, 2, 2) if lotr else found.rank)


@pytest.mark.parametrize(
    ("config", "settings", "match"),
    [
        (presets.lokr(), {}, r"no rank up to \d+ comes within 0.1: the error there is"),
        (presets.lora(), {"max_rank": 2}, "no rank up to 2 "),
        (presets.dense(), {}, "no rank to search"),
        (tna.Config(rank=(1, 2), format="tucker"), {}, "has 2: give an integer"),
        *((presets.lora(), {"max_error": error}, "error must be") for error in (-0.1, 0.0, 1.0, "x")),
    ],
)
def test_searches_that_fail(config: tna.Config, settings: dict[str, Any], match: str) -> None:
    delta = np.random.default_rng(0).normal(size=(12, 12))
    with pytest.raises(ConfigError, match=match):
        tna.search_rank([delta], config, **{"max_error": 0.1, **settings})


@given(st.data())
def test_updates_without_padding_are_recovered(data: st.DataObject) -> None:
    """One vector or matrix per group, without padding: the optimal fit is exact, and is found."""
    drawn = _added(data.draw(plans(("identity", "shuffle")).filter(lambda plan: plan.config.order <= 2)))
    groups = data.draw(st.sampled_from(["weight", "layer", drawn.config.groups]))
    config = drawn.config.replace(splits=1, terms=1, fold="stack", groups=groups)
    try:
        plan = tna.UpdatePlan(config, drawn.shapes, drawn._layers)
    except ShapeError:  # these groups do not stack; each weight alone does
        plan = tna.UpdatePlan(config.replace(groups="weight"), drawn.shapes, drawn._layers)
    made = plan.deltas(data.draw(parameters(plan)))
    _, report = tna.decompose(made, plan.config, layers=plan._layers, max_iterations=1000, tol=1e-10)
    assert report.error < 1e-5


def test_a_report_keeps_an_update_at_most_twice() -> None:
    """For the bound and the certificate, which are computed when they are read."""
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal((1024, 1024), np.float32) for _ in range(2)]
    tna.decompose(updates, tna.presets.lora(4))
    tracemalloc.start()
    _, report = tna.decompose(updates, tna.presets.lora(4))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 2.1 * sum(update.nbytes for update in updates)
    assert report.bound <= report.error
