"""The compiled transform equals NumPy butterflies bit for bit, and the reference within rounding, for any array."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from random import Random

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.backends import load_backend

pytest.importorskip("numba", reason="numba, which compiles the kernels, is not installed")

from ..internals import kernels, work_space
from ..layouts import LAYOUTS, laid_out

walsh = kernels("walsh")
transform, transform_into = walsh.transform, walsh.transform_into

DTYPES = ("float32", "float64")


def butterflies(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """The textbook algorithm: stage by stage, each a sum and a difference, rounded in the array's dtype."""
    moved = np.moveaxis(x, axis, -1)
    y, half = np.ascontiguousarray(moved).reshape(-1, moved.shape[-1]), 1
    while half < y.shape[-1]:
        pairs = y.reshape(len(y), moved.shape[-1] // (2 * half), 2, half)
        y = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2).reshape(y.shape)
        half *= 2
    return np.moveaxis(y.reshape(moved.shape), -1, axis)


def plain(x: np.ndarray, axis: int, normalize: bool) -> np.ndarray:
    backend = load_backend("numpy")
    return np.moveaxis(fwht_plain(backend, np.moveaxis(x, axis, -1), normalize), -1, axis)


@pytest.fixture(params=[1, 2, 5])
def team(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Set the number of threads, and caches so small that many arrays are large enough to be split."""
    monkeypatch.setattr(work_space, "_allowed", lambda: request.param)
    monkeypatch.setattr(walsh, "thread_count", lambda: request.param)
    monkeypatch.setattr(walsh, "_SHARED_BYTES", 1 << 12)
    return int(request.param)


@pytest.fixture
def small_caches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    walsh.planned.cache_clear()
    monkeypatch.setattr(walsh, "cache_sizes", lambda: (1 << 12, 1 << 14))
    yield
    walsh.planned.cache_clear()


@pytest.mark.law("kernels-agree")
@given(
    batch=st.lists(st.integers(0, 5), max_size=2),
    inner=st.lists(st.sampled_from([0, 1, 2, 3, 5, 8, 16, 17, 40]), max_size=2),
    bits=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    how=st.sampled_from(LAYOUTS),
    normalize=st.booleans(),
)
# More stages than two sweeps over strips have, of four stages or of three; and fewer.
@example([3], [40], 10, "float32", "C", True)
@example([3], [5], 9, "float64", "C", True)
@example([3], [48], 5, "float32", "C", True)
def test_it_equals_its_reference_implementation(
    batch: list[int], inner: list[int], bits: int, dtype: str, how: str, normalize: bool
) -> None:
    shape, axis = (*batch, 1 << bits, *inner), len(batch)
    x = laid_out(np.random.default_rng(0).normal(size=shape).astype(dtype), how)
    kept = x.copy()
    scale = 1 / math.sqrt(1 << bits) if normalize else 1.0
    found = transform(x, scale, axis)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert found.flags.writeable
    assert np.array_equal(x, kept)
    if x.size and bits:
        assert relative_error(found, plain(x, axis, normalize)) < (2e-6 if dtype == "float32" else 4e-15)
    assert np.array_equal(found, butterflies(x * x.dtype.type(scale), axis))
    if x.flags.c_contiguous and x.flags.aligned and x.flags.writeable:
        transform_into(x, x, 1.0, axis)
        assert np.array_equal(x, butterflies(kept, axis))


@pytest.mark.law("kernels-agree")
@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 12).map(lambda bits: 1 << bits)),
        st.sampled_from([(), (0,), (3,), (1, 512), (512, 1), (2, 256)]),
    ),
    dtype=st.sampled_from((*DTYPES, ">f4", "float16", "int32", "complex64")),
    how=st.sampled_from(LAYOUTS),
    normalize=st.booleans(),
)
def test_small_vectors_without_checks(shape: tuple[int, ...], dtype: str, how: str, normalize: bool) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    x = laid_out(x, how) if x.ndim and x.size else x
    kept, found = x.copy(), walsh.transform_at_once(x, normalize)
    small = dtype in DTYPES and x.ndim == 1 and walsh.low_run(x.itemsize) <= x.size < work_space.SMALL // x.itemsize
    assert (found is not None) == small
    if found is None:
        return
    assert found.flags.carray
    assert found.dtype == x.dtype
    assert np.array_equal(x, kept)
    scale = 1 / math.sqrt(shape[0]) if normalize else 1.0
    assert np.array_equal(found, transform(x, scale))
    assert np.array_equal(found, butterflies(x * x.dtype.type(scale)))


@pytest.mark.slow
@pytest.mark.law("kernels-agree")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "unit"),
    [(bits, unit) for bits in range(1, 20) for unit in (1, 2, 3, 16, 24, 1000) if unit << bits <= 1 << 20],
)
def test_every_schedule_gives_the_same_bits(bits: int, unit: int, dtype: str, team: int, small_caches: None) -> None:
    x = np.random.default_rng(bits).normal(size=(3, 1 << bits, unit)).astype(dtype)
    expected = butterflies(x * x.dtype.type(0.7), 1)
    assert np.array_equal(transform(x, 0.7, 1), expected)
    transform_into(x, x, 0.7, 1)
    assert np.array_equal(x, expected)


@pytest.mark.law("kernels-agree")
@given(
    unit=st.integers(2, 17),
    bits=st.integers(1, 9),
    batch=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    in_place=st.booleans(),
)
def test_rows_that_are_shorter_than_a_vector(unit: int, bits: int, batch: int, dtype: str, in_place: bool) -> None:
    """Vectors overlap the next row: nothing of it is changed, nor what lies around the array."""
    shape = batch, 1 << bits, unit
    memory = np.random.default_rng(bits).normal(size=math.prod(shape) + 40).astype(dtype)
    memory[:20] = memory[-20:] = np.nan
    kept, dst = memory.copy(), memory if in_place else np.full_like(memory, np.nan)
    with np.errstate(all="raise"):
        transform_into(memory[20:-20].reshape(shape), dst[20:-20].reshape(shape), 0.7, 1)
    expected = butterflies(kept[20:-20].reshape(shape) * kept.dtype.type(0.7), 1)
    assert np.array_equal(dst[20:-20].reshape(shape), expected)
    assert np.isnan(dst[:20]).all()
    assert np.isnan(dst[-20:]).all()
    if not in_place:
        assert np.array_equal(memory, kept, equal_nan=True)


@pytest.mark.parametrize("shape", [(1 << 20,), (4, 1 << 18), (1 << 19, 3), (1 << 10, 1 << 10)])
def test_large_arrays_with_the_caches_that_there_are(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    x = rng.normal(size=shape).astype(np.float32)
    for axis in range(x.ndim):
        if x.shape[axis] != 3:
            assert np.array_equal(transform(x, 1.0, axis), butterflies(x, axis))


@pytest.mark.law("walsh-not-finite")
@given(
    st.sampled_from([2, 64, 512, 4096]),
    st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38]), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_non_finite_values_are_where_the_reference_has_them(length: int, values: list[float], random: Random) -> None:
    x = np.ones((2, length), np.float32)
    for value in values:
        x[1, random.randrange(length)] = value
    with np.errstate(all="ignore"):
        found, expected = tna.fwht(x), plain(x, -1, True)
    assert np.array_equal(np.isfinite(found[0]), np.isfinite(expected[0]))
    assert relative_error(found[0], expected[0]) < 1e-6
    # The kernel scales first, so its sums stay finite where those of the reference, scaled last, may not.
    if all(abs(value) < 1e38 or not math.isfinite(value) for value in values):
        assert np.array_equal(np.isfinite(found[1]), np.isfinite(expected[1]))


def test_public_calls_from_many_threads_at_once(team: int, rng: np.random.Generator) -> None:
    x = rng.normal(size=(8, 1 << 13)).astype(np.float32)
    expected, found = tna.fwht(x), [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = tna.fwht(x[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(found[i], expected[i]) for i in range(8))
