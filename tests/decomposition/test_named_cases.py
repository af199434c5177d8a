"""Regression tests for bugs that reviews found."""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import tensorly

import tnadapt as tna
from tests.decomposition.internals import Algebra, lower_bound, tensorly_on
from tnadapt import presets
from tnadapt.backends import get_backend


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1.0, 0.98, 0.5])
@pytest.mark.parametrize("shape", [(16, 16), (30, 34)])
def test_least_squares_through_an_ill_conditioned_f_is_at_the_optimum_or_not_certified(
    ratio: float, shape: tuple[int, int]
) -> None:
    delta = np.random.default_rng(0).normal(size=shape)
    config = presets.fastfood(ratio)
    projection = tna.SuperLoRA(config, [shape]).groups[0].projection
    matrix = projection(np.eye(projection.n_in)).T
    best = np.linalg.lstsq(matrix, delta.reshape(-1), rcond=None)[0]
    least = np.linalg.norm(matrix @ best - delta.reshape(-1)) / np.linalg.norm(delta)
    _, report = tna.decompose([delta], config)
    assert report.certified
    assert report.error <= least + 1e-9


def test_lsqr_of_a_large_f_certifies_nothing() -> None:
    delta = np.random.default_rng(0).normal(size=(64, 64))
    _, report = tna.decompose([delta], presets.fastfood(1.0))
    assert "LSQR" in report.groups[0].method
    assert not report.certified
    assert report.bound == 0.0


@pytest.mark.parametrize("kind", ["float32", "float64"])
@pytest.mark.parametrize("power", [-24, -18, 0, 18, 30])
@pytest.mark.parametrize("preset", ["lora", "loha", "lokr", "superlora", "lorta"])
def test_updates_of_any_size_are_fitted_alike(kind: str, power: int, preset: str) -> None:
    config = getattr(presets, preset)(2)
    delta = np.random.default_rng(0).normal(size=(12, 8)).astype(kind)
    _, expected = tna.decompose([delta], config, max_iterations=5)
    # By a power of two, which changes no digit.
    scaled = np.ldexp(delta, round(power * math.log2(10)))
    params, report = tna.decompose([scaled], config, max_iterations=5)
    assert report.error == pytest.approx(expected.error, rel=1e-5)
    made = report.plan.deltas({name: array.astype(np.float64) for name, array in params.items()})[0]
    wide = scaled.astype(np.float64)
    assert np.linalg.norm(made - wide) / np.linalg.norm(wide) == pytest.approx(report.error, rel=1e-3)


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
    tensor = np.zeros((4, 4, 4))
    for i in range(2):
        for j in range(2):
            for k in range(2):
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
