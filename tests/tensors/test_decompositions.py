"""All decompositions: laws, peers, bad input; of arrays of every library, and of tensors read block by block."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import tensorly
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
import tnadapt.tensors as tt
from tests.conftest import on_every_library, peak_of, relative_error
from tests.decomposition.internals import BlockPasses, CPSweeps, SparseTensor, completion, cp_als, tt_svd
from tests.support.depth import LONG, in_depth
from tnadapt.backends import Backend, get_backend
from tnadapt.errors import BackendError, ConfigError, ShapeError, TnadaptError

from .test_forms import error_of, numbers

SHAPES = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)


def halves(tensor: Any) -> list[tuple[int, ...]]:
    """Two factors: the first has the whole of the first mode, the second that of the others."""
    shape = tuple(tensor.shape)
    return [(shape[0], *[1] * (len(shape) - 1)), (1, *shape[1:])]


#: Each decomposition with a small rank.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "cp": lambda tensor, **words: tna.cp(tensor, 1, **words),
    "tucker": lambda tensor, **words: tna.tucker(tensor, 2, **words),
    "tensor_train": lambda tensor, **words: tna.tensor_train(tensor, 2, **words),
    "tensor_ring": lambda tensor, **words: tna.tensor_ring(tensor, 2, **words),
    "kronecker_decomposition": lambda tensor, **words: tna.kronecker_decomposition(tensor, halves(tensor), **words),
    "hadamard_decomposition": lambda tensor, **words: tna.hadamard_decomposition(tensor, 1, max_iterations=5, **words),
}
#: Those that take complex tensors, and end at one place.
COMPLEX = st.sampled_from(sorted(set(FUNCTIONS) - {"hadamard_decomposition"}))


@pytest.mark.law("decompositions")
@given(st.sampled_from(sorted(FUNCTIONS)), SHAPES, st.integers(0, 3))
def test_the_error_is_the_error_and_the_bound_is_below(name: str, shape: tuple[int, ...], seed: int) -> None:
    tensor = numbers(shape, seed)
    found = FUNCTIONS[name](tensor)
    assert found.shape == shape
    assert found.error == pytest.approx(error_of(found, tensor), rel=1e-6, abs=1e-12)
    assert 0.0 <= found.bound <= found.error <= 1.0 + 1e-9
    assert isinstance(found.certified, bool)


@pytest.mark.law("decompositions")
@given(COMPLEX, SHAPES, st.integers(-120, 120))
def test_complex_tensors_and_powers_of_two(name: str, shape: tuple[int, ...], power: int) -> None:
    tensor = numbers(shape, 1, "complex128")
    found = FUNCTIONS[name](tensor)
    assert all(array.dtype == np.complex128 for array in found.arrays)
    assert found.error == pytest.approx(error_of(found, tensor), rel=1e-6, abs=1e-12)
    # A power of two changes nothing but the size.
    tensor = numbers(shape, 2)
    one, other = FUNCTIONS[name](tensor), FUNCTIONS[name](np.ldexp(tensor, power))
    assert other.error == pytest.approx(one.error, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_seeds_zeros_lists_and_integers(name: str) -> None:
    tensor = numbers((5, 6, 4), 3)
    for make in (int, np.random.default_rng, np.random.RandomState):
        one, other = (FUNCTIONS[name](tensor, random_state=make(7)) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(one.arrays, other.arrays, strict=True))
    zeros = FUNCTIONS[name](np.zeros((3, 4, 2)))
    assert zeros.error == 0.0
    assert np.array_equal(zeros.to_tensor(), np.zeros((3, 4, 2)))
    listed = [[1, 2, 3], [4, 5, 7]]
    assert FUNCTIONS[name](np.array(listed)).error == FUNCTIONS[name](np.array(listed, float)).error
    if name != "kronecker_decomposition":
        assert FUNCTIONS[name](listed).shape == (2, 3)


@on_every_library("name", FUNCTIONS, ["tucker", "tensor_train"])
def test_on_every_library(name: str, backend: Backend) -> None:
    if backend.name == "array_api_strict" and name == "hadamard_decomposition":
        pytest.skip("decompose computes other libraries in NumPy; their tests are its own")
    host = numbers((5, 4, 6), 5)
    with backend.double_precision():
        tensor = backend.asarray(host, "float64")
        found = FUNCTIONS[name](tensor)
        assert all(backend.owns(array) for array in found.arrays)
        assert all(backend.dtype_name(array) == "float64" for array in found.arrays)
        made = backend.to_numpy(found.to_tensor())
        assert found.error == pytest.approx(float(np.linalg.norm(made - host) / np.linalg.norm(host)), rel=1e-9)
        if name in ("tensor_train", "kronecker_decomposition"):  # without an iteration that may end elsewhere
            assert relative_error(made, FUNCTIONS[name](host).to_tensor()) < 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("tensor", "error", "text"),
    [
        (np.array([[1.0, np.nan], [0.0, 1.0]]), ShapeError, "NaN"),
        (np.array([[1.0, np.inf], [0.0, 1.0]]), ShapeError, "infinity"),
        (np.zeros((0, 3)), ShapeError, "nothing to decompose"),
        (np.array([["a", "b"]]), BackendError, "numbers"),
        ("text", BackendError, "got str"),
        ([[1.0], [1.0, 2.0]], ShapeError, "differ in length"),
    ],
    ids=["nan", "infinity", "empty", "letters", "text", "ragged"],
)
def test_what_is_no_tensor_is_refused(name: str, tensor: Any, error: type[Exception], text: str) -> None:
    function = getattr(tna, name)
    shapes = [[(1, 1), (2, 2)]] if name == "kronecker_decomposition" else [1]
    with pytest.raises(error, match=text):
        function(tensor, *shapes)


# -- Exact where there is an exact answer --------------------------------------------------------------


@pytest.mark.law("decompositions")
@given(SHAPES, st.integers(1, 3), st.integers(0, 3))
def test_what_has_the_rank_is_found(shape: tuple[int, ...], rank: int, seed: int) -> None:
    for found, tensor in (
        (tna.tensor_train(made := tt.random_tt(shape, rank, random_state=seed).to_tensor(), rank), made),
        (tna.tucker(made := tt.random_tucker(shape, rank, random_state=seed).to_tensor(), rank), made),
    ):
        assert error_of(found, tensor) < 1e-12
        assert found.certified
        assert found.converged


# -- The fewest parameters for an error ----------------------------------------------------------------


def with_noise(tensor: Any, part: float = 0.1, seed: int = 1) -> np.ndarray:
    host = np.asarray(tensor)
    noise = numbers(host.shape, seed)
    return host + part * np.linalg.norm(host) / np.linalg.norm(noise) * noise


#: Tensors of a shape and a seed.
TENSORS: dict[str, Callable[[tuple[int, ...], int], np.ndarray]] = {
    "normal": numbers,
    "planted": lambda shape, seed: with_noise(tt.random_cp(shape, 1, random_state=seed).to_tensor(), seed=seed),
    "decaying": lambda shape, seed: numbers(shape, seed) * np.exp(-0.5 * np.indices(shape).sum(0)),
    "smooth": lambda shape, seed: numbers(shape, seed).cumsum(0).cumsum(-1),
    "zero": lambda shape, seed: np.zeros(shape),
}
#: Each form that chooses ranks by an error, of any tensor.
BY_ERROR: dict[str, Callable[[np.ndarray, float], Any]] = {
    "tucker": lambda tensor, error: tna.tucker(tensor, max_error=error),
    "HOSVD": lambda tensor, error: tna.tucker(tensor, max_error=error, max_iterations=0),
    "train": lambda tensor, error: tna.tensor_train(tensor, max_error=error),
    "ring": lambda tensor, error: tna.tensor_ring(tensor, max_error=error, max_iterations=10),
    "kronecker": lambda tensor, error: tna.kronecker_decomposition(tensor, halves(tensor), max_error=error),
    "round": lambda tensor, error: tna.tensor_train(tensor, max_error=0.0).round(max_error=error),
}


@pytest.mark.law("decompositions")
@given(
    st.sampled_from(sorted(BY_ERROR)), st.sampled_from(sorted(TENSORS)), SHAPES, st.integers(0, 99),
    st.floats(1e-6, 0.95), st.sampled_from([0, -900, 900]),
)  # fmt: skip
def test_ranks_keep_to_their_error(
    name: str, tensors: str, shape: tuple[int, ...], seed: int, error: float, power: int
) -> None:
    tensor = TENSORS[tensors](shape, seed)
    found = BY_ERROR[name](np.ldexp(tensor, power), error)
    made = np.ldexp(np.asarray(found.to_tensor()), -power)
    assert np.linalg.norm(made - tensor) <= (error * (1.0 + 1e-9) + 1e-13) * np.linalg.norm(tensor)


@on_every_library("name", ["tucker", "tensor_train", "tensor_ring"], ["tensor_train"])
def test_an_error_gives_the_same_ranks_in_every_library(name: str, backend: Backend) -> None:
    host = with_noise(tt.random_tucker((17, 16, 18), 3, random_state=2).to_tensor())
    with backend.double_precision():
        found = getattr(tna, name)(backend.asarray(host, "float64"), max_error=0.12)
        assert found.rank == getattr(tna, name)(host, max_error=0.12).rank
        assert found.error <= 0.12
        if name == "tensor_train":
            rounded = tna.tensor_train(host, max_error=0.01).round(max_error=0.12)
            double = tna.tensor_train(backend.asarray(host, "float64"), max_error=0.01)
            assert double.round(max_error=0.12).rank == rounded.rank


def fewest_of_trains(tensor: np.ndarray, error: float) -> int:
    """The fewest parameters of all truncations that TT-SVD can make of three modes."""
    sizes, counts = tensor.shape, []
    _, values, right = np.linalg.svd(tensor.reshape(sizes[0], -1), full_matrices=False)
    allowed = error**2 * np.sum(values**2)
    for rank in range(1, len(values) + 1):
        rest = (values[:rank, None] * right[:rank]).reshape(-1, sizes[2])
        squares = np.linalg.svd(rest, compute_uv=False) ** 2
        for last in range(1, len(squares) + 1):
            if np.sum(values[rank:] ** 2) + np.sum(squares[last:]) <= allowed:
                counts.append(rank * sizes[0] + rank * sizes[1] * last + last * sizes[2])
    return min(counts)


def fewest_of_tucker(tensor: np.ndarray, error: float) -> int:
    """The fewest parameters of all boxes of the core of the HOSVD of three modes."""
    unfoldings = [np.moveaxis(tensor, mode, 0).reshape(size, -1) for mode, size in enumerate(tensor.shape)]
    bases = [np.linalg.svd(unfolding, full_matrices=False)[0] for unfolding in unfoldings]
    energy = np.einsum("abc,ai,bj,ck->ijk", tensor, *bases) ** 2
    ranks = itertools.product(*(range(1, size + 1) for size in energy.shape))
    return min(
        math.prod(rank) + int(np.dot(rank, tensor.shape))
        for rank in ranks
        if energy.sum() - energy[: rank[0], : rank[1], : rank[2]].sum() <= error**2 * energy.sum()
    )


@pytest.mark.law("decompositions")
@given(
    st.sampled_from(["decaying", "normal", "planted", "smooth"]), st.tuples(*[st.integers(1, 6)] * 3),
    st.integers(0, 99), st.floats(1e-3, 0.95),
)  # fmt: skip
def test_parameters_are_about_the_fewest_that_truncations_need(
    tensors: str, shape: tuple[int, int, int], seed: int, error: float
) -> None:
    tensor = TENSORS[tensors](shape, seed)
    assert tna.tensor_train(tensor, max_error=error).num_parameters <= 1.1 * fewest_of_trains(tensor, error)
    for iterations in (0, 100):
        found = tna.tucker(tensor, max_error=error, max_iterations=iterations)
        assert found.num_parameters <= 1.1 * fewest_of_tucker(tensor, error)


@pytest.mark.law("decompositions")
@given(
    st.sampled_from(["decaying", "normal", "planted", "smooth"]), st.lists(st.integers(1, 4), min_size=2, max_size=7),
    st.integers(0, 99), st.floats(1e-4, 0.95), st.sampled_from(["float64", "complex128"]),
)  # fmt: skip
def test_ranks_of_trains_are_the_least_where_these_suffice_and_do_not_need_all_digits(
    tensors: str, shape: list[int], seed: int, error: float, dtype: str
) -> None:
    tensor = TENSORS[tensors](tuple(shape), seed) * np.exp(1j if dtype == "complex128" else 0.0)
    found = tna.tensor_train(tensor, max_error=error)
    # By the singular values of each unfolding, below which no train is close enough.
    unfoldings = [tensor.reshape(math.prod(shape[:bond]), -1) for bond in range(1, len(shape))]
    squares = [np.linalg.svd(unfolding, compute_uv=False) ** 2 for unfolding in unfoldings]
    ranks = [1 + sum(np.cumsum(x[::-1])[:-1] > (1.0 + 1e-9) * error**2 * x.sum()) for x in squares]
    least = tna.tensor_train(tensor, ranks)
    if least.error <= error:
        assert found.num_parameters <= least.num_parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tt_svd, "_SQUARED", 1.0)
        assert tna.tensor_train(tensor, max_error=error).num_parameters <= 1.05 * found.num_parameters
        assert found.num_parameters <= 1.05 * tna.tensor_train(tensor, max_error=error).num_parameters


@pytest.mark.parametrize("error", [0.105, 0.11, 0.12, 0.15, 0.2])
def test_planted_ranks_are_found_in_noise(error: float) -> None:
    for shape, rank in (((25, 26, 27), 4), ((12, 11, 10, 9), 3)):
        planted = tt.random_tucker(shape, rank, random_state=1)
        noisy = with_noise(planted.to_tensor())
        assert tna.tucker(noisy, max_error=error).num_parameters <= 1.3 * planted.num_parameters
    for shape, rank in (((25, 26, 27), 4), ((4,) * 8, 3), ((2,) * 12, 2)):
        planted_train = tt.random_tt(shape, rank, random_state=2)
        noisy = with_noise(planted_train.to_tensor())
        assert tna.tensor_train(noisy, max_error=error).num_parameters <= 1.3 * planted_train.num_parameters
    train = tt.TTTensor(tna.tensor_train(noisy, max_error=1e-9))
    assert train.round(max_error=error).num_parameters <= 1.3 * planted_train.num_parameters
    matrix = tt.random_tt_matrix((3, 4, 3), (4, 3, 4), 2, random_state=3)
    found = tna.tt_matrix(with_noise(matrix.to_matrix()), rows=(3, 4, 3), cols=(4, 3, 4), max_error=error)
    assert found.num_parameters <= 1.3 * matrix.num_parameters
    ring = tt.random_tr((7, 8, 9), 2, random_state=4)
    assert tna.tensor_ring(with_noise(ring.to_tensor()), max_error=error).num_parameters <= 1.3 * ring.num_parameters


def test_a_small_mode_is_not_cut_too_early() -> None:
    # The third color has less than a third of the squared error, and is worth many rows and columns.
    rows, cols, colors = np.indices((40, 40, 3))
    image = 1.0 / (1.0 + np.abs(rows - cols)) + 0.09 * (colors == 2) * np.sin(rows) * np.cos(cols)
    for turned in (image, image.transpose(2, 0, 1)):
        assert tna.tensor_train(turned, max_error=0.1).num_parameters <= 1.1 * fewest_of_trains(turned, 0.1)
        assert tna.tucker(turned, max_error=0.1).num_parameters <= 1.1 * fewest_of_tucker(turned, 0.1)


@pytest.mark.law("decompositions")
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
def test_a_matrix_has_the_singular_values_optimum(rows: int, cols: int, rank: int) -> None:
    rank = min(rank, rows, cols)
    matrix = numbers((rows, cols), rank)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = math.sqrt(float((values[rank:] ** 2).sum() / (values**2).sum()))
    for found in (tna.cp(matrix, rank), tna.tensor_train(matrix, rank), tna.tucker(matrix, rank)):
        assert found.error == pytest.approx(best, abs=1e-12)
        assert found.certified


@pytest.mark.law("decompositions")
@given(st.data())
def test_the_nearest_kronecker_product_is_the_rearrangements_svd(data: st.DataObject) -> None:
    left, right = (data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in range(2))
    matrix = numbers((left[0] * right[0], left[1] * right[1]), 4)
    terms = data.draw(st.integers(1, 3))
    # Van Loan's rearrangement, written out: one row for each element of the first factor.
    blocks = matrix.reshape(left[0], right[0], left[1], right[1]).transpose(0, 2, 1, 3)
    values = np.linalg.svd(blocks.reshape(left[0] * left[1], -1), compute_uv=False)
    best = math.sqrt(float((values[terms:] ** 2).sum() / (values**2).sum()))
    found = tna.kronecker_decomposition(matrix, [left, right], terms)
    assert found.error == pytest.approx(best, abs=1e-12)
    assert found.certified
    whole = sum(np.kron(*term) for term in found.scaled_terms())
    assert relative_error(found.to_tensor(), whole) < 1e-12


def test_a_product_of_three_is_found() -> None:
    factors = [numbers(shape, seed) for seed, shape in enumerate([(2, 3), (3, 2), (4, 1)])]
    tensor = np.kron(np.kron(factors[0], factors[1]), factors[2])
    found = tna.kronecker_decomposition(tensor, [one.shape for one in factors])
    assert error_of(found, tensor) < 1e-12
    for ours, one in zip(found.factors, factors, strict=True):
        cosine = np.vdot(ours, one) / np.linalg.norm(ours) / np.linalg.norm(one)
        assert abs(cosine) == pytest.approx(1.0)
    assert tna.kronecker_decomposition(tensor, [one.shape for one in factors], max_error=1e-6).rank == 1


def test_a_tt_matrix_of_a_kronecker_product_has_rank_one() -> None:
    matrix = np.kron(numbers((3, 2), 1), numbers((4, 5), 2))
    found = tna.tt_matrix(matrix, 1, rows=(3, 4), cols=(2, 5))
    assert relative_error(found.to_matrix(), matrix) < 1e-12
    again = tna.tt_matrix(matrix.reshape(3, 4, 2, 5), 1)
    assert np.array_equal(again.to_matrix(), found.to_matrix())
    assert tna.tt_matrix(matrix, max_error=1e-9, rows=(3, 4), cols=(2, 5)).rank == (1, 1, 1)


# -- Numbers of any magnitude ---------------------------------------------------------------------------


#: Fits that iterate, of a tensor; some start from arrays with its size in one of them.
ITERATED: dict[str, Callable[[np.ndarray], Any]] = {
    "cp": lambda x: tna.cp(x, 2),
    "nonnegative cp": lambda x: tna.cp(abs(x), 2, nonnegative=True),
    "cp with gaps": lambda x: tna.cp(x, 2, mask=np.indices(x.shape).sum(0) % 4 > 0),
    "cp with weights": lambda x: tna.cp(x, 2, weights=1.0 + np.indices(x.shape).sum(0)),
    "cp with a penalty": lambda x: tna.cp(x, 2, ridge=1e-3),
    "cp from a start": lambda x: tna.cp(x, 2, init=start_of(x), fixed=[0]),
    "tucker with gaps": lambda x: tna.tucker(x, 2, mask=np.indices(x.shape).sum(0) % 4 > 0),
    "nonnegative tucker": lambda x: tna.tucker(abs(x), 2, nonnegative=True),
    "train with gaps": lambda x: tna.tensor_train(x, 2, mask=np.indices(x.shape).sum(0) % 4 > 0),
    "ring": lambda x: tna.tensor_ring(x, 2),
    "kronecker": lambda x: tna.kronecker_decomposition(x.reshape(8, 15), [(2, 1), (2, 3), (2, 5)]),
}


def start_of(tensor: np.ndarray) -> tt.CPTensor:
    factors = [numbers((size, 2), size).astype(tensor.dtype) for size in tensor.shape]
    return tt.CPTensor(None, [*factors[:-1], factors[-1] * np.max(abs(tensor))])


@pytest.mark.law("decompositions")
@pytest.mark.parametrize("name", ITERATED)
@pytest.mark.parametrize(
    ("dtype", "power"), [("float64", 1000), ("float64", -1000), ("float32", 100), ("float32", -100)]
)
def test_a_multiple_by_a_power_of_two_has_the_same_fit(name: str, dtype: str, power: int) -> None:
    planted = tt.random_cp((4, 5, 6), 2, random_state=0).to_tensor()
    tensor = with_noise(planted, 0.05).astype(dtype)
    found, multiple = ITERATED[name](tensor), ITERATED[name](np.ldexp(tensor, power))
    assert multiple.error == pytest.approx(found.error, rel=1e-4)
    assert multiple.outcome.stopped == found.outcome.stopped
    made = np.ldexp(np.asarray(multiple.to_tensor()), -power)
    assert relative_error(made, found.to_tensor()) < (1e-5 if dtype == "float64" else 1e-2)


# -- Against TensorLy ----------------------------------------------------------------------------------


@pytest.mark.law("decompositions")
@given(st.lists(st.integers(2, 6), min_size=3, max_size=4).map(tuple), st.integers(1, 3))
def test_trains_are_tensorlys(shape: tuple[int, ...], rank: int) -> None:
    tensor = numbers(shape, 6)
    theirs = tensorly.decomposition.tensor_train(tensor, [1, *[rank] * (len(shape) - 1), 1])
    assert error_of(tna.tensor_train(tensor, rank), tensor) == pytest.approx(
        float(np.linalg.norm(theirs.to_tensor() - tensor) / np.linalg.norm(tensor)), rel=1e-9
    )


@pytest.mark.law("decompositions")
@given(SHAPES, st.integers(1, 4), st.integers(0, 9), st.sampled_from([0.0, 0.15, 1.0]))
def test_decompose_has_the_error_of_the_function_of_its_format(
    shape: tuple[int, ...], rank: int, seed: int, noise: float
) -> None:
    factors = [numbers((size, rank), seed + mode) for mode, size in enumerate(shape)]
    for factor in factors:
        factor[:, -1] = factor[:, 0] + noise * factor[:, -1]
    tensor = tt.CPTensor(None, factors).to_tensor() + (noise == 1.0) * numbers(shape, seed)
    useful = min(rank, math.prod(shape) // max(shape))
    results = tna.cp(tensor, useful), tna.tucker(tensor, rank), tna.tensor_train(tensor, rank, sweeps=200)
    for name, found in zip(("cp", "tucker", "tt"), results, strict=True):
        config = tna.Config(rank=rank, order=len(shape), fold=shape, groups=1, format=name)
        (group,) = tna.decompose(tensor, config)[1].groups
        assert group.error == pytest.approx(found.error, rel=1e-6, abs=1e-9), name
        assert (group.stopped, group.method) == (found.outcome.stopped, found.outcome.method), name


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(8, 9, 10), (4, 5, 6, 3)])
def test_no_error_is_above_tensorlys(shape: tuple[int, ...], noise: float) -> None:
    def error(made: np.ndarray, tensor: np.ndarray) -> float:
        return float(np.linalg.norm(made - tensor) / np.linalg.norm(tensor))

    rng = np.random.default_rng(0)
    tensor = tt.random_cp(shape, 3, random_state=1).to_tensor()
    tensor = tensor + noise * tensor.std() * rng.normal(size=shape)
    theirs = tensorly.decomposition.parafac(tensor, 3, n_iter_max=200, random_state=0)
    assert tna.cp(tensor, 3).error <= error(tensorly.cp_to_tensor(theirs), tensor) * (1 + 1e-4) + 1e-6
    theirs = tensorly.decomposition.tucker(tensor, [2] * len(shape))
    assert tna.tucker(tensor, 2).error <= error(tensorly.tucker_to_tensor(theirs), tensor) + 1e-4
    ring = tensorly.decomposition.tensor_ring_als(tensor, [2] * (len(shape) + 1), random_state=0)
    assert tna.tensor_ring(tensor, 2, starts=3).error <= error(ring.to_tensor(), tensor) * (1 + 1e-3) + 1e-6


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_masked_nonnegative_and_partial_fits_are_no_worse_than_tensorlys(noise: float, share: float) -> None:
    rng = np.random.default_rng(0)
    tensor = tensorly.random.random_cp((6, 7, 8), 2, full=True, random_state=1) + noise * rng.random((6, 7, 8))
    mask = rng.random(tensor.shape) < share

    def error(made: np.ndarray, weights: Any = 1.0) -> float:
        return float(np.linalg.norm((made - tensor) * weights) / np.linalg.norm(tensor * weights))

    theirs = tensorly.decomposition.parafac(tensor * mask, 2, mask=mask * 1.0, random_state=0)
    assert tna.cp(np.where(mask, tensor, np.nan), 2, mask=mask).error <= error(theirs.to_tensor(), mask) + 1e-9
    theirs = tensorly.decomposition.non_negative_parafac(tensor, 2, random_state=0)
    assert tna.cp(tensor, 2, nonnegative=True).error <= error(theirs.to_tensor()) + 1e-6
    (core, factors), _ = tensorly.decomposition.partial_tucker(tensor, [3, 2], modes=[1, 2])
    made = tensorly.tenalg.multi_mode_dot(core, factors, modes=[1, 2])
    found = tna.tucker(tensor, (6, 3, 2))
    assert found.error <= error(made) + 1e-9
    assert tt.mode_dot(found.core, found.factors[0], 0).shape == core.shape


@pytest.mark.law("decompositions")
@given(st.lists(st.integers(2, 5), min_size=2, max_size=4).map(tuple), st.integers(1, 3), st.booleans())
def test_a_sweep_of_cp_is_the_textbooks(shape: tuple[int, ...], rank: int, complex_: bool) -> None:
    kind = "complex128" if complex_ else "float64"
    tensor = numbers(shape, 1, kind)
    factors = [numbers((size, rank), 2 + mode, kind) for mode, size in enumerate(shape)]
    found = CPSweeps(get_backend(tensor), tensor).sweep(factors, ridge=1e-3)
    # Kolda & Bader, figure 3.3, mode after mode.
    for mode in range(len(shape)):
        others = tensorly.tenalg.khatri_rao(factors, skip_matrix=mode)
        system = others.T @ others.conj() + 1e-3 * np.eye(rank)
        factors[mode] = tensorly.base.unfold(tensor, mode) @ others.conj() @ np.linalg.inv(system)
    for ours, theirs in zip(found, factors, strict=True):
        assert relative_error(ours, theirs) < 1e-7


# -- Starts, fixed parts, callbacks --------------------------------------------------------------------


def test_what_is_fixed_stays() -> None:
    tensor = numbers((4, 5, 6), 1)
    start = tt.random_cp((4, 5, 6), 2, random_state=3)
    found = tna.cp(tensor, 2, init=tt.CPTensor(None, start.factors), fixed=[1])
    assert np.array_equal(found.factors[1], start.factors[1])
    core = tna.tucker(tensor, 2, init="random", random_state=1)
    assert np.array_equal(tna.tucker(tensor, 2, init=core, fixed=[-1]).factors[2], core.factors[2])
    ring = tt.random_tr((4, 5, 6), 2, random_state=1)
    assert np.array_equal(tna.tensor_ring(tensor, 2, init=ring, fixed=[0])[0], ring[0])


def structured(shape: tuple[int, ...], rank: int, seed: int, noise: float) -> np.ndarray:
    """Return a tensor of a rank whose components are more alike with less noise, and noise."""
    factors = [numbers((size, 1), seed) + max(noise, 0.1) * numbers((size, rank), seed + 1) for size in shape]
    return tt.CPTensor(None, factors).to_tensor() + noise * numbers(shape, seed + 9)


SMALL_TENSORS = st.tuples(
    st.lists(st.integers(2, 5), min_size=3, max_size=4).map(tuple), st.integers(1, 4), st.integers(0, 9),
    st.sampled_from([0.0, 1e-3, 0.1, 1.0, 100.0]),
)  # fmt: skip


@pytest.mark.law("decompositions")
@settings(max_examples=100 if LONG else 10)
@given(SMALL_TENSORS, st.integers(1, 4), st.sampled_from(["svd", "random", "a mask"]), st.integers(1, 60))
def test_more_starts_are_never_worse(arguments: Any, rank: int, init: str, most: int) -> None:
    tensor = structured(*arguments)
    rank = min(rank, tensor.size // max(tensor.shape))
    words: dict[str, Any] = {"init": init}
    if init == "a mask":
        words = {"mask": np.arange(tensor.size).reshape(tensor.shape) % 7 != 0}
        if any(not words["mask"].any(axis=tuple(set(range(tensor.ndim)) - {m})).all() for m in range(tensor.ndim)):
            words = {}
    errors = [tna.cp(tensor, rank, starts=count, max_iterations=most, **words).error for count in (1, 2, 4, 12)]
    assert all(more <= fewer * (1.0 + 1e-9) + 1e-12 for fewer, more in itertools.pairwise(errors))


@pytest.mark.law("decompositions")
@settings(max_examples=60 if LONG else 4)
@given(SMALL_TENSORS)
def test_a_higher_rank_is_never_worse(arguments: Any) -> None:
    tensor = structured(*arguments)
    errors = [tna.cp(tensor, rank).error for rank in range(1, min(5, tensor.size // max(tensor.shape)) + 1)]
    assert all(higher <= lower * (1.0 + 1e-9) + 1e-12 for lower, higher in itertools.pairwise(errors))


def largest_cosine(found: Any, tensor: np.ndarray) -> float:
    """Return the largest cosine of the residual with its derivative by a column of a factor, written out."""
    residual, cosines = tensor - found.to_tensor(), [0.0]
    for mode in range(tensor.ndim):
        for r in range(found.rank):
            others = [found.factors[m][:, r] for m in range(tensor.ndim) if m != mode]
            outer = others[0]
            for vector in others[1:]:
                outer = np.multiply.outer(outer, vector)
            along = np.tensordot(np.moveaxis(residual, mode, 0), outer.conj(), tensor.ndim - 1)
            cosines.append(float(np.linalg.norm(along) / np.linalg.norm(outer) / np.linalg.norm(residual)))
    return max(cosines)


@pytest.mark.law("decompositions")
@settings(max_examples=30)
@given(SMALL_TENSORS, st.booleans(), st.sampled_from([1e-6, 1e-8, 1e-10]), st.booleans())
def test_converged_is_a_small_gradient(arguments: Any, complex_: bool, tol: float, fixed: bool) -> None:
    tensor = structured(*arguments)
    if complex_:
        tensor = tensor + 1j * structured(*arguments[:2], arguments[2] + 1, arguments[3])
    rank = min(arguments[1], tensor.size // max(tensor.shape))
    start = tt.CPTensor(None, [numbers((size, rank), m, str(tensor.dtype)) for m, size in enumerate(tensor.shape)])
    found = tna.cp(tensor, rank, tol=tol, **({"init": start, "fixed": [0]} if fixed else {}))
    if fixed or not found.converged:
        return
    assert found.error < 1e-13 or largest_cosine(found, tensor) <= 10.0 * tol**0.5 * 1.01


def matmul(size: int) -> np.ndarray:
    """Return the tensor of the product of two square matrices."""
    tensor, (i, j, k) = np.zeros((size**2,) * 3), np.indices((size,) * 3)
    tensor[size * i + j, size * j + k, size * k + i] = 1.0
    return tensor


def test_difficult_tensors_are_decomposed() -> None:
    errors = [tna.cp(matmul(2), 7, init="random", random_state=seed).error for seed in range(20)]
    assert sum(error < 1e-10 for error in errors) >= 19
    for shape, complex_ in (((7, 8, 9), False), ((5, 6, 4, 5), False), ((6, 7, 5), True)):
        rng = np.random.default_rng(0)
        factors = []
        for size in shape:
            columns = rng.normal(size=(size, 4)) + 1j * complex_ * rng.normal(size=(size, 4))
            # The columns have cosines of 0.99.
            gram = np.full((4, 4), 0.99) + 0.01 * np.eye(4)
            factors.append(np.linalg.qr(columns)[0] @ np.linalg.cholesky(gram).T)
        tensor = tt.CPTensor(None, factors).to_tensor()
        for init in ("svd", "random"):
            assert tna.cp(tensor, 4, init=init, starts=1).error < 1e-10
    hilbert = 1.0 / (np.indices((12, 12, 12)).sum(axis=0) + 1.0)
    assert [tna.cp(hilbert, rank).error < limit for rank, limit in ((4, 1e-3), (5, 1e-4))] == [True] * 2


@pytest.mark.slow
def test_the_product_of_three_by_three_matrices_is_found() -> None:
    assert tna.cp(matmul(3), 23, init="random", starts=50).error < 1e-10


@pytest.mark.parametrize("path", ["_FORMED", "_COARSE"])
def test_every_way_to_move_all_factors_ends_at_the_same_optimum(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By conjugate gradients, and in the leading singular vectors first."""
    tensor, rank = crawling(1)
    expected = tna.cp(tensor, rank, tol=1e-12)
    monkeypatch.setattr(cp_als, path, 0)
    same_optimum(tna.cp(tensor, rank, tol=1e-12), expected)


