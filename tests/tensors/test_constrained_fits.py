"""Fits with missing or weighted elements, without negative numbers, or from a given train."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import relative_error
from tests.support.depth import LONG, in_depth
from tnadapt.backends import Backend
from tnadapt.decomposition import completion
from tnadapt.errors import BackendError, ConfigError, ShapeError, TnadaptError

from .test_forms import error_of, numbers

# -- Missing and weighted elements -----------------------------------------------------------------

SHAPE = (8, 9, 7)
#: A tensor of each form, and how to ask for it.
FORMS: dict[str, tuple[Any, Any]] = {
    "cp": (lambda seed, **words: tt.random_cp(SHAPE, 2, random_state=seed, **words), lambda t, **w: tna.cp(t, 2, **w)),
    "tucker": (
        lambda seed, **words: tt.random_tucker(SHAPE, (2, 3, 2), random_state=seed, **words),
        lambda t, **w: tna.tucker(t, (2, 3, 2), **w),
    ),
    "train": (
        lambda seed, **words: tt.random_tt(SHAPE, 2, random_state=seed, **words),
        lambda t, **w: tna.tensor_train(t, 2, **w),
    ),
}  # fmt: skip
forms = pytest.mark.parametrize("form", FORMS)


def known(seed: int, share: float) -> np.ndarray:
    mask = np.random.default_rng(seed).random(SHAPE) < share
    mask[np.indices(SHAPE).sum(axis=0) % 5 == 0] = True  # every index is seen
    return mask


@pytest.mark.law("decompositions")
@forms
@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_missing_elements_are_found(form: str, kind: str) -> None:
    make, fit = FORMS[form]
    tensor, mask = make(3, dtype=kind).to_tensor(), known(1, 0.6)
    found = fit(np.where(mask, tensor, np.nan), mask=mask)
    assert relative_error(found.to_tensor(), tensor) < 1e-8
    assert found.error < 1e-9
    assert found.converged


@pytest.mark.law("decompositions")
@given(st.sampled_from(sorted(FORMS)), st.integers(0, 20))
@settings(max_examples=60 if LONG else 5)
def test_the_error_is_that_of_the_known_elements(form: str, seed: int) -> None:
    _, fit = FORMS[form]
    tensor, mask = numbers(SHAPE, seed), known(seed, 0.7)
    weights = np.random.default_rng(seed).random(SHAPE) * mask
    found = fit(tensor, weights=weights)
    left = np.sqrt(weights) * (found.to_tensor() - tensor)
    assert found.error == pytest.approx(float(np.linalg.norm(left) / np.linalg.norm(np.sqrt(weights) * tensor)))
    # No small change of an array reduces it: the gradient is zero.
    whole = float(np.linalg.norm(left))
    for number, array in enumerate(found.arrays):
        step = np.random.default_rng(number).normal(size=array.shape)
        step *= 1e-4 * np.linalg.norm(array) / np.linalg.norm(step)
        moved = list(found.arrays)
        errors = []
        for sign in (1.0, -1.0):
            moved[number] = array + sign * step
            made = rebuilt(found, moved).to_tensor()
            errors.append(float(np.linalg.norm(np.sqrt(weights) * (made - tensor))))
        assert abs(errors[0] - errors[1]) < 1e-4 * whole


def rebuilt(found: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(found, tt.CPTensor | tt.TuckerTensor):
        return type(found)(arrays[0], arrays[1:])
    if isinstance(found, tt.KroneckerTensor):
        count = len(found.terms[0])
        return tt.KroneckerTensor(None, [arrays[at : at + count] for at in range(0, len(arrays), count)])
    return tt.TTTensor(arrays)


@forms
def test_a_full_mask_and_equal_weights_are_no_mask(form: str) -> None:
    make, fit = FORMS[form]
    tensor = make(3).to_tensor() + 0.01 * numbers(SHAPE, 5)
    plain = fit(tensor)
    for words in ({"mask": np.ones(SHAPE, bool)}, {"weights": np.ones(SHAPE)}, {"mask": np.ones(SHAPE, int).tolist()}):
        assert np.array_equal(fit(tensor, **words).to_tensor(), plain.to_tensor())
    # Half the weight everywhere is another computation with the same answer.
    assert fit(tensor, weights=np.full(SHAPE, 0.5)).error == pytest.approx(plain.error, rel=1e-3)


@forms
def test_equal_seeds_give_equal_bits_and_zeros_give_zeros(form: str) -> None:
    _, fit = FORMS[form]
    tensor, mask = numbers(SHAPE, 1), known(2, 0.7)
    one, other = (fit(tensor, mask=mask, random_state=3, max_iterations=30) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.arrays, other.arrays, strict=True))
    zeros = fit(np.zeros(SHAPE), mask=mask)
    assert (zeros.error, zeros.to_tensor().any()) == (0.0, False)


@forms
def test_torch_tensors_stay_torch(form: str) -> None:
    torch = pytest.importorskip("torch")
    make, fit = FORMS[form]
    tensor, mask = make(3).to_tensor(), known(1, 0.6)
    found = fit(torch.tensor(tensor), mask=torch.tensor(mask))
    assert all(isinstance(array, torch.Tensor) for array in found.arrays)
    assert relative_error(found.to_tensor().numpy(), tensor) < 1e-8
    with pytest.raises(BackendError, match="detach the tensor"):
        fit(torch.tensor(tensor, requires_grad=True), mask=mask)


def test_a_given_start() -> None:
    tensor, mask = tt.random_cp(SHAPE, 2, random_state=3).to_tensor(), known(1, 0.6)
    for start in (tt.random_cp(SHAPE, 2, random_state=8), tna.cp(tensor, 2, mask=mask)):
        found = tna.cp(tensor, 2, mask=mask, init=start)
        assert relative_error(found.to_tensor(), tensor) < 1e-8
        assert found.history
    assert len(found.history) <= 1, "it was at the optimum"


@forms
@pytest.mark.parametrize("swept", [False, True])
def test_a_callback_stops(form: str, swept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if swept:
        monkeypatch.setattr(completion, "affordable", lambda elements: 0)
    make, fit = FORMS[form]
    tensor, mask = make(3).to_tensor() + 0.1 * numbers(SHAPE, 4), known(1, 0.6)
    seen: list[tuple[int, float]] = []
    whole = fit(tensor, mask=mask, callback=lambda *step: seen.append(step))
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert len(seen) > 2
    assert all(after <= before for (_, before), (_, after) in itertools.pairwise(seen))
    assert whole.error == pytest.approx(seen[-1][1])
    calls: list[float] = []

    def second(number: int, error: float) -> bool:
        calls.append(error)
        return number == 2

    stopped = fit(tensor, mask=mask, callback=second)
    assert calls == [error for _, error in seen[:2]]
    assert len(stopped.history) <= 2
    assert not stopped.converged
    assert stopped.error == pytest.approx(calls[-1])
    limited = fit(tensor, mask=mask, max_iterations=2)
    assert not swept or (len(limited.history), limited.converged) == (2, False)


# -- Without negative elements ---------------------------------------------------------------------

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


def test_a_vector_keeps_its_positive_part() -> None:
    vector = np.array([1.0, -2.0, 3.0])
    for found in (tna.cp(vector, 1, nonnegative=True), tna.tucker(vector, 1, nonnegative=True)):
        np.testing.assert_allclose(found.to_tensor(), [1.0, 0.0, 3.0])


def residual_and_slopes(found: Any, tensor: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """The relative error, and by how much slopes miss the conditions of a minimum under bounds, by their formulas."""
    factors = [found.weights * found.factors[0], *found.factors[1:]]
    left = weights * (np.einsum("ir,jr,kr->ijk", *factors) - tensor)
    norm, worst = float(np.sqrt((weights * tensor**2).sum())), 0.0
    for mode, (formula, factor) in enumerate(
        zip(("ijk,jr,kr->ir", "ijk,ir,kr->jr", "ijk,ir,jr->kr"), factors, strict=True)
    ):
        slope = np.einsum(formula, left, *(other for m, other in enumerate(factors) if m != mode)) * factor.max()
        worst = max(worst, float(np.maximum(-slope, np.where(factor > 0.0, slope, 0.0)).max()))
    return float(np.sqrt((left * left / np.where(weights > 0.0, weights, 1.0)).sum())) / norm, worst / norm**2


@pytest.mark.law("decompositions")
@settings(max_examples=10)
@given(st.integers(0, 50), st.booleans(), st.sampled_from([0.0, 0.2]))
def test_known_elements_and_no_negative_ones(seed: int, weighted: bool, noise: float) -> None:
    rng = np.random.default_rng(seed)
    tensor = TENSOR + noise * rng.random(TENSOR.shape)
    mask = rng.random(tensor.shape) < 0.6
    mask[np.indices(tensor.shape).sum(axis=0) % 4 == 0] = True
    weights = mask * (rng.random(tensor.shape) + 0.5 if weighted else 1.0)
    words = {"weights": weights} if weighted else {"mask": mask}
    found = tna.cp(
        np.where(mask, tensor, 7.0 if weighted else np.nan), 2, nonnegative=True, max_iterations=2000, **words
    )
    assert all((factor >= 0.0).all() for factor in found.factors)
    assert (np.diff(found.history) <= 0.0).all()
    error, miss = residual_and_slopes(found, np.where(mask, tensor, 0.0), weights)
    assert found.error == pytest.approx(error, abs=1e-9)
    assert miss < 1e-4
    assert found.bound <= found.error + 1e-12


@pytest.mark.law("decompositions")
@pytest.mark.parametrize("seed", in_depth(range(4), range(2)))
def test_planted_nonnegative_factors_are_found_with_gaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    factors = [rng.random((size, 3)) * (rng.random((size, 3)) < 0.7) for size in (8, 9, 10)]
    tensor, mask = tt.CPTensor(None, factors).to_tensor(), rng.random((8, 9, 10)) < 0.6
    found = tna.cp(np.where(mask, tensor, np.nan), 3, mask=mask, nonnegative=True, max_iterations=1000)
    assert relative_error(found.to_tensor(), tensor) < 1e-6
    core = tna.tucker(np.where(mask, tensor, np.nan), 3, mask=mask, nonnegative=True, max_iterations=100)
    assert core.error < 1e-3
    assert all((array >= 0.0).all() for array in core.arrays)
    signed = np.where(mask, tensor - 2.0 * np.einsum("ijk,i->ijk", tensor, np.arange(8) % 2), np.nan)
    found = tna.cp(signed, 3, mask=mask, nonnegative=[1, 2], max_iterations=1000)
    assert found.error < 1e-6
    assert (found.factors[0] * found.weights < 0.0).any()


# -- The same factor for all modes -----------------------------------------------------------------


@pytest.mark.law("decompositions")
@settings(max_examples=10)
@given(st.sampled_from([(2, 6, 3), (3, 5, 2), (3, 7, 4), (4, 4, 2)]), st.integers(0, 30), st.sampled_from([0.0, 0.1]))
def test_symmetric_tensors_have_equal_factors(sizes: tuple[int, int, int], seed: int, noise: float) -> None:
    order, size, rank = sizes
    factor, weights = numbers((size, rank), seed), np.where(numbers(rank, seed + 1) < 0.0, -1.0, 1.5)
    tensor = tt.CPTensor(weights, [factor] * order).to_tensor() + noise * numbers((size,) * order, seed)
    turns = list(itertools.permutations(range(order)))
    tensor = sum(tensor.transpose(turn) for turn in turns) / len(turns)
    found = tna.cp(tensor, rank, symmetric=True, max_iterations=2000)
    assert all((other == found.factors[0]).all() for other in found.factors)
    assert found.error == pytest.approx(error_of(found, tensor), abs=1e-9)
    assert (np.diff(abs(found.weights)) <= 0.0).all()
    assert (np.diff(found.history) <= 0.0).all()
    # As no direction reduces the error, by differences of the formula.
    columns, error = found.factors[0], error_of(found, tensor)
    if noise:
        for way in (numbers(columns.shape, 7), numbers(columns.shape, 8)):
            near = [tt.CPTensor(found.weights, [columns + step * way] * order) for step in (-1e-4, 1e-4)]
            assert abs(error_of(near[1], tensor) - error_of(near[0], tensor)) < 1e-5
        assert error <= relative_error_of_planted(factor, weights, tensor) + 1e-9 or order > 2


def relative_error_of_planted(factor: np.ndarray, weights: np.ndarray, tensor: np.ndarray) -> float:
    return error_of(tt.CPTensor(weights, [factor] * tensor.ndim), tensor)


@pytest.mark.parametrize("seed", in_depth(range(5), range(2)))
def test_planted_symmetric_components_are_found(seed: int) -> None:
    factor = numbers((8, 4), seed)
    tensor = tt.CPTensor(np.array([1.0, -2.0, 0.5, 1.5]), [factor] * 4).to_tensor()
    found = tna.cp(tensor, 4, symmetric=True, max_iterations=2000)
    assert found.error < 1e-11
    assert (found.weights < 0.0).sum() == 1
    again = tna.cp(np.ldexp(tensor, 300), 4, symmetric=True, max_iterations=2000)
    assert again.error < 1e-11
    assert tna.cp(tensor, max_error=1e-3, symmetric=True, max_iterations=2000).rank == 4
    assert len(tna.cp(tensor, 4, symmetric=True, callback=lambda *_: True).history) == 1
    assert tna.cp(0.0 * tensor, 2, symmetric=True).error == 0.0
    assert tna.cp(np.arange(3.0), 1, symmetric=True).error < 1e-12


# -- Tensor trains and TT matrices from a given start -----------------------------------------------

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def random_train(shape: tuple[int, ...], rank: int, seed: int, dtype: str = "float64") -> tt.TTTensor:
    """A train whose ranks are possible."""
    return tna.tensor_train(tt.random_tt(shape, rank, random_state=seed, dtype=dtype).to_tensor(), rank)


@pytest.mark.law("decompositions")
@example((4, 3, 4, 2), 3, 1, "complex128")
@given(SHAPES, st.integers(1, 4), st.integers(0, 3), st.sampled_from(["float64", "complex128"]))
def test_the_error_never_rises(shape: tuple[int, ...], rank: int, seed: int, dtype: str) -> None:
    tensor, start = numbers(shape, seed).astype(dtype), random_train(shape, rank, seed + 10, dtype)
    if dtype == "complex128":
        tensor = tensor + 1j * numbers(shape, seed + 5)
    found = tna.tensor_train(tensor, start.rank, init=start, sweeps=4)
    before = error_of(start, tensor)
    assert error_of(found, tensor) <= before * (1.0 + 1e-12) + 1e-15
    assert found.outcome.method == "given start, ALS"
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(found.history) <= 4
    # The gauge of the last sweep is kept.
    for core in list(found)[:-1] if found.history else ():
        flat = core.reshape(-1, core.shape[2])
        np.testing.assert_allclose(flat.conj().T @ flat, np.eye(core.shape[2]), atol=1e-10)


@pytest.mark.law("decompositions")
@given(SHAPES, st.integers(1, 3), st.integers(0, 3))
def test_an_exact_start_stays_exact(shape: tuple[int, ...], rank: int, seed: int) -> None:
    start = random_train(shape, rank, seed)
    found = tna.tensor_train(start.to_tensor(), start.rank, init=start)
    assert found.error < 1e-14
    assert found.converged
    assert found.certified


@given(st.integers(0, 1000))
def test_the_last_core_is_the_least_squares_solution(seed: int) -> None:
    tensor, start = numbers((4, 3, 5), seed), random_train((4, 3, 5), 2, seed + 1)
    found = tna.tensor_train(tensor, 2, init=list(start), sweeps=1, tol=0.0)
    left = np.einsum("xar,rbs->xabs", *list(found)[:2]).reshape(12, 2)
    expected = np.linalg.lstsq(left, tensor.reshape(12, 5), rcond=None)[0]
    np.testing.assert_allclose(found[2][:, :, 0], expected, atol=1e-10)


def test_a_start_for_a_tensor_of_zeros() -> None:
    assert tna.tensor_train(np.zeros((3, 4, 5)), 2, init=random_train((3, 4, 5), 2, 1)).error == 0.0


def test_a_start_is_improved_beyond_tt_svd_and_the_callback_stops() -> None:
    tensor = numbers((5, 6, 5, 4), 3)
    plain = tna.tensor_train(tensor, 3)
    seen: list[float] = []
    found = tna.tensor_train(tensor, 3, init=plain, callback=lambda _, error: seen.append(error))
    assert found.error < plain.error - 1e-4
    assert found.converged
    assert list(found.history) == seen
    stopped = tna.tensor_train(tensor, 3, init=plain, callback=lambda *_: True)
    assert (len(stopped.history), stopped.converged) == (1, False)
    kept = tna.tensor_train(tensor, 3, init=plain, sweeps=0)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(kept, plain, strict=True))
    assert kept.error == pytest.approx(plain.error)
    mask = np.random.default_rng(0).random(tensor.shape) < 0.6
    assert tna.tensor_train(plain.to_tensor(), 3, mask=mask, init=plain, max_iterations=1).error < 1e-12


def test_on_every_library(backend: Backend) -> None:
    host, cores = numbers((4, 5, 6), 1), list(random_train((4, 5, 6), 2, 4))
    expected = tna.tensor_train(host, 2, init=cores, sweeps=3)
    given_cores = [backend.asarray(core, "float32") for core in cores]
    found = tna.tensor_train(backend.asarray(host, "float32"), 2, init=given_cores, sweeps=3)
    assert backend.owns(found[0])
    assert found.error == pytest.approx(expected.error, abs=1e-5)


def test_tt_matrices() -> None:
    rows, cols = (2, 3, 2), (3, 2, 2)
    made = tna.tt_matrix(numbers((12, 12), 1), 3, rows=rows, cols=cols)
    matrix = numbers((12, 12), 2)
    found = tna.tt_matrix(matrix, 3, rows=rows, cols=cols, init=made)
    assert found.error < np.linalg.norm(made.to_matrix() - matrix) / np.linalg.norm(matrix)
    again = tna.tt_matrix(made.to_matrix(), 3, rows=rows, cols=cols, init=list(made))
    assert again.error < 1e-14
    plain = tna.tt_matrix(matrix, 2, rows=rows, cols=cols)
    assert tna.tt_matrix(matrix, 2, rows=rows, cols=cols, sweeps=20).error < plain.error
    stopped = tna.tt_matrix(matrix, 2, rows=rows, cols=cols, init=plain, callback=lambda *_: True)
    assert len(stopped.history) == 1


# -- Bad input -----------------------------------------------------------------------------------------

MASK, NOISE = known(1, 0.6), numbers(SHAPE, 1)
T = numbers((3, 4, 5), 1)
START = random_train((3, 4, 5), 2, 1)
HOLE = [START[0] * np.nan, *START[1:]]
EYE = {"matrix": np.eye(4), "rows": (2, 2), "cols": (2, 2)}
PAIR = tna.tt_matrix(**EYE, rank=1)
NEGATIVE = tt.CPTensor(None, [-factor for factor in FACTORS])


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"mask": MASK[:3]}, ShapeError, r"mask must have the tensor's shape \(8, 9, 7\); got"),
        ({"mask": np.full(SHAPE, 2)}, ShapeError, "True .or 1. where an element is known"),
        ({"mask": np.zeros(SHAPE, bool)}, ShapeError, "nothing is known"),
        ({"mask": np.arange(9)[:, None] != 4 + np.zeros(SHAPE)}, ShapeError, "index 4 of mode 1 has no"),
        ({"weights": -np.ones(SHAPE)}, ShapeError, "not negative"),
        ({"weights": np.full(SHAPE, np.nan)}, ShapeError, "finite"),
        ({"weights": np.full(SHAPE, "a")}, ShapeError, "weights must be real numbers or booleans; got"),
        ({"mask": MASK, "rank": None, "max_error": 0.1}, ConfigError, "need ranks"),
        ({"mask": MASK, "init": tt.random_cp(SHAPE, 2), "fixed": [0]}, ConfigError, "cannot be kept"),
        # Missing elements without a mask name it; and one where they are said to be known.
        ({"tensor": np.where(MASK, NOISE, np.nan)}, ShapeError, "pass mask=, True where known"),
        ({"tensor": np.full(SHAPE, np.nan), "mask": MASK}, ShapeError, "holds NaN"),
        (
            {"tensor": np.where(MASK, NOISE, np.nan), "mask": ~MASK}, ShapeError,
            "holds NaN.*; mask is True where an element is known: for the inverse pass ~mask",
        ),
        ({"rank": None, "max_error": 0.1, "nonnegative": True, "tol": 0.1}, ShapeError, "or leave nonnegative= out"),
        ({"ranks": 3}, TypeError, r"cp\(\) got an unexpected keyword argument 'ranks': did you mean 'rank'\?"),
        ({"nonegative": True}, TypeError, r"'nonegative': did you mean 'nonnegative'\?"),
        ({"n_iter_max": 9}, TypeError, r"'n_iter_max': did you mean 'max_iterations'\?"),
        ({"verbose": 9}, TypeError, "'verbose': it has tensor, rank, max_error, mask"),
        ({"rank": 0.1}, ConfigError, r"rank must be an integer or None; got 0.1; for a relative error, max_error=0.1"),
        ({"rank": np.ones((2, 3))}, ConfigError, r"rank must be .*; give an array of known elements as mask=, and one"),
        ({"tensor": TENSOR * 1j, "nonnegative": True}, BackendError, "needs a real tensor"),
        ({"symmetric": True}, ShapeError, "is not symmetric: symmetric= needs equal sizes"),
        ({"tensor": numbers((5, 5, 5)), "symmetric": True}, ShapeError, "is not symmetric"),
        ({"tensor": np.ones((5, 5)) * 1j, "symmetric": True}, BackendError, "needs a real tensor: leave it out"),
        ({"mask": MASK, "symmetric": True}, ConfigError, "goes without mask, weights, nonnegative"),
        ({"nonnegative": "yes"}, ConfigError, "True for all modes, False, or a list of modes"),
        ({"nonnegative": []}, ConfigError, "True for all modes, False, or a list of modes"),
        ({"nonnegative": [3]}, ShapeError, "mode must be from 0 to 2"),
        ({"tensor": TENSOR, "nonnegative": True, "init": NEGATIVE}, ShapeError, "factor 0 of init has negative"),
        (
            {"tensor": TENSOR, "nonnegative": True, "init": tt.CPTensor(None, FACTORS), "fixed": [0, 1, 2]},
            ConfigError, "nothing is left to fit",
        ),
    ],
)  # fmt: skip
def test_cp_refuses_what_cannot_be(words: dict[str, Any], error: type[TnadaptError], text: str) -> None:
    with pytest.raises(error, match=text):
        tna.cp(**{"tensor": NOISE, "rank": 2, **words})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tna.tucker(TENSOR, 2, nonnegative=[0]), ConfigError, r"cp\(\) takes single modes"),
        (lambda: tna.tucker(TENSOR, 2, nonnegative=True, callback=print), ConfigError, "does not call callback="),
        (lambda: tna.tucker(TENSOR, max_error=0.1, nonnegative=True), ConfigError, "neither max_error= nor fixed="),
        (lambda: tna.tucker(np.ones((9, 2, 2)), (5, 2, 2)), ShapeError, "above 4, the number of columns of its unfold"),
        (
            lambda: tna.tucker(TENSOR, 1, nonnegative=True, init=tna.tucker(-TENSOR, 1)),
            ShapeError, "of init has negative elements",
        ),
        *((lambda words=words: tna.tensor_train(**{"tensor": T, "rank": 2, **words}), TnadaptError, text)
          for words, text in (
            ({"init": "random"}, "init must be 'svd', a TTTensor or its cores; got 'random'"),
            ({"init": 3}, "init must be 'svd', a TTTensor or its cores; got 3"),
            ({"rank": None, "max_error": 0.1, "init": START}, "a start has its own: give rank="),
            ({"rank": None, "init": START}, "either rank= or max_error="),
            ({"rank": 3, "init": START}, r"ranks \(1, 2, 2, 1\); expected .* \(1, 3, 3, 1\)"),
            ({"tensor": T[:2], "init": START}, r"init has shape \(3, 4, 5\) .*; expected \(2, 4, 5\)"),
            ({"init": HOLE}, "core 0 of init holds NaN"),
            ({"init": [T]}, "core 0 of a tensor train has shape"),
            ({"init": START, "max_iterations": 0}, "max_iterations must be"),
        )),
        *((lambda words=words: tna.tt_matrix(**{**EYE, "rank": 1, **words}), TnadaptError, text) for words, text in (
            ({"rows": (4, 1), "init": PAIR}, r"expected \(4, 1\) and \(2, 2\)"),
            ({"rank": 2, "init": PAIR}, r"and \(1, 2, 1\)"),
            ({"init": "random"}, "init must be 'svd'"),
        )),
    ],
)  # fmt: skip
def test_others_refuse_what_cannot_be(call: Any, error: type[TnadaptError], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_what_is_traced_or_not_in_memory_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    cores = [torch.tensor(core) for core in START]
    with pytest.raises(TnadaptError, match=r"inside a trace \(jax.jit, .*\): omit init="):
        torch.func.vmap(lambda x: tna.tensor_train(x, 2, init=cores))(torch.tensor(T)[None])
    with pytest.raises(TnadaptError, match="init is not differentiated: detach the tensor first"):
        tna.tensor_train(torch.tensor(T), 2, init=[cores[0].clone().requires_grad_(), *cores[1:]])
    mapped = np.memmap(tmp_path / "tensor", dtype="float64", mode="w+", shape=T.shape)
    with pytest.raises(TnadaptError, match="no mask, weights or init"):
        tna.tensor_train(mapped, 2, init=START)
    with pytest.raises(ConfigError, match="nonnegative= needs the tensor in memory"):
        tna.tucker(mapped, 2, nonnegative=True)
    recorded = torch.ones(T.shape, requires_grad=True)
    with pytest.raises(BackendError, match="weights is not differentiated: detach it first"):
        tna.cp(torch.tensor(T), 2, weights=recorded)
    with pytest.raises(ShapeError, match="expected 1 or more modes"):
        tna.tucker(np.memmap(tmp_path / "number", "float64", "w+", shape=(1,)).reshape(()), max_error=0.1)
