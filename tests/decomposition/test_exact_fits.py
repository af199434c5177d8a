"""Exact answers are found where they exist: in padded folds, at nearly the greatest rank, and by trains of sweeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support.depth import in_depth
from tests.support.exact_cases import cp_tensor, padded_plans, random_deltas
from tnadapt.algebra.products import tt_tensor
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition import Limits, _network_fit
from tnadapt.decomposition._network_fit import from_full_rows
from tnadapt.decomposition.completion import ObservedElements
from tnadapt.decomposition.linear_algebra import Algebra
from tnadapt.decomposition.tt_svd import improved_train

NUMPY = load_backend("numpy")
FORMATS = ("cp", "cp-weighted", "tucker", "tt", "cp-batched")


def _all_exact(fmt: str, order: int, fold: str, count: int) -> None:
    for number, plan in enumerate(padded_plans(fmt, order, fold, count)):
        made = random_deltas(plan, np.random.default_rng(number))
        _, report = tna.decompose(made, plan.config)
        assert report.error < 1e-6, (number, plan.shapes, plan.config)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("order", [3, 5])
def test_padded_folds_are_fitted_exactly(fmt: str, order: int) -> None:
    _all_exact(fmt, order, "hypercube", 6)


@pytest.mark.slow
@pytest.mark.parametrize("fold", ["hypercube", "balanced"])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
@pytest.mark.parametrize("fmt", FORMATS)
def test_forty_of_forty_padded_folds_are_fitted_exactly(fmt: str, order: int, fold: str) -> None:
    if (fmt, order) == ("cp-batched", 2):
        pytest.skip("a batch of vectors has as many parameters as elements")
    _all_exact(fmt, order, fold, 40)


def test_padded_folds_are_fitted_in_every_library(backend: Backend) -> None:
    plan = next(padded_plans("tt", 3, "hypercube", 1))
    made = random_deltas(plan, np.random.default_rng(0))
    params, report = tna.decompose([backend.asarray(delta, "float32") for delta in made], plan.config)
    assert report.error < 1e-5
    assert all(backend.dtype_name(array) == "float32" for array in params.values())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_large_padded_fold_starts_from_its_full_rows(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the equations would be too large, the padding is filled in, from a start that may be exact."""
    monkeypatch.setattr(_network_fit, "fit_given", lambda *_: None)
    config = tna.Config(rank=2, order=3, groups=1, fold="hypercube", format=fmt)
    plan = tna.SuperLoRA(config, [(19, 10)])
    made = random_deltas(plan, np.random.default_rng(1))
    _, report = tna.decompose(made, config, max_iterations=100)
    assert report.error < (1e-3 if fmt in ("tt", "tucker") else 0.1)


def test_full_rows_and_the_cut_one_are_a_linear_problem() -> None:
    network = tna.SuperLoRA(tna.Config(rank=2, groups=1, fold="hypercube"), [(9, 7)]).groups[0].network
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in network.shapes.items()}
    vec = network.whole(NUMPY, arrays)
    algebra = Algebra(NUMPY, vec)
    way = _network_fit._way(algebra, network)
    found = from_full_rows(algebra, network, way.started, vec, Limits())
    assert found is not None
    np.testing.assert_allclose(network.whole(NUMPY, found), vec, atol=1e-12)
    elements = ObservedElements.of_network(network)
    assert elements.count == 63 < 64 == int(np.prod(network.sizes))


# -- CP of nearly the greatest rank ------------------------------------------------------------


def _cp_errors(sizes: tuple[int, ...], rank: int, count: int) -> list[float]:
    config = tna.Config(rank=rank, order=3, fold=sizes, groups=1)
    return [tna.decompose(cp_tensor(sizes, rank, seed), config)[1].error for seed in range(count)]


def test_cp_of_rank_7_of_a_cube_of_5_is_recovered() -> None:
    assert sum(error < 1e-6 for error in _cp_errors((5, 5, 5), 7, 8)) >= 7


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "rank", "least"), [((4, 4, 4), 5, 14), ((6, 5, 4), 6, 15), ((6, 5, 4), 7, 14)])
def test_cp_of_nearly_the_greatest_rank_is_recovered(sizes: tuple[int, ...], rank: int, least: int) -> None:
    assert sum(error < 1e-6 for error in _cp_errors(sizes, rank, 16)) >= least


# -- Products --------------------------------------------------------------------------------


