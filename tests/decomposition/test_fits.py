"""Fits: exact answers where they exist, bugs that users found, large groups through F, and late results."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import tensorly

import tnadapt as tna
from tests.decomposition.internals import (
    Algebra,
    group_fits,
    lower_bound,
    network_fit,
    parameter_fit,
    tensorly_on,
)
from tests.support.depth import in_depth
from tests.support.exact_cases import cp_tensor, padded_plans, random_deltas
from tnadapt import presets
from tnadapt.algebra.products import cp_tensor as cp_to_tensor
from tnadapt.backends import get_backend, load_backend
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.decomposition.fits import all_of, holds
from tnadapt.testing.verification import examples

# -- Exact answers, also from far away, where least squares alone has local minima -----------------

NUMPY = load_backend("numpy")
FORMATS = ("cp", "cp-weighted", "tucker", "tt", "cp-batched")
PADDED = [
    *(("hypercube", order, 6) for order in (3, 5)),
    *(
        pytest.param(fold, order, 40, marks=pytest.mark.slow)
        for fold in ("hypercube", "balanced")
        for order in (2, 3, 4, 5)
    ),
]


def _relative_error(made: Any, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(made - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(("fold", "order", "count"), PADDED)
@pytest.mark.parametrize("fmt", FORMATS)
def test_padded_folds_are_fitted_exactly(fmt: str, fold: str, order: int, count: int) -> None:
    if (fmt, order) == ("cp-batched", 2):
        pytest.skip("a batch of vectors has as many parameters as elements")
    for number, plan in enumerate(padded_plans(fmt, order, fold, count)):
        made = random_deltas(plan, np.random.default_rng(number))
        _, report = tna.decompose(made, plan.config)
        assert report.error < 1e-6, (number, plan.shapes, plan.config)


@pytest.mark.parametrize(
    ("fmt", "order", "most"),
    [("cp", 2, 1e-12), ("cp", 3, 0.1), ("cp-weighted", 3, 0.1), ("cp-batched", 3, 0.1), ("tucker", 3, 1e-3),
     ("tt", 3, 1e-3)],
)  # fmt: skip
def test_a_large_padded_fold_starts_from_its_full_rows(
    fmt: str, order: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the equations would be too large, the padding is filled in, from a start that may be exact."""
    monkeypatch.setattr(network_fit, "fit_given", lambda *_: None)
    config = tna.Config(rank=2, order=order, groups=1, fold="hypercube", format=fmt)
    plan = tna.UpdatePlan(config, [(19, 10)])
    made = random_deltas(plan, np.random.default_rng(1))
    _, report = tna.decompose(made, config, max_iterations=100)
    assert report.error < most


# -- CP of nearly the greatest rank ------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "rank", "seeds", "least"),
    [
        ((5, 5, 5), 7, 8, 7),
        pytest.param((4, 4, 4), 5, 16, 14, marks=pytest.mark.slow),
        pytest.param((6, 5, 4), 6, 16, 15, marks=pytest.mark.slow),
        pytest.param((6, 5, 4), 7, 16, 14, marks=pytest.mark.slow),
    ],
)
def test_cp_of_nearly_the_greatest_rank_is_recovered(sizes: tuple[int, ...], rank: int, seeds: int, least: int) -> None:
    config = tna.Config(rank=rank, order=3, fold=sizes, groups=1)
    errors = [tna.decompose(cp_tensor(sizes, rank, seed), config)[1].error for seed in range(seeds)]
    assert sum(error < 1e-6 for error in errors) >= least


# -- Products --------------------------------------------------------------------------------

LOKR = tna.presets.lokr(2, leading="same")
LOHA = tna.presets.loha(2)


@pytest.mark.parametrize(
    ("config", "seeds"),
    [
        (LOKR.replace(terms=2), 3),
        (LOKR.replace(terms=3), 3),
        (LOHA, 3),
        (LOHA.replace(rank=4), 1),
        (LOHA.replace(splits=3), 1),
        *(pytest.param(one, 10, marks=pytest.mark.slow) for one in in_depth([LOHA, LOHA.replace(rank=4)], [LOHA])),
    ],
)
def test_sums_of_kronecker_products_and_hadamard_products_are_recovered(config: tna.Config, seeds: int) -> None:
    plan = tna.UpdatePlan(config, [(24, 36)])
    for seed in range(seeds):
        assert tna.decompose(random_deltas(plan, np.random.default_rng(seed)), config)[1].error < 1e-6


def test_a_cut_row_whose_derivatives_do_not_fit_in_memory_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each element of the cut row has as many derivatives as the core has elements: of larger weights these took 10 GB.
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(20, 21)) for _ in range(5)]
    config = tna.Config(rank=12, order=3, groups=1, fold="hypercube", format="tucker")
    with_row = tna.decompose(deltas, config)[1].error
    monkeypatch.setattr(network_fit, "_ENTRIES", 0)
    monkeypatch.setattr(ObservedElements, "jacobian", None)
    assert tna.decompose(deltas, config)[1].error == pytest.approx(with_row, rel=0.02)