def test_every_library_moves_all_factors_to_the_same_optimum(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, rank = crawling(1)
    expected = tna.cp(tensor, rank, tol=1e-12)
    monkeypatch.setattr(cp_als, "_ON_HOST", 0)
    with backend.double_precision():
        same_optimum(tna.cp(backend.asarray(tensor, "float64"), rank, tol=1e-12), expected)


def same_optimum(result: tt.CPTensor, expected: tt.CPTensor) -> None:
    for tensor in (result, expected):
        assert tensor.converged
        assert tensor.outcome.method == "ALS, Levenberg-Marquardt"
    assert result.error == pytest.approx(expected.error, rel=1e-6)


# -- Degeneracy, and the penalty that prevents it ------------------------------------------------------


def w_tensor() -> np.ndarray:
    """Return a tensor of rank 3 that tensors of rank 2 come as near as one likes (de Silva & Lim, 2008)."""
    a, b = numbers((5,), 1), numbers((5,), 2)
    return sum(np.einsum("i,j,k", *vectors) for vectors in ((a, a, b), (a, b, a), (b, a, a)))


def test_degenerate_fits_are_named_and_a_penalty_helps() -> None:
    tensor = w_tensor()
    found = tna.cp(tensor, 2)
    assert (found.converged, found.outcome.stopped) == (False, "degenerate")
    assert "nonnegative=True, a lower rank, or a penalty such as ridge=1e-3" in found.outcome.reason
    assert found.outcome.reason in repr(found)
    shrunk = tna.cp(tensor, 2, ridge=1e-3)
    assert (shrunk.converged, shrunk.outcome.stopped) == (True, "converged")
    assert max(shrunk.weights) < 10.0 * np.linalg.norm(tensor) < 10.0 * max(found.weights)
    assert tna.cp(tensor, 1).converged
    assert tna.cp(tensor, 3).error < 1e-8, "which is its rank"


@pytest.mark.law("decompositions")
@settings(max_examples=15)
@given(SMALL_TENSORS, st.integers(1, 3), st.sampled_from([1e-4, 1e-2, 0.3]), st.booleans(), st.integers(-80, 80))
@example(((2, 4, 2), 1, 0, 0.0), 2, 1e-4, False, 0)  # a component vanishes
@example(((2, 4, 2), 1, 0, 0.0), 2, 1e-4, False, -40)
def test_the_penalized_error_is_stationary(arguments: Any, rank: int, ridge: float, complex_: bool, power: int) -> None:
    tensor = structured(*arguments) * 2.0**power
    if complex_:
        tensor = tensor + 1j * structured(*arguments[:2], arguments[2] + 1, arguments[3]) * 2.0**power
    norm, order = float(np.linalg.norm(tensor)), tensor.ndim
    found = tna.cp(tensor / norm, min(rank, tensor.size // max(tensor.shape)), ridge=ridge)
    scaled = tna.cp(tensor, found.rank, ridge=ridge)
    assert relative_error(scaled.to_tensor() / norm, found.to_tensor()) < 1e-2, "it has no scale"
    if not found.converged:
        return
    sizes = np.abs(found.weights) ** (1.0 / order)
    factors = [factor * sizes for factor in found.factors]
    weights = np.where(found.weights == 0.0, 1.0, found.weights)
    factors[0] = factors[0] * weights / np.abs(weights)
    letters = "abcd"[:order]
    left = np.einsum(",".join(f"{i}r" for i in letters) + f"->{letters}", *factors) - tensor / norm
    whole = math.sqrt(float(np.linalg.norm(left)) ** 2 + ridge * sum(float(np.linalg.norm(f)) ** 2 for f in factors))
    for mode, factor in enumerate(factors):
        others = [f"{i}r" for m, i in enumerate(letters) if m != mode]
        spec = f"{letters}," + ",".join(others) + f"->{letters[mode]}r"
        conjugates = [f.conj() for m, f in enumerate(factors) if m != mode]
        gradient = np.einsum(spec, left, *conjugates) + ridge * factor
        column = np.prod([np.linalg.norm(f, axis=0) for f in conjugates], axis=0) ** 2 + ridge
        assert (np.linalg.norm(gradient, axis=0) <= 2e-3 * np.sqrt(column) * whole).all()


def test_the_penalty_of_vectors_and_matrices_has_a_closed_form() -> None:
    matrix, vector = numbers((5, 6), 1), numbers((7,), 2)
    values = np.linalg.svd(matrix, compute_uv=False)
    found = tna.cp(matrix, 4, ridge=0.1)
    expected = np.maximum(values - 0.1 * np.linalg.norm(matrix), 0.0)[:4]
    np.testing.assert_allclose(found.weights, expected, atol=1e-12)
    assert found.outcome.method == "SVD, shrunk"
    np.testing.assert_allclose(tna.cp(vector, 1, ridge=0.25).to_tensor(), vector / 1.25)
    assert tna.cp(matrix, 4, ridge=0.0).certified


def crawling(seed: int) -> tuple[np.ndarray, int]:
    """Return a tensor and a rank for which sweeps crawl, so that Levenberg-Marquardt goes on."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(size, 1)) + 0.3 * rng.normal(size=(size, 3)) for size in (5, 6, 4)]
    return np.einsum("ar,br,cr->abc", *factors) + 0.01 * rng.normal(size=(5, 6, 4)), 3


@pytest.mark.parametrize("seed", range(4))
def test_watching_changes_nothing(seed: int) -> None:
    tensor, rank = crawling(seed)
    seen: list[tuple[int, float]] = []
    plain = tna.cp(tensor, rank)
    watched = tna.cp(tensor, rank, callback=lambda *step: seen.append(step))
    assert plain.outcome.method == watched.outcome.method == "ALS, Levenberg-Marquardt"
    assert all(map(np.array_equal, plain.factors, watched.factors))
    assert seen == [*enumerate(watched.history, 1)] == [*enumerate(plain.history, 1)]


def test_a_callback_stops_before_or_during_a_descent_and_all_starts() -> None:
    tensor, rank = crawling(0)
    # From 21 sweeps on, Levenberg-Marquardt follows.
    for at, method in ((15, "ALS"), (len(tna.cp(tensor, rank).history) - 2, "ALS, Levenberg-Marquardt")):
        found = tna.cp(tensor, rank, callback=lambda number, _, at=at: number == at)
        assert len(found.history) == at
        assert not found.converged
        assert found.error == pytest.approx(found.history[-1], rel=1e-6)
        assert found.outcome.method == method
    noise = numbers((4, 4, 4), 9)
    count = len(tna.cp(noise, 2, starts=1).history) + 2
    found = tna.cp(noise, 2, starts=3, callback=lambda number, _: number == count)
    assert (len(found.history), found.outcome.stopped) == (count, "callback"), "the third start is not begun"


@pytest.mark.parametrize("name", ["cp", "tucker", "tensor_ring"])
def test_the_history_falls_and_the_callback_stops(name: str) -> None:
    tensor, fit = numbers((5, 6, 7), 2), getattr(tna, name)
    seen: list[tuple[int, float]] = []
    found = fit(tensor, 2, callback=lambda *step: seen.append(step))
    assert seen == [*enumerate(found.history, 1)]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(found.history))
    assert found.error == pytest.approx(found.history[-1], rel=1e-6)
    for stopped in (fit(tensor, 2, callback=lambda number, error: number == 2), fit(tensor, 2, max_iterations=2)):
        assert len(stopped.history) == 2
        assert not stopped.converged
        assert "converged no" in repr(stopped)


def test_the_smallest_rank_of_an_error() -> None:
    found = tna.cp(tt.random_cp((6, 7, 8), 3, random_state=0).to_tensor(), max_error=1e-5)
    assert (found.rank, found.error <= 1e-5) == (3, True)
    tensor = tt.random_tr((4, 5, 6), 2, random_state=3).to_tensor() + 0.01 * numbers((4, 5, 6), 1)
    ring = tna.tensor_ring(tensor, max_error=0.1)
    assert (ring.rank, ring.error <= 0.1) == ((2, 2, 2, 2), True)  # type: ignore[operator]
    assert tna.tensor_ring(tensor, 1).error > 0.1  # type: ignore[operator]
    every = tna.tensor_ring(tensor, 10**6, max_iterations=20)  # as large as is useful, and as fast
    assert (every.rank, every.error < 1e-6) == ((5, 5, 5, 5), True)  # type: ignore[operator]
    tensor = tt.HadamardTensor([tt.random_cp((6, 7), 2, random_state=seed) for seed in (5, 6)]).to_tensor()
    parts = tna.hadamard_decomposition(tensor, max_error=1e-3)
    assert (parts.rank, parts.error < 1e-12, parts.converged) == ((2, 2), True, True)  # type: ignore[operator]
    assert tna.hadamard_decomposition(tensor, 1).error > 1e-3  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_a_ring_does_not_depend_on_the_signs_that_an_svd_chooses(dtype: Any) -> None:
    # The elements of these vectors, and those of their cubes, cancel.
    hadamard = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    for left in (hadamard, np.kron(np.eye(2), [[1, 1], [-1, 1]]) / math.sqrt(2)):
        for seed in range(4):
            right = np.linalg.qr(numbers((6, 4), seed))[0].T
            tensor = ((left * [4, 3, 2, 1]) @ right).reshape(4, 2, 3).astype(dtype)
            phases = [-1.0, -2.0, 3.0] if dtype == np.float64 else [-1.0, 1j, np.exp(0.3j)]
            for ranks in ((2, 2, 1), (2, 2, 2)):
                expected = tna.tensor_ring(tensor, ranks, max_iterations=0).to_tensor()
                for phase in phases:
                    ring = tna.tensor_ring(phase * tensor, ranks, max_iterations=0)
                    np.testing.assert_allclose(ring.to_tensor(), phase * expected, atol=1e-12)


def test_complex_rings_of_vectors_whose_elements_cancel() -> None:
    tensor = np.zeros((4, 2, 3), complex)
    tensor[:2, 0, 0], tensor[2:, 1, 1] = [1, -1], [2, -2]
    for found, error in (
        (tna.tensor_ring(tensor, (1, 2, 2)), 1e-12),
        (tna.tensor_ring(tensor, (1, 2, 2), max_iterations=0), 1e-12),
        (tna.tensor_ring(tensor.reshape(4, 6), (1, 2), max_iterations=0), 1e-12),
        (tna.tensor_ring(0 * tensor, (1, 2, 2), max_iterations=0), 0.0),
    ):
        assert found.error is not None
        assert found.error <= error


# -- Bad input -----------------------------------------------------------------------------------------

T = numbers((3, 4, 5), 1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: tna.cp(T), "either rank= or max_error=, .* got neither"),
        (lambda: tna.cp(T, 2, max_error=0.1), "either rank= or max_error=, .* got both"),
        (lambda: tna.cp(T, 2, mask=np.full(T.shape, 0.5)), r"got 0.5 at \(0, 0, 0\). Give weights="),
        (lambda: tna.cp(T, 2, weights=np.where(T.min() == T, np.nan, 1.0)), r"weights must be .* got nan at \("),
        (lambda: tna.cp(T, 2, weights=-np.ones(T.shape)), r"got -1 at \(0, 0, 0\). 0 leaves"),
        (lambda: tna.cp(T, 0), "rank must be an integer of at least 1; got 0"),
        (lambda: tna.cp(T, True), "rank must be an integer"),
        (lambda: tna.cp(T, 13), "rank 13 is above 12"),
        (lambda: tna.cp(T, 2, init="hosvd"), "init must be 'svd', 'random' or a CPTensor; got 'hosvd'"),
        (lambda: tna.cp(T, 2, init=tt.random_cp((3, 4, 6), 2)), r"init has shape \(3, 4, 6\)"),
        (lambda: tna.cp(T, 2, init=tt.random_cp((3, 4, 5), 3)), "init has rank 3; expected 2"),
        (lambda: tna.cp(T, 2, fixed=[0]), "init=CPTensor"),
        (lambda: tna.cp(T, 2, fixed=[0, 1, 2], init=tt.random_cp((3, 4, 5), 2)), "nothing is left to fit"),
        (lambda: tna.cp(T, 2, fixed=[3], init=tt.random_cp((3, 4, 5), 2)), "mode( in fixed)? must be from 0 to 2"),
        (lambda: tna.cp(T, 2, tol=-1), "tol must be"),
        *(
            (lambda state=state: tna.cp(T, 1, random_state=state), "random_state must be")
            for state in ("a", -1, 1.5, True)
        ),
        (lambda: tna.cp(T, 2, callback=3), "callback must be a function or None; got 3"),
        *(
            (lambda x=x: tna.cp(T, 2, ridge=x), "ridge must be a (finite )?number.*; got")
            for x in (-1e-9, float("nan"), float("inf"), True, 1j, "1", None)
        ),
        (
            lambda: tna.cp(T, 2, ridge=0.1, mask=T.max() > T),
            "ridge= is for a tensor in memory, without mask=.*leave one of them out",
        ),
        (lambda: tna.cp(np.ones((3, 3, 3)), 1, ridge=0.1, symmetric=True), "ridge= is for a tensor in memory"),
        (
            lambda: tna.cp(T, 2, ridge=0.1, nonnegative=True),
            "ridge= is for a tensor in memory, without mask=.*leave one of them out",
        ),
        (lambda: tna.cp(T, 2, max_iterations=0), "max_iterations must be"),
        (lambda: tna.cp(T, max_error=1.5), "from 0 to below 1"),
        (lambda: tna.cp(T, max_error=0.5, init=tt.random_cp((3, 4, 5), 2)), "tries several ranks"),
        (lambda: tna.tucker(T, [4, 1, 1]), "rank 4 of mode 0 is above its size 3"),
        (lambda: tna.tucker(T, [1, 1]), "one for each of the 3 modes"),
        (lambda: tna.tucker(T, 2, fixed=[0]), "init=TuckerTensor"),
        (lambda: tna.tucker(T, 2, init=tt.random_tucker(T.shape, 3)), "factor 0 of init has shape"),
        (lambda: tna.tucker(T, 2, init=tt.random_tucker(T.shape, 2), fixed=[0]), "orthonormal columns"),
        (lambda: tna.tucker(T, max_error=0.1, init="random"), "init='svd'"),
        (lambda: tna.tensor_train(T, [4, 1]), "rank 4 of bond 0 is above 3"),
        (lambda: tna.tensor_train(T, [1, 2, 2, 2]), "one for each of the 2 bonds"),
        (lambda: tna.tensor_train(T, 2, svd="lanczos"), "svd must be one of"),
        (lambda: tna.tt_matrix(T, 2), "even number of modes"),
        (lambda: tna.tt_matrix(T[0], 2, rows=(2, 2)), "rows= and cols= together"),
        (lambda: tna.tt_matrix(T[0], 2, rows=(2, 2), cols=(2, 2)), "do not divide a matrix"),
        (lambda: tna.tensor_ring(T[0, 0], 2), "2 or more modes"),
        (lambda: tna.tensor_ring(T, [2, 2, 2, 3]), "must be the same"),
        (lambda: tna.tensor_ring(T, 2, init=tt.random_tr(T.shape, 3)), "init has shape"),
        (lambda: tna.tensor_ring(T), "either rank= or max_error="),
        (lambda: tna.tensor_ring(T, 2, max_error=0.1), "either rank= or max_error="),
        (lambda: tna.tensor_ring(T, [9, 9, 9]), r"rank 9 of bond 0 is above 4, .* give \(4, 4, 4\)"),
        (lambda: tna.tensor_ring(T, [2, 2, 99]), r"rank 99 of bond 2 is above 8, .* give \(2, 2, 8\)"),
        (lambda: tna.tensor_ring(T, max_error=0.1, init=tt.random_tr(T.shape, 2)), "tries several ranks"),
        (lambda: tna.tensor_train(T, 2, init=tt.random_cp(T.shape, 2)), "a TTTensor or its cores; got <CPTensor"),
        (lambda: tna.kronecker_decomposition(T[0], [(2, 2), (2, 2)]), "multiply to"),
        (lambda: tna.kronecker_decomposition(T[0], [(4, 5, 1)]), "2 axes each"),
        (lambda: tna.kronecker_decomposition(T[0], 3), "shapes must be a sequence of sequences of integers; got 3"),
        (lambda: tna.kronecker_decomposition(T[0], [(4, 5)], 1, max_error=0.1), "either terms= or max_error="),
        (lambda: tna.hadamard_decomposition(T, 0), "rank must be"),
        (lambda: tna.hadamard_decomposition(T, 61), "more than a tensor"),
        (lambda: tna.hadamard_decomposition(T, 2, max_error=0.1), "either rank= or max_error="),
        (lambda: tna.hadamard_decomposition(T + 1j, 2), "needs a real tensor; got complex128: decompose its real"),
        (lambda: tt.random_cp(4, 2), "shape must be a sequence of integers; got 4"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(call: Any, text: str) -> None:
    with pytest.raises(TnadaptError, match=text):
        call()


def test_a_setting_out_of_range_is_a_config_error() -> None:
    calls: list[Any] = [
        lambda **words: tna.cp(T, 2, **words),
        lambda **words: tna.cp(T, 2, nonnegative=True, **words),
        lambda **words: tna.cp(np.ones((3, 3, 3)), 2, symmetric=True, **words),
        lambda **words: tna.tensor_ring(T, 2, **words),
        lambda **words: tna.kronecker_decomposition(numbers((8, 8)), [(2, 2)] * 3, **words),
        lambda **words: tna.parafac2(np.zeros((3, 4, 5)), 2, **words),
    ]
    for call, starts in itertools.product(calls, (0, -1, 1.5, 1j, True, float("nan"), 1 << 21)):
        with pytest.raises(ConfigError, match=r"starts must be an integer( from 1 to 1048576| or None)?; got"):
            call(starts=starts)
    for function, words in itertools.product((tna.cp, tna.tucker, tna.tensor_train), ({"memory": 0}, {"memory": 1.5})):
        with pytest.raises(ConfigError, match=r"memory must be an integer( of at least 1)?; got"):
            function(T, 2, **words)
    with pytest.raises(ConfigError, match="sweeps must be an integer of at least 0; got -1"):
        tna.tensor_train(T, 2, sweeps=-1)
    for function in (tna.cp, tna.tucker, tna.tensor_train, tna.tensor_ring):
        with pytest.raises(ConfigError, match="max_error must be from 0 to below 1, a relative error; got -"):
            function(T, max_error=-0.5)
        with pytest.raises(ShapeError, match="rank must be an integer of at least 1; got 0"):
            function(T, 0)


@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_sweeps_improve_a_train_and_report_it(kind: str) -> None:
    tensor = numbers((5, 6, 5, 4), 0, kind)
    plain = tt.tensor_train(tensor, (3, 4, 2))
    seen: list[float] = []
    found = tt.tensor_train(tensor, (3, 4, 2), sweeps=100, tol=1e-6, callback=lambda _, error: seen.append(error))
    assert found.rank == plain.rank
    assert found.error < plain.error - 1e-4  # type: ignore[operator]
    assert found.converged
    assert (list(found.history), found.outcome.method) == (seen, "TT-SVD, ALS")
    assert seen[-1] == pytest.approx(found.error)
    stopped = tt.tensor_train(tensor, (3, 4, 2), sweeps=100, tol=1e-6, callback=lambda *_: True)
    assert (len(stopped.history), stopped.converged) == (1, False)


@pytest.mark.parametrize("copied", [1 << 24, 0])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: tt.cp(x.reshape(12, 10), 3), lambda x: tt.tensor_train(x, 2),
        lambda x: tt.kronecker_decomposition(x.reshape(12, 10), [(3, 2), (4, 5)]), lambda x: tt.tt_matrix(x, 2),
        lambda x: tt.tensor_train(x.reshape(-1), 1),
    ],
)  # fmt: skip
def test_errors_that_are_read_later_are_those_of_the_call(
    make: Any, copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of larger tensors no copy is held until the error is asked for: it is computed at once."""
    monkeypatch.setattr("tnadapt.tensors._requests._COPIED", copied)
    x = np.random.default_rng(0).normal(size=(3, 4, 5, 2))
    found, again = make(x.copy()), make(x)
    expected = (found.error, found.bound, found.certified)
    made = found.to_tensor().reshape(x.shape)
    assert found.error == pytest.approx(np.linalg.norm(x - made) / np.linalg.norm(x), rel=1e-12)
    x[:] = 0.0
    for array in again.arrays:
        array[:] = 0.0
    assert (again.error, again.bound, again.certified) == expected


@on_every_library("shape", [(7, 60), (60, 7), (30, 40), (4, 3000), (2, 3)], [(60, 7), (4, 3000)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_left_vectors_of_wide_and_tall_matrices(shape: tuple[int, int], dtype: str, backend: Backend) -> None:
    host = numbers(shape, kind=dtype).astype(dtype)
    x = backend.asarray(host, dtype)
    found, rank = tt.tensor_train(x, 2), min(2, *shape)
    values = np.linalg.svd(host, compute_uv=False)
    u = backend.to_numpy(found[0])[0]
    np.testing.assert_allclose(np.conj(u.T) @ u, np.eye(rank), atol=1e-5)
    least = math.sqrt(np.sum(values[rank:] ** 2)) / np.linalg.norm(host)
    assert found.error == pytest.approx(least, rel=1e-4, abs=1e-5)
    assert found.certified


def test_what_is_not_finite_is_found_in_every_library(backend: Backend) -> None:
    host = np.full((6, 8), 1e30, "float32")
    for finite in (host, host[:0]):
        assert backend.all_finite(backend.asarray(finite, "float32"))
    for bad, element in itertools.product((np.nan, np.inf, -np.inf), ((0, 0), (3, 2), (5, 7))):
        broken = host.copy()
        broken[element] = bad
        x = backend.asarray(broken, "float32")
        assert not backend.all_finite(x)
        assert not backend.all_finite(backend.matrix_transpose(x))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_numbers_whose_squares_are_not(dtype: str) -> None:
    x = np.full((6, 8), 0.01 * np.finfo(dtype).max, dtype)
    for one in (x, x[::2, ::3], x.T):
        assert tt.cp(one, 1).shape == one.shape
        for bad, kind in ((np.nan, "NaN"), (np.inf, "infinity")):
            broken = one.copy()
            broken[1, 1] = bad
            with pytest.raises(ShapeError, match=f"holds {kind}"):
                tt.cp(broken, 1)
            with pytest.raises(ShapeError, match=f"holds {kind}"):
                tt.cp(np.repeat(broken, 2, axis=1)[:, ::2], 1)


# -- Memory maps and dask arrays give what NumPy's arrays give, in little memory -------------------

BLOCK_SHAPES = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)


def mapped(path: Path, tensor: np.ndarray) -> np.memmap:
    found = np.memmap(path / "tensor", tensor.dtype, "w+", shape=tensor.shape)
    found[:] = tensor
    return found


def dasked(path: Path, tensor: np.ndarray) -> Any:
    return pytest.importorskip("dask.array").from_array(tensor, chunks=tuple(max(1, d // 2) for d in tensor.shape))


SOURCES: dict[str, Callable[[Path, np.ndarray], Any]] = {"memory map": mapped, "dask": dasked}
sources = pytest.mark.parametrize("source", SOURCES)


def check_passes(passes: BlockPasses, tensor: np.ndarray, width: int) -> None:
    """Compare every pass with the formula on the whole tensor."""
    rng = np.random.default_rng(1)
    order, shape = tensor.ndim, tensor.shape
    tests = [rng.normal(size=(d, width)) for d in shape]
    modes = range(order)
    sketches, square = passes.sketches(dict.fromkeys(modes, tests))
    grams, again = passes.grams()
    assert square == pytest.approx(float(np.vdot(tensor, tensor).real))
    assert again == pytest.approx(square)
    for mode in modes:
        rows = np.moveaxis(tensor, mode, 0).reshape(shape[mode], -1)
        kr = tt.khatri_rao([one for m, one in enumerate(tests) if m != mode])
        assert relative_error(sketches[mode], rows @ kr) < 1e-10
        assert relative_error(grams[mode], rows @ rows.conj().T) < 1e-10
    factors = {mode: rng.normal(size=(shape[mode], 2)) for mode in modes if mode != 1}
    expected = tensorly.tenalg.multi_mode_dot(tensor, list(factors.values()), modes=list(factors), transpose=True)
    assert relative_error(passes.projections([factors])[0], expected) < 1e-10
    sets = [[m for m in factors if m != mode] for mode in factors]
    for others, found in zip(sets, passes.projections([{m: factors[m] for m in some} for some in sets]), strict=True):
        expected = tensorly.tenalg.multi_mode_dot(tensor, [factors[m] for m in others], modes=others, transpose=True)
        assert relative_error(found, expected) < 1e-10
    core, whole = rng.normal(size=(2,) * order), [rng.normal(size=(d, 2)) for d in shape]
    far = float(np.linalg.norm(tensor - tensorly.tucker_to_tensor((core, whole))))
    assert passes.distance(core, whole) == pytest.approx(far)


@pytest.mark.law("decompositions")
@given(BLOCK_SHAPES, st.integers(1, 300), st.sampled_from(["float64", "complex128"]))
def test_passes_over_blocks_of_any_size(shape: tuple[int, ...], elements: int, kind: str) -> None:
    tensor = numbers(shape, 1, kind)
    check_passes(BlockPasses(tensor, elements * tensor.itemsize), tensor, 3)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6), (2, 3, 4, 3)])
def test_passes_over_dask(shape: tuple[int, ...], tmp_path: Path) -> None:
    for kind in ("float64", "complex128"):
        tensor = numbers(shape, 2, kind)
        check_passes(BlockPasses(dasked(tmp_path, tensor), 1), tensor, 3)


@sources
@pytest.mark.parametrize("error", [0.11, 0.2, 0.3])
def test_in_blocks_about_as_few_parameters_are_enough(source: str, error: float, tmp_path: Path) -> None:
    for tensor in (
        with_noise(tt.random_tucker((20, 21, 22), 4, random_state=1).to_tensor()),
        TENSORS["decaying"]((20, 21, 22), 2),
    ):
        for form in (tna.tucker, tna.tensor_train):
            found = form(SOURCES[source](tmp_path, tensor), max_error=error, memory=1 << 14)
            assert error_of(found, tensor) <= error
            assert found.num_parameters <= 1.1 * form(tensor, max_error=error).num_parameters


def noisy(kind: str = "float64") -> np.ndarray:
    tensor = tt.random_tucker((20, 21, 22), (4, 5, 3), random_state=1, dtype=kind).to_tensor()
    return tensor + 0.01 * np.abs(tensor).std() * numbers(tensor.shape, 3, kind)


@sources
@pytest.mark.parametrize("kind", ["float64", "complex128"])
@pytest.mark.parametrize("request_", [{"rank": (4, 5, 3)}, {"max_error": 0.03}], ids=["rank", "error"])
def test_tucker_is_that_of_memory_and_a_train_nearly(
    source: str, kind: str, request_: dict[str, Any], tmp_path: Path
) -> None:
    tensor = noisy(kind)
    found = tna.tucker(SOURCES[source](tmp_path, tensor), memory=1 << 14, **request_)
    expected = tna.tucker(tensor, **request_)
    assert found.rank == expected.rank
    made = error_of(found, tensor)
    assert found.error == pytest.approx(made, rel=1e-6)
    assert made <= expected.error * 1.001
    assert found.bound <= found.error
    if kind == "float64":
        request_ = {"rank": (4, 3)} if "rank" in request_ else request_
        train = tna.tensor_train(SOURCES[source](tmp_path, tensor), memory=1 << 14, **request_)
        made = error_of(train, tensor)
        assert train.error == pytest.approx(made, rel=1e-6)
        assert made <= (0.03 if "max_error" in request_ else tna.tensor_train(tensor, **request_).error * 1.01)


@sources
@pytest.mark.parametrize("kind", ["float64", "complex128"])
def test_cp_in_blocks_is_that_of_memory(source: str, kind: str, tmp_path: Path) -> None:
    tensor = tt.random_cp((12, 13, 14), 3, random_state=1, dtype=kind).to_tensor()
    tensor = tensor + 0.1 * np.abs(tensor).std() * numbers(tensor.shape, 3, kind)
    mask = np.random.default_rng(0).random(tensor.shape) < 0.5
    stored = SOURCES[source](tmp_path, tensor)
    found, expected = tna.cp(stored, 3, memory=1 << 12), tna.cp(tensor, 3)
    assert found.error == pytest.approx(error_of(found, tensor), rel=1e-6)
    assert found.error == pytest.approx(expected.error, rel=1e-4)
    assert found.outcome.method == "compressed in blocks, ALS"
    partial = tna.cp(stored, 3, mask=mask, memory=1 << 13)
    assert partial.error == pytest.approx(tna.cp(tensor, 3, mask=mask).error, rel=1e-3)
    left = float(np.linalg.norm((partial.to_tensor() - tensor) * mask))
    assert partial.error == pytest.approx(left / float(np.linalg.norm(tensor * mask)), rel=1e-6)
    begun = tna.cp(stored, 3, init=expected, fixed=[1], memory=1 << 12)
    assert (begun.factors[1] == expected.factors[1]).all()
    assert begun.error <= expected.error * (1.0 + 1e-6)


@pytest.mark.law("decompositions")
@given(BLOCK_SHAPES, st.integers(1, 4), st.sampled_from(["float64", "complex128"]), st.integers(1, 300), st.data())
def test_equations_of_a_block_with_gaps(
    shape: tuple[int, ...], rank: int, kind: str, elements: int, data: st.DataObject
) -> None:
    rng, letters = np.random.default_rng(elements), "abcd"[: len(shape)]
    weights = rng.random(shape) * (rng.random(shape) < data.draw(st.floats(0.0, 1.0)))
    wanted = np.where(weights, numbers(shape, 1, kind), 0.0)
    rows = [numbers((size, rank), 2 + mode, kind) for mode, size in enumerate(shape)]
    mode = data.draw(st.integers(0, len(shape) - 1))
    left = wanted - np.einsum(",".join(f"{i}r" for i in letters) + f"->{letters}", *rows)
    others = [m for m in range(len(shape)) if m != mode]
    made = ",".join(f"{letters[m]}r" for m in others) + f"->{''.join(letters[m] for m in others)}r"
    columns = np.einsum(made, *(rows[m] for m in others)).reshape(-1, rank)
    flat = [np.moveaxis(array, mode, 0).reshape(shape[mode], -1) for array in (weights, left)]
    grams = np.einsum("nj,jv,jw->nvw", flat[0], columns.conj(), columns)
    rights = np.einsum("nj,nj,jv->nv", flat[0], flat[1], columns.conj())
    for of_block in (completion._dense_equations, completion._gathered_equations):
        found = of_block(wanted, weights, rows, mode, elements)
        np.testing.assert_allclose(found[0], grams, atol=1e-9)
        np.testing.assert_allclose(found[1], rights, atol=1e-9)
        assert found[2] == pytest.approx(float(np.sum(weights * np.abs(left) ** 2)))


@sources
@pytest.mark.parametrize("dense", [0.0, 1.0])
def test_masked_cp_in_blocks_is_that_of_memory(
    source: str, dense: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = tt.random_cp((12, 13, 14), 2, random_state=1).to_tensor() + 0.01 * numbers((12, 13, 14), 3)
    mask = np.random.default_rng(0).random(tensor.shape) < 0.5
    monkeypatch.setattr(completion, "_DENSE", dense)
    start = tt.random_cp(tensor.shape, 2, random_state=2)
    words = {"mask": mask, "init": start, "max_iterations": 5, "tol": 0.0}
    found = tna.cp(SOURCES[source](tmp_path, tensor), 2, memory=1 << 13, **words)
    # In memory, small problems have Gauss-Newton: without its work, there are sweeps, of rows or of all elements.
    monkeypatch.setattr(completion, "_WORK", 0)
    for part in (1.0, 0.0):
        monkeypatch.setattr("tnadapt.tensors._requests._DENSE", part)
        expected = tna.cp(tensor, 2, **words)
        np.testing.assert_allclose(found.history, expected.history, rtol=1e-5)
        np.testing.assert_allclose(found.to_tensor(), expected.to_tensor(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_masked_sweeps_of_all_elements_are_those_of_rows(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_WORK", 0)
    tensor = tt.random_cp((12, 13, 14), 2, random_state=1, dtype=dtype).to_tensor()
    weights = np.random.default_rng(0).random(tensor.shape) * (np.random.default_rng(1).random(tensor.shape) < 0.5)
    results = []
    for part in (1.0, 0.0):
        monkeypatch.setattr("tnadapt.tensors._requests._DENSE", part)
        # Later, single precision has converged, and rounding decides in which sweep they stop.
        results.append(tna.cp(tensor, 2, weights=weights, max_iterations=12, tol=0.0))
    rows, products = results
    assert products.factors[0].dtype == tensor.dtype
    np.testing.assert_allclose(products.history, rows.history, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(products.to_tensor(), rows.to_tensor(), rtol=1e-4, atol=1e-5)


@sources
def test_nonnegative_cp_in_blocks_is_that_of_memory(source: str, tmp_path: Path) -> None:
    tensor = abs(tt.random_cp((12, 13, 14), 2, random_state=1).to_tensor())
    stored = SOURCES[source](tmp_path, tensor)
    weights = np.random.default_rng(0).random(tensor.shape)
    found = tna.cp(stored, 2, nonnegative=True, memory=1 << 12)
    assert all((factor >= 0.0).all() for factor in found.factors)
    assert (np.diff(found.history) <= 0.0).all()
    assert found.error == pytest.approx(error_of(found, tensor), rel=1e-6)
    assert found.error <= tna.cp(tensor, 2, nonnegative=True).error * (1.0 + 1e-3)
    partial = tna.cp(stored, 2, nonnegative=[0, 1], weights=weights, memory=1 << 13)
    assert min(partial.factors[0].min(), partial.factors[1].min()) >= 0.0
    assert partial.error <= tna.cp(tensor, 2, nonnegative=[0, 1], weights=weights).error * (1.0 + 1e-3)
    assert tna.cp(stored, max_error=0.9, memory=1 << 12).rank == 1
    matrix = tensor.reshape(-1, 14)
    halves_of = tna.cp(SOURCES[source](tmp_path, matrix), 2, memory=1 << 12)
    np.testing.assert_allclose(halves_of.factors[0].T @ halves_of.factors[0], np.eye(2), atol=1e-9)
    assert halves_of.error == pytest.approx(tna.cp(matrix, 2).error, rel=1e-3)
    assert halves_of.error == pytest.approx(error_of(halves_of, matrix), rel=1e-6)
    # One that fits into a block is read at once.
    few = SOURCES[source](tmp_path, tensor[:4])
    assert tna.cp(few, 2).error == tna.cp(tensor[:4], 2).error


@sources
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"mask": np.ones((9, 9))}, r"mask must be an array of the tensor's shape \(10, 11, 12\)"),
        ({"mask": np.arange(11)[:, None] != 4 + np.zeros((10, 11, 12))}, "index 4 of mode 1 has no observed"),
        ({"weights": -np.ones((10, 11, 12))}, "weights finite and not negative"),
        ({"mask": np.zeros((10, 11, 12), bool)}, "has no observed element"),
        ({"mask": np.ones((10, 11, 12), bool), "rank": None, "max_error": 0.1}, "need rank=, and all factors free"),
    ],
)
def test_masks_in_blocks_that_are_refused(source: str, words: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TnadaptError, match=message):
        tna.cp(**{"tensor": SOURCES[source](tmp_path, numbers((10, 11, 12))), "rank": 2, "memory": 1 << 12, **words})


@sources
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gaps_zeros_and_nan_in_blocks(source: str, tmp_path: Path) -> None:
    hole = numbers((10, 11, 12))
    hole[1, 2, 3] = np.nan
    with pytest.raises(ShapeError, match="holds NaN"):
        tna.cp(SOURCES[source](tmp_path, hole), 2, memory=1 << 12)
    found = tna.cp(SOURCES[source](tmp_path, hole), 1, mask=~np.isnan(hole), memory=1 << 12, max_iterations=3)
    assert 0.0 < found.error < 1.0
    assert tna.cp(SOURCES[source](tmp_path, np.zeros((10, 11, 12))), 2, memory=1 << 12).error == 0.0


@sources
def test_an_exact_rank_is_found(source: str, tmp_path: Path) -> None:
    tensor = tt.random_tt((9, 8, 7, 6), 2, random_state=1).to_tensor()
    for found in (
        tna.tensor_train(SOURCES[source](tmp_path, tensor), 2, memory=1 << 12),
        tna.tucker(SOURCES[source](tmp_path, tensor), (2, 4, 4, 2), memory=1 << 12),
    ):
        assert relative_error(found.to_tensor(), tensor) < 1e-10
        assert found.certified


@sources
@pytest.mark.parametrize(("kind", "result"), [("float32", "float32"), ("float16", "float32"), ("int16", "float64")])
def test_the_dtype_of_the_result(source: str, kind: str, result: str, tmp_path: Path) -> None:
    tensor = (10 * numbers((6, 5, 4))).astype(kind)
    found = tna.tucker(SOURCES[source](tmp_path, tensor), 2)
    assert {array.dtype.name for array in found.arrays} == {result}
    assert found.error == pytest.approx(tna.tucker(tensor.astype("float64"), 2).error, rel=1e-3)


def test_memory_is_some_blocks(tmp_path: Path) -> None:
    # 8 MB in float32, read in blocks of 128 kB in float64.
    array = np.memmap(tmp_path / "tensor", np.float32, "w+", shape=(128, 128, 128))
    array[:] = np.sin(np.arange(128))[:, None, None] * np.cos(np.arange(128))[:, None]
    block = 1 << 17
    # From 2.5, NumPy counts the workspace of LAPACK, too, about 1 MB here.
    most = array.nbytes / (4 if np.lib.NumpyVersion(np.__version__) < "2.5.0" else 3)
    assert peak_of(lambda: tna.tucker(array, 2, memory=block)) < most
    assert peak_of(lambda: tna.tensor_train(array, 2, memory=block)) < most
    assert peak_of(lambda: tna.cp(array, 2, nonnegative=[0], memory=block, max_iterations=1)) < most
    mask = np.memmap(tmp_path / "mask", bool, "w+", shape=array.shape)
    mask[:] = np.arange(128) % 2 == 0
    mask[0, 0] = True
    assert peak_of(lambda: tna.cp(array[:24], 2, mask=mask[:24], memory=block, max_iterations=1)) < most
    assert math.prod(array.shape) * 4 == array.nbytes


@sources
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of products with infinity, in dask's threads
@pytest.mark.parametrize("words", [{"rank": 2}, {"max_error": 0.1}])
@pytest.mark.parametrize("function", [tna.tucker, tna.tensor_train])
def test_blocks_that_are_not_finite_are_refused(
    source: str, function: Any, words: dict[str, Any], tmp_path: Path
) -> None:
    for value, place in ((np.nan, (0, 0, 0)), (np.inf, (3, 4, 5))):
        wrong = numbers((4, 5, 6))
        wrong[place] = value
        with pytest.raises(ShapeError, match="holds NaN" if np.isnan(value) else "holds infinity"):
            function(SOURCES[source](tmp_path, wrong), **words)


@sources
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: tna.tucker(x), ShapeError, "either rank= or max_error="),
        (lambda x: tna.tensor_train(x, max_error=1e-9), ShapeError, "least for a tensor read in blocks"),
        (lambda x: tna.tucker(x, (5, 2, 2)), ShapeError, "rank 5 of mode 0 is above its size 4"),
        (lambda x: tna.tucker(x, 2, memory=0), ConfigError, "memory must be"),
        (lambda x: tna.tucker(x, 2, init="random"), ConfigError, "leave init, fixed, mask and weights out"),
        (lambda x: tna.tucker(x.astype("S1"), 1), BackendError, "numbers"),
    ],
)
def test_what_cannot_be_in_blocks_is_refused(source: str, call: Any, error: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        call(SOURCES[source](tmp_path, numbers((4, 5, 6))))


def test_other_functions_say_that_they_need_memory(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"a dask array.*x\.compute\(\)"):
        tna.tensor_ring(dasked(tmp_path, np.ones((3, 3, 3))), 1)


def test_the_square_of_the_largest_element_in_blocks_must_be_a_number(tmp_path: Path) -> None:
    tensor, mask = tt.random_cp((12, 12, 12), 1, random_state=0).to_tensor(), np.ones((12, 12, 12), bool)
    for scale in (1e-170, 1e170):
        for fit in (
            lambda x: tna.cp(x, 1, memory=4000),
            lambda x: tna.cp(x, 1, mask=mask, memory=4000),
            lambda x: tna.cp(x, 1, nonnegative=True, memory=4000),
            lambda x: tna.tucker(x, max_error=1e-3, memory=4000),
            lambda x: tna.tensor_train(x, 2, memory=4000),
        ):
            with pytest.raises(
                ShapeError, match="largest value of a tensor that is read in blocks must be from 1e-140"
            ):
                fit(mapped(tmp_path, scale * tensor))


def test_fixed_factors_of_zeros_are_kept(tmp_path: Path) -> None:
    start = tt.CPTensor(None, [np.ones((size, 2)) for size in (12, 13, 14)])
    zeros = np.zeros((12, 13, 14))
    for tensor, words in ((zeros, {}), (zeros, {"nonnegative": True}), (mapped(tmp_path, zeros), {"memory": 4000})):
        found = tna.cp(tensor, 2, init=start, fixed=[0], **words)
        assert np.array_equal(found.factors[0], start.factors[0])
        assert not found.to_tensor().any()


# -- Sparse tensors give what dense ones give, in memory for the nonzero elements ------------------


class Coordinates:
    """A sparse array with the attributes of pydata's COO, and of SciPy's coo_array from 1.15 on."""

    fill_value = 0.0

    def __init__(self, coords: Any, data: Any, shape: tuple[int, ...]) -> None:
        self.coords, self.data, self.shape = coords, np.asarray(data), shape

    @classmethod
    def of(cls, tensor: np.ndarray) -> Coordinates:
        return cls(np.nonzero(tensor), tensor[np.nonzero(tensor)], tensor.shape)


def sparse_numbers(shape: tuple[int, ...], seed: int, kind: str = "float64", rank: int = 3) -> np.ndarray:
    """A tensor of a rank, of whose elements few are not zero, and noise on a few others."""
    rng = np.random.default_rng(seed)
    factors = [numbers((size, rank), seed + mode, kind) for mode, size in enumerate(shape)]
    rows = [rng.permutation(np.arange(size) % 3 == 0)[:, None] for size in shape]
    tensor = tt.CPTensor(None, [factor * kept for factor, kept in zip(factors, rows, strict=True)]).to_tensor()
    return tensor + 0.1 * numbers(shape, seed + 9, kind) * (rng.random(shape) < 0.01)


@pytest.mark.law("decompositions")
@given(BLOCK_SHAPES, st.integers(0, 20), st.sampled_from(["float64", "complex128"]), st.floats(0.0, 1.0))
def test_products_with_sparse_tensors(shape: tuple[int, ...], count: int, kind: str, share: float) -> None:
    rng = np.random.default_rng(count)
    places, values = [rng.integers(0, size, count) for size in shape], numbers(count, 1, kind)
    tensor, order = np.zeros(shape, kind), len(shape)
    np.add.at(tensor, tuple(places), values)
    sparse = SparseTensor(places, values, shape)
    np.testing.assert_allclose(sparse.dense(), tensor)
    assert sparse.norm == pytest.approx(float(np.linalg.norm(tensor)))
    matrices = [numbers((size, 3), mode, kind) for mode, size in enumerate(shape)]
    for mode in range(order):
        rows = np.moveaxis(tensor, mode, 0).reshape(shape[mode], -1)
        columns = tt.khatri_rao([matrix for m, matrix in enumerate(matrices) if m != mode])
        np.testing.assert_allclose(sparse.product(matrices, mode), rows @ columns, atol=1e-12)
        left = sparse.left(mode, max(1, int(share * shape[mode])), 0)
        np.testing.assert_allclose(left.conj().T @ left, np.eye(left.shape[1]), atol=1e-12)
        values_of = np.linalg.svd(rows, compute_uv=False)[: left.shape[1]]
        assert np.linalg.norm(left.conj().T @ rows) == pytest.approx(np.linalg.norm(values_of), abs=1e-12)
    for left_out in (None, *range(order)):
        modes = [mode for mode in range(order) if mode != left_out]
        expected = tensor
        for mode in modes:
            expected = tt.mode_dot(expected, matrices[mode].conj().T, mode)
        np.testing.assert_allclose(sparse.projected(dict(enumerate(matrices)), left_out), expected, atol=1e-12)


@pytest.mark.law("decompositions")
@settings(max_examples=10)
@given(st.sampled_from([(25, 27, 26), (11, 12, 13, 11), (140, 150)]), st.integers(0, 50), st.integers(1, 3))
def test_sparse_decompositions_are_those_of_dense_tensors(shape: tuple[int, ...], seed: int, rank: int) -> None:
    tensor = sparse_numbers(shape, seed)
    sparse = Coordinates.of(tensor)
    for fit, words in ((tna.cp, {}), (tna.cp, {"init": "random", "random_state": seed}), (tna.tucker, {})):
        found, expected = fit(sparse, rank, **words), fit(tensor, rank, **words)
        assert found.error == pytest.approx(error_of(found, tensor), rel=1e-6)
        assert found.error <= expected.error * (1.0 + 1e-3) + 1e-9
        assert found.rank == expected.rank
        assert (np.diff(found.history) <= 1e-12).all()
        if fit is tna.cp and len(shape) > 2 and found.converged:
            factors = [found.factors[0] * found.weights, *found.factors[1:]]
            sweeps = CPSweeps(get_backend(tensor), tensor)
            assert sweeps.slope(factors, error_of(found, tensor) * float(np.linalg.norm(tensor))) <= 1.1e-3
    magnitudes = tna.cp(Coordinates.of(abs(tensor)), rank, nonnegative=True)
    assert all((array >= 0.0).all() for array in magnitudes.arrays)
    assert magnitudes.error <= tna.cp(abs(tensor), rank, nonnegative=True).error + 1e-3


def padded(tensor: np.ndarray, size: int = 30) -> np.ndarray:
    """The tensor with zeros behind it: it is too large to be formed, and its descents are those without zeros."""
    return np.pad(tensor, [(0, size - d) for d in tensor.shape])


@pytest.mark.parametrize("init", ["svd", "random"])
def test_sparse_tensors_have_the_descents_of_dense_ones(init: str) -> None:
    i, j, k = np.indices((2, 2, 2))
    matmul = np.zeros((4, 4, 4))
    matmul[2 * i + j, 2 * j + k, 2 * k + i] = 1.0
    errors = [tna.cp(Coordinates.of(padded(matmul)), 7, init=init, random_state=seed).error for seed in range(20)]
    assert sum(error < 1e-10 for error in errors) >= 19
    # Nearly collinear components, for which sweeps crawl.
    for seed in range(3):
        tensor, rank = crawling(seed)
        found = tna.cp(Coordinates.of(padded(tensor)), rank, init=init, random_state=seed)
        assert (found.converged, found.outcome.method) == (True, "ALS, Levenberg-Marquardt")
        assert found.error <= tna.cp(padded(tensor), rank, init=init, random_state=seed).error * (1.0 + 1e-6)


def test_sparse_tensors_too_large_to_form_have_descents(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    factors = [rng.normal(size=(20, 1)) * 0.9 + rng.normal(size=(20, 5)) * 0.1 for _ in range(3)]
    places = np.meshgrid(*(rng.choice(200, 20, replace=False) for _ in range(3)), indexing="ij")
    values = np.einsum("ir,jr,kr->ijk", *factors)
    sparse = Coordinates([place.ravel() for place in places], values.ravel(), (200, 200, 200))
    for coarse in (0, 1 << 20):
        monkeypatch.setattr(cp_als, "_COARSE", coarse)
        found = tna.cp(sparse, 5)
        assert (found.converged, found.outcome.method) == (True, "ALS, Levenberg-Marquardt")
        left = found.entries(np.stack(sparse.coords, axis=1)) - sparse.data
        assert np.linalg.norm(left) < 1e-6 * np.linalg.norm(values)
        assert float(found.norm()) == pytest.approx(float(np.linalg.norm(values)))


def test_sparse_degenerate_fits_are_named_and_a_penalty_helps() -> None:
    sparse = Coordinates.of(padded(w_tensor()))
    found = tna.cp(sparse, 2)
    assert (found.converged, found.outcome.stopped) == (False, "degenerate")
    shrunk = tna.cp(sparse, 2, ridge=1e-3)
    assert shrunk.converged
    assert shrunk.error == pytest.approx(tna.cp(w_tensor(), 2, ridge=1e-3).error, rel=1e-3)
    matrix = sparse_numbers((140, 150), 1)
    penalized = tna.cp(Coordinates.of(matrix), 2, ridge=0.01)
    np.testing.assert_allclose(penalized.weights, tna.cp(matrix, 2, ridge=0.01).weights)


def test_sparse_arrays_of_every_kind() -> None:
    tensor = sparse_numbers((140, 150), 1)
    expected = tna.cp(tensor, 2).error
    for kind in ("coo", "csr", "csc", "lil", "dok", "bsr"):
        for make in (scipy.sparse.coo_array, scipy.sparse.coo_matrix):
            assert tna.cp(make(tensor).asformat(kind), 2).error == pytest.approx(expected, rel=1e-6)
    whole = sparse_numbers((30, 31, 32), 2)
    if np.lib.NumpyVersion(scipy.__version__) >= "1.15.0":
        assert tna.tucker(scipy.sparse.coo_array(whole), 2).error == tna.tucker(Coordinates.of(whole), 2).error
    for kind, result in (("float32", "float32"), ("complex64", "complex64"), ("int8", "float64")):
        sparse = Coordinates.of((10.0 * whole).astype(kind))
        for fit in (tna.cp, tna.tucker):
            found = fit(sparse, 2)
            assert {array.dtype.name for array in found.arrays} == {result}
            assert found.error == pytest.approx(error_of(found, (10.0 * whole).astype(kind)), rel=1e-4)
    complex_ = sparse_numbers((30, 31, 32), 3, "complex128")
    assert tna.cp(Coordinates.of(complex_), 3).error == pytest.approx(tna.cp(complex_, 3).error, rel=1e-3)
    # Elements of equal indices are added; those of a small tensor, or none at all, make no difference.
    twice = Coordinates([[0, 0, 1], [0, 0, 1], [0, 0, 1]], [1.0, 1.0, 2.0], (30, 30, 30))
    assert tna.cp(twice, 1).weights[0] == pytest.approx(2.0)
    assert tna.cp(Coordinates.of(np.zeros((30, 30, 30))), 2).error == 0.0
    assert tna.tucker(Coordinates.of(np.zeros((30, 30, 30))), 2).error == 0.0
    assert tna.tucker(Coordinates.of(whole[:4, :5, :6]), max_error=0.5).error <= 0.5
    assert tna.cp(Coordinates([[1]], [3.0], (30000,)), 1).error == pytest.approx(0.0, abs=1e-9)


def test_starts_and_fixed_modes_of_sparse_tensors() -> None:
    whole = sparse_numbers((30, 31, 32), 2)
    sparse = Coordinates.of(whole)
    begun = tna.cp(sparse, 2)
    again = tna.cp(sparse, 2, init=begun, fixed=[1])
    assert (again.factors[1] == begun.factors[1]).all()
    assert again.error <= begun.error + 1e-9
    several = tna.cp(sparse, 2, init="random", starts=4)
    assert several.error <= tna.cp(sparse, 2, init="random").error
    assert len(tna.cp(sparse, 2, callback=lambda *_: True).history) == 1
    assert tna.cp(sparse, max_error=0.5).error <= 0.5
    core = tna.tucker(sparse, 2)
    kept = tna.tucker(sparse, 2, init=core, fixed=[0])
    assert (kept.factors[0] == core.factors[0]).all()
    assert tna.tucker(sparse, 2, max_iterations=0).error >= core.error - 1e-12
    assert tna.tucker(sparse, 2, init="random").error == pytest.approx(tna.tucker(whole, 2, init="random").error)


def test_zeros_are_not_formed() -> None:
    rng = np.random.default_rng(0)
    places = rng.integers(0, 10_000, (3, 20_000))
    sparse = Coordinates(places, rng.normal(size=20_000), (10_000,) * 3)
    for fit in (tna.cp, tna.tucker):
        fit(sparse, 2, max_iterations=2)
        assert peak_of(lambda fit=fit: fit(sparse, 2, max_iterations=2)) < 30 << 20
    found = tna.cp(sparse, 2, max_iterations=2)
    made = found.entries(places.T)
    square = float(found.norm()) ** 2 + np.sum((sparse.data - made) ** 2 - made**2)  # of distinct places
    assert found.error == pytest.approx(math.sqrt(square) / np.linalg.norm(sparse.data), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: tna.tensor_train(x, 2), BackendError, r"sparse, which only cp\(\) and tucker\(\) take"),
        (lambda x: tna.cp(x, 2, mask=np.ones(x.shape, bool)), ConfigError, "zeros of a sparse tensor are values"),
        (lambda x: tna.tucker(x, max_error=0.1), ConfigError, "too many for a sparse tensor: give rank="),
        (lambda x: tna.tucker(x, 2, nonnegative=True), ConfigError, r"needs zeros, too: pass x\.toarray\(\)"),
        (lambda x: tna.cp(Coordinates(x.coords, x.data * np.nan, x.shape), 2), ShapeError, "holds NaN"),
        (lambda x: tna.cp(Coordinates(x.coords, x.data * 1e200, x.shape), 2), ShapeError, "largest value of a sparse"),
        (lambda x: tna.cp(Coordinates(x.coords, x.data, (9, 30, 30)), 2), ShapeError, "mode 0 must be from 0 to 8"),
        (lambda x: tna.cp(Coordinates(x.coords[:2], x.data, x.shape), 2), ShapeError, "as many integers for each mode"),
        (lambda x: tna.cp(Coordinates(x.coords, x.data.astype("S3"), x.shape), 2), BackendError, "must hold numbers"),
        (lambda x: tna.cp(Coordinates(x.coords, x.data, (0, 3, 3)), 2), ShapeError, "nothing to decompose"),
    ],
)
def test_what_sparse_tensors_cannot_be(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(Coordinates.of(sparse_numbers((30, 30, 30), 0)))


def test_sparse_arrays_that_are_refused() -> None:
    filled = Coordinates.of(np.eye(3))
    filled.fill_value = 1.0
    with pytest.raises(BackendError, match=r"must be zero; got fill_value=1\.0"):
        tna.cp(filled, 1)
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="a sparse tensor of torch is not read"):
        tna.cp(torch.eye(3).to_sparse(), 1)


# -- PARAFAC2: matrices with rows of their own ------------------------------------------------------


def planted(
    seed: int, rank: int = 3, *, noise: float = 0.0, kind: str = "float64", count: int = 8, least: int = 5
) -> tuple[list[np.ndarray], np.ndarray]:
    """Slices of different numbers of rows that have a PARAFAC2 decomposition, but for noise, and its factor C."""
    rng = np.random.default_rng(seed)
    a, b, c = (
        rng.uniform(0.5, 1.5, (count, rank)),
        numbers((rank, rank), seed, kind),
        numbers((9, rank), seed + 1, kind),
    )
    slices = []
    for k in range(count):
        rotation = np.linalg.qr(numbers((int(rng.integers(least, 16)), rank), seed + k, kind))[0]
        slices.append(rotation @ b @ np.diag(a[k]) @ c.T)
    size = noise * np.sqrt(np.mean(np.abs(np.concatenate(slices)) ** 2))
    return [matrix + size * numbers(matrix.shape, k, kind) for k, matrix in enumerate(slices)], c


def slices_error(made: Any, slices: list[np.ndarray]) -> float:
    lost = sum(np.linalg.norm(x - y) ** 2 for x, y in zip(made, slices, strict=True))
    return float(np.sqrt(lost / sum(np.linalg.norm(y) ** 2 for y in slices)))


@pytest.mark.law("decompositions")
@settings(max_examples=10)
@given(st.integers(0, 30), st.integers(1, 3), st.sampled_from([0.0, 0.1]), st.sampled_from(["float64", "complex128"]))
def test_parafac2_is_what_it_says(seed: int, rank: int, noise: float, kind: str) -> None:
    slices, _ = planted(seed, rank, noise=noise, kind=kind)
    weights, (a, b, c), projections = found = tna.parafac2(slices, rank)
    assert found.shape == tuple(matrix.shape for matrix in slices)
    assert found.error == pytest.approx(slices_error(found.to_tensors(), slices), abs=1e-12)
    assert found.error <= found.history[-1] + 1e-9
    assert (np.diff(found.history) <= 0.0).all()
    for k, projection in enumerate(projections):
        np.testing.assert_allclose(projection.conj().T @ projection, np.eye(rank), atol=1e-12)
        np.testing.assert_allclose(found.slice(k), projection @ b @ np.diag(weights * a[k]) @ c.T, atol=1e-12)
    for factor in (a, b, c):
        np.testing.assert_allclose(np.linalg.norm(factor, axis=0), 1.0)
    whole = np.linalg.norm(np.concatenate([matrix.reshape(-1) for matrix in found.to_tensors()]))
    assert float(found.norm()) == pytest.approx(whole, rel=1e-10)
    np.testing.assert_allclose((found * -2j).slice(0), -2j * found.slice(0), atol=1e-12)
    with tempfile.TemporaryDirectory() as folder:
        found.save(folder + "/tensor")
        loaded = tt.load(folder + "/tensor")
    assert type(loaded) is tt.Parafac2Tensor
    assert all(np.array_equal(x, y) for x, y in zip(loaded.arrays, found.arrays, strict=True))
    # Rows of slices may be turned, and slices scaled, without any change of C.
    turned = [np.linalg.qr(numbers((len(x), len(x)), 7, kind))[0] @ x * 2.0**20 for x in slices]
    again = tna.parafac2(turned, rank)
    assert again.error == pytest.approx(found.error, rel=1e-3, abs=1e-4)


@pytest.mark.law("decompositions")
@pytest.mark.parametrize("seed", in_depth(range(6), range(3)))
def test_planted_components_of_slices_are_found(seed: int) -> None:
    slices, c = planted(seed)
    found = tna.parafac2(slices, 3, max_iterations=2000, tol=1e-10)
    assert found.error < 1e-6
    alike = abs(np.linalg.pinv(found.factors[2]) @ c)
    assert (np.sort(alike / alike.max(axis=0), axis=0)[:-1] < 1e-3).all(), "the same columns, up to order and scale"
    theirs, errors = tensorly.decomposition.parafac2(slices, 3, random_state=0, n_iter_max=200, return_errors=True)
    assert found.error <= errors[-1] + 1e-6
    noisy = planted(seed, noise=0.1)[0]
    theirs = tensorly.decomposition.parafac2(noisy, 3, random_state=0, n_iter_max=100)
    made = tensorly.parafac2_tensor.parafac2_to_slices(theirs)
    assert tna.parafac2(noisy, 3).error <= slices_error(made, noisy) * (1.0 + 1e-4)
    assert tt.Parafac2Tensor(*theirs).error is None
    assert slices_error(tt.Parafac2Tensor(*theirs).to_tensors(), made) < 1e-12
    own = tensorly.parafac2_tensor.parafac2_to_slices(tensorly.parafac2_tensor.Parafac2Tensor(found))
    assert slices_error(own, found.to_tensors()) < 1e-12


def test_parafac2_of_every_library_and_start(backend: Backend) -> None:
    slices = planted(1, noise=0.1)[0]
    arrays = [backend.asarray(matrix, "float32") for matrix in slices]
    found = tna.parafac2(arrays, 2, max_iterations=30)
    assert {backend.dtype_name(array) for array in (found.weights, *found.factors, *found.projections)} == {"float32"}
    assert found.backend.name == backend.name
    made = [backend.to_numpy(matrix) for matrix in found.to_tensors()]
    assert found.error == pytest.approx(slices_error(made, slices), rel=1e-4)
    square = [matrix[:5, :] for matrix in arrays]
    assert tuple(tna.parafac2(square, 2, max_iterations=5).to_tensor().shape) == (8, 5, 9)


def test_settings_of_parafac2() -> None:
    slices = planted(2, noise=0.1)[0]
    single, several = (tna.parafac2(slices, 2, init="random", starts=n, random_state=3) for n in (1, 4))
    assert several.error <= single.error
    assert len(several.history) > len(single.history)
    assert len(tna.parafac2(slices, 2, callback=lambda *_: True).history) == 1
    assert tna.parafac2(slices, 2, max_iterations=2).outcome.stopped == "max_iterations"
    found = tna.parafac2(slices, 2, nonnegative=[0, 2])
    assert min(found.factors[0].min(), found.factors[2].min()) >= 0.0
    assert (np.diff(found.history) <= 0.0).all()
    assert found.error >= tna.parafac2(slices, 2).error - 1e-6
    stacked = np.stack([matrix[:5] for matrix in slices])
    assert tna.parafac2(stacked, 2).error == tna.parafac2(list(stacked), 2).error
    zeros = tna.parafac2(0.0 * stacked, 2)
    assert (zeros.error, zeros.converged, float(abs(zeros.to_tensor()).max())) == (0.0, True, 0.0)
    text = "<Parafac2Tensor: shape 2 matrices of 3 rows and 3 columns, rank 3, parameters 45 (2.5 of 18), error "
    assert repr(tna.parafac2([np.eye(3)] * 2, 3)).startswith(text)
    with pytest.raises(ShapeError, match=r"form no tensor: use to_tensors\(\)"):
        found.to_tensor()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: tna.parafac2(x, 8), ShapeError, "rank 8 is above 7, the least number of rows or columns"),
        (lambda x: tna.parafac2([], 1), ShapeError, "at least one array"),
        (lambda x: tna.parafac2(x[0], 1), ShapeError, r"or an array of shape \(K, I, J\); got shape"),
        (lambda x: tna.parafac2([*x, x[0][:, 1:]], 1), ShapeError, "slice 8 has shape .*; expected as many columns"),
        (lambda x: tna.parafac2([*x, x[0] * np.nan], 1), ShapeError, "slice 8 holds NaN"),
        (lambda x: tna.parafac2([x[0][:0]], 1), ShapeError, "nothing to decompose"),
        (lambda x: tna.parafac2(x, 1, nonnegative=[1]), ConfigError, "takes the modes 0 and 2"),
        (lambda x: tna.parafac2(x, 1, nonnegative=[3]), ShapeError, "mode must be from 0 to 2"),
        (lambda x: tna.parafac2([y * 1j for y in x], 1, nonnegative=[0]), BackendError, "needs real slices"),
        (lambda x: tna.parafac2(x, 1, init="hosvd"), ConfigError, "init must be 'svd' or 'random'"),
        (
            lambda x: tt.Parafac2Tensor(None, [np.ones((2, 1))] * 3, [np.ones((3, 1))]),
            ShapeError,
            "got 1 projections with 1 columns",
        ),
        (lambda x: tt.Parafac2Tensor(np.ones(2), [np.ones((1, 1))] * 3, [x[0][:, :1]]), ShapeError, r"expected \(1,\)"),
        (lambda x: tna.parafac2(x, 1) + tna.parafac2(x, 1), TypeError, "unsupported operand"),
        (lambda x: tt.unfold(tna.parafac2(x, 1), 0), BackendError, r"is a Parafac2Tensor: give its to_tensor\(\)"),
        (lambda x: tt.inner(*[tna.parafac2(x, 1)] * 2), BackendError, r"tensor1 is a Parafac2Tensor: give"),
        (lambda x: tna.parafac2(x, 1).slice(8), ShapeError, "number must be an integer from 0 to 7"),
    ],
)
def test_what_parafac2_refuses(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(planted(0)[0])


def test_slices_that_require_gradients_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="not differentiated: detach them first"):
        tna.parafac2([torch.ones(3, 2, requires_grad=True)], 1)


