"""fwht: an involution, SciPy's matrix, any axis and batch, every library and dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.backends import Backend


@pytest.mark.law("walsh-involution")
@pytest.mark.parametrize("bits", range(13))
def test_it_is_scipys_matrix_and_its_own_inverse(backend: Backend, bits: int, rng: np.random.Generator) -> None:
    host = rng.normal(size=(2, 1 << bits))
    x = backend.asarray(host, "float64")
    assert relative_error(backend.to_numpy(tna.fwht(x, normalize=False)), host @ hadamard(1 << bits)) < 1e-12
    assert relative_error(backend.to_numpy(tna.fwht(tna.fwht(x))), host) < 1e-12
    again = tna.fwht(tna.fwht(x, normalize=False), normalize=False)
    assert relative_error(backend.to_numpy(again), host * (1 << bits)) < 1e-12


@pytest.mark.law("walsh-any-axis")
@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_any_axis_of_any_batch(batch: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(batch), len(batch) - 1))
    shape = [*batch]
    shape[axis] = 1 << data.draw(st.integers(0, 6))
    x = np.random.default_rng(0).normal(size=shape)
    expected = np.apply_along_axis(lambda v: hadamard(len(v)) @ v, axis, x) if x.size else x
    found = tna.fwht(x, axis=axis, normalize=False)
    assert found.shape == x.shape
    assert relative_error(found, expected) < 1e-12


@pytest.mark.law("walsh-any-axis")
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8,), 0), ((3, 8), -1), ((8, 3), -2), ((2, 16, 3), 1), ((1, 2, 1), 0), ((2, 0, 4), 0), ((2, 3, 1, 32), -1)],
)
def test_any_axis_on_every_library(
    backend: Backend, shape: tuple[int, ...], axis: int, rng: np.random.Generator
) -> None:
    x = rng.normal(size=shape)
    expected = np.apply_along_axis(lambda v: hadamard(len(v)) @ v, axis, x) if x.size else x
    found = tna.fwht(backend.asarray(x, "float64"), axis=axis, normalize=False)
    assert relative_error(backend.to_numpy(found), expected) < 1e-12


@pytest.mark.law("walsh-any-axis")
def test_strided_and_read_only_input(rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 6))[:, ::3].T
    x.flags.writeable = False
    kept = x.copy()
    assert relative_error(tna.fwht(x, normalize=False), x @ hadamard(8)) < 1e-12
    assert np.array_equal(x, kept)


@pytest.mark.law("subnormal")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_subnormal_numbers_keep_the_digits_that_there_are(
    backend: Backend, dtype: str, rng: np.random.Generator
) -> None:
    """But JAX's compiler takes them for 0, as docs/numerics says."""
    distance = float(np.finfo(dtype).smallest_subnormal)
    host = rng.integers(-50_000, 50_000, 1024).astype(np.float64)
    x = backend.asarray(host * distance, dtype)
    found = backend.to_numpy(tna.fwht(x)).astype(np.float64) / distance
    if backend.name == "jax":
        assert not found.any()
    else:
        assert np.abs(found - tna.fwht(host)).max() <= 4 * 1024**0.5


@pytest.mark.law("precision")
def test_half_precision_is_computed_in_single_and_rounded_once(backend: Backend, rng: np.random.Generator) -> None:
    host = (200.0 * rng.normal(size=4096)).astype(np.float16).astype(np.float64)
    for dtype, tolerance in (("float16", 2.0**-10), ("bfloat16", 2.0**-7)):
        try:
            x = backend.asarray(host, dtype)
        except tna.BackendError:
            continue
        found = tna.fwht(x)
        assert backend.dtype_name(found) == dtype
        exact = tna.fwht(backend.to_numpy(x).astype(np.float64))
        # Unnormalized sums reach 2**6 times the result: in float16 they would overflow.
        assert relative_error(backend.to_numpy(found).astype(np.float64), exact) < tolerance


@pytest.mark.law("precision")
def test_float32_error_grows_like_its_logarithm(rng: np.random.Generator) -> None:
    for bits in (4, 10, 16, 20):
        x = rng.normal(size=1 << bits)
        error = relative_error(tna.fwht(x.astype(np.float32)), tna.fwht(x))
        assert error < 2.0**-24 * 4 * bits


@pytest.mark.law("walsh-not-finite")
def test_non_finite_values_spread_only_within_their_vector(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 64))
    x[0, 3] = np.nan
    found = tna.fwht(x)
    assert np.isnan(found[0]).all()
    assert relative_error(found[1], tna.fwht(x[1])) == 0.0


@pytest.mark.law("walsh-length")
@pytest.mark.parametrize(("length", "padded"), [(0, 1), (3, 4), (5, 8), (6, 8), (12, 16), (1000, 1024)])
def test_a_length_that_is_not_a_power_of_two(backend: Backend, length: int, padded: int) -> None:
    with pytest.raises(tna.ShapeError, match=rf"power of two; .* has {length}: pad it with zeros to {padded}$"):
        tna.fwht(backend.asarray(np.zeros((2, length)), "float32"))