# -- Hadamard products, from the space of their rows -----------------------------------------------------


# The last two are too large for Gauss-Newton, and end by L-BFGS.
@pytest.mark.parametrize(
    ("shape", "most"),
    [((8, 12), 1e-8), ((14, 9), 1e-8), ((12, 24), 1e-8), ((9, 60), 1e-8), ((9, 300), 1e-6), ((300, 9), 1e-6)],
)
def test_what_is_such_a_product_is_found(shape: tuple[int, int], most: float) -> None:
    rng = np.random.default_rng(1)
    factors = [(rng.normal(size=(shape[0], 2)), rng.normal(size=(2, shape[1]))) for _ in range(2)]
    matrix = math.prod((a @ b for a, b in factors), start=np.ones(shape))
    found = tna.hadamard_decomposition(matrix, 2)
    assert found.rank == (2, 2)
    assert _relative_error(found.to_tensor(), matrix) < most


# -- The nearest tensor of rank one ----------------------------------------------------------------------


def _noisy(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape)
    if seed % 2:
        return noise
    return cp_to_tensor(NUMPY, None, [rng.normal(size=(size, 3)) for size in shape]) + 0.3 * noise


def _rank_one(tensor: Any) -> Any:
    """The parameters and the report of the nearest tensor of rank one."""
    return tna.decompose(tensor, tna.Config(rank=1, order=tensor.ndim, fold=tuple(tensor.shape), groups=1))


@pytest.mark.parametrize("shape", [(3, 3, 3), (4, 5, 6), (2, 3, 4, 5), (6, 6, 6, 6), (2, 2, 2, 2, 2), (12, 3, 40)])
def test_rank_one_is_no_worse_than_tensorlys(shape: tuple[int, ...]) -> None:
    for seed in range(4):
        tensor = _noisy(shape, seed)
        theirs = tensorly.decomposition.parafac(tensor, 1, init="svd", n_iter_max=1000, tol=1e-12)
        least = _relative_error(tensorly.cp_to_tensor(theirs), tensor)
        report = _rank_one(tensor)[1]
        assert report.error <= least + 1e-6, seed
        # A step with all factors costs many times a sweep, and gets no further.
        assert report.groups[0].method == "ALS", seed


def test_rank_one_of_an_outer_product() -> None:
    for shape in ((50, 40, 60), (7, 8, 9, 10)):
        rng = np.random.default_rng(0)
        _, report = _rank_one(cp_to_tensor(NUMPY, None, [rng.normal(size=(size, 1)) for size in shape]))
        assert report.error < 1e-14
        assert 0 < report.iterations < 50


def test_three_kronecker_factors() -> None:
    rng = np.random.default_rng(0)
    delta = np.kron(np.kron(rng.normal(size=(4, 4)), rng.normal(size=(3, 3))), rng.normal(size=(2, 2)))
    config = tna.Config(order=2, splits=3, format="dense", groups="weight", fold=(24, 24))
    params, report = tna.decompose([delta], config)
    assert report.groups[0].method.startswith("nearest Kronecker product")
    assert 0.0 <= report.bound <= report.error < 1.0
    assert report.certified == (report.error < 1e-10)
    np.testing.assert_allclose(
        np.linalg.norm(report.plan.deltas(params)[0] - delta), report.error * np.linalg.norm(delta), rtol=1e-6
    )