# -- Trains of functions, from few of their values -------------------------------------------------


class Counted:
    """A function of indices that notes where it is evaluated."""

    def __init__(self, function: Callable[[np.ndarray], Any]) -> None:
        self.function, self.places = function, list[tuple[int, ...]]()

    def __call__(self, indices: np.ndarray) -> Any:
        assert indices.dtype == np.int64
        self.places += map(tuple, indices.tolist())
        return self.function(indices)


def everywhere(shape: tuple[int, ...]) -> np.ndarray:
    return np.indices(shape).reshape(len(shape), -1).T


def error_at_random(train: tt.TTTensor, function: Callable[[np.ndarray], Any], count: int = 20_000) -> float:
    """The relative error at random points, by NumPy alone."""
    indices = np.random.default_rng(99).integers(0, train.shape, (count, train.order))
    made, known = np.ones((count, 1, 1)), np.asarray(function(indices))
    for core, places in zip(train, indices.T, strict=True):
        made = made @ np.asarray(core).transpose(1, 0, 2)[places]
    return float(np.linalg.norm(made[:, 0, 0] - known) / np.linalg.norm(known))


@pytest.mark.law("cross-approximation")
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6).map(tuple), st.integers(1, 4),
    st.sampled_from(["float64", "complex128"]), st.booleans(), st.integers(0, 1000),
)  # fmt: skip
def test_trains_are_found_from_their_values(
    shape: tuple[int, ...], rank: int, dtype: str, by_rank: bool, seed: int
) -> None:
    known = tt.random_tt(shape, rank, random_state=seed, dtype=dtype)
    words: dict[str, Any] = {"rank": rank} if by_rank else {"max_error": 1e-9}
    function = Counted(known.entries)
    found = tna.tt_cross(function, shape, random_state=seed, **words)
    assert found[0].dtype == dtype
    assert relative_error(found.to_tensor(), known.to_tensor()) < 1e-8
    assert found.error < 1e-8
    assert max(found.rank) <= rank
    assert (found.converged, found.outcome.calls) == (True, len(function.places))
    # Nothing is computed twice.
    assert len(set(function.places)) == len(function.places) <= math.prod(shape)


