"""The compiled F and its parts (loops, gathering, draws) against their reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import installed, relative_error
from tnadapt.algebra import rng
from tnadapt.backends import load_backend

from ..internals import kernels
from ..layouts import LAYOUTS, laid_out

pytestmark = pytest.mark.skipif(kernels("fastfood") is None, reason="numba is not installed")


# -- The compiled F against its reference implementation: values, gradients, batches, any layout of arrays -------------

compiled = kernels("fastfood")

NUMPY = load_backend("numpy")
KIND = st.sampled_from(["linear", "linear_v2"])
# Some rounding errors of single precision, relative to the largest element.
CLOSE = 1e-6


def projection(kind: str, n_in: int, n_out: int, seed: int = 3, group: int = 0) -> tna.Projection:
    return tna.Projection(kind, n_in, n_out, seed, group)


def vector(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def agree(f: tna.Projection, x: np.ndarray, y: np.ndarray) -> None:
    """Compare the kernels' F and adjoint in single precision with the reference in double precision."""
    for z, plain, adjoint in ((x, f.map.forward_plain, False), (y, f.map.adjoint_plain, True)):
        found, expected = compiled.linear(z, f.map, adjoint), plain(NUMPY, z.astype(np.float64))
        assert found.dtype == np.float32
        assert found.shape == expected.shape
        # Few elements may all be small by chance: what is summed in them has this size, as F's columns have norm 1.
        size = max(np.max(np.abs(expected)), np.linalg.norm(z) / np.sqrt(f.padded))
        assert np.max(np.abs(found - expected)) < CLOSE * size


