"""F against its dense matrix, its adjoint, slices and digest, for every kind and library; the transform within F."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

import tnadapt as tna
from tests.conftest import of_any_shape, on_every_library, peak_of, relative_error
from tests.support.references import reference
from tnadapt.algebra.maps import KINDS, SQUARE, tanhshrink
from tnadapt.algebra.maps.fastfood import hadamard_rows
from tnadapt.backends import Backend, load_backend

KIND = st.sampled_from(KINDS)
LENGTHS = [(1, 1), (1, 9), (9, 1), (2, 3), (7, 7), (64, 64), (37, 509), (40, 7), (100, 1000)]

# What files of released versions hold: a change here is a break of the format.
DIGESTS = {
    "linear": "7c1e55b9e9fe6ed055d4c50023b4f8d26890b223307237ffffa23785ccac58da",
    "linear_v2": "a52cf4074f81d8e54aaf70373e151fab4513dfcfac77e269650ae732c381a9f0",
    "shuffle": "dad5309b241ec1635d9f69308d99fe91094a03a1352047bcfd7b9aab184c8f21",
    "long": "1a5e2df247796dc72589b692bf6268377bc0a20b0aec38c20d4533bf9fde591f",
}


def dense(f: tna.Projection) -> np.ndarray:
    return reference.matrix_of(f.map)


def expected(f: tna.Projection, x: np.ndarray) -> np.ndarray:
    y = x @ dense(f).T
    return y if f.linear else reference.tanhshrink(y)


def made(kind: str, n_in: int, n_out: int, seed: int = 3, group: int = 0) -> tna.Projection:
    return tna.Projection(kind, n_out if kind in SQUARE else n_in, n_out, seed, group)


@pytest.mark.law("projection-adjoint", "projection-lengths")
@pytest.mark.parametrize("kind", KINDS)
@on_every_library("lengths", LENGTHS, [(9, 1), (7, 7), (37, 509)])
def test_on_every_library(backend: Backend, kind: str, lengths: tuple[int, int], rng: np.random.Generator) -> None:
    n_in, n_out = lengths
    f = made(kind, n_in, n_out)
    x, y = rng.normal(size=(2, f.n_in)), rng.normal(size=f.n_out)
    found = backend.to_numpy(f(backend.asarray(x, "float64")))
    assert relative_error(found, expected(f, x)) < 1e-12
    at = x[0]
    slope = np.ones(f.n_out) if f.linear else np.tanh(dense(f) @ at) ** 2
    adjoint = backend.to_numpy(f.adjoint(backend.asarray(y, "float64"), at=backend.asarray(at, "float64")))
    assert relative_error(adjoint, dense(f).T @ (slope * y)) < 1e-12


FASTFOOD = ("linear", "linear_v2", "nonlinear", "nonlinear_v2")


@pytest.mark.law("projection-adjoint", "equal-seeds")
@of_any_shape
@given(st.sampled_from(FASTFOOD), st.sampled_from([0.07, 0.5, 1.0, 3.0]), st.integers(1, 90), st.integers(0, 2**64 - 1))
def test_fastfood_is_the_f_of_plans(backend: Backend, kind: str, ratio: float, size: int, seed: int) -> None:
    config = tna.Config(order=1, format="dense", projection=kind, ratio=min(ratio, 1.0), seed=seed)
    f = tna.UpdatePlan(config, [(1, size)]).groups[0].projection
    if ratio > 1.0:  # no plan has such an F
        f = tna.Projection(kind, 3 * size, size, seed)
    host = np.random.default_rng(0).normal(size=(2, f.n_in))
    x = backend.asarray(host, "float64")
    y = backend.to_numpy(tna.fastfood(x, size, seed=seed, kind=kind))
    assert np.array_equal(y, backend.to_numpy(f(x)))
    assert relative_error(y, expected(f, host)) < 1e-12
    if f.linear:
        back = np.random.default_rng(1).normal(size=size)
        adjoint = tna.fastfood(backend.asarray(back, "float64"), f.n_in, seed=seed, kind=kind, adjoint=True)
        assert relative_error(host @ backend.to_numpy(adjoint), y @ back) < 1e-10


def test_fastfood_is_a_name_of_linear() -> None:
    assert tna.Projection("fastfood", 3, 5).kind == "linear"
    config = tna.Config(projection=["shuffle", "fastfood"])
    assert config == tna.Config(projection=["shuffle", "linear"])
    assert "fastfood" not in json.dumps(config.to_dict())
    assert np.array_equal(tna.fastfood(np.ones(3), 5, kind="fastfood"), tna.fastfood(np.ones(3), 5))
    with pytest.raises(tna.ConfigError, match="projection 'fastfood' is built in and cannot be replaced"):
        tna.register_map("fastfood", tna.maps.Map)


@pytest.mark.law("draws-in-pieces", "projection-slice")
@given(KIND, st.integers(1, 90), st.integers(1, 90), st.sampled_from([0, 2**63]), st.integers(0, 3), st.data())
def test_slices(kind: str, n_in: int, n_out: int, seed: int, group: int, data: st.DataObject) -> None:
    f = made(kind, n_in, n_out, seed, group)
    start = data.draw(st.integers(0, n_out - 1))
    stop = data.draw(st.integers(start + 1, n_out))
    x = np.random.default_rng(0).normal(size=(2, f.n_in))
    whole = expected(f, x)
    alone = f.slice(x, start, stop)  # nothing is kept yet: drawn for this slice
    scale = np.max(np.abs(whole)) or 1.0
    assert np.max(np.abs(alone - whole[:, start:stop])) < 1e-12 * scale
    f(x)
    kept = f.slice(x, start, stop)
    assert np.max(np.abs(kept - whole[:, start:stop])) < 1e-12 * scale


@pytest.mark.law("draws-in-pieces")
@pytest.mark.parametrize("part", [16, 1 << 18])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SQUARE])
def test_slices_longer_than_a_chunk_of_the_last_transform(
    kind: str, part: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnadapt.algebra.maps.fastfood._SLICE_CHUNK", 64)
    monkeypatch.setattr("tnadapt.algebra.maps.fastfood._SLICE_PART", part)
    monkeypatch.setattr("tnadapt.algebra.maps.fastfood._LEAST_BLOCK", 16)
    f = made(kind, 50, 3000)
    x = rng.normal(size=50)
    whole = made(kind, 50, 3000)(x)
    for start, stop in ((0, 1), (17, 400), (1000, 2999), (2990, 3000)):
        assert np.max(np.abs(f.slice(x, start, stop) - whole[start:stop])) < 1e-12 * np.max(np.abs(whole))


@pytest.mark.parametrize("bits", range(1, 63, 3))
def test_entries_of_a_hadamard_matrix_of_any_size_are_its_recursion(bits: int) -> None:
    size = 1 << bits
    rng = np.random.default_rng(bits)
    for row, column in [*rng.integers(0, size, (20, 2)).tolist(), (size - 1, size - 1)]:
        found = hadamard_rows.host((row, row + 1, column, column + 1, size))
        sign = math.prod(-1 if row >> bit & column >> bit & 1 else 1 for bit in range(bits))
        assert found.shape == (1, 1)
        assert found.item() == sign / math.sqrt(size)


@pytest.mark.slow
@pytest.mark.law("projection-slice")
def test_a_slice_needs_the_memory_of_the_slice_and_of_x(rng: np.random.Generator) -> None:
    f = tna.Projection("linear", 1000, 1 << 24)
    x = rng.normal(size=1000).astype(np.float32)
    for length in (1 << 16, 1 << 20):
        f.slice(x, 0, length)  # whatever is compiled for such lengths is compiled
    # The whole, in float32, is 64 MiB, its transform as much, its draws more.
    assert peak_of(lambda: f.slice(x, 5 << 20, (5 << 20) + (1 << 16))) < 10 << 20
    # Of a long slice it is a few times the slice, and no blocks of draws beside it.
    assert peak_of(lambda: f.slice(x, 3 << 20, 4 << 20)) < 2.5 * (4 << 20) + (8 << 20)


@pytest.mark.law("precision")
@given(KIND, st.integers(1, 40), st.integers(1, 40))
def test_half_and_single_precision(kind: str, n_in: int, n_out: int) -> None:
    f = made(kind, n_in, n_out)
    x = np.random.default_rng(1).normal(size=f.n_in)
    for dtype, tolerance in ((np.float32, 2e-6), (np.float16, 2e-3)):
        y = f(x.astype(dtype))
        assert y.dtype == dtype
        exact = expected(f, x.astype(dtype).astype(np.float64))
        assert np.max(np.abs(y - exact)) < tolerance * max(np.max(np.abs(exact)), 1e-30)


@pytest.mark.law("equal-seeds")
def test_equal_seeds_give_equal_maps_and_digests(rng: np.random.Generator) -> None:
    x = rng.normal(size=20)
    one, same = tna.Projection("linear", 20, 50, seed=7), tna.Projection("linear", 20, 50, seed=7)
    assert np.array_equal(one(x), same(x))
    assert one.digest == same.digest
    others = [
        tna.Projection("linear", 20, 50, seed=8),
        tna.Projection("linear", 20, 50, seed=7, group=1),
        tna.Projection("linear_v2", 20, 50, seed=7),
        tna.Projection("nonlinear", 20, 50, seed=7),
        tna.Projection("linear", 21, 50, seed=7),
        tna.Projection("linear", 20, 51, seed=7),
        tna.Projection("shuffle", 50, 50, seed=7),
        tna.Projection("identity", 50, 50, seed=7),
    ]
    assert len({one.digest, *(other.digest for other in others)}) == 1 + len(others)
    assert tna.Projection("linear", 3, 4, (1 << 64) - 1, (1 << 32) - 1)(np.ones(3)).any()
    # A linear part is another map than its whole.
    whole, plain = (tna.Projection(kind, 3, 5) for kind in ("nonlinear", "linear"))
    assert plain.linear_part is plain
    assert whole.linear_part.key not in (whole.key, plain.key)


@pytest.mark.law("known-draws")
def test_the_digest_is_pinned() -> None:
    assert tna.Projection("linear", 37, 509).digest == DIGESTS["linear"]
    assert tna.Projection("linear_v2", 37, 509).digest == DIGESTS["linear_v2"]
    assert tna.Projection("shuffle", 509, 509).digest == DIGESTS["shuffle"]
    assert tna.Projection("linear", 37, 1 << 21).digest == DIGESTS["long"]


@pytest.mark.law("projection-shared")
def test_draws_take_nine_bytes_per_element_and_copies_and_pickles_leave_them_behind(rng: np.random.Generator) -> None:
    f, x = tna.Projection("nonlinear_v2", 30, 900, seed=1), rng.normal(size=30)
    expected_y = f(x)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert not other.map.kept
        assert np.array_equal(other(x), expected_y)
    assert len(pickle.dumps(f)) < 1000
    long = tna.Projection("linear", 100, 1 << 16)
    long.map.forward_plain(load_backend("numpy"), rng.normal(size=100))
    assert sum(array.nbytes for array in long.map.kept.values()) == 9 << 16


@pytest.mark.parametrize(("bits", "dtype"), [(31, np.int32), (32, np.int64)])
def test_positions_are_held_in_the_shorter_integers_that_fit(
    bits: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    f = tna.Projection("linear", 1 << bits, 1 << bits).map
    monkeypatch.setattr(type(f), "part", lambda self, key, start, stop: np.array([stop - 1]))  # of gigabytes
    held = f.make("perm")
    assert held.dtype == dtype
    assert held == [(1 << bits) - 1]


# -- What is refused -------------------------------------------------------------------------------


NONLINEAR = tna.Projection("nonlinear", 3, 5)
ZEROS = np.zeros((2, 8), np.float32)


def read_only() -> np.ndarray:
    out = np.ones((2, 8), np.float32)
    out.flags.writeable = False
    return out


REFUSED: list[tuple[type[Exception], Callable[[], object], str]] = [
    *((tna.ConfigError, functools.partial(tna.Projection, *arguments), message) for arguments, message in (
        (("slowfood", 3, 3), "one of 'identity'"),
        (("linear", 0, 3), "n_in must be at least 1"),
        (("linear", 3, 0), "n_out must be at least 1"),
        (("identity", 3, 4), "keeps the length"),
        (("shuffle", 3, 4), "keeps the length"),
        (("linear", 3, 4, -1), "seed must be at least 0"),
        (("linear", 3, 4, 1 << 64), "seed must be at most 18,446,744,073,709,551,615"),
        (("linear", 3, 4, 0, -1), "group must be at least 0"),
        (("linear", 3, 4, 0, 1 << 32), "group must be at most 4,294,967,295"),
        (("linear", 3.5, 4), "n_in must be an integer"),
    )),
    (tna.ShapeError, lambda: NONLINEAR(np.zeros(4)), r"expected \(…, 3\)"),
    (tna.ShapeError, lambda: NONLINEAR.adjoint(np.zeros(4), at=np.zeros(3)), r"expected \(…, 5\)"),
    (tna.ConfigError, lambda: NONLINEAR.adjoint(np.zeros(5)), "at=x"),
    (tna.BackendError, lambda: NONLINEAR.adjoint(np.zeros(5), at=np.zeros(3, np.float32)), "dtypes"),
    (tna.ShapeError, lambda: NONLINEAR.adjoint(np.zeros(5), at=np.zeros(5)), r"expected \(…, 3\)"),
    *((tna.ShapeError, functools.partial(NONLINEAR.adjoint, np.zeros((*batch, 5)), at=np.zeros((*point, 3))),
       r"expected \(3,\) or the batch of y")
      for batch, point in (((), (2,)), ((2,), (3,)), ((2,), (1,)), ((2, 3), (3,)))),
    (tna.BackendError, lambda: NONLINEAR(np.zeros(3, np.int64)), "int64"),
    *((tna.ShapeError, functools.partial(NONLINEAR.slice, np.zeros(3), start, stop),
       r"is empty|must be from|must be an integer")
      for start, stop in ((0, 0), (3, 2), (-1, 2), (0, 6), (0, 2.0))),
    (tna.ShapeError, lambda: tna.fastfood(np.ones(()), 3), r"x has shape \(\); expected \(…, n\)"),
    (tna.ShapeError, lambda: tna.fastfood(np.ones((2, 0)), 3), r"x has shape \(2, 0\); expected \(…, n\)"),
    (tna.ConfigError, lambda: tna.fastfood(np.ones(3), 0), "size must be at least 1"),
    (tna.ConfigError, lambda: tna.fastfood(np.ones(3), 5, seed=-1), "seed must be at least 0"),
    (tna.ConfigError, lambda: tna.fastfood(np.ones(3), 3, kind="x"), "kind must be one of 'linear', .*; got 'x'$"),
    (tna.ConfigError, lambda: tna.fastfood(np.ones(3), 3, kind="shuffle"),
     "got 'shuffle'; tnadapt.Projection has the other maps"),
    (tna.ConfigError, lambda: tna.fastfood(np.ones(5), 3, seed=7, kind="nonlinear", adjoint=True),
     r"use tnadapt.Projection\('nonlinear', n_in=3, n_out=5, seed=7\).adjoint\(y, at=x\)"),
    (tna.BackendError, lambda: tna.fastfood(3.0, 5), "x must be an array"),
    (tna.BackendError, lambda: tna.fastfood(np.arange(3), 5), "x, the input of fastfood, must have a real floating"),
    (tna.ShapeError, lambda: tna.fwht(np.zeros((4, 4)), axis=2), "axis, in an array of shape"),
    (tna.ShapeError, lambda: tna.fwht(np.array(1.0)), "axis"),
    (tna.BackendError, lambda: tna.fwht(np.zeros(4, np.int64)), "int64"),
    (tna.BackendError, lambda: tna.fwht(np.zeros(4, complex)), "complex"),
    (tna.BackendError, lambda: tna.fwht([1.0, 2.0]), "got list"),
    (tna.ConfigError, lambda: tna.fwht(np.zeros(4), normalize=2), "normalize must be True or False; got 2"),
    (tna.ShapeError, lambda: tna.fwht(ZEROS, out=np.zeros((8, 2), np.float32)),
     r"out has shape \(8, 2\); expected that of the input, \(2, 8\)"),
    (tna.BackendError, lambda: tna.fwht(ZEROS, out=np.zeros((2, 8))), "two dtypes in one call: float32 and float64"),
    (tna.BackendError, lambda: tna.fwht(ZEROS, out=[0.0]), "got list"),
    (tna.BackendError, lambda: tna.fwht(ZEROS, out=read_only()), "read-only: give one that can be written to"),
]  # fmt: skip


@pytest.mark.law("projection-lengths", "walsh-length")
@pytest.mark.parametrize(("error", "call", "message"), REFUSED)
def test_what_cannot_be_is_refused(error: type[Exception], call: Callable[[], object], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.law("walsh-length")
@pytest.mark.parametrize(("length", "padded"), [(0, 1), (3, 4), (5, 8), (6, 8), (12, 16), (1000, 1024)])
def test_a_length_that_is_not_a_power_of_two(backend: Backend, length: int, padded: int) -> None:
    with pytest.raises(tna.ShapeError, match=rf"power of two; .* has {length}: pad it with zeros to {padded}$"):
        tna.fwht(backend.asarray(np.zeros((2, length)), "float32"))


@pytest.mark.law("precision")
def test_tanhshrink_does_not_cancel_near_zero() -> None:
    numpy = load_backend("numpy")
    t = np.concatenate([np.geomspace(1e-12, 3.0, 4001), [0.0, 0.25]])
    t = np.concatenate([-t, t])
    exact = reference.tanhshrink(t)
    zero = t == 0
    found = tanhshrink(numpy, t)
    assert not found[zero].any()
    assert np.max(np.abs(found[~zero] / exact[~zero] - 1)) < 1e-13
    # The reference implementation itself, against two terms of the series and against the plain difference.
    small, large = ~zero & (np.abs(t) < 1e-4), np.abs(t) > 1
    assert np.max(np.abs(exact[small] / (t[small] ** 3 / 3 - 2 * t[small] ** 5 / 15) - 1)) < 1e-13
    assert np.max(np.abs(exact[large] / (t[large] - np.tanh(t[large])) - 1)) < 1e-14
    single = tanhshrink(numpy, t.astype(np.float32))
    normal = np.abs(t) > 1e-9  # t**3 / 3 is a normal number of single precision
    assert np.max(np.abs(single[normal] / tanhshrink(numpy, t.astype(np.float32).astype(float))[normal] - 1)) < 2e-5


# -- fwht: an involution, SciPy's matrix, any axis and batch, every library and dtype ----------------------------------


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
def test_any_axis_of_any_batch(backend: Backend, batch: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(-len(batch), len(batch) - 1))
    shape = [*batch]
    shape[axis] = 1 << data.draw(st.integers(0, 6))
    x = np.random.default_rng(0).normal(size=shape)
    expected = np.apply_along_axis(lambda v: hadamard(len(v)) @ v, axis, x) if x.size else x
    transformed = tna.fwht(backend.asarray(x, "float64"), axis=axis, normalize=False)
    assert relative_error(backend.to_numpy(transformed), expected) < 1e-12


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


@pytest.mark.law("walsh-not-finite")
def test_non_finite_values_spread_only_within_their_vector(rng: np.random.Generator) -> None:
    x = rng.normal(size=(2, 64))
    x[0, 3] = np.nan
    found = tna.fwht(x)
    assert np.isnan(found[0]).all()
    assert relative_error(found[1], tna.fwht(x[1])) == 0.0


# -- Into a given array --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("length", [1, 8, 4096])
def test_out_is_written_to_or_refused(backend: Backend, dtype: str, length: int, rng: np.random.Generator) -> None:
    x = backend.asarray(rng.normal(size=(3, length)), dtype)
    out = backend.zeros((3, length), x)
    if backend.name not in ("numpy", "torch", "cupy"):
        with pytest.raises(tna.BackendError, match="no arrays that can be written to here: leave out"):
            tna.fwht(x, out=out)
        return
    expected = backend.to_numpy(tna.fwht(x))
    for target in (out, x):
        assert tna.fwht(x, out=target) is target
        assert np.array_equal(backend.to_numpy(target), expected)