@pytest.mark.law("cross-approximation")
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple), st.floats(1e-9, 0.5), st.integers(0, 9),
    st.sampled_from([lambda i: 1.0 / (1.0 + i.sum(1)), lambda i: np.sin(i @ np.arange(1, i.shape[1] + 1.0) ** 2 + 1j)]),
)  # fmt: skip
def test_the_error_of_a_small_tensor_is_known_and_kept(
    shape: tuple[int, ...], limit: float, seed: int, function: Any
) -> None:
    dense = function(everywhere(shape)).reshape(shape)
    found = tna.tt_cross(function, shape, max_error=limit, random_state=seed)
    exact = float(np.linalg.norm(found.to_tensor() - dense) / np.linalg.norm(dense))
    assert found.outcome.stopped == "converged"
    assert exact <= limit * (1 + 1e-9)
    if math.prod(shape) <= 1000:
        assert found.error == pytest.approx(exact, rel=1e-6, abs=1e-14)
    # It is no larger than TT-SVD with a tenth of the error.
    assert found.num_parameters <= tna.tensor_train(dense, max_error=limit / 10).num_parameters


@pytest.mark.law("cross-approximation")
@settings(max_examples=15)
@given(
    st.sampled_from(["noise", "decaying noise", "smooth", "complex"]),
    st.sampled_from([(13, 11, 9), (6, 7, 5, 8), (4, 4, 4, 4, 4, 4)]),
    st.sampled_from([{"rank": 1}, {"rank": 3}, {"max_error": 0.15}, {"max_error": 0.02}]),
    st.integers(0, 999),
)
def test_the_estimate_is_near_the_error(kind: str, shape: tuple[int, ...], words: Any, seed: int) -> None:
    places = np.indices(shape)
    dense = {
        "noise": lambda: with_noise(tt.random_tt(shape, 3, random_state=seed).to_tensor(), seed=seed),
        "decaying noise": lambda: np.exp(-0.3 * places.sum(0)) * (1.0 + 0.05 * numbers(shape, seed)),
        "smooth": lambda: 1.0 / (1.0 + places.sum(0) + seed),
        "complex": lambda: np.exp(0.01j * seed * places.sum(0)) + 0.03 * numbers(shape, seed, "complex128"),
    }[kind]()
    found = tna.tt_cross(lambda i: dense[tuple(i.T)], shape, random_state=seed, **words)
    exact = error_of(found, dense)
    # It is that of the returned train, whose ranks are lower than those of the sweeps.
    assert 0.7 * exact - 1e-13 <= found.error <= 1.3 * exact + 1e-13
    if "max_error" in words and found.converged:
        assert found.error <= words["max_error"]


