"""Tensor trains and TT matrices from a given start, some of whose cores are fixed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import relative_error
from tnadapt.backends import Backend
from tnadapt.errors import TnadaptError

from .test_modes import error_of, numbers

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def random_train(shape: tuple[int, ...], rank: int, seed: int, dtype: str = "float64") -> tt.TTTensor:
    """A train whose ranks are possible."""
    return tna.tensor_train(tt.random_tt(shape, rank, random_state=seed, dtype=dtype).to_tensor(), rank)


@pytest.mark.law("decompositions")
@example((4, 3, 4), 2, {1}, 0, "complex128")
@example((3, 1, 3, 2), 3, {0, 3}, 1, "float64")
@example((4, 3, 4, 2), 3, set(), 1, "complex128")
@given(
    SHAPES, st.integers(1, 4), st.sets(st.integers(0, 3)), st.integers(0, 3), st.sampled_from(["float64", "complex128"])
)
def test_the_error_never_rises_and_fixed_cores_stay_to_the_bit(
    shape: tuple[int, ...], rank: int, fixed: set[int], seed: int, dtype: str
) -> None:
    tensor, start = numbers(shape, seed).astype(dtype), random_train(shape, rank, seed + 10, dtype)
    if dtype == "complex128":
        tensor = tensor + 1j * numbers(shape, seed + 5)
    held = {mode for mode in fixed if mode < len(shape)}
    found = tna.tensor_train(tensor, start.rank, init=start, fixed=held, sweeps=4)
    before = error_of(start, tensor)
    assert error_of(found, tensor) <= before * (1.0 + 1e-12) + 1e-15
    assert all(np.array_equal(found[mode], start[mode]) for mode in held)
    assert found.outcome.method == "given start, ALS"
    assert list(found.history) == sorted(found.history, reverse=True)
    assert len(found.history) <= 4
    # The gauge of the last sweep is kept.
    for core in list(found)[:-1] if found.history and not held else ():
        flat = core.reshape(-1, core.shape[2])
        np.testing.assert_allclose(flat.conj().T @ flat, np.eye(core.shape[2]), atol=1e-10)


@pytest.mark.law("decompositions")
@given(SHAPES, st.integers(1, 3), st.sets(st.integers(0, 3)), st.integers(0, 3))
def test_an_exact_start_stays_exact(shape: tuple[int, ...], rank: int, fixed: set[int], seed: int) -> None:
    start = random_train(shape, rank, seed)
    held = [mode for mode in fixed if mode < len(shape)]
    found = tna.tensor_train(start.to_tensor(), start.rank, init=start, fixed=held)
    assert found.error < 1e-14
    assert found.converged
    assert found.certified


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
@pytest.mark.parametrize("fixed", [(0,), (1,), (-1,), (0, 2), (1, 2)])
def test_what_a_fixed_core_belongs_to_is_found(fixed: tuple[int, ...], dtype: str) -> None:
    made = random_train((4, 5, 6, 3), 2, 3, dtype)
    begun = random_train((4, 5, 6, 3), 2, 7, dtype)
    held = {mode % 4 for mode in fixed}
    start = tt.TTTensor([made[mode] if mode in held else begun[mode] for mode in range(4)])
    found = tna.tensor_train(made.to_tensor(), 2, init=start, fixed=fixed, tol=0.0)
    assert found.error < 1e-9


@given(st.integers(0, 1000))
def test_the_last_free_core_is_the_least_squares_solution(seed: int) -> None:
    tensor, start = numbers((4, 3, 5), seed), random_train((4, 3, 5), 2, seed + 1)
    found = tna.tensor_train(tensor, 2, init=list(start), fixed=[0, 2], sweeps=1)
    system = np.einsum("ai,jc->ijac", start[0][0].T, start[2][:, :, 0].T).reshape(20, 4)
    rows = np.linalg.lstsq(system, tensor.transpose(0, 2, 1).reshape(20, 3), rcond=None)[0]
    assert relative_error(found[1], rows.reshape(2, 2, 3).transpose(0, 2, 1)) < 1e-10
    found = tna.tensor_train(tensor, 2, init=list(start), sweeps=1, tol=0.0)
    left = np.einsum("xar,rbs->xabs", *list(found)[:2]).reshape(12, 2)
    expected = np.linalg.lstsq(left, tensor.reshape(12, 5), rcond=None)[0]
    np.testing.assert_allclose(found[2][:, :, 0], expected, atol=1e-10)


def test_a_fixed_core_without_full_rank_and_a_tensor_of_zeros() -> None:
    tensor, start = numbers((3, 4, 5), 1), list(random_train((3, 4, 5), 2, 1))
    for fixed in ((), (0,), (1,), (0, 1, 2)):
        found = tna.tensor_train(np.zeros((3, 4, 5)), 2, init=start, fixed=fixed)
        assert (found.error == 0.0) is (len(fixed) < 3)
        assert all(np.array_equal(found[mode], start[mode]) for mode in fixed)
    start[1] = start[1] * np.array([1.0, 0.0])
    assert tna.tensor_train(tensor, 2, init=start, fixed=[1]).error < error_of(tt.TTTensor(start), tensor)
    start[1] = start[1] * 0.0
    assert tna.tensor_train(tensor, 2, init=start, fixed=[1]).error == pytest.approx(1.0)


def test_a_start_is_improved_beyond_tt_svd_and_the_callback_stops() -> None:
    tensor = numbers((5, 6, 5, 4), 3)
    plain = tna.tensor_train(tensor, 3)
    seen: list[float] = []
    found = tna.tensor_train(tensor, 3, init=plain, callback=lambda _, error: seen.append(error))
    assert found.error < plain.error - 1e-4
    assert found.converged
    assert list(found.history) == seen
    stopped = tna.tensor_train(tensor, 3, init=plain, fixed=[0], callback=lambda *_: True)
    assert (len(stopped.history), stopped.converged) == (1, False)
    kept = tna.tensor_train(tensor, 3, init=plain, sweeps=0)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(kept, plain, strict=True))
    assert kept.error == pytest.approx(plain.error)
    mask = np.random.default_rng(0).random(tensor.shape) < 0.6
    assert tna.tensor_train(plain.to_tensor(), 3, mask=mask, init=plain, max_iterations=1).error < 1e-12


@pytest.mark.parametrize("fixed", [(), (1,)])
def test_on_every_library(fixed: tuple[int, ...], backend: Backend) -> None:
    host, cores = numbers((4, 5, 6), 1), list(random_train((4, 5, 6), 2, 4))
    expected = tna.tensor_train(host, 2, init=cores, fixed=fixed, sweeps=3)
    given_cores = [backend.asarray(core, "float32") for core in cores]
    found = tna.tensor_train(backend.asarray(host, "float32"), 2, init=given_cores, fixed=fixed, sweeps=3)
    assert backend.owns(found[0])
    assert found.error == pytest.approx(expected.error, abs=1e-5)
    for mode in fixed:
        assert np.array_equal(backend.to_numpy(found[mode]), cores[mode].astype(np.float32))


def test_tt_matrices() -> None:
    rows, cols = (2, 3, 2), (3, 2, 2)
    made = tna.tt_matrix(numbers((12, 12), 1), 3, rows=rows, cols=cols)
    matrix = numbers((12, 12), 2)
    found = tna.tt_matrix(matrix, 3, rows=rows, cols=cols, init=made, fixed=[1])
    assert np.array_equal(found[1], made[1])
    assert found.error < np.linalg.norm(made.to_matrix() - matrix) / np.linalg.norm(matrix)
    again = tna.tt_matrix(made.to_matrix(), 3, rows=rows, cols=cols, init=list(made), fixed=[0, -1])
    assert again.error < 1e-14
    plain = tna.tt_matrix(matrix, 2, rows=rows, cols=cols)
    assert tna.tt_matrix(matrix, 2, rows=rows, cols=cols, sweeps=20).error < plain.error
    stopped = tna.tt_matrix(matrix, 2, rows=rows, cols=cols, init=plain, callback=lambda *_: True)
    assert len(stopped.history) == 1


# -- Bad input -----------------------------------------------------------------------------------------

T = numbers((3, 4, 5), 1)
START = random_train((3, 4, 5), 2, 1)
HOLE = [START[0] * np.nan, *START[1:]]
PAIR = tna.tt_matrix(np.eye(4), 1, rows=(2, 2), cols=(2, 2))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tna.tensor_train(T, 2, init="random"), "init must be 'svd', a TTTensor or its cores; got 'random'"),
        (lambda: tna.tensor_train(T, 2, init=3), "init must be 'svd', a TTTensor or its cores; got 3"),  # type: ignore[arg-type]
        (lambda: tna.tensor_train(T, 2, fixed=[0]), r"fixed=\[0\] keeps cores of a start: .* init=TTTensor"),
        (lambda: tna.tensor_train(T, 2, init=START, fixed=[3]), "a mode in fixed must be from 0 to 2"),
        (lambda: tna.tensor_train(T, max_error=0.1, init=START), "a start has its own: give rank="),
        (lambda: tna.tensor_train(T, init=START), "either rank= or max_error="),
        (lambda: tna.tensor_train(T, 3, init=START), r"ranks \(1, 2, 2, 1\); expected .* \(1, 3, 3, 1\)"),
        (lambda: tna.tensor_train(T[:2], 2, init=START), r"init has shape \(3, 4, 5\) .*; expected \(2, 4, 5\)"),
        (lambda: tna.tensor_train(T, 2, init=HOLE), "core 0 of init holds NaN"),
        (lambda: tna.tensor_train(T, 2, init=[T]), "core 0 of a tensor train has shape"),
        (lambda: tna.tensor_train(T, 2, init=START, mask=T < 9.0, weights=T * 0.0 + 2.0, fixed=[0]), "cannot be kept"),
        (lambda: tna.tensor_train(T, 2, init=START, max_iterations=0), "max_iterations must be"),
        (lambda: tna.tt_matrix(np.eye(4), 1, rows=(2, 2), cols=(2, 2), fixed=[1]), "give them as init="),
        (lambda: tna.tt_matrix(np.eye(4), 1, rows=(4, 1), cols=(2, 2), init=PAIR), r"expected \(4, 1\) and \(2, 2\)"),
        (lambda: tna.tt_matrix(np.eye(4), 2, rows=(2, 2), cols=(2, 2), init=PAIR), r"and \(1, 2, 1\)"),
        (lambda: tna.tt_matrix(np.eye(4), 1, rows=(2, 2), cols=(2, 2), init="random"), "init must be 'svd'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(call: Any, text: str) -> None:
    with pytest.raises(TnadaptError, match=text):
        call()


def test_what_is_traced_or_not_in_memory_is_refused(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    cores = [torch.tensor(core) for core in START]
    with pytest.raises(TnadaptError, match=r"inside a trace \(jax.jit, .*\): omit init="):
        torch.func.vmap(lambda x: tna.tensor_train(x, 2, init=cores))(torch.tensor(T)[None])
    with pytest.raises(TnadaptError, match="init is not differentiated: detach the tensor first"):
        tna.tensor_train(torch.tensor(T), 2, init=[cores[0].clone().requires_grad_(), *cores[1:]])
    mapped = np.memmap(tmp_path / "tensor", dtype="float64", mode="w+", shape=T.shape)
    with pytest.raises(TnadaptError, match="neither init nor fixed"):
        tna.tensor_train(mapped, 2, init=START)