@pytest.mark.law("kernels-agree")
# Gathered and sorted, one period of the table and several, growing and reducing.
@pytest.mark.parametrize("kind", ["linear", "linear_v2"])
@given(st.integers(1, 40_000), st.integers(1, 40_000), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
@example(1, 1 << 14, 3, 0)
@example(20_001, 33_333, 3, 0)
@example(1 << 17, 1 << 17, 3, 0)
@example((1 << 18) + 1, (1 << 18) + 1, 3, 0)
@example(300_000, 999, 3, 0)
@example(300_000, 1_000_000, 3, 0)
@example(1 << 19, 1 << 19, 3, 0)
@example(700, 1 << 19, 3, 0)
@example((1 << 18) - 5, (1 << 19) + 3, 3, 0)
@example((1 << 18) + 40_000, 300_000, 2**64 - 1, 0)
@example((1 << 18) + 299_999, 7, 0, 2**32 - 1)
def test_both_algorithms_at_every_length(kind: str, n_in: int, n_out: int, seed: int, group: int) -> None:
    if max(n_in, n_out) <= 1 << 13:
        n_out += 1 << 14
    f, x = projection(kind, n_in, n_out, seed, group), np.random.default_rng(5).standard_normal(n_in)
    expected = f.map.forward_plain(NUMPY, x).tobytes()
    cold = projection(kind, n_in, n_out, seed, group)(x)
    agree(f, vector(n_in), vector(n_out, 1))
    # Double precision has the bits of the reference; what is kept for single precision is used, too.
    for found in (cold, f(x)):
        assert found.dtype == np.float64
        assert found.tobytes() == expected


@settings(max_examples=8)
@given(KIND, st.integers(1, 300_000), st.integers(1, 300_000), st.sampled_from([1.0, 1e-300, 1e-320, 1e300]))
def test_batches_in_double_precision_of_any_size(kind: str, n_in: int, n_out: int, scale: float) -> None:
    f = projection(kind, n_in, n_out + (1 << 14))
    x = np.random.default_rng(0).standard_normal((2, n_in)) * scale
    with np.errstate(over="ignore", invalid="ignore"):
        expected = f.map.forward_plain(NUMPY, x)
    assert np.array_equal(f(x), expected, equal_nan=True)


def test_shorter_periods_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    # Many repeats of a table that would be gathered from; and a vector that would be sorted, gathered.
    f = projection("linear", 1 << 18, 1 << 20)
    monkeypatch.setattr(compiled, "_GATHERED_BITS", 17)
    agree(f, vector(f.n_in), vector(f.n_out, 1))
    assert "order" in f.map.kept
    f = projection("linear", 1 << 19, 1 << 19)
    monkeypatch.setattr(compiled, "_GATHERED_BITS", 19)
    agree(f, vector(f.n_in), vector(f.n_out, 1))
    assert "order" not in f.map.kept


def test_several_passes_across_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_STRIP_BITS", 2)
    monkeypatch.setattr(compiled, "_BLOCK_BITS", 16)
    for n_in, n_out in ((1000, 1 << 20), (1 << 20, 1 << 20)):
        agree(projection("linear", n_in, n_out), vector(n_in), vector(n_out, 1))


@given(st.sampled_from([(0,), (3,), (2, 0, 2), (2, 1, 2)]), st.booleans(), st.data())
def test_batches_strides_and_flags(batch: tuple[int, ...], adjoint: bool, data: st.DataObject) -> None:
    f = projection("linear", 700, 17_000)
    length, other = (f.n_out, f.n_in) if adjoint else (f.n_in, f.n_out)
    x = vector(int(np.prod(batch)) * length).reshape(*batch, length)
    way = f.adjoint if adjoint else f
    expected = np.reshape([way(row) for row in x.reshape(-1, length)], (*batch, other))
    seen = laid_out(x, data.draw(st.sampled_from([how for how in LAYOUTS if how != "repeated"])))
    before = seen.tobytes()
    found = way(seen)
    assert found.shape == expected.shape
    assert relative_error(found, expected) < CLOSE
    assert seen.tobytes() == before


@pytest.mark.law("walsh-not-finite")
@pytest.mark.parametrize("n_in", [700, 300_000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_propagate(n_in: int, value: float) -> None:
    f = projection("linear", n_in, 300_000)
    for way, plain, length in ((f, f.map.forward_plain, f.n_in), (f.adjoint, f.map.adjoint_plain, f.n_out)):
        x = vector(length)
        x[length // 2] = value
        with np.errstate(invalid="ignore"):
            expected = plain(NUMPY, x)
        assert np.array_equal(np.isfinite(way(x)), np.isfinite(expected))
        assert not np.isfinite(expected).any()


@pytest.mark.law("kernels-agree")
@pytest.mark.parametrize("n_in", [700, 300_000])
def test_the_same_bits_with_any_number_of_threads(n_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f = projection("linear", n_in, 300_000)
    x, y = vector(n_in), vector(f.n_out)
    made = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(compiled, "thread_count", lambda threads=threads: threads)
        made.append((f(x), f.adjoint(y)))
    for forward, backward in made[1:]:
        assert np.array_equal(forward, made[0][0])
        assert np.array_equal(backward, made[0][1])


def test_the_result_keeps_little_more_than_itself() -> None:
    for n_in, n_out in ((700, (1 << 17) + 1), (300_000, 999), (1 << 19, 1 << 19), (700, (1 << 17) - 99)):
        f = projection("linear", n_in, n_out)
        for made in (f(vector(n_in)), f.adjoint(vector(n_out))):
            assert made.flags.owndata or made.base.nbytes <= 1.3 * made.nbytes + 64


@pytest.mark.skipif(not installed("torch"), reason="torch is not installed")
class TestTorch:
    """Gradients of tensors."""

    @pytest.mark.law("derivatives-of-projections")
    @pytest.mark.parametrize("kind", ["linear", "linear_v2", "nonlinear"])
    @pytest.mark.parametrize(("n_in", "n_out"), [(700, 17_000), (300_000, 999), (300_000, 300_000)])
    def test_gradients(self, kind: str, n_in: int, n_out: int) -> None:
        import torch

        f = projection(kind, n_in, n_out)
        x, y = torch.from_numpy(vector(n_in)).requires_grad_(), torch.from_numpy(vector(n_out, 1)).requires_grad_()
        (grad,) = torch.autograd.grad(f(x), x, y, create_graph=True)
        # With derivatives, double precision takes torch's own operations.
        x64, y64 = (z.detach().double().requires_grad_() for z in (x, y))
        (grad64,) = torch.autograd.grad(f(x64), x64, y64, create_graph=True)
        assert relative_error(f(x).detach(), f(x64).detach()) < CLOSE
        assert relative_error(grad.detach(), grad64.detach()) < 2 * CLOSE
        # The gradient is differentiated in its turn.
        z = torch.from_numpy(vector(n_in, 2))
        second = torch.autograd.grad(grad, [y], z)
        second64 = torch.autograd.grad(grad64, [y64], z.double())
        assert relative_error(second[0], second64[0]) < 2 * CLOSE

    @pytest.mark.law("functional-transforms")
    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
    def test_transformations(self) -> None:
        import torch

        f = projection("linear", 700, 17_000)
        x, y = torch.from_numpy(vector(2100)).reshape(700, 3), torch.from_numpy(vector(17_000))
        each = torch.stack([f(column.contiguous()) for column in x.T])
        assert torch.equal(torch.func.vmap(f, in_dims=1)(x), each)
        value, pull = torch.func.vjp(f, x[:, 0])
        assert torch.equal(value, each[0])
        assert torch.equal(pull(y)[0], f.adjoint(y))
        value, tangent = torch.func.jvp(f, (x[:, 0],), (x[:, 1],))
        assert torch.equal(tangent, each[1])
        batched = torch.func.vmap(pull)(each)[0]
        assert torch.equal(batched, f.adjoint(each))
        jacobian = torch.func.jacrev(lambda part: f(torch.cat([part, x[2:, 0]]))[:5])(x[:2, 0])
        assert jacobian.shape == (5, 2)

    def test_the_kernel_is_what_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        f, ran = projection("linear", 700, 17_000), []
        true = compiled.linear
        monkeypatch.setattr(compiled, "linear", lambda *a: ran.append(a[-1]) or true(*a))
        x = torch.from_numpy(vector(700)).requires_grad_()
        f(x).sum().backward()
        assert ran == [False, True]
        with torch.inference_mode():
            f(x)
        f(x.detach().half())
        f(torch.nn.Parameter(x.detach()))
        assert ran == [False, True, False, False, False]
        f(x.double())
        f.adjoint(torch.zeros(17_000, dtype=torch.float64))
        f(torch.empty(0, 700))
        assert len(ran) == 5
        f(x.detach().double())
        assert ran[5:] == [False]

    def test_compiled_by_torch(self) -> None:
        import torch

        f = projection("linear", 700, 17_000)
        x = torch.from_numpy(vector(700))
        whole = torch.compile(f, fullgraph=True, backend="eager")
        assert relative_error(whole(x), f(x)) < CLOSE


# -- The compiled draws equal the reference implementation bit for bit -------------------------------------------------

draws = kernels("philox")

WORD = 2**32 - 1
STREAM = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, WORD), st.integers(0, WORD))
# Near 0, at the seams of the pieces that either way works in, and far out.
START = st.one_of(st.integers(0, 9), st.integers(2**16 - 9, 2**16 + 9), st.integers(0, 2**62))
LENGTH = st.one_of(st.integers(0, 70), st.integers(1015, 1035), st.integers(2**16 - 9, 2**16 + 9))
SIZE = st.one_of(st.integers(1, 5000), st.integers(0, 62).map(lambda bits: 2**bits), st.integers(1, 2**63 - 1))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    return found.tobytes() == expected.tobytes()


@given(STREAM, START, LENGTH)
@example(stream=(0, 0, 2), start=0, length=2**18)
@example(stream=(2**64 - 1, WORD, WORD), start=2**62 + 3, length=1030)
def test_consecutive_elements(stream: tuple[int, int, int], start: int, length: int) -> None:
    for name in ("words", "normals"):
        asked = (*stream, start, start + length)
        assert same(getattr(draws, name)(*asked), getattr(rng.NumpyStreams, name)(*asked)), name


@pytest.mark.law("equal-seeds")
@given(STREAM, st.lists(st.integers(0, 2**64 - 1), max_size=3), LENGTH)
def test_elements_of_several_seeds(stream: tuple[int, int, int], seeds: list[int], stop: int) -> None:
    asked = (np.array(seeds, np.uint64), *stream[1:], stop)
    assert same(draws.normals_of_seeds(*asked), rng.NumpyStreams.normals_of_seeds(*asked))


@pytest.mark.law("equal-seeds")
@given(STREAM, st.lists(st.integers(0, 2**63 - 1), max_size=30), LENGTH)
def test_elements_anywhere(stream: tuple[int, int, int], some: list[int], length: int) -> None:
    for index in (np.array(some, np.int64), np.arange(length)[::-1] * 7, np.arange(length, dtype=np.int32)):
        for name in ("words_at", "normals_at"):
            assert same(getattr(draws, name)(*stream, index), getattr(rng.NumpyStreams, name)(*stream, index)), name


@pytest.mark.law("equal-seeds")
def test_normals_of_extreme_words() -> None:
    # By way of the kernel's own inner function: no stream holds these words at a place that is known.
    edge = round(0.075 * 2**32)
    near = [edge + i for i in range(-40, 40)]
    word = np.array([0, 1, WORD - 1, WORD, 2**31 - 1, 2**31, *near, *(WORD - i for i in near)], np.uint32)
    word = np.resize(word, 1024)
    found = np.empty(word.size, np.float32)
    draws._of_words(word, *np.empty((1, 1024)), np.empty(1024, np.int64), np.empty(1024), found)
    assert same(found, rng._normal_of(word))


@pytest.mark.law("equal-seeds")
@given(SIZE, STREAM, st.booleans(), st.sampled_from([0.0, 0.3, 1.0]), LENGTH)
@example(size=2**17, stream=(0, 0, 1), inverse=False, where=0.0, length=2**17)
@example(size=2**16 + 1, stream=(0, 0, 1), inverse=True, where=0.0, length=2**16 + 1)
@example(size=2**63 - 1, stream=(1, 0, 1), inverse=False, where=1.0, length=1030)
def test_permutations(size: int, stream: tuple[int, int, int], inverse: bool, where: float, length: int) -> None:
    keys = rng.NumpyStreams.words(*stream, 0, 8)
    start = int(where * max(0, size - length))
    asked = (size, keys, start, min(size, start + length), inverse)
    assert same(draws.permutation(*asked), rng.NumpyStreams.permutation(*asked))