def coupled(indices: np.ndarray) -> np.ndarray:
    return np.exp(-((indices - 9.5) ** 2).sum(1) / 20 - (np.diff(indices, axis=1) ** 2).sum(1) / 40)


X40 = 2.0 ** -np.arange(1, 41)
# Functions of 10^12 points and more: the shape, a rank that is enough, and the error asked for.
LARGE: dict[str, tuple[Callable[[np.ndarray], Any], tuple[int, ...], int, float]] = {
    "one over a sum": (lambda i: 1.0 / (1.0 + i.sum(1)), (20,) * 20, 8, 1e-8),
    "Gaussian": (lambda i: np.exp(-((i - 7.3) ** 2).sum(1) / 8), (20,) * 20, 1, 1e-8),
    "coupled Gaussian": (coupled, (20,) * 10, 10, 1e-5),
    "sine of a sum": (lambda i: np.sin(0.1 * i.sum(1)), (20,) * 20, 2, 1e-8),
    "integers": (lambda i: i.sum(1), (20,) * 20, 2, 1e-8),
    "a constant": (lambda i: np.full(len(i), 3.5), (10,) * 12, 1, 1e-8),
    "complex": (lambda i: np.exp(0.3j * i.sum(1)) / (1 + i[:, 3] + i[:, 7]), (10,) * 12, 7, 1e-8),
    "product of a few": (lambda i: i[:, 2] * (1.0 + i[:, 9]), (10,) * 12, 1, 1e-8),
    "distance": (lambda i: np.sqrt((1.0 + i**2).sum(1)), (30,) * 8, 11, 1e-8),
    "oscillation of 2^40": (lambda i: np.cos(40 * (i @ X40)) * np.exp(-(i @ X40)), (2,) * 40, 2, 1e-8),
    "peak of 2^40": (lambda i: 1.0 / ((i @ X40 - 0.3) ** 2 + 1e-8), (2,) * 40, 12, 1e-8),
    "kink of 2^40": (lambda i: abs(i @ X40 - 0.3), (2,) * 40, 4, 1e-8),
}


