"""The power iteration is no worse than alternating least squares from singular vectors, and agrees in every library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.algebra.products import cp_tensor
from tnadapt.backends import Backend, load_backend
from tnadapt.decomposition._single_tensor import _als
from tnadapt.decomposition.cp_als import nearest_rank_one
from tnadapt.decomposition.fits import Limits
from tnadapt.decomposition.linear_algebra import Algebra

NUMPY = load_backend("numpy")
SHAPES = ((3, 3, 3), (4, 5, 6), (2, 3, 4, 5), (6, 6, 6, 6), (2, 2, 2, 2, 2), (12, 3, 40))


def _error(tensor: Any, factors: Any) -> float:
    return float(np.linalg.norm(tensor - cp_tensor(NUMPY, None, factors)) / np.linalg.norm(tensor))


def _tensor(shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=shape)
    if seed % 2:
        return noise
    return cp_tensor(NUMPY, None, [rng.normal(size=(size, 3)) for size in shape]) + 0.3 * noise


@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_alternating_least_squares(shape: tuple[int, ...]) -> None:
    for seed in range(4):
        tensor = _tensor(shape, seed)
        algebra = Algebra(NUMPY, tensor)
        ours = _error(tensor, nearest_rank_one(algebra, tensor, Limits())[0])
        theirs = _error(tensor, _als(algebra, 1, tensor, None, Limits())[0])
        assert ours <= theirs + 1e-6, seed


def test_every_library(backend: Backend) -> None:
    if backend.name == "array_api_strict":
        pytest.skip("Algebra is for the libraries of TensorLy")
    host = _tensor((4, 5, 6), 0).astype("float32")
    x = backend.asarray(host, "float32")
    found = nearest_rank_one(Algebra(backend, x), x, Limits())[0]
    expected = nearest_rank_one(Algebra(NUMPY, host), host, Limits())[0]
    made = backend.to_numpy(cp_tensor(backend, None, found))
    np.testing.assert_allclose(made, cp_tensor(NUMPY, None, expected), atol=1e-5)


def test_an_outer_product_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    for shape in ((50, 40, 60), (7, 8, 9, 10)):
        tensor = cp_tensor(NUMPY, None, [rng.normal(size=(size, 1)) for size in shape])
        found, sweeps = nearest_rank_one(Algebra(NUMPY, tensor), tensor, Limits())
        assert _error(tensor, found) < 1e-14
        assert sweeps < 50


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
