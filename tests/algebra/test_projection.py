"""F against its dense matrix, its adjoint, slices and digest, for every kind and library."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import on_every_library, relative_error
from tnadapt.algebra.maps import KINDS, SQUARE
from tnadapt.algebra.maps.fastfood import hadamard_rows
from tnadapt.backends import Backend, load_backend
from tnadapt.testing import _reference as reference_maps

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
    return reference_maps.matrix(f.kind.removeprefix("non"), f.n_in, f.n_out, f.seed, f.group)


def expected(f: tna.Projection, x: np.ndarray) -> np.ndarray:
    y = x @ dense(f).T
    return y if f.linear else reference_maps.tanhshrink(y)


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


@pytest.mark.law("projection-slice")
@pytest.mark.parametrize("kind", KINDS)
def test_slices_on_every_library(
    backend: Backend, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tnadapt.algebra.maps.fastfood._LEAST_BLOCK", 16)  # more than one block
    f = made(kind, 9, 300)
    x = rng.normal(size=(2, f.n_in))
    whole = expected(f, x)
    for start, stop in ((299, 300), (100, 231)):
        found = backend.to_numpy(f.slice(backend.asarray(x, "float64"), start, stop))
        assert np.max(np.abs(found - whole[:, start:stop])) < 1e-12 * np.max(np.abs(whole))


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
    tracemalloc.start()
    f.slice(x, 5 << 20, (5 << 20) + (1 << 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20  # the whole, in float32, is 64 MiB, its transform as much, its draws more
    # Of a long slice it is a few times the slice, and no blocks of draws beside it.
    tracemalloc.start()
    f.slice(x, 3 << 20, 4 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * (4 << 20) + (8 << 20)


@pytest.mark.law("projection-shared")
def test_state_takes_nine_bytes_per_element(rng: np.random.Generator) -> None:
    n = 1 << 16
    f = tna.Projection("linear", 100, n)
    f.map.forward_plain(load_backend("numpy"), rng.normal(size=100))
    assert sum(array.nbytes for array in f.map.draws.kept.values()) == 9 * n


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


def test_a_linear_part_is_another_map_than_its_whole() -> None:
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
def test_copies_and_pickles_leave_the_draws_behind(rng: np.random.Generator) -> None:
    f, x = tna.Projection("nonlinear_v2", 30, 900, seed=1), rng.normal(size=30)
    expected_y = f(x)
    for other in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert not other.map.draws.kept
        assert np.array_equal(other(x), expected_y)
    assert len(pickle.dumps(f)) < 1000


@pytest.mark.law("projection-lengths")
def test_bad_input() -> None:
    for arguments, message in (
        (("fastfood", 3, 3), "one of 'identity'"),
        (("linear", 0, 3), "n_in must be from 1"),
        (("linear", 3, 0), "n_out must be from 1"),
        (("identity", 3, 4), "keeps the length"),
        (("shuffle", 3, 4), "keeps the length"),
        (("linear", 3, 4, -1), "seed must be from 0 to 18446744073709551615"),
        (("linear", 3, 4, 1 << 64), "seed must be from 0 to 18446744073709551615"),
        (("linear", 3, 4, 0, -1), "group must be from 0 to 4294967295"),
        (("linear", 3, 4, 0, 1 << 32), "group must be from 0 to 4294967295"),
        (("linear", 3.5, 4), "n_in must be an integer"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tna.Projection(*arguments)  # type: ignore[arg-type]
    assert tna.Projection("linear", 3, 4, (1 << 64) - 1, (1 << 32) - 1)(np.ones(3)).any()
    f = tna.Projection("nonlinear", 3, 5)
    with pytest.raises(tna.ShapeError, match=r"expected \(…, 3\)"):
        f(np.zeros(4))
    with pytest.raises(tna.ShapeError, match=r"expected \(…, 5\)"):
        f.adjoint(np.zeros(4), at=np.zeros(3))
    with pytest.raises(tna.ConfigError, match="at=x"):
        f.adjoint(np.zeros(5))
    with pytest.raises(tna.BackendError, match="dtypes"):
        f.adjoint(np.zeros(5), at=np.zeros(3, np.float32))
    with pytest.raises(tna.ShapeError, match=r"expected \(…, 3\)"):
        f.adjoint(np.zeros(5), at=np.zeros(5))
    for batch, point in (((), (2,)), ((2,), (3,)), ((2,), (1,)), ((2, 3), (3,))):
        with pytest.raises(tna.ShapeError, match=r"expected \(3,\) or the batch of y"):
            f.adjoint(np.zeros((*batch, 5)), at=np.zeros((*point, 3)))
    with pytest.raises(tna.BackendError, match="int64"):
        f(np.zeros(3, np.int64))
    for start, stop in ((0, 0), (3, 2), (-1, 2), (0, 6), (0, 2.0)):
        with pytest.raises(tna.ShapeError, match=r"is empty|must be from|must be an integer"):
            f.slice(np.zeros(3), start, stop)


@pytest.mark.law("precision")
def test_tanhshrink_does_not_cancel_near_zero() -> None:
    from tnadapt.algebra.maps import tanhshrink

    numpy = load_backend("numpy")
    t = np.concatenate([np.geomspace(1e-12, 3.0, 4001), [0.0, 0.25]])
    t = np.concatenate([-t, t])
    exact = reference_maps.tanhshrink(t)
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