@pytest.mark.law("cross-approximation")
@pytest.mark.parametrize("name", in_depth(LARGE, list(LARGE)[1::2]))
def test_functions_of_very_many_points(name: str) -> None:
    function, shape, rank, limit = LARGE[name]
    found = tna.tt_cross(function, shape, max_error=limit)
    assert (found.outcome.stopped, found.error <= limit) == ("converged", True)
    assert max(found.rank) <= rank
    # The estimate is that of the error at other points, up to its own scatter.
    assert error_at_random(found, function) < 4.0 * limit
    assert found.outcome.calls < 500_000
    assert "(estimated)" in repr(found)
    assert f"{found.outcome.calls:,}" in repr(found)
    again = tna.tt_cross(function, shape, max_error=limit)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    # Two trains of other random points differ by no more than both errors, everywhere.
    other = tna.tt_cross(function, shape, max_error=limit, random_state=1)
    assert float((other - found).norm()) < 2.0 * limit * float(found.norm())


def test_exact_trains_of_very_many_points_are_found_to_rounding() -> None:
    for shape, rank in (((10,) * 12, 6), ((4,) * 20, 10), ((2,) * 40, 5)):
        known = tt.random_tt(shape, rank, random_state=3)
        for words in ({"rank": rank}, {"max_error": 1e-10}):
            found = tna.tt_cross(known.entries, shape, **words)
            assert error_at_random(found, known.entries) < 1e-12
            assert max(found.rank) <= rank
            assert found.converged
    # Where the train is large is seen, too: at nearly all points this one is zero.
    spikes = tt.TTTensor([np.eye(50)[None, 7:8].transpose(0, 2, 1) + (m == 3) * 0.5 for m in range(8)])
    found = tna.tt_cross(spikes.entries, (50,) * 8, max_error=1e-9, points=[[7] * 8])
    assert float((found - spikes).norm()) < 1e-9 * float(spikes.norm())


