"""Fits of groups: bugs that users found, large groups through F, and what is computed when it is read."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import tensorly

import tnadapt as tna
from tests.decomposition.internals import Algebra, group_fits, lower_bound, tensorly_on
from tnadapt import presets
from tnadapt.backends import get_backend
from tnadapt.decomposition import GroupReport


@pytest.mark.parametrize(
    ("kind", "ratio", "shape"),
    [
        *(("linear", ratio, (6, 7)) for ratio in (1.0, 0.4)),
        ("linear_v2", 0.4, (6, 7)),
        *(
            pytest.param("linear", ratio, shape, marks=pytest.mark.slow)
            for ratio in (1.0, 0.98, 0.5)
            for shape in ((16, 16), (30, 34))
        ),
    ],
)
def test_dense_through_an_ill_conditioned_f_is_least_squares(kind: str, ratio: float, shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(0).normal(size=shape)
    config = presets.fastfood(ratio, projection=kind)
    projection = tna.SuperLoRA(config, [shape]).groups[0].projection
    matrix = projection(np.eye(projection.n_in)).T
    best = np.linalg.lstsq(matrix, delta.reshape(-1), rcond=None)[0]
    least = np.linalg.norm(matrix @ best - delta.reshape(-1)) / np.linalg.norm(delta)
    params, report = tna.decompose([delta], config, tol=1e-12)
    assert report.certified
    assert report.error <= least + 1e-9
    if ratio == 0.4:
        np.testing.assert_allclose(params["group0.split0.dense"], best, rtol=1e-6, atol=1e-8)


def test_lsqr_of_a_large_f_certifies_nothing() -> None:
    delta = np.random.default_rng(0).normal(size=(64, 64))
    _, report = tna.decompose([delta], presets.fastfood(1.0))
    assert "LSQR" in report.groups[0].method
    assert not report.certified
    assert report.bound == 0.0


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("columns", [7, 1 << 20])
def test_a_bound_is_not_above_what_rounding_leaves(library: str, columns: int) -> None:
    rows = np.random.default_rng(0).uniform(1, 2, (4, 1)).astype(np.float32)
    delta = rows * np.ones((1, columns), np.float32)  # of rank one
    x: Any = delta if library == "numpy" else pytest.importorskip("torch").from_numpy(delta)
    network = tna.SuperLoRA(presets.lora(1), [delta.shape]).groups[0].network
    assert lower_bound(Algebra(get_backend(x), x), network, x.reshape(-1)) == 0.0


def _w() -> np.ndarray:
    tensor = np.zeros((2, 2, 2))
    tensor[0, 0, 1] = tensor[0, 1, 0] = tensor[1, 0, 0] = 1.0
    return tensor


def _matmul() -> np.ndarray:
    """The tensor of the product of two matrices of 2 × 2."""
    tensor, (i, j, k) = np.zeros((4, 4, 4)), np.indices((2, 2, 2))
    tensor[2 * i + j, 2 * j + k, 2 * k + i] = 1.0
    return tensor


@pytest.mark.parametrize(("tensor", "rank", "least"), [(_w(), 2, 0.05), (_matmul(), 8, 1e-5)])
def test_structured_tensors_do_not_stop_at_a_saddle(tensor: np.ndarray, rank: int, least: float) -> None:
    config = tna.Config(rank=rank, order=3, fold=tensor.shape, groups=1)
    _, report = tna.decompose(tensor, config, max_iterations=2000, tol=1e-9)
    assert report.error < least


def test_alternating_longer_is_not_worse() -> None:
    rng = np.random.default_rng(0)
    # Collinear components in single precision.
    factors = [rng.normal(size=(size, 1)) + 0.05 * rng.normal(size=(size, 6)) for size in (2, 300, 300)]
    tensor = np.einsum("ar,br,cr->abc", *factors).astype(np.float32)
    config = tna.Config(rank=4, order=3, fold=tensor.shape, groups=1)
    errors = [tna.decompose(tensor, config, max_iterations=n, tol=0.0)[1].error for n in (5, 20, 60)]
    assert errors[0] >= errors[1] >= errors[2]


def test_a_hadamard_product_is_no_worse_than_one_split_alone() -> None:
    rng = np.random.default_rng(0)
    for rank in (1, 2, 3):
        for delta in (rng.normal(size=(10, 12)), rng.normal(size=(10, rank)) @ rng.normal(size=(rank, 12))):
            loha = tna.decompose([delta], presets.loha(rank), max_iterations=10)[1].error
            lora = tna.decompose([delta], presets.lora(rank))[1].error
            assert loha <= lora + 1e-12


def test_threads_leave_no_filters_and_go_on_following_the_process() -> None:
    before = list(warnings.filters)
    seen: list[str] = []
    tensor = np.random.default_rng(0).normal(size=(3, 4, 5))
    decomposed, told = threading.Event(), threading.Event()

    def work() -> None:
        tna.decompose(tensor, tna.Config(rank=5, order=3, fold=(3, 4, 5), format="tucker"))
        decomposed.set()
        told.wait(30)
        seen.append(tensorly.get_backend())

    thread = threading.Thread(target=work)
    thread.start()
    assert decomposed.wait(30)
    was, name = tensorly.backend.BackendManager._backend, tensorly.get_backend()
    try:
        pytest.importorskip("torch")
        tensorly.set_backend("pytorch")
        told.set()
        thread.join()
    finally:
        told.set()
        tensorly.set_backend(name)
        assert tensorly.backend.BackendManager._backend is was
    assert seen == ["pytorch"]
    assert warnings.filters == before


def test_tensorlys_backend_is_set_in_one_thread_and_until_an_error_ends_it() -> None:
    torch = pytest.importorskip("torch")
    seen = {tensorly.get_backend()}

    def ask() -> None:
        seen.add(tensorly.get_backend())

    def in_thread(*_: Any) -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    tna.decompose(torch.randn(3, 4, 5), tna.Config(rank=2, order=3, fold=(3, 4, 5)), progress=in_thread)
    in_thread()
    with pytest.raises(ZeroDivisionError), tensorly_on(get_backend(torch.zeros(1))):
        raise ZeroDivisionError
    ask()
    assert seen == {"numpy"}


def test_a_large_argument_of_tanhshrink_overflows_nothing() -> None:
    projection = tna.Projection("nonlinear", 8, 8, seed=0)
    with np.errstate(all="raise", under="ignore"):
        found = projection(np.full(8, 1e30, np.float32))
    assert np.isfinite(found).all()


# -- Alternating least squares through F -----------------------------------------------------------------

ALGEBRA = Algebra(get_backend(np.zeros(1)), np.zeros(1))


def updates_of(plan: tna.SuperLoRA, seed: int, noise: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = plan.deltas({name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()})
    return [delta + (noise * np.std(delta) * rng.normal(size=delta.shape)).astype("f4") for delta in truth]


# Through which F, and what the updates are: of the network, with noise as large, and noise alone.
LARGE = [(ratio, noise) for ratio in (0.05, 0.3, 1.0) for noise in (0.0, 1.0, 1e6)]


@pytest.mark.parametrize(("ratio", "noise"), LARGE)
def test_a_large_group_is_fitted_at_least_as_well_from_the_adjoint(
    ratio: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tna.SuperLoRA(tna.presets.superlora(2, projection="linear", ratio=ratio), [(128, 128)] * 17)
    updates = updates_of(plan, 3, noise)
    _, found = tna.decompose(updates, plan.config)
    monkeypatch.setattr(group_fits, "_LARGE", 1 << 30)
    _, before = tna.decompose(updates, plan.config)
    # Noise has many local optima that are nearly as good as the best.
    assert 1.0 - found.error**2 >= (0.99 if noise > 1.0 else 1.0) * (1.0 - before.error**2) - 1e-6
    if not noise:
        assert found.error < 1e-6


@pytest.mark.parametrize("format", ["cp", "cp-weighted", "tucker"])
@pytest.mark.parametrize("splits", [1, 2])
def test_the_curvature_is_that_of_the_network(format: str, splits: int) -> None:
    config = tna.Config(rank=2, order=2, fold=(12, 24), groups=1, format=format, splits=splits)
    network = tna.SuperLoRA(config, [(12, 24)]).groups[0].network
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    known = 0
    for name, shape in network.shapes.items():
        curvature = group_fits._curvature(network, arrays, ALGEBRA, name)
        if curvature is None:
            continue
        known += 1
        direction = rng.normal(size=shape)
        image = network.whole(ALGEBRA.backend, {**arrays, name: direction})
        back = network.adjoint(ALGEBRA.backend, arrays, image, only=name)[name]
        expected = direction * curvature[0, 0] if len(curvature) == 1 else direction @ curvature
        factor = np.vdot(expected, back) / np.vdot(expected, expected)
        assert factor > 0.0
        assert np.allclose(back, factor * expected)
    assert known == {"cp": 2, "cp-weighted": 2, "tucker": 0}[format] + splits - 1


def test_arrays_without_curvature_are_not_weighted() -> None:
    single = Algebra(ALGEBRA.backend, np.zeros(1, np.float32))
    assert group_fits._inverse(single, None) is None
    assert group_fits._inverse(single, np.zeros((2, 2))) is None
    # A component without weight has no gradient; its rounding is not blown up.
    for factor in (0.0, 1e-30):
        inverse = group_fits._inverse(single, np.diag([1.0, factor]))
        assert inverse is not None
        assert np.isfinite(inverse).all()
        assert inverse.max() < 1e4


# -- What is computed when it is read ----------------------------------------------------------------------

KNOWN = {"size": 4, "norm": 2.0, "iterations": 0, "method": "SVD"}


@pytest.mark.parametrize("decompose", [tna.cp, tna.tucker])
def test_a_matrix_of_decaying_values_is_certified(decompose: Any) -> None:
    matrix = np.random.default_rng(0).normal(size=(120, 100)) @ np.diag(0.5 ** np.arange(100.0))
    result = decompose(matrix, 3)
    assert 0.0 < result.error < 1.0
    assert result.certified
    assert result.bound == pytest.approx(result.error)


@pytest.mark.parametrize("error_later", [False, True])
@pytest.mark.parametrize("use", [lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_report_that_is_computed_later_is_like_any_other(use: Any, error_later: bool) -> None:
    asked: list[str] = []

    def find_error() -> float:
        asked.append("error")
        return 0.5

    def find(error: float) -> tuple[float, bool]:
        asked.append("bound")
        return error / 2.0, False

    plain = GroupReport(**KNOWN, error=0.5, bound=0.25, certified=False)
    error: Any = find_error if error_later else 0.5
    report = GroupReport.computed_later(find, error=error, **KNOWN)
    assert asked == []
    assert (report.error, report.error, asked) == (0.5, 0.5, ["error"] * error_later)
    assert use(report) == plain
    assert (report.certified, report.bound, asked[error_later:]) == (False, 0.25, ["bound"])
    assert repr(report) == repr(plain)
    assert use(GroupReport.computed_later(find, error=error, **KNOWN)) == plain
    with pytest.raises(AttributeError, match="'GroupReport' object has no attribute 'other'"):
        plain.other  # noqa: B018


def test_what_the_caller_does_to_the_updates_changes_no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(8, 6)) / 9.0 for _ in range(3)]
    given = [delta.copy() for delta in deltas]
    config = tna.Config(order=3, rank=2, fold=(4, 2, 6), groups="weight")
    _, report = tna.decompose(deltas, config)
    for delta in deltas:
        delta[:] = 0.0
    expected = tna.decompose(given, config)[1]
    assert 0.0 < report.bound == expected.bound < report.error < 1.0
    # Beyond a number of elements updates are not kept: bounds are computed at once.
    monkeypatch.setattr(group_fits, "_HELD", 100)
    assert tna.decompose(given, config)[1].bound == expected.bound