def test_sums_of_factored_kronecker_products_are_recovered() -> None:
    for terms in (2, 3):
        config = tna.presets.lokr(2, leading="same", terms=terms)
        plan = tna.SuperLoRA(config, [(24, 36)])
        for seed in range(3):
            made = random_deltas(plan, np.random.default_rng(seed))
            assert tna.decompose(made, config)[1].error < 1e-6


@pytest.mark.parametrize(
    ("rank", "parts", "seeds"),
    [
        (2, 2, 3),
        (4, 2, 1),
        (2, 3, 1),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in in_depth([(2, 2, 10), (4, 2, 10)], [(2, 2, 10)])),
    ],
)
def test_hadamard_products_are_recovered(rank: int, parts: int, seeds: int) -> None:
    config = tna.presets.loha(rank).replace(splits=parts)
    plan = tna.SuperLoRA(config, [(24, 36)])
    for seed in range(seeds):
        assert tna.decompose(random_deltas(plan, np.random.default_rng(seed)), config)[1].error < 1e-6


# -- Trains -----------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 5), min_size=3, max_size=5), st.integers(1, 3), st.booleans(), st.integers(0, 1000))
def test_sweeps_over_a_train_only_gain_and_keep_its_gauge(sizes: list[int], rank: int, cplx: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = rng.normal(size=sizes)
    ranks = [1, *[rank] * (len(sizes) - 1), 1]
    ranks = [min(r, int(np.prod(sizes[:m])), int(np.prod(sizes[m:]))) for m, r in enumerate(ranks)]
    cores = [rng.normal(size=(ranks[m], size, ranks[m + 1])) for m, size in enumerate(sizes)]
    if cplx:
        tensor = tensor + 1j * rng.normal(size=sizes)
        cores = [core + 1j * rng.normal(size=core.shape) for core in cores]
    errors: list[float] = []
    found, sweeps, _ = improved_train(NUMPY, tensor, cores, Limits(1e-9, 20), lambda _, error: errors.append(error))
    assert [core.shape for core in found] == [core.shape for core in cores]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) <= sweeps <= 20
    before, after = (np.linalg.norm(tensor - tt_tensor(NUMPY, each)) for each in (cores, found))
    assert after <= before * (1.0 + 1e-12)
    for core in found[:-1] if errors else ():
        flat = core.reshape(-1, core.shape[2])
        np.testing.assert_allclose(flat.conj().T @ flat, np.eye(core.shape[2]), atol=1e-10)


@given(st.integers(0, 1000))
def test_each_core_is_the_least_squares_solution(seed: int) -> None:
    """The last core after a sweep is what dense least squares gives for it."""
    rng = np.random.default_rng(seed)
    tensor = rng.normal(size=(3, 4, 3, 2))
    cores = [rng.normal(size=shape) for shape in ((1, 3, 2), (2, 4, 3), (3, 3, 2), (2, 2, 1))]
    found, _, _ = improved_train(NUMPY, tensor, cores, Limits(0.0, 1))
    left = np.einsum("xar,rbs,sct->xabct", *found[:3]).reshape(36, 2)
    expected = np.linalg.lstsq(left, tensor.reshape(36, 2), rcond=None)[0]
    np.testing.assert_allclose(found[3].reshape(2, 2), expected, atol=1e-10)


def test_noisy_trains_are_better_than_tt_svd() -> None:
    import tensorly

    config = tna.Config(rank=3, order=4, fold=(6, 6, 6, 6), groups=1, format="tt")
    gains = []
    for seed in range(5):
        tensor = np.random.default_rng(seed).normal(size=(6, 6, 6, 6))
        _, report = tna.decompose(tensor, config)
        with tensorly.backend_context("numpy", local_threadsafe=True):
            theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(tensor, [1, 3, 3, 3, 1]))
        gains.append(float(np.linalg.norm(theirs - tensor) / np.linalg.norm(tensor)) - report.error)
    assert min(gains) >= 0.0
    assert np.mean(gains) > 1e-3


def test_a_cut_row_whose_derivatives_do_not_fit_in_memory_is_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each element of the cut row has as many derivatives as the core has elements: of larger weights these took 10 GB.
    rng = np.random.default_rng(0)
    deltas = [rng.normal(size=(20, 21)) for _ in range(5)]
    config = tna.Config(rank=12, order=3, groups=1, fold="hypercube", format="tucker")
    with_row = tna.decompose(deltas, config)[1].error
    monkeypatch.setattr(_network_fit, "_ENTRIES", 0)
    monkeypatch.setattr(ObservedElements, "jacobian", None)
    assert tna.decompose(deltas, config)[1].error == pytest.approx(with_row, rel=0.02)