@pytest.mark.law("walsh-length")
def test_bad_input() -> None:
    with pytest.raises(tna.ShapeError, match="axis, in an array of shape"):
        tna.fwht(np.zeros((4, 4)), axis=2)
    with pytest.raises(tna.ShapeError, match="axis"):
        tna.fwht(np.array(1.0))
    with pytest.raises(tna.BackendError, match="int64"):
        tna.fwht(np.zeros(4, np.int64))
    with pytest.raises(tna.BackendError, match="complex"):
        tna.fwht(np.zeros(4, complex))
    with pytest.raises(tna.BackendError, match="got list"):
        tna.fwht([1.0, 2.0])
    with pytest.raises(tna.ConfigError, match="normalize must be True or False; got 2"):
        tna.fwht(np.zeros(4), normalize=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [None, False, True])
def test_the_reference_implementation_takes_the_same_arguments(
    backend: Backend, normalize: bool | None, rng: np.random.Generator
) -> None:
    x = backend.asarray(rng.normal(size=(3, 16)), "float64")
    settings = {} if normalize is None else {"normalize": normalize}
    expected = backend.to_numpy(tna.fwht(x, **settings))
    assert relative_error(backend.to_numpy(fwht_plain(backend, x, **settings)), expected) < 1e-12


# -- Into a given array --------------------------------------------------------------------------------------------


def writable(backend: Backend) -> bool:
    return backend.name in ("numpy", "torch", "cupy")


@given(
    st.sampled_from(["float32", "float64", "float16"]),
    st.sampled_from(["C", "turned", "every other", "read-only"]),
    st.sampled_from(["another", "itself", "turned", "every other", "overlapping"]),
    st.sampled_from([((8,), 0), ((3, 8), -1), ((8, 3), 0), ((2, 16, 3), 1), ((3, 1), 1), ((0, 4), 1)]),
    st.booleans(),
)
def test_out_receives_what_a_call_without_it_returns(
    dtype: str, how: str, where: str, case: tuple[tuple[int, ...], int], normalize: bool
) -> None:
    (shape, axis), rng = case, np.random.default_rng(0)
    memory = rng.normal(size=4 * int(np.prod(shape)) + 8).astype(dtype)

    def laid_out(name: str, start: int) -> np.ndarray:
        part = memory[start:]
        size = int(np.prod(shape))
        if name == "turned":
            return part[:size].reshape(shape[::-1]).T
        return part[: 2 * size : 2].reshape(shape) if name == "every other" else part[:size].reshape(shape)

    x = laid_out(how, 0)
    out = x if where == "itself" else laid_out(where, 3 if where == "overlapping" else memory.size // 2)
    if where == "every other":
        x = x.copy()  # its memory reaches into that of out
    if how == "read-only" and where != "itself":
        x = x.copy()
        x.flags.writeable = False
    expected = tna.fwht(x, axis=axis, normalize=normalize)  # a copy may have another layout, and so other bits
    assert tna.fwht(x, axis=axis, normalize=normalize, out=out) is out
    assert np.array_equal(out, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("length", [1, 8, 4096])
def test_out_on_every_library(backend: Backend, dtype: str, length: int, rng: np.random.Generator) -> None:
    if dtype == "float16" and not writable(backend):
        return  # some libraries do not have it
    x = backend.asarray(rng.normal(size=(3, length)), dtype)
    out = backend.zeros((3, length), x)
    if not writable(backend):
        with pytest.raises(tna.BackendError, match="no arrays that can be written to here: leave out"):
            tna.fwht(x, out=out)
        return
    expected = backend.to_numpy(tna.fwht(x))
    assert tna.fwht(x, out=out) is out
    assert np.array_equal(backend.to_numpy(out), expected)
    assert tna.fwht(x, out=x) is x
    assert np.array_equal(backend.to_numpy(x), expected)


def test_an_out_that_does_not_fit() -> None:
    x = np.zeros((2, 8), np.float32)
    with pytest.raises(tna.ShapeError, match=r"out has shape \(8, 2\); expected that of the input, \(2, 8\)"):
        tna.fwht(x, out=np.zeros((8, 2), np.float32))
    with pytest.raises(tna.BackendError, match="two dtypes in one call: float32 and float64"):
        tna.fwht(x, out=np.zeros((2, 8)))
    with pytest.raises(tna.BackendError, match="got list"):
        tna.fwht(x, out=[0.0])  # type: ignore[list-item]
    out = np.ones((2, 8), np.float32)
    out.flags.writeable = False
    with pytest.raises(tna.BackendError, match="read-only: give one that can be written to"):
        tna.fwht(x, out=out)
    assert (out == 1).all()