def test_a_rank_gets_nearly_the_best_train_of_it() -> None:
    shape, dense = (12, 12, 12, 12), 1.0 / (1.0 + np.indices((12, 12, 12, 12)).sum(0))
    for rank in (2, 4):
        found = tna.tt_cross(lambda i: 1.0 / (1.0 + i.sum(1)), shape, rank=rank)
        assert max(found.rank) == rank
        assert found.outcome.stopped == "converged"
        assert error_of(found, dense) < 1.5 * tna.tensor_train(dense, rank).error
    found = tna.tt_cross(lambda i: 1.0 / (1.0 + i.sum(1)), shape, rank=(2, 3, 2), max_error=1e-9)
    assert (found.rank, found.outcome.stopped, found.converged) == ((1, 2, 3, 2, 1), "rank", False)
    assert "allow higher ranks" in found.outcome.reason
    assert error_of(found, dense) <= found.error < 0.1


def test_a_function_that_is_zero_almost_everywhere_needs_points() -> None:
    def spikes(indices: np.ndarray) -> np.ndarray:
        return 2.0 * (indices == 3).all(1) + (indices == [5] * 10 + [1] * 10).all(1)

    shape, places = (20,) * 20, [[3] * 20, [5] * 10 + [1] * 10]
    zeros = tna.tt_cross(spikes, shape, max_error=1e-6)
    assert (float(zeros.norm()), zeros.error, zeros.converged) == (0.0, 0.0, True)
    found = tna.tt_cross(spikes, shape, max_error=1e-6, points=places)
    assert np.allclose(found.entries(places), [2.0, 1.0], rtol=1e-12)
    assert float(found.norm()) == pytest.approx(math.sqrt(5.0), rel=1e-12)
    assert float(tna.tt_cross(lambda i: 0.0 * i[:, 0], shape, rank=3).norm()) == 0.0


