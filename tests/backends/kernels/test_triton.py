"""The Triton kernels against their reference implementations: on a CUDA device, or under Triton's interpreter.

The interpreter must be selected before Triton is imported, so without a device one test runs this file again in a
separate process. The rules and the rounding of the compiler, which the interpreter does not have, are tested in
test_triton_compile.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra import rng

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.5")

import triton.language as tl

from ..internals import launch_plans as passes
from .internals import triton_kernels as kernel_draws
from .internals import triton_launcher as launcher

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; done by test_under_the_interpreter"
)
# The interpreter takes seconds for what a device does in microseconds.
few = settings(max_examples=15 if INTERPRETED else 100)

SEEDS = [(0, 0), (2**40 + 7, 3), (2**63 - 1, 2**31), (2**64 - 1, 2**32 - 1)]
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this is the interpreter, or there is a device")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def tensor(array: np.ndarray, dtype: str = "float64") -> Any:
    return torch.tensor(array, dtype=getattr(torch, dtype), device=DEVICE)


def numpy(x: Any) -> np.ndarray:
    return np.asarray(x.cpu())


@triton.jit
def _draw(
    words, normals, normals_in_rows, signs, images, inverses,
    start: tl.int64, group: tl.int64, seed: tl.uint64, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    tl.store(words + i, kernel_draws.word(start + i, 2, group, seed))
    tl.store(normals + i, kernel_draws.normal(start + i, 2, group, seed))
    rows = tl.arange(0, N // 128) * 128
    place = rows[:, None] + tl.arange(0, 128)[None, :]
    tl.store(normals_in_rows + place, kernel_draws.normal_row(start + rows, 128, 4, group, seed))
    tl.store(signs + place, kernel_draws.sign_row(start + rows, 128, group, seed).to(tl.int8))
    keys = kernel_draws.feistel_keys(group, seed)
    tl.store(images + i, kernel_draws.feistel(start + i, keys, BITS, False))
    tl.store(inverses + i, kernel_draws.feistel(start + i, keys, BITS, True))


@pytest.mark.law("equal-seeds")
@kernels
@pytest.mark.parametrize(("seed", "group"), SEEDS)
@pytest.mark.parametrize("start", [0, 1 << 15, (1 << 35) + 128])
def test_draws_have_the_bits_of_the_format(seed: int, group: int, start: int) -> None:
    n = 1 << 14
    bits = max(15, start.bit_length())
    kinds = [torch.int32, torch.float32, torch.float32, torch.int8, torch.int64, torch.int64]
    found = [torch.zeros(n, dtype=kind, device=DEVICE) for kind in kinds]
    _draw[(1,)](*found, start, group, seed, N=n, BITS=bits, enable_fp_fusion=False)
    words, normals, normals_in_rows, signs, images, inverses = map(numpy, found)
    stop = start + n
    assert np.array_equal(words.view(np.uint32), rng.words(seed, group, 2, start, stop))
    assert np.array_equal(normals, rng.normals(seed, group, 2, start, stop))
    assert np.array_equal(normals_in_rows, rng.normals(seed, group, 4, start, stop))
    assert np.array_equal(1 - 2 * signs, rng.signs(seed, group, start, stop))
    assert np.array_equal(images, rng.permutation(1 << bits, seed, group, start, stop))
    assert np.array_equal(inverses, rng.permutation(1 << bits, seed, group, start, stop, inverse=True))


@triton.jit
def _normal_of(words, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, kernel_draws.normal_of(tl.load(words + i).to(tl.uint32, bitcast=True)))


@kernels
def test_normals_of_words_everywhere(rng: np.random.Generator) -> None:
    edges = [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
    # |q| = 0.425 divides centre and tails.
    for edge in (0.075, 0.925):
        edges += [int(edge * 2**32) + d for d in range(-3, 4)]
    # And the series of the logarithm changes its half-octave.
    edges += [int(2.0 ** (-k / 2) * 2**32) + d for k in range(7, 64) for d in (-1, 0, 1) if 2.0 ** (32 - k / 2) > 2]
    words = np.concatenate([edges, rng.integers(0, 1 << 32, (1 << 18) - len(edges))]).astype(np.uint32)
    found = torch.zeros(words.size, device=DEVICE)
    _normal_of[(64,)](torch.tensor(words.view(np.int32), device=DEVICE), found, N=1 << 12, enable_fp_fusion=False)
    assert np.array_equal(numpy(found), rng._normal_of(words))


@pytest.mark.law("kernels-agree")
@kernels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", range(17))
def test_fwht(bits: int, dtype: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 1 << bits))
    found = launcher.fwht(tensor(x, dtype), 1 << bits, 0.1, 1 << bits)
    assert found.dtype == getattr(torch, dtype)
    exact = tna.fwht(numpy(tensor(x, dtype)).astype(np.float64), normalize=False) * 0.1
    assert relative_error(numpy(found), exact) < TOLERANCE[dtype]


@kernels
@few
@given(st.integers(0, 11), st.integers(0, 5), st.data())
def test_fwht_padded_and_cut(bits: int, vectors: int, data: st.DataObject) -> None:
    length = 1 << bits
    n_in, n_out = (data.draw(st.integers(1, length)) for _ in range(2))
    x = np.random.default_rng(0).normal(size=(vectors, n_in))
    found = launcher.fwht(tensor(x), length, 1.0, n_out)
    expected = tna.fwht(np.pad(x, [(0, 0), (0, length - n_in)]), normalize=False)[:, :n_out]
    assert relative_error(numpy(found), expected) < TOLERANCE["float64"]


@kernels
def test_three_passes(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(launcher.TritonLauncher, "tile_bytes", 1 << 11)
    monkeypatch.setattr(passes, "_SHORT_TILE", 1 << 8)
    monkeypatch.setattr(passes, "_LEAST_STRIDED_BITS", 1)
    monkeypatch.setattr(passes, "_LEAST_WIDTH", 1 << 8)
    assert len(passes.passes(12, 8, 1 << 11)) == 3
    x = rng.normal(size=(2, 1 << 12))
    found = numpy(launcher.fwht(tensor(x), 1 << 12, 1.0, 1 << 12))
    assert relative_error(found, tna.fwht(x, normalize=False)) < TOLERANCE["float64"]
    f = tna.Projection("linear_v2", 300, 4000, seed=5)
    found = numpy(launcher.fastfood(tensor(x[:, :300]), drawn(f)))
    assert relative_error(found, f(x[:, :300])) < TOLERANCE["float64"]
    found = numpy(launcher.fastfood_adjoint(tensor(x[:, :4000]), drawn(f)))
    assert relative_error(found, f.adjoint(x[:, :4000])) < TOLERANCE["float64"]


@pytest.mark.law("walsh-not-finite")
@kernels
def test_non_finite_values_spread_only_within_their_vector(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 64))
    x[0, 3], x[1, 5] = np.nan, np.inf
    found = numpy(launcher.fwht(tensor(x), 64, 1.0, 64))
    assert np.isnan(found[0]).all()
    assert np.isinf(found[1]).all()
    assert relative_error(found[2], tna.fwht(x[2], normalize=False)) < TOLERANCE["float64"]


def drawn(f: tna.Projection) -> launcher.Drawn:
    period = 1 << (f.n_in - 1).bit_length()
    return launcher.Drawn(f.n_in, f.n_out, f.padded, period, f.seed, f.group, not f.kind.endswith("_v2"))


def tolerance_of_adjoint(f: tna.Projection, dtype: str = "float64") -> float:
    # A sum of r numbers of both signs is about the root of r less than their sizes: so much more of it is rounding.
    return TOLERANCE[dtype] * max(1.0, math.sqrt(f.padded / (1 << (f.n_in - 1).bit_length())) / 8)


LENGTHS = [(1, 1), (1, 2), (2, 3), (9, 1), (37, 509), (1, 2000), (64, 64), (40, 7), (1500, 4096), (3, 9000)]


@kernels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["linear", "linear_v2"])
@pytest.mark.parametrize(("n_in", "n_out"), LENGTHS)
def test_fastfood(kind: str, n_in: int, n_out: int, dtype: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, n_in, n_out, seed=2**64 - 59, group=3)
    x, y = rng.normal(size=(2, n_in)), rng.normal(size=(2, n_out))
    found = numpy(launcher.fastfood(tensor(x, dtype), drawn(f)))
    assert relative_error(found, f(x)) < TOLERANCE[dtype]
    found = numpy(launcher.fastfood_adjoint(tensor(y, dtype), drawn(f)))
    assert relative_error(found, f.adjoint(y)) < tolerance_of_adjoint(f, dtype)


@pytest.mark.law("kernels-agree")
@kernels
@few
@given(
    st.sampled_from(["linear", "linear_v2"]), st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1), st.integers(0, 3),
)  # fmt: skip
def test_fastfood_of_any_size(kind: str, n_in: int, n_out: int, seed: int, group: int, vectors: int) -> None:
    f = tna.Projection(kind, n_in, n_out, seed, group)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(vectors, n_in)), generator.normal(size=(vectors, n_out))
    assert relative_error(numpy(launcher.fastfood(tensor(x), drawn(f))), f(x)) < TOLERANCE["float64"]
    assert relative_error(numpy(launcher.fastfood_adjoint(tensor(y), drawn(f))), f.adjoint(y)) < tolerance_of_adjoint(f)


@kernels
def test_the_adjoint_gives_the_same_bits_at_every_run(rng: np.random.Generator) -> None:
    f = tna.Projection("linear", 5, 4000, seed=0)
    y = tensor(rng.normal(size=(1, 4000)), "float32")
    first, second = (launcher.fastfood_adjoint(y, drawn(f)) for _ in range(2))
    assert torch.equal(first, second)


@kernels
@few
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 3), st.booleans())
def test_shuffle(size: int, seed: int, vectors: int, inverse: bool) -> None:
    x = np.arange(float(vectors * size)).reshape(vectors, size)
    found = numpy(launcher.shuffle(tensor(x), seed, 7, inverse))
    assert np.array_equal(found, x[:, rng.permutation(size, seed, 7, inverse=inverse)])
