"""Exact answers are found where they exist, also from far away, where least squares alone has local minima.

In padded folds, at nearly the greatest rank, of products and sums of products, and of frozen cores.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tensorly

import tnadapt as tna
from tests.decomposition.internals import hadamard_fit, network_fit, parameter_fit
from tests.support.depth import in_depth
from tests.support.exact_cases import cp_tensor, padded_plans, random_deltas
from tnadapt.algebra.products import cp_tensor as cp_to_tensor
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.sources import Mixed, Seeded
from tnadapt.testing.verification import examples

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


def test_padded_folds_are_fitted_in_every_library(backend: Backend) -> None:
    plan = next(padded_plans("tt", 3, "hypercube", 1))
    made = random_deltas(plan, np.random.default_rng(0))
    params, report = tna.decompose([backend.asarray(delta, "float32") for delta in made], plan.config)
    assert report.error < 1e-5
    assert all(backend.dtype_name(array) == "float32" for array in params.values())


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
    plan = tna.SuperLoRA(config, [(19, 10)])
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
    plan = tna.SuperLoRA(config, [(24, 36)])
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

subspace_start = hadamard_fit.subspace_start


def hadamard_product(shape: tuple[int, int], ranks: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    parts = (rng.normal(size=(shape[0], rank)) @ rng.normal(size=(rank, shape[1])) for rank in ranks)
    return math.prod(parts, start=np.ones(shape))


def _of_pairs(pairs: list[tuple[np.ndarray, np.ndarray]], matrix: np.ndarray) -> float:
    return _relative_error(math.prod((a @ b.T for a, b in pairs), start=np.ones(matrix.shape)), matrix)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((8, 12), (2, 2)), ((14, 9), (2, 2)), ((12, 24), (2, 3)), ((12, 24), (1, 2, 3)), ((9, 9), (1, 3)),
     ((9, 300), (2, 2))],
)  # fmt: skip
def test_what_is_such_a_product_is_found(shape: tuple[int, int], ranks: tuple[int, ...]) -> None:
    matrix = hadamard_product(shape, ranks, 1)
    found = subspace_start(matrix, ranks, 1.0, np.random.RandomState(0))
    assert found is not None
    assert [(a.shape, b.shape) for a, b in found] == [((shape[0], r), (shape[1], r)) for r in ranks]
    assert _of_pairs(found, matrix) < 1e-4
    assert np.linalg.matrix_rank(found[-1][1]) == ranks[-1]


def test_a_matrix_far_from_the_rank_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hadamard_fit, "_Search", None)
    noise, rng = np.random.default_rng(0).normal(size=(9, 12)), np.random.RandomState(0)
    assert subspace_start(noise, (2, 2), 0.5, rng) is None
    # The space of the rows determines no product of rank 9 or more.
    assert subspace_start(hadamard_product((9, 12), (3, 3), 1), (3, 3), 0.5, rng) is None


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
        assert _rank_one(tensor)[1].error <= least + 1e-6, seed


def test_rank_one_in_every_library_and_of_an_outer_product(backend: Backend) -> None:
    host = _noisy((4, 5, 6), 0).astype("float32")
    params, report = _rank_one(backend.asarray(host, "float32"))
    made = report.plan.vector({name: backend.to_numpy(array) for name, array in params.items()})
    expected, other = _rank_one(host)
    np.testing.assert_allclose(made, other.plan.vector(expected), atol=1e-5)
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


# -- Matrices that turn one tensor into another ----------------------------------------------------------

# Of general position, of two slices, of coinciding eigenvalues, of few classes, of other orders.
CORES = [(4, 4, 4), (3, 5, 6), (2, 5, 5), (5, 2, 5), (6, 6, 2), (3, 3, 3), (2, 3, 4), (1, 4, 4), (5, 5), (3, 4, 3, 4)]


@pytest.mark.parametrize("core", CORES)
def test_mixing_matrices_of_a_frozen_core_are_recovered(core: tuple[int, ...]) -> None:
    mixed = Mixed(Seeded("uniform"))
    sizes = tuple(size + 2 for size in core)
    config = tna.Config(
        format="tucker", order=len(core), fold=sizes, groups=1, rank=core, alpha=float(2 * max(core)),
        sources={"core": Seeded("normal"), **{f"factor{mode}": mixed for mode in range(len(core))}},
    )  # fmt: skip
    plan = tna.SuperLoRA(config, [(sizes[0], int(np.prod(sizes[1:])))])
    for seed in in_depth(range(100), range(5)):
        rng = np.random.default_rng(seed)
        params = {name: np.eye(len(a)) + rng.normal(size=a.shape) for name, a in plan.init(dtype="float64").items()}
        _, report = tna.decompose(plan.deltas(params), config)
        assert report.error < 1e-5, seed


@pytest.mark.parametrize("columns", [256, 0])
def test_tied_arrays_with_diagonals_are_recovered(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a Jacobian that is formed, and with one that is multiplied by, as for large problems."""
    monkeypatch.setattr(parameter_fit, "_COLUMNS", columns)
    plan = tna.SuperLoRA(tna.presets.tied_lora(2), [(8, 6)] * 3)
    rng = np.random.default_rng(2)
    params = {name: array + rng.normal(size=array.shape) for name, array in plan.init(dtype="float64").items()}
    _, report = tna.decompose(plan.deltas(params), plan.config, max_iterations=300)
    assert report.error < 1e-8


@pytest.mark.parametrize(("name", "apart"), [("vera", True), ("tied_lora", False)])
def test_groups_without_a_common_parameter_are_fitted_by_themselves(name: str, apart: bool) -> None:
    config, shapes = examples()[name]
    plan = tna.SuperLoRA(config, shapes)
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=shape) for shape in shapes]
    most = 100 if apart else 3
    params, report = tna.decompose(deltas, config, max_iterations=most)
    only_first = [deltas[0], *(np.zeros(shape) for shape in shapes[1:])]
    alone, other = tna.decompose(only_first, config, max_iterations=most)
    assert (report.groups[0].error == other.groups[0].error) is apart
    assert all(np.array_equal(params[full], alone[full]) for full in plan.groups[0].names.values()) is apart
    assert not apart or other.iterations < report.iterations