@pytest.mark.parametrize("columns", [256, 0])
def test_tied_arrays_with_diagonals_are_recovered(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Jacobian that is formed, and with one that is multiplied by, as for large problems."""
    monkeypatch.setattr(parameter_fit, "_COLUMNS", columns)
    plan = tna.UpdatePlan(tna.presets.tied_lora(2), [(8, 6)] * 3)
    rng = np.random.default_rng(2)
    params = {name: array + rng.normal(size=array.shape) for name, array in plan.init(dtype="float64").items()}
    _, report = tna.decompose(plan.deltas(params), plan.config, max_iterations=300)
    assert report.error < 1e-8


@pytest.mark.parametrize(("name", "apart"), [("vera", True), ("tied_lora", False)])
def test_groups_without_a_common_parameter_are_fitted_by_themselves(name: str, apart: bool) -> None:
    config, shapes = examples()[name]
    plan = tna.UpdatePlan(config, shapes)
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=shape) for shape in shapes]
    most = 100 if apart else 3
    params, report = tna.decompose(deltas, config, max_iterations=most)
    only_first = [deltas[0], *(np.zeros(shape) for shape in shapes[1:])]
    alone, other = tna.decompose(only_first, config, max_iterations=most)
    assert (report.groups[0].error == other.groups[0].error) is apart
    assert all(np.array_equal(params[full], alone[full]) for full in plan.groups[0].names.values()) is apart
    assert not apart or other.iterations < report.iterations


# -- Cases that users found ------------------------------------------------------------------------


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
    projection = tna.UpdatePlan(config, [shape]).groups[0].projection
    matrix = projection(np.eye(projection.n_in)).T
    best = np.linalg.lstsq(matrix, delta.reshape(-1), rcond=None)[0]
    least = np.linalg.norm(matrix @ best - delta.reshape(-1)) / np.linalg.norm(delta)
    params, report = tna.decompose([delta], config, tol=1e-12)
    assert report.certified
    assert report.error <= least + 1e-9
    if ratio == 0.4:
        np.testing.assert_allclose(params["group0.split0.dense"], best, rtol=1e-6, atol=1e-8)


def test_cgls_of_a_large_f_certifies_nothing() -> None:
    delta = np.random.default_rng(0).normal(size=(64, 64))
    _, report = tna.decompose([delta], presets.fastfood(1.0))
    assert "CGLS" in report.groups[0].method
    assert not report.certified
    assert report.bound == 0.0


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("columns", [7, 1 << 20])
def test_a_bound_is_not_above_what_rounding_leaves(library: str, columns: int) -> None:
    rows = np.random.default_rng(0).uniform(1, 2, (4, 1)).astype(np.float32)
    delta = rows * np.ones((1, columns), np.float32)  # of rank one
    x: Any = delta if library == "numpy" else pytest.importorskip("torch").from_numpy(delta)
    network = tna.UpdatePlan(presets.lora(1), [delta.shape]).groups[0].network
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


def updates_of(plan: tna.UpdatePlan, seed: int, noise: float) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = plan.deltas({name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()})
    return [delta + (noise * np.std(delta) * rng.normal(size=delta.shape)).astype("f4") for delta in truth]


# Through which F, and what the updates are: of the network, with noise as large, and noise alone.
LARGE = [(ratio, noise) for ratio in (0.05, 0.3, 1.0) for noise in (0.0, 1.0, 1e6)]


@pytest.mark.parametrize(("ratio", "noise"), LARGE)
def test_a_large_group_is_fitted_at_least_as_well_from_the_adjoint(
    ratio: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tna.UpdatePlan(tna.presets.superlora(2, projection="linear", ratio=ratio), [(128, 128)] * 17)
    updates = updates_of(plan, 3, noise)
    _, found = tna.decompose(updates, plan.config)
    monkeypatch.setattr(group_fits, "_LARGE", 1 << 30)
    _, before = tna.decompose(updates, plan.config)
    # Noise has many local optima that are nearly as good as the best.
    assert 1.0 - found.error**2 >= (0.99 if noise > 1.0 else 1.0) * (1.0 - before.error**2) - 1e-6
    if not noise:
        assert found.error < 1e-6


# -- What is computed when it is read ----------------------------------------------------------------------


def test_claims_hold_together_and_none_is_asked_in_vain() -> None:
    def unasked() -> bool:
        pytest.fail("asked")

    assert all_of([True, True]) is True
    assert all_of([unasked, False]) is False
    assert not holds(all_of([True, lambda: True, lambda: False]))
    assert holds(all_of([True, lambda: True]))


@pytest.mark.parametrize("use", [lambda x: x, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_what_is_computed_when_it_is_read_is_like_any_other(use: Any) -> None:
    tensor = np.random.default_rng(0).normal(size=(8, 6, 5))
    makers: list[Any] = [lambda: tna.decompose(list(tensor), presets.lora(2))[1].groups[0]]
    makers += [lambda: tna.tensor_train(tensor, 2).outcome]
    for make in makers:
        read = make()
        plain = type(read)(**{field.name: getattr(read, field.name) for field in dataclasses.fields(read)})
        assert 0.0 < plain.bound <= plain.error
        assert use(make()) == use(read) == plain
        unread = use(make())
        assert (unread.certified, unread.bound, unread.error) == (plain.certified, plain.bound, plain.error)
        assert repr(make()) == repr(plain)
        with pytest.raises(AttributeError, match=f"'{type(read).__name__}' object has no attribute 'other'"):
            plain.other  # noqa: B018


@pytest.mark.parametrize("decompose", [tna.cp, tna.tucker])
def test_a_matrix_of_decaying_values_is_certified(decompose: Any) -> None:
    matrix = np.random.default_rng(0).normal(size=(120, 100)) @ np.diag(0.5 ** np.arange(100.0))
    result = decompose(matrix, 3)
    assert 0.0 < result.error < 1.0
    assert result.certified
    assert result.bound == pytest.approx(result.error)


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
