"""Missing and weighted elements: what has the ranks is found again, and least squares is least squares."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import relative_error
from tnadapt.decomposition import completion
from tnadapt.errors import BackendError, ConfigError, ShapeError, TnadaptError

from .test_modes import numbers

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
    "kronecker": (
        lambda seed, **words: tt.KroneckerTensor(
            None, [[tt.random_cp((2, 3, 1), 1, random_state=seed, **words).to_tensor(),
                    tt.random_cp((4, 3, 7), 2, random_state=seed + 1, **words).to_tensor()]]
        ),
        lambda t, **w: tna.kronecker_decomposition(t, [(2, 3, 1), (4, 3, 7)], **w),
    ),
    "two kronecker products": (
        lambda seed, **words: tt.KroneckerTensor(
            None, [[tt.random_cp((4, 3, 1), 2, random_state=seed + term, **words).to_tensor(),
                    tt.random_cp((2, 3, 7), 1, random_state=seed + 9 + term, **words).to_tensor()] for term in (1, 5)]
        ),
        lambda t, **w: tna.kronecker_decomposition(t, [(4, 3, 1), (2, 3, 7)], 2, **w),
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
@settings(max_examples=8)
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
    one, other = (fit(tensor, mask=mask, random_state=3) for _ in range(2))
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


def test_a_hadamard_product_is_completed_and_stops() -> None:
    parts = [tt.random_cp((9, 8), 1, random_state=seed) for seed in (1, 2)]
    tensor = tt.HadamardTensor(parts).to_tensor()
    mask = np.random.default_rng(0).random((9, 8)) < 0.7
    found = tna.hadamard_decomposition(np.where(mask, tensor, np.nan), 1, mask=mask)
    assert relative_error(found.to_tensor(), tensor) < 1e-8
    stopped = tna.hadamard_decomposition(numbers((9, 8), 1), 1, mask=np.eye(9, 8) < 0.5, callback=lambda *_: True)
    assert (len(stopped.history), stopped.converged) == (1, False)


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


MASK = known(1, 0.6)
TENSOR = numbers(SHAPE, 1)


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({"mask": MASK[:3]}, ShapeError, "mask must be numbers of"),
        ({"mask": np.full(SHAPE, 2)}, ShapeError, "True .or 1. where an element is known"),
        ({"mask": np.zeros(SHAPE, bool)}, ShapeError, "nothing is known"),
        (
            {"mask": np.arange(9)[:, None] != 4 + np.zeros(SHAPE)},
            ShapeError,
            "index 4 of mode 1 has no",
        ),
        ({"weights": -np.ones(SHAPE)}, ShapeError, "not negative"),
        ({"weights": np.full(SHAPE, np.nan)}, ShapeError, "finite"),
        ({"weights": np.full(SHAPE, "a")}, ShapeError, "weights must be numbers"),
        ({"mask": MASK, "rank": None, "max_error": 0.1}, ConfigError, "need ranks"),
        ({"mask": MASK, "nonnegative": True}, ConfigError, "does not go with mask="),
        ({"mask": MASK, "init": tt.random_cp(SHAPE, 2), "fixed": [0]}, ConfigError, "cannot be kept"),
    ],
)
def test_what_cannot_be_is_refused(words: dict[str, Any], error: type[TnadaptError], text: str) -> None:
    with pytest.raises(error, match=text):
        tna.cp(TENSOR, **{"rank": 2, **words})


def test_missing_elements_without_a_mask_name_it() -> None:
    with pytest.raises(ShapeError, match="pass mask=, True where known"):
        tna.cp(np.where(MASK, TENSOR, np.nan), 2)
    with pytest.raises(ShapeError, match="holds NaN"):  # where it is said to be known
        tna.cp(np.full(SHAPE, np.nan), 2, mask=MASK)
