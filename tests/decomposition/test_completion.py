"""Missing and weighted elements: exact answers are found, and errors are of what is observed."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt.decomposition.completion as completion
from tnadapt.algebra.formats import CP, Dense, Format, TensorTrain, Tucker
from tnadapt.backends import load_backend
from tnadapt.decomposition import Limits
from tnadapt.decomposition.completion import complete

NUMPY = load_backend("numpy")
FORMATS: dict[str, Format] = {
    "cp": CP((6, 7, 8), 2),
    "tucker": Tucker((6, 7, 8), 2),
    "train": TensorTrain((6, 7, 8), 2),
    "train of order 4": TensorTrain((4, 5, 4, 5), 2),
}


def _exact(split: Format, seed: int, kind: str = "float64") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=shape).astype(kind) for name, shape in split.shapes.items()}
    if np.dtype(kind).kind == "c":
        arrays = {name: array + 1j * rng.normal(size=array.shape) for name, array in arrays.items()}
    full = split.tensor(NUMPY, arrays, [(0, size) for size in split.sizes])
    mask = rng.random(full.shape) < 0.5
    assert completion.unobserved(mask) is None
    return full, mask


@pytest.mark.parametrize("kind", ["float64", "complex128"])
@pytest.mark.parametrize("name", FORMATS)
def test_missing_elements_are_recovered(name: str, kind: str) -> None:
    split = FORMATS[name]
    for seed in range(3):
        full, mask = _exact(split, seed, kind)
        found = complete([split], np.where(mask, full, np.nan), mask, limits=Limits(1e-9, 200))
        assert found.error < 1e-10
        assert found.converged
        made = split.tensor(NUMPY, found.arrays, [(0, size) for size in split.sizes])
        np.testing.assert_allclose(made, full, atol=1e-7)


def test_sums_of_kronecker_products_are_completed() -> None:
    rng = np.random.default_rng(0)
    splits = [Dense((3, 4), 1), Dense((4, 3), 1)]
    full = sum(np.kron(rng.normal(size=(3, 4)), rng.normal(size=(4, 3))) for _ in range(2))
    mask = rng.random(full.shape) < 0.6
    found = complete(splits, np.where(mask, full, np.nan), mask, terms=2, limits=Limits(1e-9, 200))
    made = sum(np.kron(found.arrays[f"term{t}.split0.dense"], found.arrays[f"term{t}.split1.dense"]) for t in range(2))
    np.testing.assert_allclose(made, full, atol=1e-8)


def test_hadamard_products_are_completed() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(size=(18, 2)) @ rng.normal(size=(2, 16)) for _ in range(2)]
    full = parts[0] * parts[1]
    mask = rng.random(full.shape) < 0.9
    found = complete([CP((18, 16), 2)] * 2, full, mask, hadamard=True, limits=Limits(1e-6, 100))
    made = [found.arrays[f"term0.split{k}.factor0"] @ found.arrays[f"term0.split{k}.factor1"].T for k in range(2)]
    np.testing.assert_allclose(made[0] * made[1], full, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_make_the_optimum_weighted(name: str) -> None:
    """No small change of the arrays reduces the weighted error; the unweighted optimum has a larger one."""
    split, rng = FORMATS[name], np.random.default_rng(3)
    full, _ = _exact(split, 3)
    noisy = full + 0.3 * full.std() * rng.normal(size=full.shape)
    weights = rng.uniform(0.0, 4.0, size=full.shape) ** 2

    def error(arrays: dict[str, np.ndarray]) -> float:
        made = split.tensor(NUMPY, arrays, [(0, size) for size in split.sizes])
        return float(np.sqrt((weights * (made - noisy) ** 2).sum() / (weights * noisy**2).sum()))

    found = complete([split], noisy, weights, limits=Limits(1e-9, 300))
    assert found.error == pytest.approx(error(found.arrays), rel=1e-9)
    plain = complete([split], noisy, np.ones(full.shape, bool), limits=Limits(1e-9, 300))
    assert found.error < error(plain.arrays)
    for size in (1e-2, 1e-3):
        near = {name: array * (1.0 + size * rng.normal(size=array.shape)) for name, array in found.arrays.items()}
        assert error(near) > found.error - 1e-9


def test_a_large_problem_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "affordable", lambda elements: 0)
    full, mask = _exact(FORMATS["cp"], 1)
    errors: list[float] = []
    found = complete([FORMATS["cp"]], full, mask, limits=Limits(1e-9, 500), watch=lambda _, error: errors.append(error))
    assert list(found.history) == errors == sorted(errors, reverse=True)
    assert found.error < 1e-5


def test_a_start_is_used() -> None:
    full, mask = _exact(FORMATS["cp"], 0)
    first = complete([FORMATS["cp"]], full, mask, limits=Limits(1e-9, 200))
    again = complete([FORMATS["cp"]], full, mask, start=first.arrays, starts=0)
    assert again.error < 1e-10
    assert again.iterations <= 1


def test_zeros_are_fitted_by_zeros() -> None:
    found = complete([CP((2, 3), 1)], np.zeros((2, 3)), np.ones((2, 3), bool))
    assert found.error == 0.0
    assert not any(array.any() for array in found.arrays.values())


def test_the_same_seed_gives_the_same_arrays() -> None:
    full, mask = _exact(FORMATS["train"], 2)
    one, other = (complete([FORMATS["train"]], full, mask, seed=7) for _ in range(2))
    assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
