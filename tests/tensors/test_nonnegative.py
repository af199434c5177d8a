"""nonnegative= of cp and tucker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import relative_error
from tnadapt.errors import BackendError, ConfigError, ShapeError

RNG = np.random.default_rng(0)
FACTORS = [RNG.random((size, 2)) for size in (4, 5, 6)]
TENSOR = tt.CPTensor(None, FACTORS).to_tensor()


@pytest.mark.law("decompositions")
@settings(max_examples=10)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple), st.integers(0, 3), st.sampled_from([0.0, 0.5]))
def test_no_element_is_negative_and_the_bound_is_below_the_error(
    shape: tuple[int, ...], seed: int, shift: float
) -> None:
    tensor = np.random.default_rng(seed).random(shape) - shift
    found: list[Any] = [tna.cp(tensor, 1, nonnegative=True, max_iterations=5)]
    if len(shape) > 1:
        found.append(tna.tucker(tensor, 1, nonnegative=True, max_iterations=5))
    for one in found:
        assert all((array >= 0.0).all() for array in one.arrays)
        assert one.error == pytest.approx(np.linalg.norm(one.to_tensor() - tensor) / np.linalg.norm(tensor))
        lost = np.linalg.norm(np.minimum(tensor, 0.0)) / np.linalg.norm(tensor)
        assert lost - 1e-9 <= one.error
        assert one.bound == pytest.approx(min(one.error, lost)) or one.certified


def test_a_nonnegative_tensor_is_recovered() -> None:
    found = tna.cp(TENSOR, 2, nonnegative=True, max_iterations=500)
    assert found.error < 0.01
    assert found.outcome is not None
    assert found.outcome.method == "non-negative HALS"
    assert found.history[-1] == pytest.approx(found.error, abs=1e-6)
    assert tna.tucker(TENSOR, (2, 2, 2), nonnegative=True, max_iterations=40).error < 0.1
    stopped = tna.cp(TENSOR, 2, nonnegative=True, max_iterations=3)
    assert (stopped.converged, len(stopped.history)) == (False, 3)
    # A core that becomes zero starts again.
    found = tna.tucker(np.array([[0.14, -0.23]]), 1, nonnegative=True)
    assert found.error == pytest.approx(0.23 / np.hypot(0.14, 0.23), abs=1e-3)


def test_a_matrix_or_single_modes_may_be_constrained() -> None:
    found = tna.cp(TENSOR[0], 2, nonnegative=True)
    assert min(factor.min() for factor in found.factors) >= 0.0, "no SVD"
    assert found.error < 0.01
    signed = tt.CPTensor(None, [FACTORS[0], FACTORS[1] - 0.5, FACTORS[2]]).to_tensor()
    found = tna.cp(signed, 2, nonnegative=[0, -1], max_iterations=500)
    assert found.error < 1e-3
    assert [bool((factor < 0.0).any()) for factor in found.factors] == [False, True, False]


BOTH = pytest.mark.parametrize("fit", [tna.cp, tna.tucker])


@BOTH
def test_zeros_and_powers_of_two(fit: Any) -> None:
    found = fit(-TENSOR, 1, nonnegative=True)  # without a positive element
    assert found.error == pytest.approx(1.0)
    assert found.certified
    assert fit(0.0 * TENSOR, 1, nonnegative=True).error == 0.0
    plain = fit(TENSOR, 2, nonnegative=True, max_iterations=20)
    for power in (-300, 300):
        scaled = fit(np.ldexp(TENSOR, power), 2, nonnegative=True, max_iterations=20)
        assert scaled.error == pytest.approx(plain.error, rel=1e-9)


def test_starts_fixed_modes_errors_and_seeds() -> None:
    given = tt.CPTensor(np.array([2.0, 3.0]), FACTORS)
    kept = tna.cp(given.to_tensor(), 2, nonnegative=True, init=given, fixed=[0, 2])
    assert (kept.factors[0] == FACTORS[0]).all()
    assert (kept.factors[2] == FACTORS[2]).all()
    assert kept.error < 1e-6
    several = tna.cp(TENSOR, 2, nonnegative=True, init="random", starts=3, max_iterations=30)
    single = tna.cp(TENSOR, 2, nonnegative=True, init="random", max_iterations=30)
    assert several.error <= single.error
    again = tna.cp(TENSOR, 2, nonnegative=True, init="random", starts=3, max_iterations=30)
    assert (again.factors[0] == several.factors[0]).all()
    assert tna.cp(TENSOR, nonnegative=True, max_error=0.02).rank == 2
    more = tna.cp(TENSOR, 2, nonnegative=True, init=given, fixed=[0], starts=2, max_iterations=30)
    assert (more.factors[0] == FACTORS[0]).all()
    start = tna.tucker(TENSOR, 2, nonnegative=True, max_iterations=30)
    assert tna.tucker(TENSOR, 2, nonnegative=True, init=start, max_iterations=30).error <= start.error + 1e-9


@BOTH
def test_every_library_keeps_its_arrays(backend: Any, fit: Any) -> None:
    tensor = backend.asarray(TENSOR.astype("float32"), "float32", None)
    found = fit(tensor, 2, nonnegative=True, max_iterations=30)
    assert found.backend.name == backend.name
    assert {backend.dtype_name(array) for array in found.arrays} == {"float32"}
    assert relative_error(backend.to_numpy(found.to_tensor()), TENSOR) < 0.2


def test_a_memory_map_is_refused(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "tensor", "float64", "w+", shape=(3, 4, 5))
    with pytest.raises(ConfigError, match="nonnegative= needs the tensor in memory"):
        tna.tucker(mapped, 2, nonnegative=True)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tna.cp(TENSOR * 1j, 2, nonnegative=True), BackendError, "needs a real tensor"),
        (lambda: tna.cp(TENSOR, 2, nonnegative="yes"), ConfigError, "True for all modes, False, or a list of modes"),
        (lambda: tna.cp(TENSOR, 2, nonnegative=[]), ConfigError, "True for all modes, False, or a list of modes"),
        (lambda: tna.cp(TENSOR, 2, nonnegative=[3]), ShapeError, "mode must be from 0 to 2"),
        (lambda: tna.cp(TENSOR, 2, nonnegative=True, callback=print), ConfigError, "callback= is not called with"),
        (lambda: tna.tucker(TENSOR, 2, nonnegative=[0]), ConfigError, r"cp\(\) takes single modes"),
        (lambda: tna.tucker(TENSOR, 2, nonnegative=True, callback=print), ConfigError, "callback= is not called"),
        (lambda: tna.tucker(TENSOR, max_error=0.1, nonnegative=True), ConfigError, "neither max_error= nor fixed="),
        (
            lambda: tna.cp(TENSOR, 2, nonnegative=True, init=tt.CPTensor(None, [-one for one in FACTORS])),
            ShapeError,
            "factor 0 of init has negative elements",
        ),
        (
            lambda: tna.cp(TENSOR, 2, nonnegative=True, init=tt.CPTensor(None, FACTORS), fixed=[0, 1, 2]),
            ConfigError,
            "nothing is left to fit",
        ),
        (
            lambda: tna.tucker(TENSOR, 1, nonnegative=True, init=tna.tucker(-TENSOR, 1)),
            ShapeError,
            "of init has negative elements",
        ),
    ],
)
def test_what_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