@pytest.mark.parametrize("power", [-600, 600])
def test_values_of_any_size(power: int) -> None:
    def function(indices: np.ndarray) -> np.ndarray:
        return 1.0 / (1.0 + indices.sum(1))

    one = tna.tt_cross(function, (9,) * 6, max_error=1e-6)
    other = tna.tt_cross(lambda i: np.ldexp(function(i), power), (9,) * 6, max_error=1e-6)
    assert other.error == pytest.approx(one.error, rel=1e-9)
    assert np.array_equal(np.ldexp(other[0], -power), one[0])


def test_values_that_double_precision_does_not_hold() -> None:
    for function, shape in (
        (lambda i: 1e308 * np.sin(i.sum(1)), (30, 20, 20)),
        (lambda i: np.where((i == 7).all(1), 1e200, 1e-200), (8, 8, 8)),
    ):
        with pytest.raises(ShapeError, match="too large, or range too widely, for double precision: divide it by"):
            tna.tt_cross(function, shape, max_error=1e-8)


def test_a_cross_always_ends() -> None:
    table = np.random.default_rng(0).normal(size=1 << 16)

    def noise(indices: np.ndarray) -> np.ndarray:
        return table[(indices @ 3 ** np.arange(1, 13)) % (1 << 16)]

    function = Counted(noise)
    found = tna.tt_cross(function, (10,) * 12, max_error=1e-6, max_calls=30_000)
    assert (found.outcome.stopped, found.converged) == ("max_calls", False)
    assert "allow more calls" in found.outcome.reason
    assert not tna.tt_cross(noise, (10,) * 12, rank=2).converged, "the train is no better than zeros"
    assert found.outcome.calls == len(function.places) <= 30_000
    assert found.error > 0.5
    for error, dtype in ((0.0, np.float64), (1e-9, np.float32)):
        found = tna.tt_cross(lambda i, dtype=dtype: (1 / (1 + i.sum(1))).astype(dtype), (9,) * 6, max_error=error)
        assert found.outcome.stopped == "stalled"
        assert found.error < 1e3 * np.finfo(dtype).eps


def test_a_cross_is_in_the_library_of_the_values(backend: Backend) -> None:
    with backend.double_precision():
        for dtype in ("float64", "float32", "complex64"):
            found = tna.tt_cross(
                lambda i, dtype=dtype: backend.asarray(1.0 / (1.0 + i.sum(1)), dtype), (8,) * 6, max_error=1e-4
            )
            assert all(backend.owns(core) and backend.dtype_name(core) == dtype for core in found)
            host = tna.tt_cross(lambda i, dtype=dtype: (1.0 / (1.0 + i.sum(1))).astype(dtype), (8,) * 6, max_error=1e-4)
            assert relative_error(backend.to_numpy(found.to_tensor()), host.to_tensor()) < 1e-6
    assert tna.tt_cross(lambda i: (i.sum(1) > 3).tolist(), (4, 4), rank=4)[0].dtype == np.float64


def one(indices: np.ndarray) -> np.ndarray:
    return np.ones(len(indices))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: tna.tt_cross(lambda i: np.where(i[:, 1] == 2, np.nan, 1.0), (5, 5), rank=1), ShapeError,
         r"returned nan at index \(\d, 2\); expected finite numbers: replace"),
        (lambda: tna.tt_cross(lambda i: np.where(i[:, 1] == 2, -np.inf, 1.0), (5, 5), rank=1), ShapeError,
         r"returned -inf at index \(\d, 2\)"),
        (lambda: tna.tt_cross(lambda i: np.ones(3), (9, 9), rank=1), ShapeError,
         r"one number for each row .*shape \(\d+,\) for indices of shape \(\d+, 2\); got shape \(3,\)"),
        (lambda: tna.tt_cross(lambda i: one(i)[:, None], (9, 9), rank=1), ShapeError, r"got shape \(\d+, 1\)"),
        (lambda: tna.tt_cross(lambda i: 1.0, (9, 9), rank=1), ShapeError, r"got shape \(\)"),
        (lambda: tna.tt_cross(lambda i: None, (9, 9), rank=1), BackendError, "what the function returns .*NoneType"),
        (lambda: tna.tt_cross(lambda i: np.array(["a"] * len(i)), (9, 9), rank=1), BackendError, "must hold numbers"),
        (lambda: tna.tt_cross(lambda i: 1 / 0, (9, 9), rank=1), ZeroDivisionError, "division by zero"),
        (lambda: tna.tt_cross(3, (9, 9), rank=1), ConfigError, "function must be a function; got 3"),
        (lambda: tna.tt_cross(one, (9, 9)), ShapeError, "rank= or max_error=, or both.*got neither"),
        (lambda: tna.tt_cross(one, (9, 9), max_calls=10**4), ShapeError, "rank= or max_error="),
        (lambda: tna.tt_cross(one, (9, 9), max_error=1.5), ConfigError, "max_error must be from 0"),
        (lambda: tna.tt_cross(one, (9, 0), rank=1), ShapeError, "a size in shape must be .*at least 1; got 0"),
        (lambda: tna.tt_cross(one, (), rank=1), ShapeError, "shape is empty"),
        (lambda: tna.tt_cross(one, (9, 9), rank=0), ShapeError, "rank must be an integer of at least 1; got 0"),
        (lambda: tna.tt_cross(one, (9, 9), rank=(1, 2)), ShapeError, "one for each of the 1 bonds"),
        (lambda: tna.tt_cross(one, (1 << 40, 2), rank=1), ShapeError, "divide it into several modes, such as 40 of 2"),
        (lambda: tna.tt_cross(one, (2,) * 1000, rank=1), ShapeError,
         "1000 modes has more than 1e300 elements, .* fewer or smaller modes"),
        (lambda: tna.tt_cross(one, (20,) * 20, rank=1, max_calls=500), ShapeError,
         r"max_calls=500 is too small for a train of shape .*: expected at least 2200"),
        (lambda: tna.tt_cross(one, (9, 9), rank=1, max_calls=0), ConfigError, "max_calls must be"),
        (lambda: tna.tt_cross(one, (9, 9), rank=1, points=[[9, 0]]), ShapeError, r"\(9, 0\), outside of a tensor"),
        (lambda: tna.tt_cross(one, (9, 9), rank=1, points=[[1.0, 0.0]]), ShapeError, r"integers of shape \(n, 2\)"),
        (lambda: tna.tt_cross(one, (9, 9), rank=1, points=[1, 2]), ShapeError, r"integers of shape \(n, 2\)"),
        (lambda: tna.tt_cross(one, (9, 9), rank=1, random_state=-1), ConfigError, "random_state"),
    ],
)  # fmt: skip
def test_what_cannot_be_crossed_is_refused(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_a_function_returns_arrays_of_one_library_without_derivatives() -> None:
    torch = pytest.importorskip("torch")
    turn = itertools.count()
    with pytest.raises(BackendError, match="an array of torch before, and now one of numpy"):
        tna.tt_cross(lambda i: one(i) if next(turn) else torch.ones(len(i)), (50, 50), rank=1)
    with pytest.raises(BackendError, match="not differentiated: let the function return detached values"):
        tna.tt_cross(lambda i: torch.ones(len(i), requires_grad=True), (5, 5), rank=1)
